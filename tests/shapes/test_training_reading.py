"""What captions say, which T5 learns to read first."""

from __future__ import annotations

from random import Random

import pytest
import torch
from shapes import captions, data, reading

from fluxkiln.bench.shapes_scene import Background, Scene, Thing


def test_facts_are_said_and_known() -> None:
    rng = Random(0)
    for i in range(2000):
        sample = data.training_sample(rng, edit=i % 2 == 1)
        for field, value in reading.facts(sample).items():
            assert value in reading.FIELDS[field]
            implied = (
                field in ("kind", "relation", "number", "background") or value == reading.NOTHING or "letter" in field
            )
            if not implied:
                assert value in sample.caption.lower()


def test_facts_tell_who_is_what() -> None:
    rng, pairs = Random(1), []
    while len(pairs) < 200:
        sample = captions.text_to_image(rng, "pair")
        facts = reading.facts(sample)
        first, second = (sample.caption.lower().find(f"{facts[f'color {i}']} {facts[f'shape {i}']}") for i in range(2))
        assert 0 <= first < second
        if facts["relation"] != "inside":
            row = ("left", "right") if facts["relation"] in ("left of", "right of") else ("top", "bottom")
            there = row if facts["relation"] in ("left of", "above") else row[::-1]
            assert [facts[f"{cell}: shape"] for cell in there] == [facts[f"shape {i}"] for i in range(2)]
            assert [facts[f"{cell}: color"] for cell in there] == [facts[f"color {i}"] for i in range(2)]
        pairs.append(facts["relation"])
    assert set(pairs) == set(reading.RELATIONS)


def test_facts_take_nothing_for_said_that_is_not() -> None:
    """Of two small things one size may be given, and what is striped may be the background."""
    stripes = Background("striped", "red", "blue")
    star = Thing.of("star", "white", "small", "left").replace(style="striped")
    circle = Thing.of("circle", "black", "small", "right")
    said = {
        "a small striped white star left of a black circle on a striped red and blue background": {"style 0"},
        "a white star left of a small black circle on a background with red and blue stripes": set(),
        "a small striped white star left of a small black circle": {"size 0", "style 0", "size 1"},
        "a white star left of a black circle on a striped red and blue background": set(),
    }
    for caption, found in said.items():
        scene = Scene(stripes, (star, circle), "left of")
        facts = reading.facts(captions.Sample("pair", caption, scene))
        assert {field for field in facts if field.startswith(("size", "style"))} == found


def test_a_reader_is_right_only_about_what_is_said() -> None:
    sample = captions.text_to_image(Random(2), "pair", complete=True)
    facts = reading.facts(sample)
    answers = [
        10
        * torch.nn.functional.one_hot(torch.tensor([values.index(facts.get(field, values[-1]))]), len(values)).float()
        for field, values in reading.FIELDS.items()
    ]
    loss, right = reading.loss_and_right(answers, [sample])
    assert right == 1
    assert loss < 1e-3
    wrong = list(reading.FIELDS).index("color 1")
    answers[wrong] = answers[wrong].roll(1, dims=1)
    assert reading.loss_and_right(answers, [sample])[1] == pytest.approx(1 - 1 / len(facts))
