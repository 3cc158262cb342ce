"""Words are read, and what does not belong to them is seen."""

from __future__ import annotations

from random import Random

import pytest
from scenes import drawn, unused
from shapes import captions

from fluxkiln.bench import shapes_judge, shapes_words
from fluxkiln.bench.shapes_scene import COLORS, LETTER_CELL, Background, Scene


@pytest.mark.parametrize("side", [64, 96, 128])
def test_a_word_is_of_one_color(side: int) -> None:
    """Neither a letter of it nor half of it may have another, and nothing else may stand among the letters."""
    rng = Random(side)
    for _ in range(20):
        scene = captions.text_to_image(rng, "word").scene
        other = rng.choice([c for c in unused(scene) if c != scene.word_color])
        pixels, painted = drawn(scene, side, side), drawn(scene.replace(word_color=other), side, side)
        assert shapes_judge.judge(pixels, scene).ok
        half, letter = pixels.copy(), pixels.copy()
        half[: side // 2] = painted[: side // 2]
        left = round(side * (0.5 - len(scene.word) * LETTER_CELL / 2))
        right = left + round(side * LETTER_CELL)
        letter[:, left:right] = painted[:, left:right]
        for wrong in (half, letter):
            assert not shapes_judge.judge(wrong, scene).ok, scene


@pytest.mark.parametrize("side", [64, 96, 128])
def test_marks_in_a_words_own_color_are_seen(side: int) -> None:
    """Between its letters, through them, under them, and of dots that are missing in all of them."""
    rng = Random(side)
    for _ in range(20):
        scene = captions.text_to_image(rng, "word").scene
        pixels, ink = drawn(scene, side, side), COLORS[scene.word_color]
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


@pytest.mark.parametrize("ground", ["white", "yellow", "purple"])
def test_letters_between_the_pixels_are_read_in_their_color(ground: str) -> None:
    """At 96 pixels these letters' dots begin in the middle of pixels: most of what is seen of them is a mixture."""
    background = Background("plain", ground)
    for color in (c for c in COLORS if c != ground):
        pixels = drawn(Scene(background, word="KX", word_color=color), 96, 96)
        assert shapes_words.read_word(pixels, background) == ("KX", color)
