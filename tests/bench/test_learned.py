"""Measures with other people's weights: called as their packages want, and a sentence where those are missing."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fluxkiln.bench import learned
from fluxkiln.cli import main

RED, GREY = np.zeros((8, 12, 3), np.uint8), np.full((8, 12, 3), 51, np.uint8)
RED[..., 0] = 255


@pytest.mark.parametrize(
    ("options", "package"),
    [
        (["--lpips", "alex"], "lpips"),
        (["--ocr", "tesseract"], "pytesseract"),
        (["--image-reward", "."], "image-reward"),
    ],
)
def test_a_missing_package_is_named(
    options: list[str],
    package: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for module in ("lpips", "ImageReward", "pytesseract"):
        monkeypatch.setitem(sys.modules, module, None)
    for name in ("ImageReward.pt", "med_config.json"):
        (tmp_path / name).touch()
    options = [str(tmp_path) if option == "." else option for option in options]
    assert main(["bench", "image", "--limit", "1", *options]) == 1
    assert f"needs the package {package}, which cannot be imported" in capsys.readouterr().err


def test_image_reward_names_the_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no ImageReward\.pt: expected a download"):
        learned.image_reward(tmp_path)


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


def test_image_reward_is_given_prompt_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ImageReward.pt", "med_config.json"):
        (tmp_path / name).touch()

    def load(name: str, download_root: str) -> Any:
        assert (Path(name), Path(download_root)) == (tmp_path / "ImageReward.pt", tmp_path)
        return SimpleNamespace(score=score)

    def score(prompt: str, picture: Image.Image) -> float:
        assert picture.size == (12, 8)
        return len(prompt) / 2

    monkeypatch.setitem(sys.modules, "ImageReward", SimpleNamespace(load=load))
    assert learned.image_reward(tmp_path)("four", RED) == 2.0


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
