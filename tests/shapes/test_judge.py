"""The judge is judged: right on true renders, unmoved by near misses."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from random import Random

import numpy as np
import pytest
from PIL import Image, ImageFilter
from scenes import drawn, unused
from scipy import ndimage
from shapes import captions

from fluxkiln.bench import metrics, shapes_judge, shapes_masks, shapes_measure, suite
from fluxkiln.bench.shapes_scene import (
    CELLS,
    COLORS,
    FONT,
    SHAPES,
    STYLES,
    Background,
    Scene,
    Thing,
    draw,
)

KINDS = ("single", "pair", "count", "word")
SIZES = ((64, 64), (64, 64), (96, 96), (128, 128), (128, 64), (64, 128), (64, 96), (96, 64), (96, 128), (128, 96))


def _accepts(sample: captions.Sample, pixels: np.ndarray) -> bool:
    """Whether a picture passes for what `sample` asks for."""
    if sample.before is None:
        verdict = shapes_judge.judge(pixels, sample.scene)
    else:
        height, width, _ = pixels.shape
        verdict = shapes_judge.judge_edit(drawn(sample.before, width, height), pixels, sample.before, sample.scene)
    json.dumps(verdict.checks)  # they are written to the results: NumPy's truth values cannot be
    return verdict.ok


def _sample(rng: Random, kind: str) -> captions.Sample:
    return captions.edit(rng) if kind == "edit" else captions.text_to_image(rng, kind)


@pytest.mark.parametrize("kind", [*KINDS, "edit"])
def test_true_renders_are_right(kind: str) -> None:
    rng = Random(f"true {kind}")
    samples = [_sample(rng, kind) for _ in range(120)]
    wrong = [sample for sample in samples if not _accepts(sample, drawn(sample.scene, *rng.choice(SIZES)))]
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
        assert shapes_judge.judge(drawn(scene, side, side), scene).ok, (scene, side)


def test_seams_of_a_striped_background_may_be_soft() -> None:
    """As an autoencoder leaves them: a seam is a mixture of what is on both sides, and no thing."""
    for shape in ("circle", "star", "triangle", "cross"):
        scene = Scene(Background("striped", "blue", "yellow"), (Thing.of(shape, "red"),))
        soft = draw(scene).filter(ImageFilter.GaussianBlur(0.7))
        assert shapes_judge.judge(np.asarray(soft), scene).ok, shape


def _near_misses(rng: Random, kind: str, sample: captions.Sample) -> dict[str, Scene]:
    """Legible scenes that differ from the sample's in one thing, by as little as there is."""
    misses = _other_grounds(sample.scene) | _other_contents(rng, kind, sample.scene)
    if sample.before is not None:
        misses["undone"] = sample.before
    return {name: miss for name, miss in misses.items() if miss.legible}


def _nearest(color: str, others: list[str]) -> str:
    return min(others, key=lambda c: math.dist(COLORS[c], COLORS[color]))


def _other_grounds(scene: Scene) -> dict[str, Scene]:
    ground = scene.background
    near = _nearest(ground.color, [c for c in unused(scene) if c != scene.word_color])
    grounds = {"background": dataclasses.replace(ground, color=near)}
    if ground.color2:
        grounds["order"] = Background(ground.kind, ground.color2, ground.color)
        grounds["first of two"] = Background("plain", ground.color)
    for kind in ("striped", "gradient"):
        if kind != ground.kind:
            grounds[kind] = Background(kind, ground.color, ground.color2 or near)
    return {name: scene.replace(background=ground) for name, ground in grounds.items()}


def _other_contents(rng: Random, kind: str, scene: Scene) -> dict[str, Scene]:
    misses, others = {"blank": Scene(scene.background)}, unused(scene)
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
        accepted += [(name, sample, size) for name, miss in misses.items() if _accepts(sample, drawn(miss, *size))]
    assert len(accepted) <= 0.01 * n, accepted


@pytest.mark.long  # judges ten thousand pictures
def test_the_judge_is_right_within_half_a_percent_and_taken_in_by_less_than_one() -> None:
    """Of each kind a thousand true renders and as many misses, at all sizes; the claims are of all kinds together."""
    rng, noise = Random("both"), np.random.default_rng(0)
    refused, accepted, n = list[tuple](), list[tuple](), 1000
    for kind in (*KINDS, "edit"):
        for _ in range(n):
            sample, size = _sample(rng, kind), rng.choice(SIZES)
            if not _accepts(sample, drawn(sample.scene, *size)):
                refused.append((kind, size, sample))
            misses = _near_misses(rng, kind, sample)
            name = rng.choice([*misses, "noise"])
            random = noise.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
            if _accepts(sample, drawn(misses[name], *size) if name in misses else random):
                accepted.append((kind, name, size, sample))
    n *= len(KINDS) + 1
    print(f"of {n} true renders {len(refused)} refused, of {n} misses {len(accepted)} accepted")
    assert metrics.wilson(n - len(refused), n)[0] >= 0.995, refused
    assert metrics.wilson(len(accepted), n)[1] <= 0.01, accepted


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (5, 5), (3, 40)])
def test_pictures_of_a_few_pixels_show_nothing(size: tuple[int, int]) -> None:
    """Of a few columns all are edges of stripes: there is nothing to tell these by."""
    scene = Scene(Background("plain", "blue"), (Thing.of("circle", "red"),))
    with np.errstate(all="raise"):
        assert not shapes_judge.judge(drawn(scene, *size), scene).ok


@pytest.mark.parametrize("kind", [*KINDS, "edit"])
def test_large_pictures_are_judged_as_small_ones(kind: str) -> None:
    rng = Random(f"large {kind}")
    for width, height in ((512, 512), (400, 300)):
        sample = _sample(rng, kind)
        assert _accepts(sample, drawn(sample.scene, width, height))
        misses = _near_misses(rng, kind, sample)
        wrong = rng.choice([name for name in misses if "size" not in name])
        assert not _accepts(sample, drawn(misses[wrong], width, height)), wrong


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
        assert not shapes_judge.judge(drawn(Scene(scene.background)), scene).ok
        assert not shapes_judge.judge(noise.integers(0, 256, (64, 64, 3), dtype=np.uint8), scene).ok


def test_an_edit_must_leave_the_rest_alone() -> None:
    before = Scene(Background("plain", "blue"), (Thing.of("circle", "red", "small", "left"),))
    after = before.replace(things=(before.things[0].replace(color="green"),))
    source, good = drawn(before), drawn(after)
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
    assert shapes_judge.judge_edit(drawn(before), drawn(after), before, after).ok


@pytest.mark.parametrize("shape", ["circle", "square", "triangle", "diamond"])
def test_an_outline_is_kept_on_another_background(shape: str) -> None:
    """It is all that there is to compare, and in a true render what was painted is the same to the last bit."""
    before = Scene(Background("plain", "blue"), (Thing.of(shape, "red", style="outlined"),))
    after = before.replace(background=Background("gradient", "white", "green"))
    source, good = drawn(before), drawn(after)
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
    verdict = shapes_judge.judge_edit(drawn(before), drawn(after), before, after)
    assert verdict.ok
    assert verdict.unchanged_psnr is None
    assert "unchanged" not in verdict.checks


def test_components_agree_with_scipy() -> None:
    mask = np.random.default_rng(0).random((40, 50)) < 0.55
    labels, n = ndimage.label(mask)
    ours = shapes_masks.components(mask)
    assert sorted(int(r.sum()) for r in ours) == sorted(int((labels == i).sum()) for i in range(1, n + 1))
    np.testing.assert_array_equal(shapes_masks.fill(mask), ndimage.binary_fill_holes(mask))
