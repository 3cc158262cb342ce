"""Picture metrics against scipy and known values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import ndimage

from fluxkiln.bench import metrics
from fluxkiln.bench.shapes_scene import Background, Scene, Thing, draw

LOOKS = (("star", "red"), ("cross", "orange"))


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (96, 80, 3), dtype=np.uint8)
    b = np.clip(a + rng.normal(0, 25, a.shape), 0, 255).astype(np.uint8)
    return a, b


def test_psnr_of_known_errors() -> None:
    a = np.zeros((8, 8, 3), np.uint8)
    assert metrics.psnr(a, a) == math.inf
    assert metrics.psnr(a, a + 255) == pytest.approx(0)
    assert metrics.psnr(a, a + 1) == pytest.approx(20 * math.log10(255))


def test_psnr_within_a_mask() -> None:
    a, b = np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.uint8)
    mask = np.zeros((8, 8), bool)
    mask[2:4, :5] = True
    b[3, 4] = 10
    b[7] = 200  # outside
    assert metrics.psnr(a, b, mask) == pytest.approx(20 * math.log10(255 / 10) + 10 * math.log10(10))
    assert metrics.psnr(a, a, mask) == math.inf
    with pytest.raises(ValueError, match="pixels to compare"):
        metrics.psnr(a, b, np.zeros((8, 8), bool))


def maps(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """SSIM and its contrast and structure alone, by scipy's filter."""

    def blur(image: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(image, 1.5, truncate=3.4)[5:-5, 5:-5]  # 11 taps, as far as they fit

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    structure = (2 * cov + c2) / (vx + vy + c2)
    return (2 * mx * my + c1) / (mx**2 + my**2 + c1) * structure, structure


def luma(picture: np.ndarray) -> np.ndarray:
    return picture.astype(np.float64) @ [0.299, 0.587, 0.114] / 255


def test_ssim_against_scipy(pair: tuple[np.ndarray, np.ndarray]) -> None:
    assert metrics.ssim(*pair) == pytest.approx(maps(*map(luma, pair))[0].mean(), abs=1e-9)


@pytest.mark.parametrize(("tiles", "scales"), [((1, 1), 3), ((3, 4), 5)])
def test_ms_ssim_against_scipy(pair: tuple[np.ndarray, np.ndarray], tiles: tuple[int, int], scales: int) -> None:
    a, b = (np.tile(p, (*tiles, 1)) for p in pair)
    weights = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])[:scales]
    values, x, y = [], luma(a), luma(b)
    for _ in range(scales):
        whole, structure = (each.mean() for each in maps(x, y))
        values.append(structure)
        x, y = (p.reshape(p.shape[0] // 2, 2, p.shape[1] // 2, 2).mean((1, 3)) for p in (x, y))
    expected = np.prod(np.array([*values[:-1], whole]) ** (weights / weights.sum()))
    assert metrics.ms_ssim(a, b) == pytest.approx(expected, abs=1e-9)


def test_similarities_of_equal_pictures(pair: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = pair
    assert metrics.ssim(a, a) == pytest.approx(1)
    assert metrics.ms_ssim(a, a) == pytest.approx(1)
    assert 0 < metrics.ms_ssim(a, b) < 1


def test_flip_knows_its_ends(pair: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = pair
    assert metrics.flip(a, a) == 0
    assert metrics.flip(a, b) == pytest.approx(metrics.flip(b, a))
    assert 0 < metrics.flip(a, b) < 1
    green, blue = (np.broadcast_to(np.array(c, np.uint8), (32, 32, 3)) for c in ((0, 255, 0), (0, 0, 255)))
    assert metrics.flip(green, blue) == pytest.approx(1, abs=1e-6)  # by definition the largest difference


def test_flip_sees_less_from_afar(pair: tuple[np.ndarray, np.ndarray]) -> None:
    assert metrics.flip(*pair, per_degree=120) < metrics.flip(*pair, per_degree=30)


@pytest.mark.parametrize(("per_degree", "expected"), [(67.0, 0.1001867), (30.0, 0.0881512)])
def test_flip_as_nvidias_evaluator_has_it(per_degree: float, expected: float) -> None:
    """Expected from flip-evaluator 1.7, in fp32, for the same two pictures."""
    scenes = (Scene(Background("plain", "blue"), (Thing.of(*look, "large"),)) for look in LOOKS)
    a, b = (np.asarray(draw(scene, 96, 64)) for scene in scenes)
    assert metrics.flip(a, b, per_degree) == pytest.approx(expected, abs=2e-7)


@pytest.mark.parametrize(
    ("a", "b", "distance"), [("KILN", "KILN", 0), ("KILN", "KLN", 1), ("", "AB", 2), ("FOX", "BOX", 1)]
)
def test_edit_distance(a: str, b: str, distance: int) -> None:
    assert metrics.edit_distance(a, b) == distance


@pytest.mark.parametrize(
    ("k", "n", "low", "high"), [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0)]
)
def test_wilson_interval(k: int, n: int, low: float, high: float) -> None:
    assert metrics.wilson(k, n) == pytest.approx((low, high), abs=1e-3)
    assert metrics.wilson(0, 0) == (0, 1)


def test_sizes_must_agree() -> None:
    with pytest.raises(ValueError, match="of one size"):
        metrics.psnr(np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9, 3), np.uint8))


@pytest.mark.parametrize("similarity", [metrics.ssim, metrics.ms_ssim])
def test_the_window_must_fit(similarity: metrics.Metric) -> None:
    assert similarity(np.zeros((11, 40, 3)), np.zeros((11, 40, 3))) == pytest.approx(1)
    for side in (4, 6, 10):
        with pytest.raises(ValueError, match=r"SSIM needs at least 11 pixels a side, got \[\d+, 40, 3\]"):
            similarity(np.zeros((side, 40, 3)), np.zeros((side, 40, 3)))
