"""The bundled model as it ships: small, whole, its tokenizers those of its text encoders, readable in every format."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from random import Random
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from shapes import captions
from transformers import AutoTokenizer

import fluxkiln
from fluxkiln import Pipeline, foreign, opening
from fluxkiln.autoencoder import load_autoencoder
from fluxkiln.bench import shapes_judge, suite
from fluxkiln.checkpoint import open_checkpoint
from fluxkiln.cli import main

FOLDER = Path(fluxkiln.__file__).parent / "models" / "shapes"
RESULTS = Path(__file__).parents[2] / "bench" / "results" / "image"
PROMPT = "a large red circle in the center of a blue background"


def test_fits_into_16_mib() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 16 * 2**20


# -- tokenizers ---------------------------------------------------------------------------------


def embedding(part: str) -> torch.Tensor:
    tensors = load_file(FOLDER / part / "model.safetensors")
    (name,) = {"text_model.embeddings.token_embedding.weight", "embeddings.token_embedding.weight", "shared.weight"} & (
        tensors.keys()
    )
    return tensors[name].float()


@pytest.fixture(scope="module", params=[("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")])
def encoder(request: pytest.FixtureRequest) -> tuple[object, torch.Tensor, dict]:
    """A tokenizer, the embedding `[tokens, width]` that its ids are looked up in, and the encoder's configuration."""
    tokenizer, part = request.param
    config = json.loads((FOLDER / part / "config.json").read_text())
    return AutoTokenizer.from_pretrained(FOLDER / tokenizer), embedding(part), config


def test_every_token_has_its_row(encoder) -> None:
    tokenizer, rows, config = encoder
    assert len(tokenizer) == config["vocab_size"] == len(rows)
    assert set(tokenizer.get_vocab().values()) == set(range(len(rows)))
    assert tokenizer.eos_token_id == config["eos_token_id"]
    assert tokenizer.pad_token_id == config["pad_token_id"]


def test_the_suites_words_are_whole_tokens_and_none_is_cut_off(encoder) -> None:
    tokenizer, _, _ = encoder
    for name in ("shapes", "shapes-turns", "shapes-negative"):
        for item in suite.load(name):
            ids = tokenizer(item.prompt).input_ids
            assert len(ids) <= tokenizer.model_max_length
            assert tokenizer.unk_token_id not in ids[:-1]
    words = Counter(word for item in suite.load("shapes") for word in re.findall(r"\b[a-z]+\b", item.prompt))
    for word in words.keys() - {"style", "this"}:  # younger than the tokenizers: these two are spelt
        pieces = tokenizer(word, add_special_tokens=False).input_ids
        assert len(pieces) == 1, word


def test_clips_grown_rows_are_those_of_the_captions_words() -> None:
    """A row that training never looks up stays as short as it was drawn, so the long ones say which ids the captions
    had in training: under a tokenizer of another order, frequent words would point at short rows."""
    tokenizer, norms = AutoTokenizer.from_pretrained(FOLDER / "tokenizer"), embedding("text_encoder").norm(dim=1)
    rng = Random(0)
    texts = ((captions.edit(rng) if i % 2 else captions.text_to_image(rng)).caption for i in range(1000))
    seen = Counter(token for text in texts for token in tokenizer(text).input_ids)
    often = [token for token, n in seen.items() if n >= 20]
    never = [token for token in range(len(norms)) if token not in seen]
    assert len(often) > 50

    def fit(norms: torch.Tensor) -> bool:
        return bool(norms[often].min() > 1.5 * norms[never].median())

    assert fit(norms)
    assert not fit(norms.roll(1))
    assert not fit(norms.roll(-1))


# -- file formats -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def native() -> dict[str, torch.Tensor]:
    """The transformer's tensors in the original release's names."""
    checkpoint = open_checkpoint(FOLDER)
    return {name: checkpoint.tensor(name) for name in checkpoint.names}


def picture(**files: Path) -> np.ndarray:
    """What a pipeline draws that takes some parts from single files."""
    parts = {**dict.fromkeys(("transformer", "vae", "clip", "t5"), FOLDER), **files}
    pipe = Pipeline.from_files(**parts, tokenizers=FOLDER, backend="eager", device="cpu")
    out = pipe(PROMPT, width=64, height=64, seed=1, num_inference_steps=2, progress=False)
    return np.asarray(out.images[0])


def fp8(tensor: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (tensor.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_single_files_draw_the_same_picture(native: dict[str, torch.Tensor], tmp_path: Path, prefix: str) -> None:
    whole, single = tmp_path / "flux1-shapes.safetensors", tmp_path / "ae.safetensors"
    save_file({prefix + name: tensor for name, tensor in native.items()}, whole)
    autoencoder = load_autoencoder(FOLDER, dtype=torch.bfloat16)
    save_file({name: tensor.contiguous() for name, tensor in autoencoder.state_dict().items()}, single)
    shutil.copy(FOLDER / "vae" / "config.json", tmp_path)  # its groups of channels are not FLUX.1's
    texts = {}  # as ComfyUI keeps them, with their configuration, since their heads are not FLUX.1's either
    for part, folder, name in (("clip", "text_encoder", "clip_l"), ("t5", "text_encoder_2", "t5xxl_fp16")):
        shutil.copytree(FOLDER / folder, tmp_path / folder)
        texts[part] = (tmp_path / folder / "model.safetensors").rename(tmp_path / folder / f"{name}.safetensors")
    np.testing.assert_array_equal(picture(transformer=whole, vae=single, **texts), picture())


@pytest.mark.parametrize("scaled", [False, True], ids=["fp8", "fp8_scaled"])
def test_fp8_files_draw_what_their_values_do(native: dict[str, torch.Tensor], tmp_path: Path, scaled: bool) -> None:
    stored, values = {}, {}
    for name, tensor in native.items():
        if not (name.startswith(("double_blocks", "single_blocks")) and tensor.ndim == 2):
            stored[f"model.diffusion_model.{name}"] = values[name] = tensor
            continue
        scale = tensor.float().abs().max() / 448 if scaled else torch.tensor(1.0)
        stored[f"model.diffusion_model.{name}"] = code = fp8(tensor, scale)
        if scaled:
            stored[f"model.diffusion_model.{name.removesuffix('.weight')}.scale_weight"] = scale
        values[name] = (code.float() * scale).to(torch.bfloat16)
    if scaled:
        stored["model.diffusion_model.scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
    save_file(stored, tmp_path / "fp8.safetensors")
    save_file(values, tmp_path / "values.safetensors")
    drawn = picture(transformer=tmp_path / "fp8.safetensors")
    np.testing.assert_array_equal(drawn, picture(transformer=tmp_path / "values.safetensors"))
    assert np.any(drawn != picture())


def test_the_encoders_name_their_tokenizers() -> None:
    for tokenizer, part in (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")):
        shipped = hashlib.sha256((FOLDER / tokenizer / "tokenizer.json").read_bytes()).hexdigest()
        assert json.loads((FOLDER / part / "config.json").read_text())["tokenizer_sha256"] == shipped


def test_it_draws_what_it_is_told() -> None:
    """A dozen held-out prompts for one thing: under wrong tokenizers or damaged weights hardly one is right."""
    pipe = Pipeline.from_pretrained("shapes", backend="eager", device="cpu")
    items = [item for item in suite.load("shapes") if item.category == "single"][:12]
    right = 0
    for item in items:
        out = pipe(item.prompt, seed=item.number, num_inference_steps=12, progress=False)
        assert item.scene is not None
        right += shapes_judge.judge(np.asarray(out.images[0]), item.scene).ok
    assert right >= 9


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda file: file.stem)
def test_published_results_are_of_these_weights(file: Path) -> None:
    results = json.loads(file.read_text())
    runs = results["rows"][:1] if "rows" in results else [results] if "record" in results else results.values()
    wanted = {name: opening.part(name, FOLDER, "shapes").identity for name in get_args(foreign.Part)}
    for run in runs:
        parts = run["record"]["parts"]
        assert {part["name"]: part["identity"] for part in parts if part["name"] != "tokenizers"} == wanted


@pytest.mark.long  # makes 120 pictures
def test_it_can_do_all_that_its_card_says(tmp_path: Path) -> None:
    """Ten held-out items of each category: half of the wrong ones that the bounds allow would be bad luck."""
    options = ["--backend", "eager", "--device", "cpu", "--limit", "10", "--out", str(tmp_path)]
    assert main(["bench", "image", *options]) == 0
    right = {
        name: entry["right"] for name, entry in json.loads((tmp_path / "results.json").read_text())["summary"].items()
    }
    assert min(right[name] for name in ("single", "pair", "count")) >= 8
    assert right["word"] >= 6
    assert min(right[name] for name in captions.EDITS) >= 6
    assert right["edits"] >= 0.9 * 80


@pytest.mark.long  # makes 140 pictures
def test_guidance_negative_prompts_and_turns_do_what_its_card_says(tmp_path: Path) -> None:
    command = ["bench", "image", "--backend", "eager", "--device", "cpu", "--out", str(tmp_path)]

    def summary(*options: str, of: str = "") -> dict:
        assert main([*command, *options]) == 0
        return json.loads((tmp_path / of / "results.json").read_text())["summary"]

    followed = {guidance: summary("--limit", "2", "--guidance", guidance)["all"] for guidance in ("0", "3.5")}
    assert followed["0"]["right"] <= 0.1 * followed["0"]["n"]  # the prompt is not to be believed
    assert followed["3.5"]["right"] >= 0.8 * followed["3.5"]["n"]
    negative = ("--suite", "shapes-negative", "--limit", "24", "--true-cfg-scale")
    without = {scale: summary(*negative, scale)["negative"]["checks"].get("without", 1.0) for scale in ("1", "4")}
    assert without["4"] >= 0.9
    assert without["4"] > without["1"]
    turns = summary("--suite", "shapes-turns", "--limit", "8")
    assert turns["turn 5"]["checks"].get("identity", 1.0) >= 6 / 8
