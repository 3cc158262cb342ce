"""Text encoding against transformers and diffusers, from folders and from single files of every kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from fluxkiln.checkpoint import CheckpointError
from fluxkiln.text import CACHED, ROOM, TextEncoders, place, stream

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PROMPTS = ["a red fox", "", "x", "fox " * 10_000, "naïve — ☃ 狐"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with tiny random encoders, and tokenizers whose vocabulary is the alphabet."""
    path = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    pieces = [*LETTERS, *(c + "</w>" for c in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    clip_tokenizer = CLIPTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=[], model_max_length=77)
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((c, -2.0) for c in LETTERS)]
    t5_tokenizer = T5Tokenizer(vocab=scores, extra_ids=0, model_max_length=512)
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(pieces), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=1,
            bos_token_id=len(pieces) - 2, eos_token_id=2, pad_token_id=1,
        )
    )  # fmt: skip
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(scores), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip
    for name, part in (
        ("text_encoder", clip), ("text_encoder_2", t5), ("tokenizer", clip_tokenizer), ("tokenizer_2", t5_tokenizer),
    ):  # fmt: skip
        part.save_pretrained(path / name)
    return path


@pytest.fixture(scope="module")
def peer(folder: Path) -> FluxPipeline:
    return FluxPipeline(
        None, None,
        CLIPTextModel.from_pretrained(folder / "text_encoder"), CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        T5EncoderModel.from_pretrained(folder / "text_encoder_2"), T5Tokenizer.from_pretrained(folder / "tokenizer_2"),
        None,
    )  # fmt: skip


def encoders(folder: Path, dtype: torch.dtype = torch.float32) -> TextEncoders:
    return TextEncoders.from_pretrained(folder, dtype=dtype)


def diffusers_embeddings(
    peer: FluxPipeline, prompt: str, prompt_2: str | None, length: int
) -> tuple[torch.Tensor, ...]:
    # It takes an empty second prompt for none at all.
    return peer.encode_prompt(prompt, prompt_2, device=torch.device("cpu"), max_sequence_length=length)[:2]


@pytest.mark.parametrize("length", [512, 64])
@pytest.mark.parametrize("prompt", PROMPTS, ids=["plain", "empty", "letter", "long", "unicode"])
@torch.no_grad()
def test_equals_diffusers(folder: Path, peer: FluxPipeline, prompt: str, length: int) -> None:
    ours = encoders(folder).encode(prompt, max_sequence_length=length)
    for got, want in zip(ours, diffusers_embeddings(peer, prompt, None, length), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("second", ["a bear", ""])
@torch.no_grad()
def test_the_second_prompt_goes_to_t5(folder: Path, peer: FluxPipeline, second: str) -> None:
    ours = encoders(folder).encode("a fox", second, 32)
    for got, want in zip(ours, diffusers_embeddings(peer, "a fox", second, 32), strict=True):
        assert torch.equal(got, want)


@torch.no_grad()
def test_bf16_equals_transformers_in_bf16(folder: Path) -> None:
    sequence, pooled = encoders(folder, torch.bfloat16).encode("a red fox", max_sequence_length=32)
    clip = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.bfloat16)
    t5 = T5EncoderModel.from_pretrained(folder / "text_encoder_2", dtype=torch.bfloat16)
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    clip_ids = CLIPTokenizer.from_pretrained(folder / "tokenizer")("a red fox", max_length=77, **options).input_ids
    t5_ids = T5Tokenizer.from_pretrained(folder / "tokenizer_2")("a red fox", max_length=32, **options).input_ids
    assert torch.equal(pooled, clip(clip_ids).pooler_output)
    assert torch.equal(sequence, t5(t5_ids).last_hidden_state)


def plain(state: dict, prefix: str) -> dict:
    return {prefix + name: tensor.half() for name, tensor in state.items()}


def fp8(state: dict, prefix: str) -> dict:
    return {prefix + name: tensor.to(torch.float8_e4m3fn) for name, tensor in state.items()}


def scaled_fp8(state: dict, prefix: str) -> dict:
    tensors = {prefix + "scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}
    for name, tensor in state.items():
        if tensor.ndim == 2 and "embed" not in name and "shared" not in name and "bias" not in name:
            scale = tensor.abs().amax() / 448
            tensors[prefix + name] = (tensor / scale).to(torch.float8_e4m3fn)
            tensors[prefix + name.removesuffix("weight") + "scale_weight"] = scale
        else:
            tensors[prefix + name] = tensor.half()
    return tensors


@pytest.mark.parametrize("write", [plain, fp8, scaled_fp8], ids=lambda write: write.__name__)
@pytest.mark.parametrize("prefix", ["", "text_model."], ids=["new names", "old names"])
@torch.no_grad()
def test_single_files_equal_their_dequantised_weights(
    folder: Path, tmp_path: Path, write: Callable[[dict, str], dict], prefix: str
) -> None:
    """ComfyUI's files hold no configuration: everything is read off shapes."""
    clip = CLIPTextModel.from_pretrained(folder / "text_encoder")
    t5 = T5EncoderModel.from_pretrained(folder / "text_encoder_2")
    for model, name, start in ((clip, "clip_l", prefix), (t5, "t5xxl", "")):
        state = {key: tensor.clone() for key, tensor in model.state_dict().items() if "embed_tokens" not in key}
        stored = write(state, start)
        save_file(stored, tmp_path / f"{name}.safetensors")
        for key in state:
            scale = stored.get(f"{start}{key.removesuffix('weight')}scale_weight", 1.0)
            state[key] = stored[start + key].float() * scale
        model.load_state_dict(state, strict=False)
    ours = TextEncoders.from_files(
        tmp_path / "clip_l.safetensors", tmp_path / "t5xxl.safetensors", folder, dtype=torch.float32
    )
    sequence, pooled = ours.encode("a red fox", max_sequence_length=16)
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    clip_ids = CLIPTokenizer.from_pretrained(folder / "tokenizer")("a red fox", max_length=77, **options).input_ids
    t5_ids = T5Tokenizer.from_pretrained(folder / "tokenizer_2")("a red fox", max_length=16, **options).input_ids
    torch.testing.assert_close(pooled, clip(clip_ids).pooler_output, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sequence, t5(t5_ids).last_hidden_state, rtol=1e-5, atol=1e-6)


def test_what_is_cut_is_said(folder: Path) -> None:
    text = encoders(folder)
    assert text.cut("a red fox") == []
    clip, t5 = text.cut("a" * 100 + " fox" * 300, max_sequence_length=300)
    assert clip.startswith("CLIP reads 77 tokens")
    assert t5.startswith("T5 reads 300 tokens")
    assert "fox" in clip
    assert "fox" in t5


@pytest.mark.parametrize("length", [0, -1, 513])
def test_lengths_that_cannot_be_are_refused(folder: Path, length: int) -> None:
    with pytest.raises(ValueError, match=f"max_sequence_length must be from 1 to 512, got {length}"):
        encoders(folder).encode("a", max_sequence_length=length)


def test_repeated_prompts_are_known_and_dropped_encoders_come_back(folder: Path) -> None:
    text = encoders(folder)
    first = text.encode("a fox", max_sequence_length=8)
    text.drop()
    assert text._clip.model is None
    assert text.encode("a fox", max_sequence_length=8)[0] is first[0]
    assert text._clip.model is None
    again = text.encode("a bear", max_sequence_length=8)
    text.drop()
    for i in range(CACHED):
        text.encode("b" * (i + 1), max_sequence_length=8)
    assert torch.equal(text.encode("a bear", max_sequence_length=8)[0], again[0])
    assert text.encode("a bear", max_sequence_length=8)[0] is not again[0]


@torch.no_grad()
def test_streamed_encoders_say_the_same_with_one_block_there_at_a_time(folder: Path) -> None:
    wanted, text = encoders(folder).encode("a red fox", max_sequence_length=32), encoders(folder)
    for encoder in (text._clip, text._t5):
        encoder.model = stream(encoder.load(), torch.device("cpu"))
        blocks = next(part for part in encoder.model.modules() if isinstance(part, torch.nn.ModuleList))
        assert len(blocks) == 2
        home = [[p.data_ptr() for p in block.parameters()] for block in blocks]

        def away(blocks: Any = blocks, home: list[list[int]] = home) -> list[set[bool]]:
            now = [[p.data_ptr() for p in block.parameters()] for block in blocks]
            return [{a != b for a, b in zip(*pair, strict=True)} for pair in zip(now, home, strict=True)]

        seen: list[list[set[bool]]] = []
        for block in blocks:
            block.register_forward_pre_hook(lambda *_, seen=seen, away=away: seen.append(away()))
        ids = encoder.tokens("a red fox", 32)
        found = encoder.run(ids)
        assert seen == [[{True}, {False}], [{False}, {True}]]
        assert away() == [{False}, {False}]
        assert torch.equal(found.last_hidden_state, encoder.load()(ids).last_hidden_state)
    for got, want in zip(text.encode("a red fox", max_sequence_length=32), wanted, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("short", [0, 1])
def test_encoders_are_streamed_where_a_gpu_has_no_room(
    folder: Path, monkeypatch: pytest.MonkeyPatch, short: int
) -> None:
    model, gpu, done = encoders(folder)._t5.load(), torch.device("cuda", 1), []
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (size + ROOM - 200 - short, 2**40))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)  # of which torch can give 200
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    monkeypatch.setattr(model, "to", lambda device: done.append(("there", device)))
    monkeypatch.setattr("fluxkiln.text.stream", lambda model, device: done.append(("streamed", device)))
    place(model, gpu)
    assert done == [("streamed" if short else "there", gpu)]


def test_a_whole_clip_model_is_read_for_its_text(folder: Path, tmp_path: Path) -> None:
    """As openai/clip-vit-large-patch14 has it: two towers, and the sizes of each inside the configuration."""
    part = CLIPTextModel.from_pretrained(folder / "text_encoder")
    seeing = CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    whole = CLIPModel(CLIPConfig(text_config=part.config.to_dict(), vision_config=seeing.to_dict(), projection_dim=8))
    whole.text_model.load_state_dict({name.removeprefix("text_model."): t for name, t in part.state_dict().items()})
    whole.save_pretrained(tmp_path)
    text = TextEncoders.from_files(tmp_path, folder, folder, dtype=torch.float32)
    for got, want in zip(text.encode("a red fox"), encoders(folder).encode("a red fox"), strict=True):
        assert torch.equal(got, want)


def test_missing_parts_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected the folder of a tokenizer"):
        TextEncoders.from_files(folder, folder, tmp_path)
    (tmp_path / "text_encoder").mkdir()
    config = json.loads((folder / "text_encoder" / "config.json").read_text()) | {"num_hidden_layers": 3}
    (tmp_path / "text_encoder" / "config.json").write_text(json.dumps(config))
    (tmp_path / "text_encoder" / "model.safetensors").write_bytes(
        (folder / "text_encoder" / "model.safetensors").read_bytes()
    )
    with pytest.raises(CheckpointError, match="16 tensors are missing"):
        TextEncoders.from_files(tmp_path, folder, folder).encode("a")
