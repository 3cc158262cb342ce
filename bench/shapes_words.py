"""Words in a picture, read by the dots of each letter's cell, and what is where no dot of them should be."""

from __future__ import annotations

import itertools
import math
from functools import cache

import numpy as np
from numpy.typing import NDArray

from fluxkiln.bench.shapes_masks import Pixels
from fluxkiln.bench.shapes_measure import NAMES, NOT_BACKGROUND, PALETTE, RGB, expected, off_way
from fluxkiln.bench.shapes_scene import FONT, LETTER_CELL, LETTER_DOT, Background

_ASTRAY = 0.6  # of the way from background to ink: more than a letter's blur


@cache
def _glyphs() -> tuple[list[str], NDArray[np.float32]]:
    bits = [[[row >> (4 - c) & 1 for c in range(5)] for row in rows] for rows in FONT.values()]
    return list(FONT), np.array(bits, np.float32)


def read_word(pixels: Pixels, background: Background) -> tuple[str, str | None]:
    """The word in the middle and the colour it is written in; letters that are no letter read as "?"."""
    height, width, _ = pixels.shape
    side = min(height, width)
    ground = RGB[background.color]
    distance = np.linalg.norm(pixels - ground, axis=-1)
    ink_pixels = distance > 60
    if not ink_pixels.any():
        return "", None
    # A dot that lies between pixels has few of its own colour: four in sixteen at 96 pixels a side.
    strong = pixels[distance >= np.quantile(distance[ink_pixels], 0.8)].astype(np.float32)
    votes = np.linalg.norm(strong[:, None] - PALETTE, axis=-1).argmin(-1)
    color = int(np.bincount(votes, minlength=len(NAMES)).argmax())
    way = PALETTE[color] - ground
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
    return best, NAMES[color]


def not_word(pixels: Pixels, background: Background, letters: int, color: str) -> float:
    """Share of the picture that is not as where a word of so many letters stands: neither background nor, in the
    word's place, on the way from it to the word's colour."""
    height, width, _ = pixels.shape
    side = min(height, width)
    ground = expected(background, height, width)[0]
    half, tall = letters * side * LETTER_CELL / 2 + 1, 3.5 * side * LETTER_DOT + 1
    rows, columns = (np.abs(np.arange(n) + 0.5 - n / 2) for n in (height, width))
    place = np.ix_(rows <= tall, columns <= half)
    off = np.linalg.norm(pixels - ground, axis=-1)
    off[place] = off_way(pixels[place].astype(np.float32), ground[place], RGB[color])
    return float((off > NOT_BACKGROUND).mean())


def ink_astray(pixels: Pixels, background: Background, word: str, color: str) -> float:
    """Share of the picture that has ink where no dot of the word is, or none where one is, give or take a pixel."""
    height, width, _ = pixels.shape
    side, ground = min(height, width), RGB[background.color]
    way = RGB[color] - ground
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
