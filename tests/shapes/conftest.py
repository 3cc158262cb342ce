"""What is trained on, made small."""

from __future__ import annotations

from pathlib import Path

import pytest
from shapes import data, model

from fluxkiln.autoencoder import Autoencoder


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "tokenizers"
    model.save_tokenizers(folder)
    return folder


@pytest.fixture
def pools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[bool, data.Pool]:
    """Of prompts and of edits, each of 16 samples."""
    monkeypatch.setattr(data, "CHUNK", 16)
    encoder = Autoencoder(model.AUTOENCODER)
    made = {edit: data.Pool(tmp_path / "latents", encoder, edit, 64, 64, seed=0) for edit in (False, True)}
    for pool in made.values():
        pool.grow(1)
    return made
