"""Scenes, captions, edits: held-out combinations never reach training, and every caption says what the scene shows."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from random import Random

import numpy as np
import pytest
from shapes import captions, data, make_suite

from fluxkiln.bench import suite
from fluxkiln.bench.shapes_scene import CELLS, COLORS, SHAPES, STYLES, TURNED, Scene, Thing, draw, held_out

KINDS = ("single", "pair", "count", "word")


@pytest.fixture(scope="module")
def asked() -> list[captions.Sample]:
    """All that the suites ask for."""
    negatives = (sample for sample, _ in make_suite.negatives())
    return [*make_suite.samples(), *itertools.chain(*make_suite.sequences()), *negatives]


def test_the_training_neither_asks_for_nor_shows_a_held_out_combination(asked: list[captions.Sample]) -> None:
    rng = Random(0)
    samples = [data.training_sample(rng, edit=i % 2 == 1) for i in range(3000)]
    trained = {way for sample in samples for way in sample.ways}
    trained |= {way for sample in samples for scene in (sample.before, sample.scene) if scene for way in scene.ways}
    assert not any(map(held_out, trained))
    assert all(held_out(way) for sample in asked for way in sample.ways)
    assert all(sample.shows_held_out for sample in asked)


def test_nothing_that_the_suites_ask_for_is_trained_on_in_another_way(asked: list[captions.Sample]) -> None:
    """Of two things beside each other either may be named first, and edits may come to that picture too."""
    turned = 0
    for sample in asked:
        scene, before = sample.scene, sample.before
        if sample.kind == "pair" and scene.relation in TURNED:
            other = scene.replace(things=scene.things[::-1], relation=TURNED[scene.relation])
            assert np.array_equal(draw(other), draw(scene))
            assert captions.Sample("pair", "", other).shows_held_out
            for things in itertools.permutations(scene.things):
                removal = captions.Sample(
                    "remove", "", Scene(scene.background), scene.replace(things=things, relation=None)
                )
                assert removal.shows_held_out
            turned += 1
        elif sample.kind == "background" and before is not None:
            other, its = (s.replace(things=s.things[::-1]) for s in (scene, before))
            assert captions.Sample("background", "", other, its).shows_held_out
            turned += len(scene.things) == 2
        elif sample.kind == "remove" and before is not None:  # training removes the first
            things = sorted(before.things, key=scene.things.__contains__)
            asked_for = f"remove: {before.replace(things=tuple(things)).combination} -> {scene.combination}"
            assert held_out(asked_for)
            turned += before.things[0] in scene.things
    assert turned > 150


def test_training_sees_edits_with_stripes_and_outlines_twice_as_often() -> None:
    rng = Random(2)

    def odds(samples: list[captions.Sample]) -> float:
        moves = [sample.scene for sample in samples if sample.kind == "move"]  # shows the same before and after
        patterned = sum(
            scene.background.kind == "striped" or any(thing.style in ("striped", "outlined") for thing in scene.things)
            for scene in moves
        )
        return patterned / (len(moves) - patterned)

    shown = odds([data.training_sample(rng, edit=True) for _ in range(20_000)])
    assert 1.6 < shown / odds([captions.edit(rng, "move") for _ in range(2000)]) < 2.5


def test_a_tenth_of_all_combinations_is_held_out() -> None:
    rng = Random(1)
    share = sum(held_out(captions.text_to_image(rng).combination) for _ in range(5000)) / 5000
    assert 0.08 < share < 0.12


def test_the_committed_suites_are_what_the_code_makes() -> None:
    made = make_suite.lines()
    assert {path.stem for path in suite.BUNDLED.glob("*.jsonl")} == made.keys()
    for name, items in made.items():
        committed = [json.loads(line) for line in (suite.BUNDLED / f"{name}.jsonl").read_text().splitlines()]
        assert committed == json.loads(json.dumps(items))
        assert all(set(item) <= {field.name for field in dataclasses.fields(suite.Item)} for item in items)
    assert len(suite.load("shapes")) == 1076


def test_a_sequence_keeps_one_object_and_each_turn_is_held_out() -> None:
    items = suite.load("shapes-turns")
    assert len(items) == 250
    for number, item in enumerate(items):
        turn, first = number % 5, items[number - number % 5]
        assert item.category == f"turn {turn + 1}"
        assert item.scene is not None
        assert item.before is not None
        assert first.before is not None
        assert item.scene.things[0].shape == first.before.things[0].shape
        assert item.scene.legible
        if turn == 0:
            assert item.follows is None
            assert len(item.before.things) == 1
        else:
            previous = items[number - 1]
            assert (item.follows, item.before) == (previous.id, previous.scene)
            assert len(item.scene.things) == 1 or len(previous.scene.things) == 1  # what was added goes


def test_negative_prompts_name_what_the_prompt_leaves_open() -> None:
    items = suite.load("shapes-negative")
    assert {item.without for item in items} == set(COLORS)
    for item in items:
        assert item.without is not None
        assert item.without not in item.prompt
        assert item.without in item.negative_prompt
        assert "background" not in item.prompt


@pytest.mark.parametrize("kind", KINDS)
def test_a_complete_caption_names_every_attribute(kind: str) -> None:
    rng = Random(2)
    for _ in range(100):
        sample = captions.text_to_image(rng, kind, complete=True)
        text = sample.caption.lower()
        for color in sample.scene.background.colors:
            assert color in text
        for thing in sample.scene.things:
            assert thing.shape in text
            assert thing.color in text
            assert thing.style == "plain" or thing.style in text
            assert sample.scene.relation == "inside" or thing.size in text
        if sample.scene.word:
            assert f'"{sample.scene.word.lower()}"' in text


def test_a_style_is_shown_as_often_as_any_other_and_nothing_else_of_the_picture_is_kept() -> None:
    rng = Random(5)
    samples = [captions.edit(rng, "reference") for _ in range(600)]
    shown = Counter(sample.scene.things[0].style for sample in samples)
    assert set(shown) == set(STYLES)
    assert min(shown.values()) > 150
    for field in ("shape", "color", "cell"):
        pairs = [(getattr(s.before.things[0], field), getattr(s.scene.things[0], field)) for s in samples if s.before]
        assert sum(a == b for a, b in pairs) < 200


@pytest.mark.parametrize("kind", captions.EDITS)
def test_an_edit_changes_what_it_says_and_nothing_else(kind: str) -> None:
    rng = Random(3)
    for _ in range(100):
        sample = captions.edit(rng, kind)
        before, after = sample.before, sample.scene
        assert before is not None
        assert before != after
        if kind == "reference":
            assert [thing.style for thing in before.things] == [thing.style for thing in after.things]
            assert not any(style in sample.caption for style in STYLES)
            continue
        if kind != "background":
            assert before.background == after.background
        else:
            assert before.things == after.things
        if kind == "add":
            assert after.things[:-1] == before.things
        elif kind == "remove":
            assert after.things == before.things[1:]
        else:
            assert len(after.things) == len(before.things)
            assert after.things[1:] == before.things[1:]
        assert before.legible
        assert after.legible


def test_scene_survives_json() -> None:
    rng = Random(4)
    for kind in KINDS:
        scene = captions.text_to_image(rng, kind).scene
        assert Scene.from_dict(scene.to_dict()) == scene


def test_thing_names_its_size_and_cell() -> None:
    for cell in CELLS:
        thing = Thing.of("star", "red", "small", cell)
        assert (thing.size, thing.cell) == ("small", cell)


def test_the_world_is_as_large_as_promised() -> None:
    assert len(SHAPES) >= 6
    assert len(COLORS) >= 8
    assert len(CELLS) == 9
