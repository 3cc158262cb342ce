"""Training the autoencoder: the pictures that it is shown, and the noise."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch
from shapes import autoencoder

from fluxkiln.bench.shapes_scene import Background, Scene, Thing

CPU = torch.device("cpu")


def test_a_crop_shows_the_thing_that_is_hard_to_draw() -> None:
    """Pixels that say where they are, and a plain square beside a small star, a striped one and an outlined one."""
    rng, places = Random(0), torch.stack(torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij"))
    square = Thing("square", "red", 0.155, 0.25, 0.25)
    hard = [("star", 0.115, "plain"), ("square", 0.21, "striped"), ("circle", 0.155, "outlined")]
    for shape, radius, style in hard * 20:
        x, y = rng.uniform(0.12, 0.88), rng.uniform(0.12, 0.88)
        scene = Scene(Background("plain", "blue"), (square, Thing(shape, "green", radius, x, y, style)))
        rows, columns = autoencoder._crop(rng, places, scene)
        assert rows.shape == (32, 32)
        assert rows[0, 0] <= 64 * y < rows[-1, 0] + 1
        assert columns[0, 0] <= 64 * x < columns[0, -1] + 1


def test_half_of_the_steps_are_crops_and_most_of_those_of_what_is_hard(monkeypatch: pytest.MonkeyPatch) -> None:
    cropped = []
    monkeypatch.setattr(autoencoder, "_crop", lambda rng, picture, scene: cropped.append(scene) or picture[:, :32, :32])
    rng = Random(0)
    crops = sum(autoencoder._pictures(rng).shape[-1] == 32 for _ in range(200))
    assert 80 < crops < 120
    hard = sum(any(map(autoencoder._fine, scene.things)) for scene in cropped)
    assert 0.6 < hard / len(cropped) < 0.9


def test_workers_of_the_autoencoder_draw_noise_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture, seen = torch.rand(2, 3, 32, 32), []
    monkeypatch.setattr(autoencoder, "_pictures", lambda rng: picture)
    monkeypatch.setattr(autoencoder, "average_gradients", lambda parameters: None)
    monkeypatch.setattr(autoencoder, "_reconstruction", lambda made, picture: seen.append(made) or made.mean())
    for rank in (0, 1, 1):
        autoencoder.train(rank, tmp_path / "made.pt", 1, 0, CPU, lambda **entry: None)
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], seen[2])
