"""What training writes is a diffusers folder: diffusers, transformers and fluxkiln read the same model from it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from shapes import autoencoder as training
from shapes import data, model, muon, vocabulary
from torch import nn

from fluxkiln import Pipeline
from fluxkiln.autoencoder import Autoencoder

PROMPT = "A small red circle to the left of a large blue square."


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with random weights, open gates and all."""
    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    model.save_tokenizers(folder)
    denoiser = model.Denoiser(folder)
    with torch.no_grad():
        for p in denoiser.tensors.values():
            p.add_(0.03 * torch.randn_like(p))
    model.save_pipeline(folder, denoiser.eval(), Autoencoder(model.AUTOENCODER))
    return folder


def test_tokenizers_know_the_words_and_survive_others(folder: Path) -> None:
    from transformers import AutoTokenizer, CLIPTokenizerFast, T5TokenizerFast

    clip = CLIPTokenizerFast.from_pretrained(folder / "tokenizer")
    t5 = T5TokenizerFast.from_pretrained(folder / "tokenizer_2")
    assert clip.model_max_length == t5.model_max_length == vocabulary.MAX_LENGTH
    words = len(PROMPT.split())
    assert len(clip(PROMPT).input_ids) == words + 3  # start, full stop, end
    assert len(t5(PROMPT).input_ids) == words + 2
    assert t5.convert_ids_to_tokens(t5('"KILN"').input_ids)[2:6] == list("KILN")
    odd = "Zwölf Boxkämpfer, 拳 \x00 <|endoftext|> é?!"
    for tokenizer in (clip, t5, AutoTokenizer.from_pretrained(folder / "tokenizer")):
        assert tokenizer("").input_ids
        assert tokenizer.decode(tokenizer(odd, truncation=True).input_ids)


def test_diffusers_computes_the_same_velocity(folder: Path) -> None:
    theirs = FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    prompt_embeds, pooled, txt_ids = theirs.encode_prompt(PROMPT, PROMPT, max_sequence_length=32)
    torch.manual_seed(1)
    img, t, g = torch.randn(1, 12, 64), torch.tensor([0.7]), torch.tensor([3.5])
    ids = model.position_ids(3, 4)
    with torch.no_grad():
        expected = theirs.transformer(
            hidden_states=img,
            encoder_hidden_states=prompt_embeds,
            pooled_projections=pooled,
            timestep=t,
            guidance=g,
            img_ids=ids,
            txt_ids=txt_ids,
            return_dict=False,
        )[0]
    ours = Pipeline.from_pretrained(folder, precision="fp32", backend="eager")
    embeddings, our_pooled = ours.text.encode(PROMPT)
    torch.testing.assert_close(embeddings, prompt_embeds, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        velocity = ours.transformer(img, embeddings, our_pooled, t, g, ids, txt_ids)
    assert expected.abs().mean() > 0.01
    torch.testing.assert_close(velocity, expected, rtol=1e-4, atol=1e-5)


def test_pipeline_generates_and_edits(folder: Path) -> None:
    pipe = Pipeline.from_pretrained(folder, precision="fp32", backend="eager")
    first = pipe(PROMPT, seed=1, num_inference_steps=2).images[0]
    assert first.size == (model.PICTURE, model.PICTURE)
    edited = pipe("make the circle green", image=first, seed=1, num_inference_steps=2).images[0]
    other = pipe("make the circle green", image=Image.new("RGB", first.size), seed=1, num_inference_steps=2).images[0]
    assert np.any(np.asarray(edited) != np.asarray(other))  # the reference matters


def test_whitening_changes_latents_not_what_the_decoder_sees() -> None:
    torch.manual_seed(0)
    autoencoder, rng = Autoencoder(model.AUTOENCODER).eval(), Random(5)
    batch = data.pixels([data.training_sample(rng, False).scene for _ in range(64)], 64, 64)

    def seen() -> tuple[torch.Tensor, torch.Tensor]:
        latents = autoencoder.encode(batch)
        config = model.AUTOENCODER
        return latents, autoencoder.decoder.conv_in(latents / config.scaling_factor + config.shift_factor)

    with torch.no_grad():
        _, before = seen()
        training.whiten(autoencoder, Random(6), pictures=128)
        latents, after = seen()
    assert latents.mean((0, 2, 3)).abs().max() < 0.3
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.3
    inside = (..., slice(1, -1), slice(1, -1))  # padding stands for another value now
    torch.testing.assert_close(after[inside], before[inside], rtol=1e-3, atol=1e-3)


def test_muon_makes_updates_orthogonal_and_learns() -> None:
    torch.manual_seed(0)
    for shape in ((16, 40), (40, 16)):
        singular = torch.linalg.svdvals(muon.orthogonalize(torch.randn(shape)))
        assert singular.min() > 0.6
        assert singular.max() < 1.3
    net = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 1))
    x = torch.randn(256, 8)
    y = x[:, :1] * x[:, 1:2]
    optimizer = muon.Muon([net[0].weight], [net[0].bias, *net[2].parameters()], lr=0.02)
    losses = []
    for _ in range(300):
        loss = nn.functional.mse_loss(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
