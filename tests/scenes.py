"""Scenes as pictures, and what is not in them."""

from __future__ import annotations

import numpy as np

from fluxkiln.bench.shapes_scene import COLORS, Scene, draw


def drawn(scene: Scene, width: int = 64, height: int = 64) -> np.ndarray:
    return np.asarray(draw(scene, width, height))


def unused(scene: Scene) -> list[str]:
    """Colors that neither the background nor a thing has."""
    return [c for c in COLORS if c not in scene.background.colors and all(c not in t.colors for t in scene.things)]
