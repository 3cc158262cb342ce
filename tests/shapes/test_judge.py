"""The judge is judged: right on true renders, unmoved by near misses."""

from __future__ import annotations

import dataclasses
import json
import math
from random import Random

import numpy as np
import pytest
from scipy import ndimage
from shapes import captions

from fluxkiln.bench import shapes_judge
from fluxkiln.bench.shapes_scene import CELLS, COLORS, FONT, SHAPES, Background, Scene, Thing, draw

KINDS = ("single", "pair", "count", "word")
SIZES = ((64, 64), (64, 64), (96, 96), (128, 128), (128, 64), (64, 128), (64, 96), (96, 64))


def _pixels(scene: Scene, width: int = 64, height: int = 64) -> np.ndarray:
    return np.asarray(draw(scene, width, height))


def _accepts(sample: captions.Sample, scene: Scene, size: tuple[int, int]) -> bool:
    """Whether a picture of `scene` passes for what `sample` asks for."""
    pixels = _pixels(scene, *size)
    if sample.before is None:
        verdict = shapes_judge.judge(pixels, sample.scene)
    else:
        verdict = shapes_judge.judge_edit(_pixels(sample.before, *size), pixels, sample.before, sample.scene)
    json.dumps(verdict.checks)  # they are written to the results: NumPy's truth values cannot be
    return verdict.ok


def _sample(rng: Random, kind: str) -> captions.Sample:
    return captions.edit(rng) if kind == "edit" else captions.text_to_image(rng, kind)


@pytest.mark.parametrize("kind", [*KINDS, "edit"])
def test_true_renders_are_right(kind: str) -> None:
    rng = Random(f"true {kind}")
    samples = [_sample(rng, kind) for _ in range(120)]
    wrong = [sample for sample in samples if not _accepts(sample, sample.scene, rng.choice(SIZES))]
    assert len(wrong) <= 0.005 * len(samples), wrong


def _near_misses(rng: Random, kind: str, scene: Scene) -> dict[str, Scene]:
    """Scenes that differ from `scene` in one thing, by as little as there is."""
    misses, ground = {}, scene.background
    others = [c for c in COLORS if c not in ground.colors and all(c not in t.colors for t in scene.things)]
    nearest = sorted(
        (c for c in others if c != scene.word_color), key=lambda c: math.dist(COLORS[c], COLORS[ground.color])
    )
    misses["background"] = scene.replace(background=dataclasses.replace(ground, color=nearest[0]))
    if ground.color2:
        misses["order"] = scene.replace(background=Background(ground.kind, ground.color2, ground.color))
    if scene.word:
        i = rng.randrange(len(scene.word))
        letter = rng.choice([c for c in FONT if c != scene.word[i]])
        misses["letter"] = scene.replace(word=scene.word[:i] + letter + scene.word[i + 1 :])
        misses["short"] = scene.replace(word=scene.word[:-1])
        misses["word color"] = scene.replace(word_color=rng.choice([c for c in others if c != scene.word_color]))
        misses["more"] = scene.replace(things=(Thing.of(rng.choice(SHAPES), rng.choice(others), "small", "top"),))
        return misses
    if not scene.things:
        misses["more"] = scene.replace(things=(Thing.of(rng.choice(SHAPES), rng.choice(others), "small"),))
        return misses
    first, rest = scene.things[0], scene.things[1:]

    def instead(**changes: object) -> Scene:
        return scene.replace(things=(first.replace(**changes), *rest))

    misses["shape"] = instead(shape=rng.choice([s for s in SHAPES if s != first.shape]))
    misses["color"] = instead(color=min(others, key=lambda c: math.dist(COLORS[c], COLORS[first.color])))
    misses["size"] = instead(radius=first.radius * rng.choice((1.355, 1 / 1.355)))
    if first.radius >= 0.15:  # of smaller ones, two stripes are all there is
        misses["style"] = instead(style="striped" if first.style == "plain" else "plain")
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
        misses["cell"] = instead(x=x, y=y)
    if kind == "pair" and scene.relation != "inside":
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
        misses = _near_misses(rng, kind, sample.scene)
        if sample.before is not None:
            misses["undone"] = sample.before
        for name, miss in misses.items():
            if miss.legible:
                n += 1
                if _accepts(sample, miss, size):
                    accepted.append((name, sample, miss, size))
    assert len(accepted) <= 0.01 * n, accepted


@pytest.mark.parametrize("kind", KINDS)
def test_blank_and_noise_are_refused(kind: str) -> None:
    rng, noise = Random(12), np.random.default_rng(0)
    for i in range(10):
        scene = captions.text_to_image(rng, kind).scene
        assert not shapes_judge.judge(np.full((64, 64, 3), 25 * i, np.uint8), scene).ok
        assert not shapes_judge.judge(_pixels(Scene(scene.background)), scene).ok
        assert not shapes_judge.judge(noise.integers(0, 256, (64, 64, 3), dtype=np.uint8), scene).ok


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


@pytest.mark.parametrize(
    ("a", "b", "distance"), [("KILN", "KILN", 0), ("KILN", "KLN", 1), ("", "AB", 2), ("FOX", "BOX", 1)]
)
def test_edit_distance(a: str, b: str, distance: int) -> None:
    assert shapes_judge.edit_distance(a, b) == distance


def test_components_agree_with_scipy() -> None:
    mask = np.random.default_rng(0).random((40, 50)) < 0.55
    labels, n = ndimage.label(mask)
    ours = shapes_judge.components(mask)
    assert sorted(int(r.sum()) for r in ours) == sorted(int((labels == i).sum()) for i in range(1, n + 1))
    np.testing.assert_array_equal(shapes_judge.fill(mask), ndimage.binary_fill_holes(mask))
