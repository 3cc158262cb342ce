"""Training: what a step is made of."""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from shapes import data, model, portions, rollouts, workers
from shapes.denoiser import velocity_loss

from fluxkiln.autoencoder import Autoencoder
from fluxkiln.hub import resolve

_EDITS = [portions.SHORT_EDITS, portions.LONG_EDITS]


@pytest.mark.parametrize(
    ("step", "rank", "drawn"),
    [
        (9, 0, [portions.PROMPTS, portions.OTHER_SIZES]),
        (10, 0, [portions.PROMPTS, *_EDITS]),
        (10, 1, [portions.OTHER_SIZES, *_EDITS]),
        (11, 0, [portions.OTHER_SIZES, *_EDITS]),
        (11, 1, [portions.PROMPTS, *_EDITS]),
        (20, 0, [portions.PROMPTS, *_EDITS]),
        (20, 1, [portions.OTHER_SIZES, *_EDITS]),
    ],
)
def test_a_step_draws_the_kinds_of_its_phase(step: int, rank: int, drawn: list) -> None:
    phase = portions.portions_of(step, rank, Namespace(edits_from=10, own_from=20))
    assert [portion.kinds for portion in phase] == drawn
    assert [portion.own for portion in phase] == [step == 20 and kinds != portions.OTHER_SIZES for kinds in drawn]


def test_kinds_have_their_shares_and_portions_as_many_tokens() -> None:
    for kinds in (portions.PROMPTS, portions.OTHER_SIZES, *_EDITS):
        assert sum(kinds.values()) == pytest.approx(1)
        for kind in kinds:
            width, height = kind.size
            each = (1 + kind.edit) * (width // 16) * (height // 16) + kind.text
            assert portions.TOKENS - each < kind.samples * each <= portions.TOKENS


def test_one_portion_in_six_is_padded_as_pipelines_pad() -> None:
    rng = Random(0)
    for kind in portions.SHARES:
        lengths = [portions.text_length(kind, rng) for _ in range(3000)]
        assert {*lengths} == {kind.text, model.vocabulary.MAX_LENGTH}
        if kind.text < 32:
            assert lengths.count(32) == pytest.approx(500, rel=0.2)


def test_as_many_rolls_are_kept_as_there_is_time_for() -> None:
    """A save begins them anew, so that a run that goes on has the same."""
    assert rollouts.KEPT * rollouts.EVERY == workers.SAVE_EVERY


def test_edits_in_other_tokenizers_words_are_kept() -> None:
    """To those of the bundled model "in this style" is eight tokens; a run may begin from it."""
    denoiser, rng = model.Denoiser(resolve("shapes")), Random(6)
    drawn = [data.training_sample(rng, edit=True).caption for _ in range(600)]
    assert max(map(denoiser.length, drawn)) > 20
    usual = [kind for kind in _kinds() if kind.size == portions.USUAL]
    assert all(sum(portions.has_tokens(denoiser, kind, caption) for kind in usual) == 1 for caption in drawn)


def test_short_and_long_edits_are_all_edits_as_they_come(
    tokenizers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each belongs to one of the two, and a portion of each is the mixture; so no text is cut or needs more padding."""
    denoiser, rng = model.Denoiser(tokenizers), Random(5)
    short, long = (next(kind for kind in kinds if kind.size == portions.USUAL) for kinds in _EDITS)
    other = portions.Kind(True, (48, 80), 32)
    drawn = [data.training_sample(rng, edit=True).caption for _ in range(1000)]
    among = {kind: [caption for caption in drawn if portions.has_tokens(denoiser, kind, caption)] for kind in _kinds()}
    assert sorted(among[short] + among[long]) == sorted(drawn)
    assert among[other] == drawn
    share = short.samples / (short.samples + long.samples)
    assert len(among[short]) / 1000 == pytest.approx(share, abs=0.06)
    monkeypatch.setattr(data, "CHUNK", 16)
    encoder = Autoencoder(model.AUTOENCODER)
    for kind in (short, long):
        pool = data.Pool(tmp_path, encoder, True, 64, 64, 0, partial(portions.has_tokens, denoiser, kind))
        pool.grow(1)
        captions = pool.batch(100, rng).captions
        assert len({*captions} - {""}) > 10
        assert all(ids.shape == (100, kind.text) for ids in denoiser.tokenize(captions, kind.text))
        assert all(portions.has_tokens(denoiser, kind, caption) for caption in captions if caption)


def _kinds() -> list[portions.Kind]:
    return [kind for kinds in _EDITS for kind in kinds]


def test_the_asked_share_of_times_lies_where_the_prompt_is_read() -> None:
    noise = torch.Generator().manual_seed(0)
    plain, early = (portions.times(20_000, noise, share) for share in (0.0, 0.65))
    assert all(t.min() > 0 and t.max() <= 1 for t in (plain, early))
    # The rest is drawn as ever, and reaches there too.
    usual = (plain > 0.8).float().mean().item()
    assert (early > 0.8).float().mean().item() == pytest.approx(0.65 + 0.35 * usual, abs=0.02)


def test_straight_places_lie_between_noise_and_picture(pools: dict[bool, data.Pool]) -> None:
    batch = pools[True].batch(50, Random(0))
    places = portions.straight(batch, 0.4, torch.Generator().manual_seed(0))
    t = places.t[:, None, None]
    torch.testing.assert_close(places.img - t * places.velocity, batch.target)
    noise = places.img + (1 - t) * places.velocity
    assert noise.std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("edit", [False, True])
def test_places_on_own_paths_are_where_eulers_steps_lead(
    pools: dict[bool, data.Pool], tokenizers: Path, edit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a velocity whose paths are known: each sample drifts as fast as its guidance says."""
    pool = pools[edit]

    def drift(predict: object, img: torch.Tensor, reference: torch.Tensor | None, size: tuple, *rest: torch.Tensor):
        assert size == (64, 64)
        assert (reference is not None) is edit
        *_, guidance = rest
        return guidance[:, None, None].expand_as(img)

    monkeypatch.setattr(rollouts, "velocity", drift)
    monkeypatch.setattr(rollouts, "STEPS", (9, 9))
    denoiser, paths, rng = model.Denoiser(tokenizers), rollouts.Rollouts(pool), Random(3)
    for _ in range(rollouts.KEPT + 2):
        paths.roll(denoiser, denoiser, rng)
    assert len(paths.rolls) == rollouts.KEPT
    batch, img, t = places = paths.batch(60, rng)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.58)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 9, 9).tolist())
    steps = scheduler.sigmas[1:-1]
    assert len(t.unique()) == 8
    assert all((steps - at).abs().min() < 1e-6 for at in t)
    # Noise has the mean 0 and the deviation 1; 1024 numbers of it have a mean within 0.15.
    torch.testing.assert_close(img.mean((1, 2)), batch.guidance * (t - 1), atol=0.15, rtol=0)
    torch.testing.assert_close(img.std((1, 2)), torch.ones(60), atol=0.1, rtol=0)
    for n, target in enumerate(batch.target):
        (i,) = [i for i in range(16) if torch.equal(pool.latents[0][i, 0].float(), target)]
        if edit:
            assert batch.captions[n] == pool.samples[i].caption
            assert batch.reference is not None
            assert torch.equal(batch.reference[n], pool.latents[0][i, 1].float())
    monkeypatch.setattr(paths, "batch", lambda n, rng: places)
    wanted = portions.on_own_paths(paths, 60, rng)
    torch.testing.assert_close(img - t[:, None, None] * wanted.velocity, batch.target)


@pytest.mark.parametrize("edit", [False, True])
def test_late_places_on_own_paths_count_by_the_picture(
    pools: dict[bool, data.Pool], edit: bool, tokenizers: Path
) -> None:
    """From a velocity of zero, one time's places at a time: below 0.4 the loss is the picture's error over 0.4."""
    batch = pools[edit].batch(3, Random(0))
    denoiser, noise = model.Denoiser(tokenizers), torch.Generator()

    def still(img: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(img)

    for at, counts_at in ((0.9, 0.9), (0.5, 0.5), (0.4, 0.4), (0.2, 0.4), (0.1, 0.4)):
        img, t = batch.target + torch.randn(batch.target.shape), torch.full((3,), at)
        paths = SimpleNamespace(batch=lambda n, rng, img=img, t=t: (batch, img, t))
        places = portions.on_own_paths(paths, 3, Random(0))
        error = (img - batch.target).square().mean().item()
        loss = velocity_loss(denoiser, still, places, 32, noise).item()
        assert loss == pytest.approx(error / counts_at**2, rel=1e-4)
        both = portions.joined(places, portions.straight(batch, 0.4, noise))
        assert both.weight.tolist() == [*places.weight.tolist(), 1, 1, 1]
        assert both.batch.captions == 2 * batch.captions
        assert torch.equal(both.img[:3], img)
