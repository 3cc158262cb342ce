"""Training: samples, their captions and latents."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch
from shapes import data, model

from fluxkiln.autoencoder import Autoencoder


@pytest.mark.parametrize("edit", [False, True])
def test_what_is_certain_leaves_nothing_open(pools: dict[bool, data.Pool], edit: bool) -> None:
    pool = pools[edit]
    batch = pool.batch(300, Random(0), certain=True)
    assert batch.guidance.min() >= 2
    for caption, target in zip(batch.captions, batch.target, strict=True):
        (i,) = [i for i in range(16) if torch.equal(pool.latents[0][i, 0].float(), target)]
        sample = pool.samples[i]
        if edit:
            assert caption == sample.caption
            continue
        scene = sample.scene
        said = [*scene.background.colors, *(thing.color for thing in scene.things)]
        said += [thing.size for thing in scene.things if scene.relation != "inside"]
        assert all(word in caption.lower() for word in said)
    assert "" in pool.batch(300, Random(0)).captions


def test_guidance_is_the_chance_that_an_edit_is_to_be_believed(pools: dict[bool, data.Pool]) -> None:
    """If it is not, or nothing is asked for, the picture stays as it was."""
    pool, stayed = pools[True], {True: list[bool](), False: list[bool]()}
    latents = pool.latents[0].float()
    batch = pool.batch(3000, Random(0))
    assert batch.reference is not None
    for caption, target, reference, guidance in zip(
        batch.captions, batch.target, batch.reference, batch.guidance, strict=True
    ):
        (i,) = (latents[:, 1] == reference).flatten(1).all(1).nonzero().flatten().tolist()
        assert caption in ("", pool.samples[i].caption)
        as_it_was = torch.equal(target, reference)
        if not caption:
            assert as_it_was
        elif guidance < 1:
            stayed[True].append(as_it_was)
        else:
            stayed[False].append(as_it_was and guidance >= 2)
            assert torch.equal(target, latents[i, 0]) or as_it_was
    assert not any(stayed[False])
    share = sum(stayed[True]) / len(stayed[True])  # the mean of (1 - guidance / 2) ** 2 up to 1 is 7 / 12
    assert share == pytest.approx(7 / 12, abs=0.1)
    assert batch.captions.count("") == pytest.approx(0.08 * 3000, rel=0.25)


def test_guidance_is_the_chance_that_a_prompt_is_to_be_believed(pools: dict[bool, data.Pool]) -> None:
    """If it is not, the prompt is another picture's."""
    pool, believed = pools[False], {True: list[bool](), False: list[bool]()}
    batch = pool.batch(3000, Random(0))
    for caption, target, guidance in zip(batch.captions, batch.target, batch.guidance, strict=True):
        (i,) = (pool.latents[0][:, 0].float() == target).flatten(1).all(1).nonzero().flatten().tolist()
        scene = pool.samples[i].scene
        shapes = {scene.word or "", *(thing.shape for thing in scene.things)} - {""}
        if caption and shapes and (guidance < 1 or guidance >= 2):
            believed[guidance.item() >= 2].append(all(shape.lower() in caption.lower() for shape in shapes))
    assert all(believed[True])
    assert sum(believed[False]) / len(believed[False]) < 0.75


def test_latents_stay_with_their_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that makes other scenes, or another encoder, finds none of the latents that were kept before."""
    monkeypatch.setattr(data, "CHUNK", 4)
    encoders = [Autoencoder(model.AUTOENCODER) for _ in range(2)]
    made = data.training_sample

    def grown(encoder: Autoencoder) -> data.Pool:
        pool = data.Pool(tmp_path, encoder, True, 32, 48, seed=0)
        pool.grow(2)
        for i, sample in enumerate(pool.samples):
            assert sample.before is not None
            with torch.no_grad():
                latents = model.pack(encoder.encode(data.pixels([sample.scene, sample.before], 32, 48)))
            torch.testing.assert_close(pool.latents[i // 4][i % 4].float(), latents, rtol=1e-2, atol=1e-2)
        return pool

    first = grown(encoders[0])
    with monkeypatch.context() as patch:
        patch.setattr(data.Pool, "_encode", None)  # nothing is encoded again
        assert grown(encoders[0]).samples == first.samples
    grown(encoders[1])
    monkeypatch.setattr(data, "training_sample", lambda rng, edit: (rng.random(), made(rng, edit))[1])
    assert grown(encoders[0]).samples != first.samples


def test_short_text_is_the_same_text_with_less_padding(tokenizers: Path) -> None:
    denoiser = model.Denoiser(tokenizers)
    texts = ["a small red star at the top left of a blue background", "a star", ""]
    for whole, short in zip(denoiser.tokenize(texts), denoiser.tokenize(texts, 16), strict=True):
        assert whole.shape == (3, 32)
        assert short.shape == (3, 16)
        assert torch.equal(whole[:, :16], short)
        assert (whole[:, 16:] == whole[2, -1]).all()
    assert all(ids.shape == (3, 32) for ids in denoiser.tokenize(texts, 8))  # one of them is longer
