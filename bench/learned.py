"""Measures that need other people's packages and weights: used where the user has them.

lpips          the package `lpips`; torchvision fetches its backbone, once, where its cache does not have it
image_reward   ImageReward.pt and BERT's vocab.txt in a folder; the network is put together from transformers' BLIP
tesseract      the package `pytesseract` and the program it calls: reads words in pictures of any model
"""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fluxkiln.bench.metrics import Metric

LPIPS_NETS = ("alex", "vgg", "squeeze")


def _package(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"this measure needs the package {package}, which cannot be imported: {error}") from error


def lpips(net: str) -> Metric:
    """LPIPS 0.1 of two pictures `[H, W, 3]`, uint8; 0 for equal ones.

    Raises:
        ValueError: the package is not installed, or torchvision has no backbone and cannot fetch it.
    """
    package = _package("lpips", "lpips")
    try:
        model = package.LPIPS(net=net, verbose=False)
    except OSError as error:
        raise ValueError(f"LPIPS needs torchvision's weights of {net}, which cannot be fetched: {error}") from error

    def unit(picture: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1

    @torch.no_grad()
    def measure(a: np.ndarray, b: np.ndarray) -> float:
        return float(model(unit(a), unit(b)))

    return measure


# Of ImageReward: width and layers of its ViT and of its BERT, and words: BERT's and two more.
_VISION, _TEXT, _WORDS = (1024, 24), (768, 12), 30524
_SIDE = 224  # pixels
_RENAMED = (
    ("blip.visual_encoder.cls_token", "vision.embeddings.class_embedding"),
    ("blip.visual_encoder.pos_embed", "vision.embeddings.position_embedding"),
    ("blip.visual_encoder.patch_embed.proj", "vision.embeddings.patch_embedding"),
    ("blip.visual_encoder.norm", "vision.post_layernorm"),
    ("blip.visual_encoder.blocks", "vision.encoder.layers"),
    (".norm1", ".layer_norm1"),
    (".norm2", ".layer_norm2"),
    (".attn.qkv", ".self_attn.qkv"),
    (".attn.proj", ".self_attn.projection"),
    ("blip.text_encoder", "text"),
    ("mlp.layers", "head"),
)
# BLIP's projections, which no score goes through, and the numbers 0, 1, 2, ...
_UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")


class _ImageReward(nn.Module):
    """The network of Xu et al. 2023, as the package image-reward 1.5 has it: BLIP's ViT, its BERT, a linear head."""

    def __init__(self) -> None:
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        (seen, vision_layers), (width, layers) = _VISION, _TEXT
        vision = BlipVisionConfig(
            hidden_size=seen,
            intermediate_size=4 * seen,
            num_hidden_layers=vision_layers,
            num_attention_heads=seen // 64,
            image_size=_SIDE,
            layer_norm_eps=1e-6,
        )
        text = BlipTextConfig(
            vocab_size=_WORDS,
            hidden_size=width,
            encoder_hidden_size=seen,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
        )
        with torch.device("meta"):  # the weights are the file's
            self.vision = BlipVisionModel(vision)
            self.text = BlipTextModel(text, add_pooling_layer=False)
            # An identity stands where training drops out, so that the layers have the checkpoint's numbers.
            self.head = nn.Sequential(
                nn.Linear(width, 1024),
                nn.Identity(),
                nn.Linear(1024, 128),
                nn.Identity(),
                nn.Linear(128, 64),
                nn.Identity(),
                nn.Linear(64, 16),
                nn.Linear(16, 1),
            )

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Scores `[N, 1]` of pictures `[N, 3, 224, 224]` and prompts `[N, words]`; the mask is 0 at padding."""
        seen = self.vision(pixels).last_hidden_state
        # Positions are given because the model's own, which no file holds, are on the meta device.
        at = torch.arange(ids.shape[1])[None]
        read = self.text(ids, mask, position_ids=at, encoder_hidden_states=seen).last_hidden_state
        return (self.head(read[:, 0]) - 0.16717362830052426) / 1.0333394966054072


def _load(file: Path) -> _ImageReward:
    model = _ImageReward()
    try:
        state = {}
        for name, tensor in torch.load(file, map_location="cpu", weights_only=True).items():
            if not name.startswith(_UNUSED):
                for theirs, ours in _RENAMED:
                    name = name.replace(theirs, ours)
                state[name] = tensor
        model.load_state_dict(state, assign=True)
    except (AttributeError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{file} is not the checkpoint of ImageReward-v1.0 (the hub's THUDM/ImageReward)") from error
    return model.float().eval()


def _centre(picture: np.ndarray) -> Tensor:
    """`[1, 3, 224, 224]`, normalised as for CLIP: the middle of a picture `[H, W, 3]`, uint8, scaled to 224 pixels."""
    shortest = min(picture.shape[:2])
    width, height = (int(_SIDE * side / shortest) for side in (picture.shape[1], picture.shape[0]))
    left, top = round((width - _SIDE) / 2), round((height - _SIDE) / 2)
    image = Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image.crop((left, top, left + _SIDE, top + _SIDE)))) / 255
    mean, std = torch.tensor([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]])
    return ((pixels - mean) / std).permute(2, 0, 1)[None]


def image_reward(folder: Path) -> Callable[[str, np.ndarray], float]:
    """ImageReward-v1.0 of a prompt and its picture `[H, W, 3]`, uint8: about normal over pictures, more is better.

    Computed on the CPU, in fp32. Of a prompt, the first 33 tokens count.

    Args:
        folder: with `ImageReward.pt` of the hub's THUDM/ImageReward and `vocab.txt` of google-bert/bert-base-uncased.

    Raises:
        ValueError: a file is missing or another one.
    """
    from transformers import BertTokenizer

    for name, origin in (("ImageReward.pt", "THUDM/ImageReward"), ("vocab.txt", "google-bert/bert-base-uncased")):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}: expected a download of the hub's {origin}")
    words = (folder / "vocab.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "extra_special_tokens": ["[ENC]"]})
    if len(tokenizer) != _WORDS:
        raise ValueError(f"{folder / 'vocab.txt'} is not bert-base-uncased's: {len(words)} words, not {_WORDS - 2}")
    model = _load(folder / "ImageReward.pt")

    @torch.no_grad()
    def measure(prompt: str, picture: np.ndarray) -> float:
        read = tokenizer(prompt, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        return float(model(_centre(picture), read["input_ids"], read["attention_mask"]))

    return measure


def tesseract() -> Callable[[np.ndarray], str]:
    """The words in a picture `[H, W, 3]`, uint8, as Tesseract reads them, with single spaces between.

    Raises:
        ValueError: the package or the program is not installed.
    """
    package = _package("pytesseract", "pytesseract")
    try:
        package.get_tesseract_version()
    except package.TesseractNotFoundError:
        raise ValueError("the program tesseract is not installed") from None
    return lambda picture: " ".join(package.image_to_string(Image.fromarray(picture)).split())
