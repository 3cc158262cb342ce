"""Measures that need other people's packages and weights: used where the user has them, never fetched by us.

lpips          the package `lpips`, with torchvision's backbone
image_reward   the package `image-reward` and the folder with ImageReward.pt and med_config.json
tesseract      the package `pytesseract` and the program it calls: reads words in pictures of any model
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

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
        ValueError: the package is not installed.
    """
    model = _package("lpips", "lpips").LPIPS(net=net, verbose=False)

    def unit(picture: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1

    @torch.no_grad()
    def measure(a: np.ndarray, b: np.ndarray) -> float:
        return float(model(unit(a), unit(b)))

    return measure


def image_reward(folder: Path) -> Callable[[str, np.ndarray], float]:
    """ImageReward of a prompt and its picture `[H, W, 3]`, uint8: about normal over people's choices, more is better.

    Args:
        folder: with `ImageReward.pt` and `med_config.json`.

    Raises:
        ValueError: the package is not installed, or a file is missing.
    """
    for name in ("ImageReward.pt", "med_config.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}: expected a download of the hub's THUDM/ImageReward")
    package = _package("ImageReward", "image-reward")
    model = package.load(str(folder / "ImageReward.pt"), download_root=str(folder))

    @torch.no_grad()
    def measure(prompt: str, picture: np.ndarray) -> float:
        return float(model.score(prompt, Image.fromarray(picture)))

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
