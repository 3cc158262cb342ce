"""What is wrong within a picture that has all that was asked for is seen: stains, holes, rims, stripes, ghosts."""

from __future__ import annotations

import itertools
from random import Random

import numpy as np
import pytest
from scenes import drawn

from fluxkiln.bench import shapes_judge, shapes_scene
from fluxkiln.bench.shapes_scene import COLORS, SHAPES, Background, Scene, Thing, things_in_relation


@pytest.mark.parametrize("outer", SHAPES)
def test_an_outline_around_a_thing_is_no_thing_behind_it(outer: str) -> None:
    for side, inner in itertools.product((64, 128), SHAPES):
        looks = [(inner, "red", "medium"), (outer, "white", "large")]
        scene = Scene(Background("plain", "blue"), things_in_relation("inside", looks), "inside")
        front, behind = scene.things
        around = scene.replace(things=(front, behind.replace(style="outlined")))
        for asked, shown in itertools.product((scene, around), repeat=2):
            assert shapes_judge.judge(drawn(shown, side, side), asked).ok is (asked is shown), (inner, side)


@pytest.mark.parametrize("style", ["plain", "outlined"])
@pytest.mark.parametrize("shape", ["circle", "square", "cross"])
def test_a_thing_of_no_color_is_of_none(shape: str, style: str) -> None:
    """Grey is nearest to purple; and speckles of all colours have some of any."""
    noise = np.random.default_rng(0)
    for side, ground in itertools.product((64, 128), ("blue", "white")):
        scene = Scene(Background("plain", ground), (Thing.of(shape, "purple", "large", style=style),))
        pixels = drawn(scene, side, side)
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
        pixels, thing = drawn(scene, side, side), scene.things[0]
        assert shapes_judge.judge(pixels, scene).ok
        for name, wrong in _scribbles(rng, pixels, thing, ["red", "yellow", "orange"]).items():
            assert not shapes_judge.judge(wrong.astype(np.uint8), scene).ok, (name, side, color)


@pytest.mark.parametrize("shape", ["circle", "star", "diamond"])
def test_a_small_thing_has_room_for_less(shape: str) -> None:
    """Of a picture, a stain of three by four pixels in 64 is not too much; of a small thing, it is."""
    for side in (64, 128):
        scene = Scene(Background("plain", "green"), (Thing.of(shape, "purple", "small"),))
        pixels, dot = drawn(scene, side, side).copy(), side // 64
        assert shapes_judge.judge(pixels, scene).ok
        pixels[side // 2 - 2 * dot : side // 2 + 2 * dot, side // 2 - dot : side // 2 + 2 * dot] = COLORS["orange"]
        assert not shapes_judge.judge(pixels, scene).ok, side


@pytest.mark.parametrize("style", ["plain", "striped"])
def test_a_hole_is_none_of_a_things_styles_but_one(style: str) -> None:
    """Smaller than an outline's, too."""
    for side, shape in itertools.product((64, 128), ("circle", "square", "diamond", "triangle")):
        scene = Scene(Background("plain", "green"), (Thing.of(shape, "purple", "large", style=style),))
        hole = Thing(shape, "green", 0.065, 0.5, 0.51)
        assert shapes_judge.judge(drawn(scene, side, side), scene).ok
        pierced = scene.replace(things=(*scene.things, hole))
        assert not shapes_judge.judge(drawn(pierced, side, side), scene).ok, (side, shape)


@pytest.mark.parametrize("side", [64, 128])
@pytest.mark.parametrize("shape", ["circle", "square", "diamond", "triangle"])
def test_a_rim_of_another_color_is_seen(shape: str, side: int) -> None:
    """As a recolouring leaves of the old one."""
    for size, ground in itertools.product(("medium", "large"), ("green", "black")):
        thing = Thing.of(shape, "yellow", size)
        scene = Scene(Background("plain", ground), (thing,))
        for width in (1 / 64, 2 / 64):
            rimmed = scene.replace(things=(thing.replace(color="purple"), thing.replace(radius=thing.radius - width)))
            assert not shapes_judge.judge(drawn(rimmed, side, side), scene).ok, (size, ground, width)


@pytest.mark.parametrize("height", [1 / 32, 1 / 8])
def test_stripes_have_their_height(height: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes_scene, "THING_STRIPE", height)  # draws thus; the judge goes on as it was
    for side, shape, color in itertools.product((64, 128), ("circle", "square", "diamond"), ("purple", "white")):
        scene = Scene(Background("plain", "green"), (Thing.of(shape, color, "large", style="striped"),))
        assert not shapes_judge.judge(drawn(scene, side, side), scene).ok, (side, shape, color)


@pytest.mark.parametrize("own", [0.25, 0.75])
def test_stripes_are_as_wide_as_those_between(own: float) -> None:
    for side, shape, color in itertools.product((64, 128), ("circle", "square", "diamond"), ("purple", "blue")):
        plain = Thing.of(shape, color, "large")
        scene = Scene(Background("plain", "green"), (plain.replace(style="striped"),))
        own_color, white = (
            drawn(scene.replace(things=(thing,)), side, side) for thing in (plain, plain.replace(color="white"))
        )
        rows = (np.arange(side) + 0.5 - side / 2) / (side * shapes_scene.THING_STRIPE)
        mine = np.abs((rows + 1) % 2 - 1) < own
        assert not shapes_judge.judge(np.where(mine[:, None, None], own_color, white), scene).ok, (side, shape, color)


def test_stripes_are_all_over_a_thing() -> None:
    for side, shape, color in itertools.product((64, 128), ("circle", "square", "diamond"), ("purple", "white")):
        scene = Scene(Background("plain", "green"), (Thing.of(shape, color, "large", style="striped"),))
        plain = scene.replace(things=(scene.things[0].replace(style="plain"),))
        pixels = drawn(scene, side, side).copy()
        pixels[side // 2 :] = drawn(plain, side, side)[side // 2 :]
        assert not shapes_judge.judge(pixels, scene).ok, (side, shape, color)


@pytest.mark.parametrize("scale", [0.3, 0.8])
def test_an_outlines_hole_has_its_size(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes_scene, "OUTLINE_SCALE", scale)  # draws thus; the judge goes on as it was
    for side, shape in itertools.product((64, 128), ("circle", "square", "diamond", "triangle")):
        scene = Scene(Background("plain", "green"), (Thing.of(shape, "purple", "large", style="outlined"),))
        assert not shapes_judge.judge(drawn(scene, side, side), scene).ok, (side, shape)


@pytest.mark.parametrize("shape", ["circle", "square", "diamond"])
def test_an_outlines_hole_is_in_its_middle(shape: str) -> None:
    for side in (64, 128):
        thing = Thing.of(shape, "purple", "large")
        outlined = Scene(Background("plain", "green"), (thing.replace(style="outlined"),))
        radius = thing.radius * shapes_scene.OUTLINE_SCALE
        for x, right in ((0.5, True), (0.5 + 0.3 * thing.radius, False)):
            hole = Thing(shape, "green", radius, x, 0.5)
            pierced = Scene(outlined.background, (thing, hole))
            assert shapes_judge.judge(drawn(pierced, side, side), outlined).ok is right, (side, x)


def test_a_ghost_is_seen() -> None:
    """What was removed, or should not be there, at a sixth of its strength or less."""
    for side, (ground, color, strength) in itertools.product(
        (64, 128), (("green", "red", 0.17), ("white", "black", 0.1), ("blue", "yellow", 0.13))
    ):
        scene = Scene(Background("plain", ground))
        thing = scene.replace(things=(Thing.of("star", color, "medium"),))
        pixels = (1 - strength) * drawn(scene, side, side) + strength * drawn(thing, side, side)
        assert not shapes_judge.judge(pixels.round().astype(np.uint8), scene).ok, (side, ground)


def test_a_gradient_is_no_steps() -> None:
    scene = Scene(Background("gradient", "red", "yellow"))
    pixels = drawn(scene)
    assert shapes_judge.judge(pixels, scene).ok
    assert not shapes_judge.judge(pixels[np.minimum(np.arange(64) // 22 * 22 + 11, 63)], scene).ok


@pytest.mark.parametrize("kind", ["single", "no things"])
def test_seams_between_stripes_are_of_these_stripes(kind: str) -> None:
    for width, height in ((64, 64), (128, 64), (96, 96)):
        background = Background("striped", "blue", "yellow")
        things = (Thing.of("circle", "red", "small"),) if kind == "single" else ()
        scene = Scene(background, things)
        pixels = drawn(scene, width, height).copy()
        assert shapes_judge.judge(pixels, scene).ok
        for i in range(1, 8):
            pixels[:, round(i * width / 8) - 1 : round(i * width / 8) + 1] = COLORS["green"]
        assert not shapes_judge.judge(pixels, scene).ok


@pytest.mark.parametrize("stain", ["red", "white"])
def test_a_stain_on_one_thing_behind_another_is_seen(stain: str) -> None:
    """Of a third colour, or of the other thing's."""
    for side in (64, 128):
        looks = [("circle", "white", "medium"), ("square", "purple", "large")]
        scene = Scene(Background("plain", "green"), things_in_relation("inside", looks), "inside")
        pixels = drawn(scene, side, side).copy()
        assert shapes_judge.judge(pixels, scene).ok
        outer = scene.things[1]
        y, x = (round((at - 0.72 * outer.radius) * side) for at in (outer.y, outer.x))
        pixels[y : y + side // 12, x : x + side // 12] = COLORS[stain]
        assert not shapes_judge.judge(pixels, scene).ok, side
