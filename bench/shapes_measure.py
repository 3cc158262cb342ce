"""What a picture shows, measured from its pixels by geometry, without a network.

    background   the plain, striped or gradient hypothesis that explains the frame; the rest is what it leaves over
    things       connected pixels that are not background, split where two colours meet that are not stripes
    each thing   colour by majority, if that is near to one; shape, centre and radius by the best overlap among the
                 six outlines
    unexplained  pixels that none of this accounts for: what was found is laid out ideally, and each has to be a colour
                 or a mixture of two that lie there, give or take a pixel in 64
    word         the dots of each letter's cell against the letters' patterns

Nothing here draws a scene: outlines are filled by a rasteriser of its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from fluxkiln.bench.shapes_scene import (
    COLORS,
    FONT,
    LETTER_CELL,
    LETTER_DOT,
    OUTLINE_SCALE,
    SHAPES,
    STRIPES,
    THING_STRIPE,
    Background,
    outline,
)

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]

BORDER = 0.035  # width of the frame in which the background is recognised, over the shorter side
BACKGROUND_ERROR = 22.0  # mean RGB distance of the frame from its background, at most
NOT_BACKGROUND = 40.0  # RGB distance from which a pixel is something else; any two legible colours are 75 apart
PURE = 45.0  # RGB distance from a palette colour up to which a pixel is no mixture of two
SPECK = 0.004  # of the area: less than that is no thing, and more unexplained than that in all is a fault
_HOLE = 0.12  # of what is painted, from which a thing is outlined
_ASTRAY = 0.6  # of the way from background to ink: more than a letter's blur
STRIPE_SHARE = 0.1  # of a striped thing, by which its own colour may take more or less than it should
_FINE = 3  # points a pixel across and down, of which each lies in an outline or not
_ENOUGH = 128  # pixels of the shorter side; of more, nothing is seen that these do not show

_NAMES = list(COLORS)
_PALETTE = np.array([COLORS[name] for name in _NAMES], np.float32)
_RGB = dict(zip(_NAMES, _PALETTE, strict=True))


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


# -- masks ------------------------------------------------------------------------------------------------------------


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


def _within(corners: list[tuple[float, float]], height: int, width: int) -> Mask:
    """Which of the points `[3 H, 3 W]` lie within a polygon, by the even-odd rule."""
    xs, ys = (_points(n) for n in (width, height))
    inside = np.zeros((len(ys), len(xs)), bool)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        if y0 == y1:
            continue
        crosses = (ys < y0) != (ys < y1)
        at = x0 + (ys - y0) / (y1 - y0) * (x1 - x0)
        inside ^= crosses[:, None] & (xs[None, :] < at[:, None])
    return inside


def _points(n: int) -> NDArray[np.float64]:
    """Where the points of n pixels in a row lie, in pixels."""
    return (np.arange(_FINE * n) + 0.5) / _FINE


def _by_pixel(points: Mask) -> Mask:
    """The points of each pixel, `[H, 3, W, 3]`."""
    return points.reshape(points.shape[0] // _FINE, _FINE, -1, _FINE)


def coverage(corners: list[tuple[float, float]], height: int, width: int) -> NDArray[np.float32]:
    """Share of every pixel inside a polygon."""
    return _by_pixel(_within(corners, height, width)).mean((1, 3), dtype=np.float32)


def widened(mask: Mask, side: int) -> Mask:
    """A mask and all within a pixel of it; two from 97 pixels of the shorter side on, three from 161, and so on."""
    for _ in range(max(1, math.ceil(side / 64 - 0.5))):
        mask = dilate(mask)
    return mask


# -- background -------------------------------------------------------------------------------------------------------


@cache
def _hypotheses() -> tuple[Background, ...]:
    pairs = itertools.permutations(_NAMES, 2)
    return (
        *(Background("plain", c) for c in _NAMES),
        *(Background(k, *p) for p in pairs for k in ("striped", "gradient")),
    )


def _expected(background: Background, height: int, width: int) -> tuple[NDArray[np.float32], Mask]:
    """Colour of every pixel `[H, W, 3]`, and the columns `[W]` on a stripe's edge, where it is a mixture."""
    first, last = (_RGB[background.colors[i]] for i in (0, -1))
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
    expected = [_expected(background, height, width) for background in _hypotheses()]
    weights = [np.broadcast_to(~edge, (height, width))[frame] for _, edge in expected]
    return frame, np.stack([colors[frame] for colors, _ in expected]), np.stack(weights).astype(np.float32)


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
    distances = np.linalg.norm(pixels[:, :, None].astype(np.float32) - _PALETTE, axis=-1)
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


def _off_way(pixels: NDArray[np.float32], first: NDArray[np.float32], last: NDArray[np.float32]) -> NDArray[np.float32]:
    """RGB distance of pixels `[..., 3]` from the way between two colours, each `[3]` or of the pixels' shape."""
    way = last - first
    share = ((pixels - first) * way).sum(-1) / np.maximum((way * way).sum(-1), 1)
    return np.linalg.norm(pixels - first - np.clip(share, 0, 1)[..., None] * way, axis=-1)


def _stripes(labels: NDArray[np.int64], region: Mask, pure: Mask) -> tuple[int, int] | None:
    """(own colour, colour between) if the region is made of horizontal stripes with white or black between.

    Of white and black either may be the own one.
    """
    counts = np.bincount(labels[region & pure], minlength=len(_NAMES))
    pair = [int(value) for value in np.argsort(-counts)[:2]]
    pale = [value for value in pair if _NAMES[value] in ("white", "black")]
    if not pale or counts[pair[1]] < 0.1 * region.sum():
        return None
    shortest = max(2, round(min(region.shape) * THING_STRIPE / 2))  # a blurred rim is thinner
    runs: list[tuple[int, int]] = []  # (colour, rows) from top to bottom
    for y in np.flatnonzero(region.any(1)):
        row = np.bincount(labels[y][region[y]], minlength=len(_NAMES))[pair]
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
    ways = [_PALETTE[color] - colors for color in paint]
    shares = [((pixels - colors) * way).sum(-1) / np.maximum((way * way).sum(-1), 1) for way in ways]
    cover = np.where(rim, np.clip(np.max(shares, axis=0), 0, 1), whole).astype(np.float32)
    shape, x, y, radius, overlap = fit_shape(cover)
    return Found(shape, _NAMES[paint[0]], radius / min(height, width), x / width, y / height, style, overlap, whole)


def _measure_part(
    pixels: Pixels, part: Mask, region: Mask, labels: NDArray[np.int64], color: int, colors: NDArray[np.float32]
) -> Found:
    """`_measure` for one of several colours of a region: where it is enclosed by another, that is its background."""
    whole = fill(part)
    around = dilate(whole) & ~whole
    under = colors
    if (around & region).sum() > 0.8 * around.sum():
        behind = np.bincount(labels[dilate(around) & ~whole & region], minlength=len(_NAMES)).argmax()
        under = np.broadcast_to(_PALETTE[behind], colors.shape)
    hole = fill(part) & ~region  # what another thing of the region covers is none
    return _measure(pixels, part, (color,), under, "outlined" if hole.sum() > _HOLE * part.sum() else "plain")


def find_things(pixels: Pixels, background: Background) -> list[Found]:
    """Everything in front of the background that is large enough to be a thing, and of a colour."""
    height, width, _ = pixels.shape
    colors, edge = _expected(background, height, width)
    different = np.linalg.norm(pixels - colors, axis=-1) > NOT_BACKGROUND
    if edge.any():  # there, both stripes are the background, and what lies between
        ends = (_RGB[name] for name in background.colors)
        different[:, edge] = _off_way(pixels[:, edge].astype(np.float32), *ends) > NOT_BACKGROUND
    smallest = SPECK * height * width
    found: list[Found] = []
    for region in components(different):
        if region.sum() < smallest:
            break
        labels, pure, solid = _colors_in(pixels, region)
        if stripes := _stripes(labels, region, pure):
            thing = _measure(pixels, region, stripes, colors, "striped")
            if {_NAMES[value] for value in stripes} == {"white", "black"}:  # the own colour crosses the centre
                row = min(int(thing.y * height), height - 1)
                share = (labels[row] == stripes[0])[region[row]].mean()
                thing = replace(thing, color=_NAMES[stripes[0] if share >= 0.5 else stripes[1]])
            found.append(thing)
        elif len(solid) == 1 and (labels[region] == solid[0]).mean() >= 0.5:
            found.append(_measure(pixels, region, (solid[0],), colors))
        elif len(solid) > 1:  # things that touch, or one in front of another
            for value in solid:
                for part in components(region & (labels == value)):
                    if part.sum() >= smallest and erode(part).any():
                        found.append(_measure_part(pixels, part, region, labels, value, colors))
    return found


# -- what is left over ------------------------------------------------------------------------------------------------


def _paints(pixels: Pixels, background: Background, things: Iterable[Found]) -> list[tuple[Mask, NDArray[np.float32]]]:
    """What was found as it should look: for each paint where it may be seen `[H, W]`, and its colour `[H, W, 3]`.

    Of two things the smaller is in front.
    """
    height, width, _ = pixels.shape
    side, paints = min(height, width), list[tuple[Mask, NDArray[np.float32]]]()
    free = np.ones((_FINE * height, _FINE * width), bool)

    def add(points: Mask, color: NDArray[np.float32]) -> None:
        where = widened(_by_pixel(points).any((1, 3)), side)
        paints.append((where, np.broadcast_to(color, (height, width, 3))))

    for thing in sorted(things, key=lambda thing: thing.radius):
        x, y, radius = thing.x * width, thing.y * height, thing.radius * side
        seen = _within(outline(thing.shape, x, y, radius), height, width)
        if thing.style == "outlined":
            seen &= ~_within(outline(thing.shape, x, y, radius * OUTLINE_SCALE), height, width)
        seen &= free
        free &= ~seen
        if thing.style == "striped":
            between = _RGB["black" if thing.color == "white" else "white"]
            own = _own_stripes(pixels, _by_pixel(seen).all((1, 3)), y, _RGB[thing.color], between)[:, None]
            for _ in range(_FINE):  # a tip may end in a sliver of a stripe that no point lies in
                seen = dilate(seen)
            add(seen & own, _RGB[thing.color])
            add(seen & ~own, between)
        else:
            add(seen, _RGB[thing.color])
    if background.kind == "striped":
        odd = (_points(width) * STRIPES / width).astype(int) % 2 == 1
        for points, name in zip((free & ~odd, free & odd), background.colors, strict=True):
            add(points, _RGB[name])
    else:
        add(free, _expected(background, height, width)[0])
    return paints


def _own_stripes(pixels: Pixels, seen: Mask, y: float, own: NDArray[np.float32], between: NDArray[np.float32]) -> Mask:
    """Which rows of points `[3 H]` of a striped thing should have its own colour; all, if its stripes are too wide or
    too narrow.

    One such stripe is centred on the thing, as far as y says where that is: of the places within half a stripe, the
    one that fits best, and of equals the nearest.
    """
    step, ys = THING_STRIPE * min(seen.shape), _points(len(seen))
    way, n = own - between, seen.sum(1)
    share = np.clip(((pixels - between) * way).sum(-1) / (way * way).sum(), 0, 1)  # of the own colour, in each pixel
    lean = ((2 * share - 1) * seen).sum(1)

    def mine(shift: float) -> Mask:
        return np.floor((ys - y - shift) / step + 0.5) % 2 == 0

    def by_row(shift: float) -> NDArray[np.float64]:
        return mine(shift).reshape(-1, _FINE).mean(1)

    shifts = sorted(np.linspace(-0.45, 0.45, 13) * step, key=abs)
    best = max(shifts, key=lambda shift: float(lean @ by_row(shift)))
    off = abs(float((share * seen).sum() - n @ by_row(best))) / max(n.sum(), 1)
    return mine(best) if off <= STRIPE_SHARE else np.ones(len(ys), bool)


def unexplained(pixels: Pixels, background: Background, things: Iterable[Found]) -> NDArray[np.float32]:
    """RGB distance `[H, W]` of each pixel from what was found: from the colours that should be within a pixel of there
    (`widened`), and from mixtures of them."""
    paints, off = _paints(pixels, background, things), np.full(pixels.shape[:2], np.inf, np.float32)

    def hold(where: Mask, first: NDArray[np.float32], last: NDArray[np.float32]) -> None:
        off[where] = np.minimum(off[where], _off_way(pixels[where].astype(np.float32), first[where], last[where]))

    for i, (here, first) in enumerate(paints):
        hold(here, first, first)
        for j, (there, second) in enumerate(paints[:i]):
            if not (both := here & there).any():
                continue
            hold(both, first, second)
            for also, third in paints[:j]:  # where a stripe ends at a rim
                if (all_three := both & also).any():
                    for a, b, c in ((first, second, third), (second, third, first), (third, first, second)):
                        hold(all_three, a, (b + c) / 2)
    return off


# -- words ------------------------------------------------------------------------------------------------------------


@cache
def _glyphs() -> tuple[list[str], NDArray[np.float32]]:
    bits = [[[row >> (4 - c) & 1 for c in range(5)] for row in rows] for rows in FONT.values()]
    return list(FONT), np.array(bits, np.float32)


def read_word(pixels: Pixels, background: Background) -> tuple[str, str | None]:
    """The word in the middle and the colour it is written in; letters that are no letter read as "?"."""
    height, width, _ = pixels.shape
    side = min(height, width)
    ground = _RGB[background.color]
    distance = np.linalg.norm(pixels - ground, axis=-1)
    ink_pixels = distance > 60
    if not ink_pixels.any():
        return "", None
    # A dot that lies between pixels has few of its own colour: four in sixteen at 96 pixels a side.
    strong = pixels[distance >= np.quantile(distance[ink_pixels], 0.8)].astype(np.float32)
    votes = np.linalg.norm(strong[:, None] - _PALETTE, axis=-1).argmin(-1)
    color = int(np.bincount(votes, minlength=len(_NAMES)).argmax())
    way = _PALETTE[color] - ground
    ink = np.clip(((pixels - ground) * way).sum(-1) / max(float((way * way).sum()), 1.0), 0, 1)
    total = np.pad(ink.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    letters, glyphs = _glyphs()
    cell, dot = side * LETTER_CELL, side * LETTER_DOT
    best, best_cost = "?", math.inf
    for n, dx, dy in itertools.product(range(1, int(width / cell) + 1), (-1, 0, 1), (-1, 0, 1)):
        word, cost, seen = "", 0.0, 0.0
        for i in range(n):
            left = width / 2 - n * cell / 2 + (cell - 5 * dot) / 2 + i * cell + dx
            top = height / 2 - 3.5 * dot + dy
            dots = _dots(total, left, top, dot)
            errors = np.abs(glyphs - dots).mean((1, 2))
            k = int(errors.argmin())
            word += letters[k] if errors[k] < 0.17 else "?"
            cost += float(errors[k]) * 35
            seen += float(dots.sum())
        cost += max(0.0, float(ink.sum()) / dot**2 - seen)  # ink outside the letters
        if cost < best_cost - 1e-6:
            best, best_cost = word, cost
    return best, _NAMES[color]


def not_word(pixels: Pixels, background: Background, letters: int, color: str) -> float:
    """Share of the picture that is not as where a word of so many letters stands: neither background nor, in the
    word's place, on the way from it to the word's colour."""
    height, width, _ = pixels.shape
    side = min(height, width)
    ground = _expected(background, height, width)[0]
    half, tall = letters * side * LETTER_CELL / 2 + 1, 3.5 * side * LETTER_DOT + 1
    rows, columns = (np.abs(np.arange(n) + 0.5 - n / 2) for n in (height, width))
    place = np.ix_(rows <= tall, columns <= half)
    off = np.linalg.norm(pixels - ground, axis=-1)
    off[place] = _off_way(pixels[place].astype(np.float32), ground[place], _RGB[color])
    return float((off > NOT_BACKGROUND).mean())


def ink_astray(pixels: Pixels, background: Background, word: str, color: str) -> float:
    """Share of the picture that has ink where no dot of the word is, or none where one is, give or take a pixel."""
    height, width, _ = pixels.shape
    side, ground = min(height, width), _RGB[background.color]
    way = _RGB[color] - ground
    ink = np.clip(((pixels - ground) * way).sum(-1) / max(float((way * way).sum()), 1.0), 0, 1)
    glyphs = dict(zip(*_glyphs(), strict=True))
    dots = np.concatenate([glyphs.get(letter, np.zeros((7, 5), np.float32)) for letter in word], axis=1)
    cell, dot = side * LETTER_CELL, side * LETTER_DOT
    left = width / 2 - len(word) * cell / 2 + (cell - 5 * dot) / 2
    lefts = (left + cell * np.arange(len(word))[:, None] + dot * np.arange(5)).ravel()
    tops, least = height / 2 - 3.5 * dot + dot * np.arange(7), 1.0
    for dx, dy in itertools.product((-1, -0.5, 0, 0.5, 1), repeat=2):
        wanted = _spans(tops + dy, dot, height).T @ dots @ _spans(lefts + dx, dot, width)
        least = min(least, float((np.abs(wanted - ink) > _ASTRAY).mean()))
    return least


def _spans(starts: NDArray[np.floating], length: float, n: int) -> NDArray[np.floating]:
    """Share `[k, n]` of each of n pixels in a row that lies within each span of that length."""
    at = np.arange(n)
    return np.clip(np.minimum(starts[:, None] + length, at + 1) - np.maximum(starts[:, None], at), 0, 1)


def _dots(total: NDArray[np.floating], left: float, top: float, dot: float) -> NDArray[np.floating]:
    """Mean ink `[7, 5]` of each dot of a letter's cell, from the ink summed over everything left and above."""
    xs, ys = (np.rint(start + dot * np.arange(n + 1)).astype(int) for start, n in ((left, 5), (top, 7)))
    xs, ys = np.clip(xs, 0, total.shape[1] - 1), np.clip(ys, 0, total.shape[0] - 1)
    sums = np.diff(np.diff(total[np.ix_(ys, xs)], axis=0), axis=1)
    return sums / np.maximum(np.diff(ys)[:, None] * np.diff(xs), 1)
