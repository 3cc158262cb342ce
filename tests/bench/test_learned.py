"""Measures with other people's weights: called as their packages want, and a sentence where those are missing."""

from __future__ import annotations

import math
import string
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torch import Tensor

from fluxkiln.bench import learned
from fluxkiln.cli import main

RED, GREY = np.zeros((8, 12, 3), np.uint8), np.full((8, 12, 3), 51, np.uint8)
RED[..., 0] = 255

# ImageReward with two layers of each network, and a vocabulary of letters.
SEEN, WIDTH = 192, 128
LETTERS = string.ascii_lowercase
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *("##" + x for x in LETTERS), *"!',.:[]"]
VOCABULARY += ["red", "square", "left", "of"]
WORDS = len(VOCABULARY) + 2


@pytest.mark.parametrize(
    ("options", "package"),
    [(["--lpips", "alex"], "lpips"), (["--ocr", "tesseract"], "pytesseract")],
)
def test_a_missing_package_is_named(
    options: list[str], package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("lpips", "pytesseract"):
        monkeypatch.setitem(sys.modules, module, None)
    assert main(["bench", "image", "--limit", "1", *options]) == 1
    assert f"needs the package {package}, which cannot be imported" in capsys.readouterr().err


def test_lpips_is_given_pictures_from_minus_one_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Network:
        def __init__(self, net: str, verbose: bool) -> None:
            assert (net, verbose) == ("vgg", False)

        def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            assert a.shape == b.shape == (1, 3, 8, 12)
            return (a - b).square().mean(dim=(1, 2, 3), keepdim=True)

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=Network))
    measure = learned.lpips("vgg")
    assert measure(RED, RED) == 0
    assert measure(RED, GREY) == pytest.approx((1.6**2 + 2 * 0.4**2) / 3)


def test_a_backbone_that_cannot_be_fetched_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(net: str, verbose: bool) -> None:
        raise URLError("no network")

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=unreachable))
    with pytest.raises(ValueError, match=r"torchvision's weights of vgg, which cannot be fetched: .*no network"):
        learned.lpips("vgg")


def test_tesseract_reads_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    package = SimpleNamespace(
        get_tesseract_version=lambda: "5",
        TesseractNotFoundError=OSError,
        image_to_string=lambda picture: " OPEN\n DAILY \n",
    )
    monkeypatch.setitem(sys.modules, "pytesseract", package)
    assert learned.tesseract()(RED) == "OPEN DAILY"

    def missing() -> None:
        raise OSError

    package.get_tesseract_version = missing
    with pytest.raises(ValueError, match="program tesseract is not installed"):
        learned.tesseract()


def _random(name: str, size: int) -> np.ndarray:
    """64 random bits each, of a generator whose numbers NumPy promises to keep."""
    return np.random.PCG64(zlib.crc32(name.encode())).random_raw(size)


def _picture(name: str, height: int, width: int) -> np.ndarray:
    return (_random(name, height * width * 3) >> np.uint64(56)).astype(np.uint8).reshape(height, width, 3)


def _shapes() -> dict[str, tuple[int, ...]]:
    """The package's names: of tensors, or of layers, whose bias is as long as the weight."""
    vit, bert = "blip.visual_encoder", "blip.text_encoder"
    shapes: dict[str, tuple[int, ...]] = {
        f"{vit}.cls_token": (1, 1, SEEN),
        f"{vit}.pos_embed": (1, 197, SEEN),
        f"{vit}.patch_embed.proj": (SEEN, 3, 16, 16),
        f"{vit}.norm": (SEEN,),
        f"{bert}.embeddings.word_embeddings.weight": (WORDS, WIDTH),
        f"{bert}.embeddings.position_embeddings.weight": (512, WIDTH),
        f"{bert}.embeddings.LayerNorm": (WIDTH,),
        "blip.vision_proj": (256, SEEN),
        "blip.text_proj": (256, WIDTH),
        "mlp.layers.0": (1024, WIDTH),
        "mlp.layers.2": (128, 1024),
        "mlp.layers.4": (64, 128),
        "mlp.layers.6": (16, 64),
        "mlp.layers.7": (1, 16),
    }
    for layer in range(2):
        block, of = f"{vit}.blocks.{layer}", f"{bert}.encoder.layer.{layer}"
        shapes |= {f"{block}.norm1": (SEEN,), f"{block}.attn.qkv": (3 * SEEN, SEEN), f"{block}.attn.proj": (SEEN, SEEN)}
        shapes |= {
            f"{block}.norm2": (SEEN,),
            f"{block}.mlp.fc1": (4 * SEEN, SEEN),
            f"{block}.mlp.fc2": (SEEN, 4 * SEEN),
        }
        for name, source in (("attention", WIDTH), ("crossattention", SEEN)):
            shapes |= {f"{of}.{name}.self.query": (WIDTH, WIDTH)}
            shapes |= {f"{of}.{name}.self.{part}": (WIDTH, source) for part in ("key", "value")}
            shapes |= {f"{of}.{name}.output.dense": (WIDTH, WIDTH), f"{of}.{name}.output.LayerNorm": (WIDTH,)}
        shapes |= {f"{of}.intermediate.dense": (4 * WIDTH, WIDTH), f"{of}.output.dense": (WIDTH, 4 * WIDTH)}
        shapes |= {f"{of}.output.LayerNorm": (WIDTH,)}
    return shapes


def _checkpoint() -> dict[str, Tensor]:
    state = {"blip.text_encoder.embeddings.position_ids": torch.arange(512)[None]}
    for name, shape in _shapes().items():
        alone = name.endswith((".weight", "cls_token", "pos_embed"))
        parts = {name: shape} if alone else {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
        for part, size in parts.items():
            scale = len(size) == 1 and part.endswith("weight")
            values = (_random(part, math.prod(size)) / 2**63 - 1) / 8 + scale
            state[part] = torch.from_numpy(values).float().view(size)
    return state


@pytest.fixture
def reward_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in (("_VISION", (SEEN, 2)), ("_TEXT", (WIDTH, 2)), ("_WORDS", WORDS)):
        monkeypatch.setattr(learned, name, value)
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    torch.save(_checkpoint(), tmp_path / "ImageReward.pt")
    return tmp_path


# Made by the package's own network and `score`: image-reward 1.5 with timm 0.6.13, transformers 4.40.2, torchvision
# 0.16.0's transforms, torch 2.13.0 and Pillow 13.0.0 on a CPU. Its `create_vit` was given embed_dim, depth and heads of
# (192, 2, 3), its `MLP` 128 inputs, its med_config.json hidden_size 128, intermediate_size 512, two layers, two heads
# and the vocabulary above; each tensor of its state_dict was filled as `_checkpoint` does, by the tensor's name.
@pytest.mark.parametrize(
    ("prompt", "picture", "expected"),
    [
        ("a red square", _picture("square", 224, 224), 0.112623),
        ("A CAFÉ, left of the blue circle: it's [ENC] 3 [MASK] times 'déjà vu'!", _picture("wide", 50, 83), 0.398098),
        ("", _picture("tall", 301, 230), 0.202982),
        ("the quick brown fox jumps over the lazy dog " * 5, np.full((32, 32, 3), (123, 117, 104), np.uint8), 0.450820),
    ],
    ids=["square", "wide", "tall", "grey"],
)
def test_image_reward_is_the_packages(prompt: str, picture: np.ndarray, expected: float, reward_folder: Path) -> None:
    assert learned.image_reward(reward_folder)(prompt, picture) == pytest.approx(expected, abs=5e-6)


def test_image_reward_has_the_packages_size() -> None:
    # Of its 446 666 465 numbers, 512 are positions and 459 264 are of the two projections that no score goes through.
    assert sum(tensor.numel() for tensor in learned._ImageReward().parameters()) == 446_206_689


@pytest.mark.parametrize("name", ["ImageReward.pt", "vocab.txt"])
def test_image_reward_names_the_missing_file(name: str, reward_folder: Path) -> None:
    (reward_folder / name).unlink()
    with pytest.raises(ValueError, match=f"has no {name}: expected a download"):
        learned.image_reward(reward_folder)


def test_image_reward_wants_berts_vocabulary(reward_folder: Path) -> None:
    (reward_folder / "vocab.txt").write_text("\n".join(VOCABULARY[:-1]))
    with pytest.raises(ValueError, match=r"not bert-base-uncased's: 67 words, not 68"):
        learned.image_reward(reward_folder)


def test_image_reward_refuses_another_checkpoint(reward_folder: Path) -> None:
    file = reward_folder / "ImageReward.pt"
    state = torch.load(file)
    lacking = {name: tensor for name, tensor in state.items() if name != "mlp.layers.7.bias"}
    for other in (lacking, state | {"more": torch.ones(1)}, [1], {1: 2}):
        torch.save(other, file)
        with pytest.raises(ValueError, match=r"is not the checkpoint of ImageReward-v1\.0"):
            learned.image_reward(reward_folder)
    for content in (b"", b"no pickle"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"is not the checkpoint of ImageReward-v1\.0"):
            learned.image_reward(reward_folder)
