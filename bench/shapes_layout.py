"""What was found in a picture, laid out as it should look, and how far each pixel is from that.

Each has to be one of the colours that should be there, give or take a pixel in 64, or a mixture of two or of three.
Outlines are filled by the rasteriser that measures them, not by the one that draws scenes.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from fluxkiln.bench.shapes_masks import FINE, Mask, Pixels, by_pixel, dilate, points_of, widened, within
from fluxkiln.bench.shapes_measure import RGB, Found, expected, off_way
from fluxkiln.bench.shapes_scene import OUTLINE_SCALE, STRIPES, THING_STRIPE, Background, outline

STRIPE_SHARE = 0.1  # of a striped thing, by which its own colour may take more or less than it should


def _paints(pixels: Pixels, background: Background, things: Iterable[Found]) -> list[tuple[Mask, NDArray[np.float32]]]:
    """What was found as it should look: for each paint where it may be seen `[H, W]`, and its colour `[H, W, 3]`.

    Of two things the smaller is in front.
    """
    height, width, _ = pixels.shape
    side, paints = min(height, width), list[tuple[Mask, NDArray[np.float32]]]()
    free = np.ones((FINE * height, FINE * width), bool)

    def add(points: Mask, color: NDArray[np.float32]) -> None:
        where = widened(by_pixel(points).any((1, 3)), side)
        paints.append((where, np.broadcast_to(color, (height, width, 3))))

    for thing in sorted(things, key=lambda thing: thing.radius):
        x, y, radius = thing.x * width, thing.y * height, thing.radius * side
        seen = within(outline(thing.shape, x, y, radius), height, width)
        if thing.style == "outlined":
            seen &= ~within(outline(thing.shape, x, y, radius * OUTLINE_SCALE), height, width)
        seen &= free
        free &= ~seen
        if thing.style == "striped":
            between = RGB["black" if thing.color == "white" else "white"]
            own = _own_stripes(pixels, by_pixel(seen).all((1, 3)), y, RGB[thing.color], between)[:, None]
            for _ in range(FINE):  # a tip may end in a sliver of a stripe that no point lies in
                seen = dilate(seen)
            add(seen & own, RGB[thing.color])
            add(seen & ~own, between)
        else:
            add(seen, RGB[thing.color])
    if background.kind == "striped":
        odd = (points_of(width) * STRIPES / width).astype(int) % 2 == 1
        for points, name in zip((free & ~odd, free & odd), background.colors, strict=True):
            add(points, RGB[name])
    else:
        add(free, expected(background, height, width)[0])
    return paints


def _own_stripes(pixels: Pixels, seen: Mask, y: float, own: NDArray[np.float32], between: NDArray[np.float32]) -> Mask:
    """Which rows of points `[3 H]` of a striped thing should have its own colour; all, if its stripes are too wide or
    too narrow.

    One such stripe is centred on the thing, as far as y says where that is: of the places within half a stripe, the
    one that fits best.
    """
    step, ys = THING_STRIPE * min(seen.shape), points_of(len(seen))
    way, n = own - between, seen.sum(1)
    share = np.clip(((pixels - between) * way).sum(-1) / (way * way).sum(), 0, 1)  # of the own colour, in each pixel
    lean = ((2 * share - 1) * seen).sum(1)

    def mine(shift: float) -> Mask:
        return np.floor((ys - y - shift) / step + 0.5) % 2 == 0

    def by_row(shift: float) -> NDArray[np.float64]:
        return mine(shift).reshape(-1, FINE).mean(1)

    best = max(np.linspace(-0.45, 0.45, 13) * step, key=lambda shift: float(lean @ by_row(shift)))
    off = abs(float((share * seen).sum() - n @ by_row(best))) / max(n.sum(), 1)
    return mine(best) if off <= STRIPE_SHARE else np.ones(len(ys), bool)


def unexplained(pixels: Pixels, background: Background, things: Iterable[Found]) -> NDArray[np.float32]:
    """RGB distance `[H, W]` of each pixel from what was found: from the colours that should be within a pixel of there
    (`widened`), and from mixtures of them."""
    paints, off = _paints(pixels, background, things), np.full(pixels.shape[:2], np.inf, np.float32)

    def hold(where: Mask, first: NDArray[np.float32], last: NDArray[np.float32]) -> None:
        off[where] = np.minimum(off[where], off_way(pixels[where].astype(np.float32), first[where], last[where]))

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
