"""What a picture shows, measured from its pixels by geometry, without a network.

    background   the plain, striped or gradient hypothesis that explains the frame; the rest is what it leaves over
    things       connected pixels that are not background, split where two colours meet that are not stripes
    each thing   colour by majority, if that is near to one; shape, centre and radius by the best overlap among the
                 six outlines

What none of this accounts for is in `shapes_layout.py`, words are in `shapes_words.py`. Nothing here draws a scene.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from fluxkiln.bench.shapes_masks import Mask, Pixels, components, coverage, dilate, erode, fill
from fluxkiln.bench.shapes_scene import (
    COLORS,
    SHAPES,
    STRIPES,
    THING_STRIPE,
    Background,
    outline,
)

BORDER = 0.035  # width of the frame in which the background is recognised, over the shorter side
BACKGROUND_ERROR = 22.0  # mean RGB distance of the frame from its background, at most
NOT_BACKGROUND = 40.0  # RGB distance from which a pixel is something else; any two legible colours are 75 apart
PURE = 45.0  # RGB distance from a palette colour up to which a pixel is no mixture of two
SPECK = 0.004  # of the area: less than that is no thing, and more unexplained than that in all is a fault
_HOLE = 0.12  # of what is painted, from which a thing is outlined
_ENOUGH = 128  # pixels of the shorter side; of twice as many, only the mean of each square is seen

NAMES = list(COLORS)
PALETTE = np.array([COLORS[name] for name in NAMES], np.float32)
RGB = dict(zip(NAMES, PALETTE, strict=True))


@dataclass(frozen=True)
class Found:
    """One thing as measured; the units are those of `Thing`."""

    shape: str
    color: str
    radius: float
    x: float
    y: float
    style: str
    overlap: float
    mask: Mask = field(repr=False, compare=False)


def reduced(pixels: Pixels) -> Pixels:
    """A picture of at least twice as many pixels a side as it takes, made smaller: each square by its mean.

    What is measured takes time by the pixel, and regions by their length as well: at FLUX.1's own size, half a minute.
    """
    factor = min(pixels.shape[:2]) // _ENOUGH
    if factor < 2:
        return pixels
    height, width = (n // factor for n in pixels.shape[:2])
    squares = pixels[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
    return np.rint(squares.mean((1, 3), dtype=np.float32)).astype(np.uint8)


# -- background -------------------------------------------------------------------------------------------------------


@cache
def _hypotheses() -> tuple[Background, ...]:
    pairs = itertools.permutations(NAMES, 2)
    return (
        *(Background("plain", c) for c in NAMES),
        *(Background(k, *p) for p in pairs for k in ("striped", "gradient")),
    )


def expected(background: Background, height: int, width: int) -> tuple[NDArray[np.float32], Mask]:
    """Colour of every pixel `[H, W, 3]`, and the columns `[W]` on a stripe's edge, where it is a mixture."""
    first, last = (RGB[background.colors[i]] for i in (0, -1))
    if background.kind == "gradient":
        weight = ((np.arange(height) + 0.5) / height)[:, None, None]
        return np.broadcast_to((1 - weight) * first + weight * last, (height, width, 3)), np.zeros(width, bool)
    if background.kind == "plain":
        return np.broadcast_to(first, (height, width, 3)), np.zeros(width, bool)
    place = (np.arange(width) + 0.5) * STRIPES / width
    columns = np.where((place.astype(int) % 2 == 0)[:, None], first, last)
    edge = np.abs(place - np.rint(place)) * width / STRIPES < 1.01
    edge &= (np.rint(place) > 0) & (np.rint(place) < STRIPES)
    return np.broadcast_to(columns, (height, width, 3)), edge


@cache
def _frames(height: int, width: int) -> tuple[Mask, NDArray[np.float32], NDArray[np.float32]]:
    """The frame `[H, W]`, and for each hypothesis the colours of its n pixels `[120, n, 3]` and weights `[120, n]`."""
    margin = max(2, round(BORDER * min(height, width)))
    frame = np.ones((height, width), bool)
    frame[margin:-margin, margin:-margin] = False
    every = [expected(background, height, width) for background in _hypotheses()]
    weights = [np.broadcast_to(~edge, (height, width))[frame] for _, edge in every]
    return frame, np.stack([colors[frame] for colors, _ in every]), np.stack(weights).astype(np.float32)


def find_background(pixels: Pixels) -> Background | None:
    """The background that explains the picture's frame, None when none does."""
    frame, colors, weights = _frames(*pixels.shape[:2])
    distances = np.linalg.norm(pixels[frame].astype(np.float32) - colors, axis=-1)
    distances = np.minimum(distances, 120.0)  # a thing that reaches into the frame counts, but not fully
    seen = weights.sum(1)  # none, where a picture is so narrow that all of it is stripes' edges
    errors = np.where(seen > 0, (distances * weights).sum(1) / np.maximum(seen, 1), np.inf)
    best = int(errors.argmin())
    return _hypotheses()[best] if errors[best] <= BACKGROUND_ERROR else None


# -- things -----------------------------------------------------------------------------------------------------------


@cache
def _unit(shape: str) -> tuple[float, float, float]:
    """Area and centroid of a shape of radius 1 around the origin."""
    corners = outline(shape, 0.0, 0.0, 1.0)
    area = cx = cy = 0.0
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        cross = x0 * y1 - x1 * y0
        area += cross / 2
        cx += (x0 + x1) * cross / 6
        cy += (y0 + y1) * cross / 6
    return abs(area), cx / area, cy / area


def fit_shape(cover: NDArray[np.float32]) -> tuple[str, float, float, float, float]:
    """Best shape of a region given as coverage `[H, W]` in 0..1: name, x, y, radius (pixels), overlap 0..1."""
    area = float(cover.sum())
    if area < 1:
        return SHAPES[0], 0.0, 0.0, 1.0, 0.0
    rows, columns = np.flatnonzero(cover.any(1)), np.flatnonzero(cover.any(0))
    margin = max(2, (len(rows) + len(columns)) // 4)  # an ideal outline that reaches further has lost anyway
    top, left = max(int(rows[0]) - margin, 0), max(int(columns[0]) - margin, 0)
    cover = cover[top : int(rows[-1]) + margin, left : int(columns[-1]) + margin]
    height, width = cover.shape
    x = float((cover.sum(0) * (np.arange(width) + 0.5)).sum() / area)
    y = float((cover.sum(1) * (np.arange(height) + 0.5)).sum() / area)
    best = (SHAPES[0], x, y, 1.0, -1.0)
    for shape in SHAPES:
        unit_area, cx, cy = _unit(shape)
        radius = math.sqrt(area / unit_area)
        at = (x - cx * radius, y - cy * radius)
        ideal = coverage(outline(shape, *at, radius), height, width)
        overlap = float(np.minimum(ideal, cover).sum() / np.maximum(ideal, cover).sum())
        if overlap > best[-1]:
            best = (shape, at[0] + left, at[1] + top, radius, overlap)
    return best


def _colors_in(pixels: Pixels, region: Mask) -> tuple[NDArray[np.int64], Mask, list[int]]:
    """Nearest palette entry of every pixel, where it is near, and which are more than the blur between two others."""
    distances = np.linalg.norm(pixels[:, :, None].astype(np.float32) - PALETTE, axis=-1)
    labels, pure = distances.argmin(-1), distances.min(-1) < PURE
    area = region.sum()
    solid = []
    for value in np.unique(labels[region]):
        part = region & (labels == value)
        inside = erode(part)
        if (
            part.sum() >= 0.03 * area
            and (inside.any() or area < 60)
            and np.median(distances[..., value][inside if inside.any() else part]) < NOT_BACKGROUND
        ):
            solid.append(int(value))
    return labels, pure, solid


def off_way(pixels: NDArray[np.float32], first: NDArray[np.float32], last: NDArray[np.float32]) -> NDArray[np.float32]:
    """RGB distance of pixels `[..., 3]` from the way between two colours, each `[3]` or of the pixels' shape."""
    way = last - first
    share = ((pixels - first) * way).sum(-1) / np.maximum((way * way).sum(-1), 1)
    return np.linalg.norm(pixels - first - np.clip(share, 0, 1)[..., None] * way, axis=-1)


def _stripes(labels: NDArray[np.int64], region: Mask, pure: Mask) -> tuple[int, int] | None:
    """(own colour, colour between) if the region is made of horizontal stripes with white or black between.

    Of white and black either may be the own one.
    """
    counts = np.bincount(labels[region & pure], minlength=len(NAMES))
    pair = [int(value) for value in np.argsort(-counts)[:2]]
    pale = [value for value in pair if NAMES[value] in ("white", "black")]
    if not pale or counts[pair[1]] < 0.1 * region.sum():
        return None
    shortest = max(2, round(min(region.shape) * THING_STRIPE / 2))  # a blurred rim is thinner
    runs: list[tuple[int, int]] = []  # (colour, rows) from top to bottom
    for y in np.flatnonzero(region.any(1)):
        row = np.bincount(labels[y][region[y]], minlength=len(NAMES))[pair]
        if row.max() >= 0.7 * row.sum() and row.sum() >= 0.5 * region[y].sum():
            winner = int(row.argmax())
            runs[-1:] = [(winner, runs[-1][1] + 1)] if runs and runs[-1][0] == winner else [*runs[-1:], (winner, 1)]
    bands = [winner for winner, length in runs if length >= shortest]
    if sum(a != b for a, b in itertools.pairwise(bands)) < 2:
        return None
    if len(pale) == 1:
        return next(value for value in pair if value not in pale), pale[0]
    return pair[0], pair[1]


def _measure(
    pixels: Pixels, region: Mask, paint: tuple[int, ...], colors: NDArray[np.float32], style: str | None = None
) -> Found:
    """Shape, place and size of a region painted in one colour, or in two when striped, before `colors`."""
    height, width = region.shape
    whole = fill(region)
    if style is None:
        style = "outlined" if whole.sum() > (1 + _HOLE) * region.sum() else "plain"
    # Soften the rim by how far each pixel is on the way from the background to the paint.
    rim = dilate(region) & ~erode(region) & dilate(~whole)
    ways = [PALETTE[color] - colors for color in paint]
    shares = [((pixels - colors) * way).sum(-1) / np.maximum((way * way).sum(-1), 1) for way in ways]
    cover = np.where(rim, np.clip(np.max(shares, axis=0), 0, 1), whole).astype(np.float32)
    shape, x, y, radius, overlap = fit_shape(cover)
    return Found(shape, NAMES[paint[0]], radius / min(height, width), x / width, y / height, style, overlap, whole)


def _measure_part(
    pixels: Pixels, part: Mask, region: Mask, labels: NDArray[np.int64], color: int, colors: NDArray[np.float32]
) -> Found:
    """`_measure` for one of several colours of a region: where it is enclosed by another, that is its background."""
    whole = fill(part)
    around = dilate(whole) & ~whole
    under = colors
    if (around & region).sum() > 0.8 * around.sum():
        behind = np.bincount(labels[dilate(around) & ~whole & region], minlength=len(NAMES)).argmax()
        under = np.broadcast_to(PALETTE[behind], colors.shape)
    hole = fill(part) & ~region  # what another thing of the region covers is none
    return _measure(pixels, part, (color,), under, "outlined" if hole.sum() > _HOLE * part.sum() else "plain")


def find_things(pixels: Pixels, background: Background) -> list[Found]:
    """Everything in front of the background that is large enough to be a thing, and of a colour."""
    height, width, _ = pixels.shape
    colors, edge = expected(background, height, width)
    different = np.linalg.norm(pixels - colors, axis=-1) > NOT_BACKGROUND
    if edge.any():  # there, both stripes are the background, and what lies between
        ends = (RGB[name] for name in background.colors)
        different[:, edge] = off_way(pixels[:, edge].astype(np.float32), *ends) > NOT_BACKGROUND
    smallest = SPECK * height * width
    found: list[Found] = []
    for region in components(different):
        if region.sum() < smallest:
            break
        labels, pure, solid = _colors_in(pixels, region)
        if stripes := _stripes(labels, region, pure):
            thing = _measure(pixels, region, stripes, colors, "striped")
            if {NAMES[value] for value in stripes} == {"white", "black"}:  # the own colour crosses the centre
                row = min(int(thing.y * height), height - 1)
                share = (labels[row] == stripes[0])[region[row]].mean()
                thing = replace(thing, color=NAMES[stripes[0] if share >= 0.5 else stripes[1]])
            found.append(thing)
        elif len(solid) == 1 and (labels[region] == solid[0]).mean() >= 0.5:
            found.append(_measure(pixels, region, (solid[0],), colors))
        elif len(solid) > 1:  # things that touch, or one in front of another
            for value in solid:
                for part in components(region & (labels == value)):
                    if part.sum() >= smallest and erode(part).any():
                        found.append(_measure_part(pixels, part, region, labels, value, colors))
    return found
