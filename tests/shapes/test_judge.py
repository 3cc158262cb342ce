"""The judge is judged: right on true renders, unmoved by near misses."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from shapes import captions

from fluxkiln.bench import shapes_judge
from fluxkiln.bench.shapes_scene import CELLS, COLORS, FONT, SHAPES, Background, Scene, Thing, draw

KINDS = ("single", "pair", "count", "word")
SIZES = ((64, 64), (64, 64), (96, 96), (128, 64), (64, 96))


def _pixels(scene: Scene, width: int = 64, height: int = 64) -> np.ndarray:
    return np.asarray(draw(scene, width, height))


def test_true_renders_are_right() -> None:
    rng, wrong, n = Random(10), [], 0
    for kind in KINDS:
        for _ in range(100):
            sample = captions.text_to_image(rng, kind)
            n += 1
            if not shapes_judge.judge(_pixels(sample.scene, *rng.choice(SIZES)), sample.scene).ok:
                wrong.append(sample)
    for _ in range(200):
        sample = captions.edit(rng)
        assert sample.before is not None
        n += 1
        verdict = shapes_judge.judge_edit(_pixels(sample.before), _pixels(sample.scene), sample.before, sample.scene)
        if not verdict.ok:
            wrong.append(sample)
    assert len(wrong) <= 0.005 * n, wrong


def _near_misses(rng: Random, kind: str, scene: Scene) -> dict[str, Scene]:
    """Scenes that differ from `scene` in one thing, by as little as there is."""
    misses = {}
    if scene.word:
        i = rng.randrange(len(scene.word))
        letter = rng.choice([c for c in FONT if c != scene.word[i]])
        misses["letter"] = scene.replace(word=scene.word[:i] + letter + scene.word[i + 1 :])
        misses["short"] = scene.replace(word=scene.word[:-1])
        colors = [c for c in COLORS if c not in (scene.word_color, scene.background.color)]
        misses["word color"] = scene.replace(word_color=rng.choice(colors))
        return misses
    first, rest = scene.things[0], scene.things[1:]
    taken = (*first.colors, *scene.background.colors)
    misses["shape"] = scene.replace(
        things=(first.replace(shape=rng.choice([s for s in SHAPES if s != first.shape])), *rest)
    )
    misses["color"] = scene.replace(
        things=(first.replace(color=rng.choice([c for c in COLORS if c not in taken])), *rest)
    )
    misses["size"] = scene.replace(things=(first.replace(radius=first.radius * rng.choice((1.355, 1 / 1.355))), *rest))
    misses["fewer"] = scene.replace(things=rest)
    free = [
        c
        for c, at in CELLS.items()
        if all(np.hypot(at[0] - t.x, at[1] - t.y) > 1.2 * (t.radius + 0.115) for t in scene.things)
    ]
    if free and kind != "pair":
        x, y = CELLS[rng.choice(free)]
        misses["more"] = scene.replace(things=(*scene.things, first.replace(x=x, y=y, radius=0.115)))
    if kind == "single":
        x, y = CELLS[rng.choice([c for c in CELLS if c != first.cell])]
        misses["cell"] = scene.replace(things=(first.replace(x=x, y=y),))
    if kind == "pair" and scene.relation != "inside":
        other = rest[0]
        misses["swapped"] = scene.replace(
            things=(first.replace(x=other.x, y=other.y), other.replace(x=first.x, y=first.y))
        )
    return misses


def test_near_misses_are_refused() -> None:
    rng, accepted, n = Random(11), [], 0
    for kind in KINDS:
        for _ in range(30):
            scene = captions.text_to_image(rng, kind).scene
            for name, miss in _near_misses(rng, kind, scene).items():
                n += 1
                if shapes_judge.judge(_pixels(miss), scene).ok:
                    accepted.append((name, scene, miss))
    assert n > 400
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
    ndimage = pytest.importorskip("scipy.ndimage")
    mask = np.random.default_rng(0).random((40, 50)) < 0.55
    labels, n = ndimage.label(mask)
    ours = shapes_judge.components(mask)
    assert sorted(int(r.sum()) for r in ours) == sorted(int((labels == i).sum()) for i in range(1, n + 1))
    np.testing.assert_array_equal(shapes_judge.fill(mask), ndimage.binary_fill_holes(mask))
