"""`fluxkiln export` writes what onnxruntime opens, and nothing half."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch

from fluxkiln.checkpoint import save_checkpoint
from fluxkiln.cli import main
from fluxkiln.kernels.recipe import RECIPES
from fluxkiln.transformer import Transformer

from parity import SMALL, layers_of, random_tensors, relative


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, random_tensors(SMALL).items())
    return path


@torch.no_grad()
def test_onnxruntime_opens_the_file(checkpoint: Path, tmp_path: Path) -> None:
    assert main(["export", "--model", str(checkpoint), "--precision", "fp32", "-o", str(tmp_path / "onnx")]) == 0
    onnx.checker.check_model(str(tmp_path / "onnx" / "model.onnx"), full_check=True)
    model = Transformer(SMALL, layers_of(SMALL, RECIPES["fp32"], torch.float32))
    x = {
        "hidden_states": torch.randn(1, 6, 16),
        "encoder_hidden_states": torch.randn(1, 3, 48),
        "modulation": model.modulate(torch.randn(1, 24), torch.tensor([0.5]), torch.tensor([3.5])),
        "img_ids": torch.rand(6, 3).round(),
        "txt_ids": torch.zeros(3, 3),
    }
    want = model.step(*list(x.values())[:3], model.rope(x["txt_ids"], x["img_ids"]))
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {name: value.numpy() for name, value in x.items()})
    assert relative(torch.from_numpy(got), want) < 5e-6


def test_a_folder_that_exists_is_kept(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--model", str(checkpoint), "-o", str(tmp_path)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert checkpoint.exists()


def test_a_damaged_weight_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    data = bytearray(checkpoint.read_bytes())
    checkpoint.write_bytes(data[:-100])
    assert main(["export", "--model", str(checkpoint), "-o", str(tmp_path / "onnx")]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors"]
