"""Does a picture show the scene that was asked for? Says for each attribute whether what is measured is right."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fluxkiln.bench import metrics
from fluxkiln.bench.shapes_layout import unexplained
from fluxkiln.bench.shapes_masks import Mask, Pixels, coverage, widened
from fluxkiln.bench.shapes_measure import NOT_BACKGROUND, SPECK, Found, find_background, find_things, reduced
from fluxkiln.bench.shapes_scene import OUTLINE_SCALE, Background, Scene, Thing, outline
from fluxkiln.bench.shapes_words import ink_astray, not_word, read_word

SHAPE_OVERLAP = 0.80  # intersection over union with the ideal outline, at least
BLEMISH = 0.06  # of a thing's area that is unexplained, on it or beside it, at most
RADIUS_RATIO = 1.16  # halfway (in logarithms) to the next size
PLACE = 0.09  # of the sides: less than halfway to the next of the nine cells
UNCHANGED_PSNR = 30.0  # dB, of what an edit should have left alone
MARGIN = 1 / 32  # of the shorter side, between a change and what should be as it was


@dataclass(frozen=True)
class Verdict:
    """What was right. `checks` has an entry for each attribute that the scene asks for.

    `unchanged_psnr` (dB) is of an edit's pixels that should be as they were: infinite if they are, None if there are
    none or nothing was edited.
    """

    checks: dict[str, bool]
    background: Background | None
    things: tuple[Found, ...]
    word: str | None = None
    unchanged_psnr: float | None = None

    @property
    def ok(self) -> bool:
        return all(self.checks.values())


def _looks(found: Found, thing: Thing) -> dict[str, bool]:
    return {
        "shape": found.shape == thing.shape and found.overlap >= SHAPE_OVERLAP,
        "color": found.color == thing.color,
        "size": abs(math.log(found.radius / thing.radius)) <= math.log(RADIUS_RATIO),
        "style": found.style == thing.style,
    }


def _near(found: Found, thing: Thing) -> bool:
    return abs(found.x - thing.x) <= PLACE and abs(found.y - thing.y) <= PLACE


def _related(relation: str, a: Found, b: Found) -> bool:
    dx, dy = b.x - a.x, b.y - a.y
    if relation == "inside":
        return bool((a.mask & ~b.mask).sum() <= 0.05 * a.mask.sum() and a.mask.sum() < b.mask.sum())
    across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[relation]
    return across[0] > 0.2 and abs(across[1]) < 0.15


def _pair_up(found: list[Found], scene: Scene) -> list[tuple[Found, Thing]]:
    """Each thing of the scene with the measured one that is most like it; things are few, so all orders are tried."""
    if len(found) != len(scene.things):
        return []

    def unlike(pair: tuple[Found, Thing]) -> float:
        f, t = pair
        return 2 * (f.color != t.color) + (f.shape != t.shape) + math.dist((f.x, f.y), (t.x, t.y))

    orders = (list(zip(order, scene.things, strict=True)) for order in itertools.permutations(found))
    return min(orders, key=lambda pairs: sum(map(unlike, pairs)))


def _clean(pixels: Pixels, background: Background, things: list[Found]) -> bool:
    """Whether what was found is all that there is: of the picture, and of each thing and what is right beside it.

    Of what is fainter, the ghost of a thing or the steps of a gradient, there may be three times as much.
    """
    off, side = unexplained(pixels, background, things), min(pixels.shape[:2])
    stray = off > NOT_BACKGROUND

    def spoilt(thing: Found) -> bool:
        area = thing.mask.sum() * (1 - OUTLINE_SCALE**2 if thing.style == "outlined" else 1)
        return bool((stray & widened(widened(thing.mask, side), side)).sum() > BLEMISH * area)

    faint = (off > 2 / 3 * NOT_BACKGROUND).mean()
    return bool(stray.mean() <= SPECK and faint <= 3 * SPECK) and not any(map(spoilt, things))


def judge(pixels: Pixels, scene: Scene) -> Verdict:
    """Compare a picture `[H, W, 3]` (RGB, uint8) with what was asked for.

    Things in a relation may be anywhere as long as the relation holds, and counted ones anywhere; otherwise places
    count. A picture whose background is none is wrong in everything.
    """
    pixels = reduced(pixels)
    background = find_background(pixels)
    asked = ["background"]
    asked += (
        ["word", "color", "clean"]
        if scene.word
        else ["clean", "count", "shape", "color", "size", "style"]
        if scene.things
        else ["clean", "count"]
    )
    counted = len(scene.things) > 1 and len({(t.shape, t.color, t.radius) for t in scene.things}) == 1
    if scene.things and not counted:
        asked.append("relation" if scene.relation else "position")
    checks = dict.fromkeys(asked, False)
    if background is None:
        return Verdict(checks, None, ())
    checks["background"] = background == scene.background
    if scene.word:
        word, color = read_word(pixels, background)
        checks |= {"word": word == scene.word, "color": color == scene.word_color}
        if color is not None:
            # Half a speck is two dots of a letter.
            legible = ink_astray(pixels, background, word, color) <= SPECK / 2
            checks["clean"] = legible and not_word(pixels, background, len(word), color) <= SPECK
        return Verdict(checks, background, (), word)
    found = find_things(pixels, background)
    pairs = _pair_up(found, scene)
    checks |= {"clean": _clean(pixels, background, found), "count": len(found) == len(scene.things)}
    if pairs:
        looks = [_looks(found, thing) for found, thing in pairs]
        checks |= {name: all(look[name] for look in looks) for name in looks[0]}
        if "position" in checks:
            checks["position"] = all(_near(f, t) for f, t in pairs)
        if scene.relation:
            checks["relation"] = _related(scene.relation, pairs[0][0], pairs[1][0])
    return Verdict(checks, background, tuple(found))


def judge_without(pixels: Pixels, scene: Scene, color: str) -> Verdict:
    """`judge` where the scene's background was left open: any will do that has not this colour."""
    background = find_background(reduced(pixels))
    verdict = judge(pixels, scene if background is None else scene.replace(background=background))
    absent = background is not None and color not in background.colors
    return replace(verdict, checks={**verdict.checks, "without": absent})


def unchanged(before: Scene, after: Scene, height: int, width: int) -> Mask:
    """The pixels `[H, W]` that an edit from `before` to `after` should leave alone, without those near a change.

    On a new background these are the insides of the things that stay, and of outlined ones the line. There are none
    where no thing stays, or where a line is too thin for a pixel within it.
    """
    a, b, none = set(before.things), set(after.things), np.zeros((height, width), bool)
    changed = np.any([none, *(_around(thing, height, width) for thing in a ^ b)], axis=0)
    if before.background == after.background:
        return ~changed
    return np.any([none, *(_inside(thing, height, width) for thing in a & b)], axis=0) & ~changed


def _around(thing: Thing, height: int, width: int) -> Mask:
    """A disc in which the thing lies, with a margin."""
    side = min(height, width)
    ys, xs = np.mgrid[:height, :width] + 0.5
    return np.hypot(xs - thing.x * width, ys - thing.y * height) <= (1.35 * thing.radius + MARGIN) * side


def _inside(thing: Thing, height: int, width: int) -> Mask:
    """What the thing alone paints: its rim mixes with what is behind it. Of an outline's line, half is left."""

    def cover(radius: float) -> NDArray[np.float32]:
        corners = outline(thing.shape, thing.x * width, thing.y * height, radius * min(height, width))
        return coverage(corners, height, width)

    if thing.style != "outlined":
        return cover(max(thing.radius - MARGIN, 0)) == 1
    hole = thing.radius * OUTLINE_SCALE
    rim = min(MARGIN, (thing.radius - hole) / 4)
    return (cover(thing.radius - rim) == 1) & (cover(hole + rim) == 0)


def judge_edit(source: Pixels, pixels: Pixels, before: Scene, after: Scene) -> Verdict:
    """`judge`, the PSNR of what should not have changed (`unchanged`), which must reach 30 dB, and `identity`.

    `identity` is that the first thing is there as asked for, wherever it is and whatever else may be wrong. Where
    nothing is to be left alone there is no check of it.

    Args:
        source: the picture that was edited, `[H, W, 3]` like `pixels`.

    Raises:
        ValueError: the two have different sizes.
    """
    verdict = judge(pixels, after)
    checks, kept, value = dict(verdict.checks), unchanged(before, after, *pixels.shape[:2]), None
    if kept.any():
        value = metrics.psnr(source, pixels, kept)
        checks["unchanged"] = value >= UNCHANGED_PSNR
    if after.things:
        checks["identity"] = any(all(_looks(found, after.things[0]).values()) for found in verdict.things)
    return replace(verdict, checks=checks, unchanged_psnr=value)
