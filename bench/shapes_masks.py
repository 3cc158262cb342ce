"""Masks of pixels: regions, holes, rims, and which of the points of a pixel lie within an outline."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]

FINE = 3  # points a pixel across and down, of which each lies in an outline or not


def components(mask: Mask) -> list[Mask]:
    """Connected regions (4 neighbours), largest first."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:  # spread the largest label of each region until nothing changes
        grown = labels.copy()
        grown[1:] = np.maximum(grown[1:], labels[:-1])
        grown[:-1] = np.maximum(grown[:-1], labels[1:])
        grown[:, 1:] = np.maximum(grown[:, 1:], labels[:, :-1])
        grown[:, :-1] = np.maximum(grown[:, :-1], labels[:, 1:])
        grown[~mask] = 0
        if (grown == labels).all():
            break
        labels = grown
    regions = [labels == value for value in np.unique(labels) if value]
    return sorted(regions, key=lambda region: -int(region.sum()))


def _shifted(mask: Mask, fill: bool) -> NDArray[np.bool_]:
    """The nine 3 x 3 neighbours of every pixel, `[9, H, W]`."""
    padded = np.pad(mask, 1, constant_values=fill)
    h, w = mask.shape
    return np.stack([padded[i : i + h, j : j + w] for i in range(3) for j in range(3)])


def erode(mask: Mask) -> Mask:
    return _shifted(mask, False).all(0)


def dilate(mask: Mask) -> Mask:
    return _shifted(mask, False).any(0)


def fill(mask: Mask) -> Mask:
    """The mask with its holes: what cannot be reached from outside without crossing it."""
    outside = np.pad(~mask, 1, constant_values=True)
    frame = np.zeros_like(outside)
    frame[0] = frame[-1] = frame[:, 0] = frame[:, -1] = True
    reached = frame
    while True:
        grown = reached.copy()
        grown[1:] |= reached[:-1]
        grown[:-1] |= reached[1:]
        grown[:, 1:] |= reached[:, :-1]
        grown[:, :-1] |= reached[:, 1:]
        grown &= outside
        if (grown == reached).all():
            return ~reached[1:-1, 1:-1]
        reached = grown


def within(corners: list[tuple[float, float]], height: int, width: int) -> Mask:
    """Which of the points `[3 H, 3 W]` lie within a polygon, by the even-odd rule."""
    xs, ys = (points_of(n) for n in (width, height))
    inside = np.zeros((len(ys), len(xs)), bool)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        if y0 == y1:
            continue
        crosses = (ys < y0) != (ys < y1)
        at = x0 + (ys - y0) / (y1 - y0) * (x1 - x0)
        inside ^= crosses[:, None] & (xs[None, :] < at[:, None])
    return inside


def points_of(n: int) -> NDArray[np.float64]:
    """Where the points of n pixels in a row lie, in pixels."""
    return (np.arange(FINE * n) + 0.5) / FINE


def by_pixel(points: Mask) -> Mask:
    """The points of each pixel, `[H, 3, W, 3]`."""
    return points.reshape(points.shape[0] // FINE, FINE, -1, FINE)


def coverage(corners: list[tuple[float, float]], height: int, width: int) -> NDArray[np.float32]:
    """Share of every pixel inside a polygon."""
    return by_pixel(within(corners, height, width)).mean((1, 3), dtype=np.float32)


def widened(mask: Mask, side: int) -> Mask:
    """A mask and all within a pixel of it; two from 97 pixels of the shorter side on, three from 161, and so on."""
    for _ in range(max(1, math.ceil(side / 64 - 0.5))):
        mask = dilate(mask)
    return mask
