"""Scenes, captions, edits: held-out combinations never reach training, and every caption says what the scene shows."""

from __future__ import annotations

from random import Random

import pytest
from shapes import captions, data, make_suite

from fluxkiln.bench import suite
from fluxkiln.bench.shapes_scene import CELLS, COLORS, SHAPES, Scene, Thing, held_out

KINDS = ("single", "pair", "count", "word")


def test_training_never_sees_a_held_out_combination() -> None:
    rng = Random(0)
    trained = {data.training_sample(rng, edit=i % 2 == 1).combination for i in range(3000)}
    assert not any(map(held_out, trained))
    suite_combinations = {sample.combination for sample in make_suite.samples()}
    assert all(map(held_out, suite_combinations))
    assert not trained & suite_combinations


def test_a_tenth_of_all_combinations_is_held_out() -> None:
    rng = Random(1)
    share = sum(captions.text_to_image(rng).held_out for _ in range(5000)) / 5000
    assert 0.08 < share < 0.12


def test_the_committed_suite_is_what_the_code_makes() -> None:
    committed = suite.load("shapes")
    made = make_suite.samples()
    assert len(committed) == len(made) == 1004
    for item, sample in zip(committed, made, strict=True):
        assert (item.prompt, item.scene, item.before) == (sample.caption, sample.scene, sample.before)


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


@pytest.mark.parametrize("kind", captions.EDITS)
def test_an_edit_changes_what_it_says_and_nothing_else(kind: str) -> None:
    rng = Random(3)
    for _ in range(100):
        sample = captions.edit(rng, kind)
        before, after = sample.before, sample.scene
        assert before is not None
        assert before != after
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
