"""The judge is judged: right on true renders, unmoved by near misses."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from random import Random

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from shapes import captions

from fluxkiln.bench import metrics, shapes_judge, shapes_measure, shapes_scene, suite
from fluxkiln.bench.shapes_scene import (
    CELLS,
    COLORS,
    FONT,
    LETTER_CELL,
    SHAPES,
    STYLES,
    Background,
    Scene,
    Thing,
    draw,
    things_in_relation,
)

KINDS = ("single", "pair", "count", "word")
SIZES = ((64, 64), (64, 64), (96, 96), (128, 128), (128, 64), (64, 128), (64, 96), (96, 64), (96, 128), (128, 96))


def _pixels(scene: Scene, width: int = 64, height: int = 64) -> np.ndarray:
    return np.asarray(draw(scene, width, height))


def _accepts(sample: captions.Sample, pixels: np.ndarray) -> bool:
    """Whether a picture passes for what `sample` asks for."""
    if sample.before is None:
        verdict = shapes_judge.judge(pixels, sample.scene)
    else:
        height, width, _ = pixels.shape
        verdict = shapes_judge.judge_edit(_pixels(sample.before, width, height), pixels, sample.before, sample.scene)
    json.dumps(verdict.checks)  # they are written to the results: NumPy's truth values cannot be
    return verdict.ok


def _sample(rng: Random, kind: str) -> captions.Sample:
    return captions.edit(rng) if kind == "edit" else captions.text_to_image(rng, kind)


@pytest.mark.parametrize("kind", [*KINDS, "edit"])
def test_true_renders_are_right(kind: str) -> None:
    rng = Random(f"true {kind}")
    samples = [_sample(rng, kind) for _ in range(120)]
    wrong = [sample for sample in samples if not _accepts(sample, _pixels(sample.scene, *rng.choice(SIZES)))]
    assert len(wrong) <= 0.005 * len(samples), wrong


@pytest.mark.parametrize("style", ["striped", "outlined"])
@pytest.mark.parametrize("ground", [Background("plain", "green"), Background("striped", "black", "green")])
def test_true_renders_between_the_pixels_are_right(style: str, ground: Background) -> None:
    """Where stripes and outlines begin in the middle of pixels, which are mixtures of up to three colours then."""
    rng, shapes = Random(f"{style} {ground}"), SHAPES if style == "striped" else ("circle", "square", "triangle")
    for shape, side in itertools.product(shapes, (64, 64, 80, 96, 100, 128)):
        x, y = (round(rng.uniform(0.47, 0.53), 3) for _ in "xy")
        thing = Thing.of(shape, rng.choice(("red", "purple", "yellow")), rng.choice(("medium", "large")), style=style)
        scene = Scene(ground, (thing.replace(x=x, y=y),))
        assert shapes_judge.judge(_pixels(scene, side, side), scene).ok, (scene, side)


def _near_misses(rng: Random, kind: str, sample: captions.Sample) -> dict[str, Scene]:
    """Legible scenes that differ from the sample's in one thing, by as little as there is."""
    misses = _other_grounds(sample.scene) | _other_contents(rng, kind, sample.scene)
    if sample.before is not None:
        misses["undone"] = sample.before
    return {name: miss for name, miss in misses.items() if miss.legible}


def _unused(scene: Scene) -> list[str]:
    return [c for c in COLORS if c not in scene.background.colors and all(c not in t.colors for t in scene.things)]


def _nearest(color: str, others: list[str]) -> str:
    return min(others, key=lambda c: math.dist(COLORS[c], COLORS[color]))


def _other_grounds(scene: Scene) -> dict[str, Scene]:
    ground = scene.background
    near = _nearest(ground.color, [c for c in _unused(scene) if c != scene.word_color])
    grounds = {"background": dataclasses.replace(ground, color=near)}
    if ground.color2:
        grounds["order"] = Background(ground.kind, ground.color2, ground.color)
        grounds["first of two"] = Background("plain", ground.color)
    for kind in ("striped", "gradient"):
        if kind != ground.kind:
            grounds[kind] = Background(kind, ground.color, ground.color2 or near)
    return {name: scene.replace(background=ground) for name, ground in grounds.items()}


def _other_contents(rng: Random, kind: str, scene: Scene) -> dict[str, Scene]:
    misses, others = {"blank": Scene(scene.background)}, _unused(scene)
    if scene.word:
        i = rng.randrange(len(scene.word))
        letter = rng.choice([c for c in FONT if c != scene.word[i]])
        misses["letter"] = scene.replace(word=scene.word[:i] + letter + scene.word[i + 1 :])
        misses["short"] = scene.replace(word=scene.word[:-1])
        misses["long"] = scene.replace(word=scene.word + rng.choice(list(FONT)))
        near = _nearest(scene.word_color, [c for c in others if c != scene.word_color])
        misses["word color"] = scene.replace(word_color=near)
        for name, (x, y) in {"more": CELLS["top"], "more in it": (rng.uniform(0.3, 0.7), 0.5)}.items():
            more = Thing(rng.choice(SHAPES), rng.choice(others), radius=0.115, x=x, y=y)
            misses[name] = scene.replace(things=(more,))
        return misses
    if not scene.things:  # a removal has left none
        return {"more": scene.replace(things=(Thing.of(rng.choice(SHAPES), rng.choice(others), "small"),))}
    first, rest = scene.things[0], scene.things[1:]
    for name, i in {"": 0, "last ": len(rest)}.items():
        thing = scene.things[i]

        def instead(i: int = i, thing: Thing = thing, **changes: object) -> Scene:
            return scene.replace(things=(*scene.things[:i], thing.replace(**changes), *scene.things[i + 1 :]))

        misses[f"{name}shape"] = instead(shape=rng.choice([s for s in SHAPES if s != thing.shape]))
        misses[f"{name}color"] = instead(color=_nearest(thing.color, others))
        misses[f"{name}size"] = instead(radius=thing.radius * rng.choice((1.355, 1 / 1.355)))
        if thing.radius >= 0.15:  # of smaller ones, two stripes are all there is
            thin = thing.shape in ("star", "cross") and scene.relation != "inside"
            styles = [s for s in STYLES if s != thing.style and not (s == "outlined" and thin)]
            misses |= {f"{name}{style}": instead(style=style) for style in styles}
    misses["fewer"] = scene.replace(things=rest)
    free = [
        c
        for c, at in CELLS.items()
        if all(np.hypot(at[0] - t.x, at[1] - t.y) > 1.2 * (t.radius + 0.115) for t in scene.things)
    ]
    if free:
        x, y = CELLS[rng.choice(free)]
        misses["more"] = scene.replace(things=(*scene.things, first.replace(x=x, y=y, radius=0.115)))
    if kind in ("single", "edit"):
        apart = [
            at
            for c, at in CELLS.items()
            if c != first.cell and all(captions.apart(first.replace(x=at[0], y=at[1]), t) for t in rest)
        ]
        x, y = min(apart, key=lambda at: (math.dist(at, (first.x, first.y)), rng.random()))
        misses["cell"] = scene.replace(things=(first.replace(x=x, y=y), *rest))
    if kind == "pair" and scene.relation == "inside":
        misses["on the rim"] = scene.replace(things=(first.replace(x=rest[0].x - rest[0].radius), *rest))
    elif kind == "pair":
        other = rest[0]
        misses["swapped"] = scene.replace(
            things=(first.replace(x=other.x, y=other.y), other.replace(x=first.x, y=first.y))
        )
    return misses


@pytest.mark.parametrize("kind", [*KINDS, "edit"])
def test_near_misses_are_refused(kind: str) -> None:
    rng, accepted, n = Random(f"near {kind}"), [], 0
    while n < 220:
        sample, size = _sample(rng, kind), rng.choice(SIZES)
        misses = _near_misses(rng, kind, sample)
        n += len(misses)
        accepted += [(name, sample, size) for name, miss in misses.items() if _accepts(sample, _pixels(miss, *size))]
    assert len(accepted) <= 0.01 * n, accepted


@pytest.mark.long  # judges ten thousand pictures
def test_the_judge_is_right_within_half_a_percent_and_taken_in_by_less_than_one() -> None:
    """Of each kind a thousand true renders and as many misses, at all sizes; the claims are of all kinds together."""
    rng, noise = Random("both"), np.random.default_rng(0)
    refused, accepted, n = list[tuple](), list[tuple](), 1000
    for kind in (*KINDS, "edit"):
        for _ in range(n):
            sample, size = _sample(rng, kind), rng.choice(SIZES)
            if not _accepts(sample, _pixels(sample.scene, *size)):
                refused.append((kind, size, sample))
            misses = _near_misses(rng, kind, sample)
            name = rng.choice([*misses, "noise"])
            random = noise.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
            if _accepts(sample, _pixels(misses[name], *size) if name in misses else random):
                accepted.append((kind, name, size, sample))
    n *= len(KINDS) + 1
    print(f"of {n} true renders {len(refused)} refused, of {n} misses {len(accepted)} accepted")
    assert metrics.wilson(n - len(refused), n)[0] >= 0.995, refused
    assert metrics.wilson(len(accepted), n)[1] <= 0.01, accepted


@pytest.mark.parametrize("side", [64, 96, 128])
def test_a_word_is_of_one_color(side: int) -> None:
    """Neither a letter of it nor half of it may have another, and nothing else may stand among the letters."""
    rng = Random(side)
    for _ in range(20):
        scene = captions.text_to_image(rng, "word").scene
        other = rng.choice([c for c in _unused(scene) if c != scene.word_color])
        pixels, painted = _pixels(scene, side, side), _pixels(scene.replace(word_color=other), side, side)
        assert shapes_judge.judge(pixels, scene).ok
        half, letter = pixels.copy(), pixels.copy()
        half[: side // 2] = painted[: side // 2]
        left = round(side * (0.5 - len(scene.word) * LETTER_CELL / 2))
        right = left + round(side * LETTER_CELL)
        letter[:, left:right] = painted[:, left:right]
        for wrong in (half, letter):
            assert not shapes_judge.judge(wrong, scene).ok, scene


@pytest.mark.parametrize("outer", SHAPES)
def test_an_outline_around_a_thing_is_no_thing_behind_it(outer: str) -> None:
    for side, inner in itertools.product((64, 128), SHAPES):
        looks = [(inner, "red", "medium"), (outer, "white", "large")]
        scene = Scene(Background("plain", "blue"), things_in_relation("inside", looks), "inside")
        front, behind = scene.things
        around = scene.replace(things=(front, behind.replace(style="outlined")))
        for asked, shown in itertools.product((scene, around), repeat=2):
            assert shapes_judge.judge(_pixels(shown, side, side), asked).ok is (asked is shown), (inner, side)


@pytest.mark.parametrize("kind", [*KINDS, "edit"])
def test_large_pictures_are_judged_as_small_ones(kind: str) -> None:
    rng = Random(f"large {kind}")
    for width, height in ((512, 512), (400, 300)):
        sample = _sample(rng, kind)
        assert _accepts(sample, _pixels(sample.scene, width, height))
        misses = _near_misses(rng, kind, sample)
        wrong = rng.choice([name for name in misses if "size" not in name])
        assert not _accepts(sample, _pixels(misses[wrong], width, height)), wrong


@pytest.mark.parametrize(("width", "height", "factor"), [(512, 513, 4), (400, 300, 2), (300, 255, 1)])
def test_they_are_made_smaller_as_pillow_does(width: int, height: int, factor: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    kept = noise[: height // factor * factor]
    expected = np.asarray(Image.fromarray(kept).reduce(factor)).astype(int)
    found = shapes_measure.reduced(noise)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1  # a half is rounded to even here


@pytest.mark.parametrize("kind", KINDS)
def test_blank_and_noise_are_refused(kind: str) -> None:
    rng, noise = Random(12), np.random.default_rng(0)
    for i in range(10):
        scene = captions.text_to_image(rng, kind).scene
        assert not shapes_judge.judge(np.full((64, 64, 3), 25 * i, np.uint8), scene).ok
        assert not shapes_judge.judge(_pixels(Scene(scene.background)), scene).ok
        assert not shapes_judge.judge(noise.integers(0, 256, (64, 64, 3), dtype=np.uint8), scene).ok


@pytest.mark.parametrize("style", ["plain", "outlined"])
@pytest.mark.parametrize("shape", ["circle", "square", "cross"])
def test_a_thing_of_no_color_is_of_none(shape: str, style: str) -> None:
    """Grey is nearest to purple; and speckles of all colours have some of any."""
    noise = np.random.default_rng(0)
    for side, ground in itertools.product((64, 128), ("blue", "white")):
        scene = Scene(Background("plain", ground), (Thing.of(shape, "purple", "large", style=style),))
        pixels = _pixels(scene, side, side)
        assert shapes_judge.judge(pixels, scene).ok
        thing = (pixels == COLORS["purple"]).all(-1)
        grey, speckled = pixels.copy(), pixels.copy()
        grey[thing] = 128
        places = np.argwhere(thing)[noise.random(thing.sum()) < 0.6]
        speckled[tuple(places.T)] = np.array([COLORS[c] for c in ("red", "black", "green")])[
            noise.integers(0, 3, len(places))
        ]
        stained, (y, x) = pixels.copy(), np.argwhere(thing)[thing.sum() // 2]
        stained[y : y + side // 8, x : x + side // 8] = (150, 200, 150)  # 135 from the nearest colour
        for wrong in (grey, speckled, stained):
            assert not shapes_judge.judge(wrong, scene).ok


def _scribbles(rng: Random, pixels: np.ndarray, thing: Thing, colors: list[str]) -> dict[str, np.ndarray]:
    """What does not belong on a thing, over less than half of it."""
    height, width, _ = pixels.shape
    side = min(height, width)
    ys, xs = np.mgrid[:height, :width] + 0.5
    far = np.hypot(ys - thing.y * height, xs - thing.x * width) / side
    lines = (ys % (side / 12) < side / 32) & (far < 0.8 * thing.radius)
    speckles = (np.random.default_rng(rng.randrange(99)).random((height, width)) < 0.4) & (far < 0.8 * thing.radius)
    marks = {"spot": far < 0.07, "lines": lines, "speckles": speckles}
    return {name: np.where(mark[..., None], COLORS[rng.choice(colors)], pixels) for name, mark in marks.items()}


@pytest.mark.parametrize("style", ["plain", "striped"])
@pytest.mark.parametrize("shape", ["circle", "square", "diamond"])
def test_what_is_drawn_on_a_thing_is_seen(shape: str, style: str) -> None:
    """Neither where it is a thing of its own, nor where it is too thin or too little for one."""
    rng = Random(f"{shape} {style}")
    for side, color in itertools.product((64, 128), ("purple", "blue", "white")):
        scene = Scene(Background("plain", "green"), (Thing.of(shape, color, "large", style=style),))
        pixels, thing = _pixels(scene, side, side), scene.things[0]
        assert shapes_judge.judge(pixels, scene).ok
        for name, wrong in _scribbles(rng, pixels, thing, ["red", "yellow", "orange"]).items():
            assert not shapes_judge.judge(wrong.astype(np.uint8), scene).ok, (name, side, color)


@pytest.mark.parametrize("style", ["plain", "striped"])
def test_a_hole_is_none_of_a_things_styles_but_one(style: str) -> None:
    """Smaller than an outline's, too."""
    for side, shape in itertools.product((64, 128), ("circle", "square", "diamond", "triangle")):
        scene = Scene(Background("plain", "green"), (Thing.of(shape, "purple", "large", style=style),))
        hole = Thing(shape, "green", 0.065, 0.5, 0.51)
        assert shapes_judge.judge(_pixels(scene, side, side), scene).ok
        pierced = scene.replace(things=(*scene.things, hole))
        assert not shapes_judge.judge(_pixels(pierced, side, side), scene).ok, (side, shape)


@pytest.mark.parametrize("side", [64, 128])
@pytest.mark.parametrize("shape", ["circle", "square", "diamond", "triangle"])
def test_a_rim_of_another_color_is_seen(shape: str, side: int) -> None:
    """As a recolouring leaves of the old one."""
    for size, ground in itertools.product(("medium", "large"), ("green", "black")):
        thing = Thing.of(shape, "yellow", size)
        scene = Scene(Background("plain", ground), (thing,))
        for width in (1 / 64, 2 / 64):
            rimmed = scene.replace(things=(thing.replace(color="purple"), thing.replace(radius=thing.radius - width)))
            assert not shapes_judge.judge(_pixels(rimmed, side, side), scene).ok, (size, ground, width)


@pytest.mark.parametrize("height", [1 / 32, 1 / 8])
def test_stripes_have_their_height(height: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes_scene, "THING_STRIPE", height)  # draws thus; the judge goes on as it was
    for side, shape, color in itertools.product((64, 128), ("circle", "square", "diamond"), ("purple", "white")):
        scene = Scene(Background("plain", "green"), (Thing.of(shape, color, "large", style="striped"),))
        assert not shapes_judge.judge(_pixels(scene, side, side), scene).ok, (side, shape, color)


@pytest.mark.parametrize("own", [0.25, 0.75])
def test_stripes_are_as_wide_as_those_between(own: float) -> None:
    for side, shape, color in itertools.product((64, 128), ("circle", "square", "diamond"), ("purple", "blue")):
        plain = Thing.of(shape, color, "large")
        scene = Scene(Background("plain", "green"), (plain.replace(style="striped"),))
        own_color, white = (
            _pixels(scene.replace(things=(thing,)), side, side) for thing in (plain, plain.replace(color="white"))
        )
        rows = (np.arange(side) + 0.5 - side / 2) / (side * shapes_scene.THING_STRIPE)
        mine = np.abs((rows + 1) % 2 - 1) < own
        assert not shapes_judge.judge(np.where(mine[:, None, None], own_color, white), scene).ok, (side, shape, color)


def test_stripes_are_all_over_a_thing() -> None:
    for side, shape, color in itertools.product((64, 128), ("circle", "square", "diamond"), ("purple", "white")):
        scene = Scene(Background("plain", "green"), (Thing.of(shape, color, "large", style="striped"),))
        plain = scene.replace(things=(scene.things[0].replace(style="plain"),))
        pixels = _pixels(scene, side, side).copy()
        pixels[side // 2 :] = _pixels(plain, side, side)[side // 2 :]
        assert not shapes_judge.judge(pixels, scene).ok, (side, shape, color)


@pytest.mark.parametrize("scale", [0.3, 0.8])
def test_an_outlines_hole_has_its_size(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes_scene, "OUTLINE_SCALE", scale)  # draws thus; the judge goes on as it was
    for side, shape in itertools.product((64, 128), ("circle", "square", "diamond", "triangle")):
        scene = Scene(Background("plain", "green"), (Thing.of(shape, "purple", "large", style="outlined"),))
        assert not shapes_judge.judge(_pixels(scene, side, side), scene).ok, (side, shape)


@pytest.mark.parametrize("shape", ["circle", "square", "diamond"])
def test_an_outlines_hole_is_in_its_middle(shape: str) -> None:
    for side in (64, 128):
        thing = Thing.of(shape, "purple", "large")
        outlined = Scene(Background("plain", "green"), (thing.replace(style="outlined"),))
        radius = thing.radius * shapes_scene.OUTLINE_SCALE
        for x, right in ((0.5, True), (0.5 + 0.3 * thing.radius, False)):
            hole = Thing(shape, "green", radius, x, 0.5)
            pierced = Scene(outlined.background, (thing, hole))
            assert shapes_judge.judge(_pixels(pierced, side, side), outlined).ok is right, (side, x)


def test_a_ghost_is_seen() -> None:
    """What was removed, or should not be there, at a sixth of its strength or less."""
    for side, (ground, color, strength) in itertools.product(
        (64, 128), (("green", "red", 0.17), ("white", "black", 0.1), ("blue", "yellow", 0.13))
    ):
        scene = Scene(Background("plain", ground))
        thing = scene.replace(things=(Thing.of("star", color, "medium"),))
        pixels = (1 - strength) * _pixels(scene, side, side) + strength * _pixels(thing, side, side)
        assert not shapes_judge.judge(pixels.round().astype(np.uint8), scene).ok, (side, ground)


def test_a_gradient_is_no_steps() -> None:
    scene = Scene(Background("gradient", "red", "yellow"))
    pixels = _pixels(scene)
    assert shapes_judge.judge(pixels, scene).ok
    assert not shapes_judge.judge(pixels[np.minimum(np.arange(64) // 22 * 22 + 11, 63)], scene).ok


@pytest.mark.parametrize("kind", ["single", "no things"])
def test_seams_between_stripes_are_of_these_stripes(kind: str) -> None:
    for width, height in ((64, 64), (128, 64), (96, 96)):
        background = Background("striped", "blue", "yellow")
        things = (Thing.of("circle", "red", "small"),) if kind == "single" else ()
        scene = Scene(background, things)
        pixels = _pixels(scene, width, height).copy()
        assert shapes_judge.judge(pixels, scene).ok
        for i in range(1, 8):
            pixels[:, round(i * width / 8) - 1 : round(i * width / 8) + 1] = COLORS["green"]
        assert not shapes_judge.judge(pixels, scene).ok


@pytest.mark.parametrize("side", [64, 96, 128])
def test_marks_in_a_words_own_color_are_seen(side: int) -> None:
    """Between its letters, through them, under them, and of dots that are missing in all of them."""
    rng = Random(side)
    for _ in range(20):
        scene = captions.text_to_image(rng, "word").scene
        pixels, ink = _pixels(scene, side, side), COLORS[scene.word_color]
        assert shapes_judge.judge(pixels, scene).ok
        cell, dot = side * LETTER_CELL, side // 32
        left, top = round(side / 2 - len(scene.word) * cell / 2), round(side / 2 - 3.5 * dot)
        right = round(left + len(scene.word) * cell)
        barred, struck, underlined, pale = (pixels.copy() for _ in range(4))
        for i in range(1, len(scene.word)):
            at = round(left + i * cell)
            barred[top : top + 7 * dot, at - dot // 2 : at - dot // 2 + dot] = ink
        struck[round(top + 3.5 * dot) : round(top + 3.5 * dot) + dot, left:right] = ink
        underlined[top + 7 * dot : top + 7 * dot + dot, left:right] = ink
        pale[top + 5 * dot : top + 7 * dot] = COLORS[scene.background.color]
        for name, wrong in {"barred": barred, "struck": struck, "underlined": underlined, "pale": pale}.items():
            assert not shapes_judge.judge(wrong, scene).ok, (name, scene)


@pytest.mark.parametrize("stain", ["red", "white"])
def test_a_stain_on_one_thing_behind_another_is_seen(stain: str) -> None:
    """Of a third colour, or of the other thing's."""
    for side in (64, 128):
        looks = [("circle", "white", "medium"), ("square", "purple", "large")]
        scene = Scene(Background("plain", "green"), things_in_relation("inside", looks), "inside")
        pixels = _pixels(scene, side, side).copy()
        assert shapes_judge.judge(pixels, scene).ok
        outer = scene.things[1]
        y, x = (round((at - 0.72 * outer.radius) * side) for at in (outer.y, outer.x))
        pixels[y : y + side // 12, x : x + side // 12] = COLORS[stain]
        assert not shapes_judge.judge(pixels, scene).ok, side


def test_an_edit_must_leave_the_rest_alone() -> None:
    before = Scene(Background("plain", "blue"), (Thing.of("circle", "red", "small", "left"),))
    after = before.replace(things=(before.things[0].replace(color="green"),))
    source, good = _pixels(before), _pixels(after)
    assert shapes_judge.judge_edit(source, good, before, after).ok
    spoilt = good.copy()
    spoilt[:, 40:] = np.clip(spoilt[:, 40:].astype(int) + 20, 0, 255).astype(np.uint8)
    verdict = shapes_judge.judge_edit(source, spoilt, before, after)
    assert not verdict.checks["unchanged"]
    assert not shapes_judge.judge_edit(source, source, before, after).ok


def test_another_background_may_change_everything_but_the_things() -> None:
    before = Scene(Background("plain", "blue"), (Thing.of("square", "red", "large"),))
    after = before.replace(background=Background("striped", "white", "green"))
    kept = shapes_judge.unchanged(before, after, 64, 64)
    assert 0 < kept.sum() < 28 * 28
    assert shapes_judge.judge_edit(_pixels(before), _pixels(after), before, after).ok


@pytest.mark.parametrize("ground", ["white", "yellow", "purple"])
def test_letters_between_the_pixels_are_read_in_their_color(ground: str) -> None:
    """At 96 pixels these letters' dots begin in the middle of pixels: most of what is seen of them is a mixture."""
    background = Background("plain", ground)
    for color in (c for c in COLORS if c != ground):
        pixels = _pixels(Scene(background, word="KX", word_color=color), 96, 96)
        assert shapes_measure.read_word(pixels, background) == ("KX", color)


@pytest.mark.parametrize("shape", ["circle", "square", "triangle", "diamond"])
def test_an_outline_is_kept_on_another_background(shape: str) -> None:
    """It is all that there is to compare, and in a true render what was painted is the same to the last bit."""
    before = Scene(Background("plain", "blue"), (Thing.of(shape, "red", style="outlined"),))
    after = before.replace(background=Background("gradient", "white", "green"))
    source, good = _pixels(before), _pixels(after)
    kept = shapes_judge.unchanged(before, after, 64, 64)
    assert kept.sum() >= 20
    verdict = shapes_judge.judge_edit(source, good, before, after)
    assert verdict.ok
    assert verdict.unchanged_psnr == math.inf
    paler = good.copy()
    paler[kept] = paler[kept] * 0.92 + 16
    verdict = shapes_judge.judge_edit(source, paler, before, after)
    assert [name for name, right in verdict.checks.items() if not right] == ["unchanged"]


def test_every_edit_of_the_suites_leaves_something_alone() -> None:
    for item in itertools.chain(suite.load("shapes"), suite.load("shapes-turns")):
        if item.before is not None and item.category != "reference":  # which takes a style and nothing else
            assert shapes_judge.unchanged(item.before, item.scene, 64, 64).any(), item.id


def test_nothing_to_leave_alone_is_not_checked() -> None:
    before, after = (Scene(Background("plain", color)) for color in ("blue", "red"))
    verdict = shapes_judge.judge_edit(_pixels(before), _pixels(after), before, after)
    assert verdict.ok
    assert verdict.unchanged_psnr is None
    assert "unchanged" not in verdict.checks


def test_components_agree_with_scipy() -> None:
    mask = np.random.default_rng(0).random((40, 50)) < 0.55
    labels, n = ndimage.label(mask)
    ours = shapes_measure.components(mask)
    assert sorted(int(r.sum()) for r in ours) == sorted(int((labels == i).sum()) for i in range(1, n + 1))
    np.testing.assert_array_equal(shapes_measure.fill(mask), ndimage.binary_fill_holes(mask))
