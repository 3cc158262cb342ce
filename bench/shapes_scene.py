"""The little world of the bundled "shapes" model: what a scene is, how it is drawn, and which scenes are held out.

A scene is data (`Scene`, `Thing`, `Background`), everything about it is relative to the picture's sides, so one scene
can be drawn at any size and aspect ratio. Training (`tools/shapes`) and the benchmark share this description; the
judge (`shapes_judge.py` and what it takes) measures pixels and never calls `draw`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 170, 70),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 50),
    "purple": (150, 60, 180),
    "orange": (245, 140, 40),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
SIZES: dict[str, float] = {"small": 0.115, "medium": 0.155, "large": 0.21}  # radius over the shorter side
OUTER_RADIUS, INNER_RADIUS = 0.38, 0.11  # of the two things of "inside"
CELLS: dict[str, tuple[float, float]] = {  # centre (x over width, y over height)
    f"{row} {column}".strip() or "center": (0.25 + 0.25 * c, 0.25 + 0.25 * r)
    for r, row in enumerate(("top", "", "bottom"))
    for c, column in enumerate(("left", "", "right"))
}
BACKGROUNDS = ("plain", "striped", "gradient")
STYLES = ("plain", "striped", "outlined")
RELATIONS = ("left of", "right of", "above", "below", "inside")
RELATION_CELLS = {
    "left of": ("left", "right"),
    "right of": ("right", "left"),
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
    "inside": ("center", "center"),
}
TURNED = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
# Centres of n equal things, as fractions of the sides.
COUNT_CENTERS: dict[int, tuple[tuple[float, float], ...]] = {
    2: ((0.25, 0.5), (0.75, 0.5)),
    3: ((0.2, 0.5), (0.5, 0.5), (0.8, 0.5)),
    4: ((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)),
}
OUTLINE_SCALE = 0.55  # inner over outer radius of an outlined thing
STRIPES = 8  # of a striped background, across the width
THING_STRIPE = 1 / 16  # height of a stripe of a striped thing, over the shorter side
HELD_OUT = 10  # one combination in this many is asked for by no prompt or edit of the training
_SUPERSAMPLING = 4

# 5 x 7 capitals, one row of five bits per line, most significant bit on the left.
FONT: dict[str, tuple[int, ...]] = {
    "A": (14, 17, 17, 31, 17, 17, 17),
    "B": (30, 17, 17, 30, 17, 17, 30),
    "C": (14, 17, 16, 16, 16, 17, 14),
    "D": (30, 17, 17, 17, 17, 17, 30),
    "E": (31, 16, 16, 30, 16, 16, 31),
    "F": (31, 16, 16, 30, 16, 16, 16),
    "G": (14, 17, 16, 23, 17, 17, 14),
    "H": (17, 17, 17, 31, 17, 17, 17),
    "I": (14, 4, 4, 4, 4, 4, 14),
    "J": (7, 2, 2, 2, 2, 18, 12),
    "K": (17, 18, 20, 24, 20, 18, 17),
    "L": (16, 16, 16, 16, 16, 16, 31),
    "M": (17, 27, 21, 21, 17, 17, 17),
    "N": (17, 25, 21, 19, 17, 17, 17),
    "O": (14, 17, 17, 17, 17, 17, 14),
    "P": (30, 17, 17, 30, 16, 16, 16),
    "Q": (14, 17, 17, 17, 21, 18, 13),
    "R": (30, 17, 17, 30, 20, 18, 17),
    "S": (15, 16, 16, 14, 1, 1, 30),
    "T": (31, 4, 4, 4, 4, 4, 4),
    "U": (17, 17, 17, 17, 17, 17, 14),
    "V": (17, 17, 17, 17, 17, 10, 4),
    "W": (17, 17, 17, 21, 21, 27, 17),
    "X": (17, 17, 10, 4, 10, 17, 17),
    "Y": (17, 17, 10, 4, 4, 4, 4),
    "Z": (31, 1, 2, 4, 8, 16, 31),
}
LETTER_CELL, LETTER_DOT = 1 / 4, 1 / 32  # width of a letter's cell and of one dot of it, over the shorter side


@dataclass(frozen=True)
class Background:
    """`kind` plain (one colour), striped (vertical stripes, `color` first) or gradient (`color` on top)."""

    kind: str
    color: str
    color2: str | None = None

    @property
    def colors(self) -> tuple[str, ...]:
        return (self.color,) if self.color2 is None else (self.color, self.color2)


@dataclass(frozen=True)
class Thing:
    """One shape. `radius` is over the shorter side, `x`, `y` are over width and height."""

    shape: str
    color: str
    radius: float
    x: float
    y: float
    style: str = "plain"

    @classmethod
    def of(cls, shape: str, color: str, size: str = "medium", cell: str = "center", style: str = "plain") -> Thing:
        return cls(shape, color, SIZES[size], *CELLS[cell], style)

    @property
    def size(self) -> str:
        """The nearest size word."""
        return min(SIZES, key=lambda s: abs(math.log(SIZES[s] / self.radius)))

    @property
    def cell(self) -> str:
        """The nearest of the nine positions."""
        return min(CELLS, key=lambda c: math.dist(CELLS[c], (self.x, self.y)))

    @property
    def colors(self) -> tuple[str, ...]:
        """Its colour, and that of the stripes between if it is striped."""
        return (self.color, "black" if self.color == "white" else "white") if self.style == "striped" else (self.color,)

    def replace(self, **changes: Any) -> Thing:
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class Scene:
    """A background, the things on it from back to front, or a word. `relation` is that of things[0] to things[1]."""

    background: Background
    things: tuple[Thing, ...] = ()
    relation: str | None = None
    word: str | None = None
    word_color: str | None = None

    def replace(self, **changes: Any) -> Scene:
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in dataclasses.asdict(self).items() if v not in (None, ())}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Scene:
        """What `to_dict` made.

        Raises:
            ValueError: a name that this world does not have, a number that is none, one color or thing where two are
                wanted.
            KeyError, TypeError: another key, or none, where one is wanted.
        """
        things = tuple(Thing(**thing) for thing in data.get("things", ()))
        scene = cls(**{**data, "background": Background(**data["background"]), "things": things})
        colors = (*scene.background.colors, scene.word_color or "black", *(thing.color for thing in things))
        for what, names, known in (
            ("kind of background", [scene.background.kind], BACKGROUNDS),
            ("color", colors, COLORS),
            ("shape", [thing.shape for thing in things], SHAPES),
            ("style", [thing.style for thing in things], STYLES),
            ("relation", [scene.relation or RELATIONS[0]], RELATIONS),
            ("letter", scene.word or "", FONT),
        ):
            for name in names:
                if name not in known:
                    raise ValueError(f"{what} must be one of {', '.join(known)}, got {name!r}")
        for thing in things:
            for what, number in (("radius", thing.radius), ("x", thing.x), ("y", thing.y)):
                if not isinstance(number, int | float) or not (
                    0 < number <= 1 if what == "radius" else 0 <= number <= 1
                ):
                    raise ValueError(f"{what} of a thing must be a number of 0 to 1, got {number!r}")
        if scene.background.kind != "plain" and scene.background.color2 is None:
            raise ValueError(f"a {scene.background.kind} background needs a color2")
        if scene.relation and len(things) != 2:
            raise ValueError(f"a relation is of two things, got {len(things)}")
        if scene.word and not scene.word_color:
            raise ValueError("a word needs a word_color")
        return scene

    @property
    def legible(self) -> bool:
        """No thing is painted in a colour that the background has or, in a gradient, passes through."""
        ends = np.array([COLORS[self.background.colors[i]] for i in (0, -1)], np.float64)
        steps = np.linspace(0, 1, 33 if self.background.kind == "gradient" else 2)[:, None]
        behind = (1 - steps) * ends[0] + steps * ends[1]
        paints = [COLORS[color] for thing in self.things for color in thing.colors]
        return all(np.linalg.norm(behind - paint, axis=1).min() > 75 for paint in paints)

    @property
    def combination(self) -> str:
        """What is held out or trained on as a whole: shapes, colours, background and place, but not size or style."""
        background = "/".join((self.background.kind, *self.background.colors))
        if self.word is not None:
            return f"word {self.word}"
        places = () if self.relation else tuple(thing.cell for thing in self.things)
        things = (f"{thing.color} {thing.shape}" for thing in self.things)
        return " | ".join((background, self.relation or "", *things, *places))

    @property
    def ways(self) -> tuple[str, ...]:
        """Every combination that asks for this picture: of two things beside each other, either may come first.

        Two of one colour are counted, and in no relation.
        """
        relation = self.relation
        if len(self.things) == 2 and self.things[0].color != self.things[1].color:
            cells = tuple(thing.cell for thing in self.things)
            relation = relation or next((name for name, at in RELATION_CELLS.items() if at == cells), None)
        if relation not in TURNED:
            return (self.combination,)
        turned = self.replace(things=self.things[::-1], relation=TURNED[relation])
        return tuple(dict.fromkeys(s.combination for s in (self, self.replace(relation=relation), turned)))


def held_out(combination: str) -> bool:
    """True for one combination in `HELD_OUT`: training asks for none of these and shows none, the benchmark asks for no
    others, in whatever way."""
    return int.from_bytes(hashlib.sha256(combination.encode()).digest()[:8], "big") % HELD_OUT == 0


def outline(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """The polygon of a shape around (x, y), in the units of `radius`; a circle has 48 corners."""
    if shape == "circle":
        unit = [(math.cos(i * math.pi / 24), math.sin(i * math.pi / 24)) for i in range(48)]
    elif shape == "square":
        unit = [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)]
    elif shape == "triangle":
        unit = [(0.0, -1.1), (1.05, 0.75), (-1.05, 0.75)]
    elif shape == "diamond":
        unit = [(0.0, -1.15), (1.15, 0.0), (0.0, 1.15), (-1.15, 0.0)]
    elif shape == "star":
        radii = (1.15, 0.5)
        angles = [i * math.pi / 5 - math.pi / 2 for i in range(10)]
        unit = [(radii[i % 2] * math.cos(a), radii[i % 2] * math.sin(a)) for i, a in enumerate(angles)]
    elif shape == "cross":
        w, r = 0.36, 1.05
        unit = [
            (-w, -r),
            (w, -r),
            (w, -w),
            (r, -w),
            (r, w),
            (w, w),
            (w, r),
            (-w, r),
            (-w, w),
            (-r, w),
            (-r, -w),
            (-w, -w),
        ]
    else:
        raise ValueError(f"expected a shape of {', '.join(SHAPES)}; got {shape!r}")
    return [(x + radius * u, y + radius * v) for u, v in unit]


def _draw_background(background: Background, width: int, height: int) -> Image.Image:
    image = Image.new("RGB", (width, height), COLORS[background.color])
    if background.kind == "striped":
        pen = ImageDraw.Draw(image)
        for i in range(1, STRIPES, 2):
            box = (round(i * width / STRIPES), 0, round((i + 1) * width / STRIPES) - 1, height)
            pen.rectangle(box, fill=COLORS[background.color2 or background.color])
    elif background.kind == "gradient":
        weight = ((np.arange(height) + 0.5) / height)[:, None, None]
        first, last = (
            np.array(COLORS[c], np.float32) for c in (background.color, background.color2 or background.color)
        )
        rows = np.broadcast_to((1 - weight) * first + weight * last, (height, width, 3))
        image = Image.fromarray(np.rint(rows).astype(np.uint8))
    elif background.kind != "plain":
        raise ValueError(f"expected a background of kind plain, striped or gradient; got {background.kind!r}")
    return image


def _draw_thing(image: Image.Image, thing: Thing) -> None:
    width, height = image.size
    side = min(width, height)
    x, y, radius = thing.x * width, thing.y * height, thing.radius * side
    mask = Image.new("L", image.size)
    pen = ImageDraw.Draw(mask)
    pen.polygon(outline(thing.shape, x, y, radius), fill=255)
    if thing.style == "outlined":
        pen.polygon(outline(thing.shape, x, y, radius * OUTLINE_SCALE), fill=0)
    paint = Image.new("RGB", image.size, COLORS[thing.color])
    if thing.style == "striped":
        other, step = COLORS[thing.colors[1]], THING_STRIPE * side
        stripes = ImageDraw.Draw(paint)
        first = y - step / 2 - 2 * step * math.ceil(y / (2 * step))  # one coloured stripe is centred on the thing
        for i in range(2 * math.ceil(height / (2 * step)) + 2):
            top = first + (2 * i + 1) * step
            stripes.rectangle((0, round(top), width, round(top + step) - 1), fill=other)
    image.paste(paint, mask=mask)


def _draw_word(image: Image.Image, word: str, color: str) -> None:
    width, height = image.size
    side, pen = min(width, height), ImageDraw.Draw(image)
    cell, dot = side * LETTER_CELL, side * LETTER_DOT
    left, top = width / 2 - len(word) * cell / 2 + (cell - 5 * dot) / 2, height / 2 - 3.5 * dot
    for i, letter in enumerate(word):
        for r, bits in enumerate(FONT[letter]):
            for c in range(5):
                if bits >> (4 - c) & 1:
                    x, y = left + i * cell + c * dot, top + r * dot
                    box = (round(x), round(y), round(x + dot) - 1, round(y + dot) - 1)
                    pen.rectangle(box, fill=COLORS[color])


def draw(scene: Scene, width: int = 64, height: int = 64) -> Image.Image:
    """The scene as an RGB picture, antialiased by drawing it four times as large."""
    image = _draw_background(scene.background, width * _SUPERSAMPLING, height * _SUPERSAMPLING)
    for thing in scene.things[::-1] if scene.relation == "inside" else scene.things:
        _draw_thing(image, thing)
    if scene.word is not None:
        _draw_word(image, scene.word, scene.word_color or "black")
    return image.reduce(_SUPERSAMPLING)


def things_in_relation(relation: str, looks: list[tuple[str, str, str]]) -> tuple[Thing, ...]:
    """Two things of (shape, colour, size) placed so that the first is `relation` the second."""
    placed = [Thing.of(*look, cell) for look, cell in zip(looks, RELATION_CELLS[relation], strict=True)]
    if relation == "inside":
        placed = [placed[0].replace(radius=INNER_RADIUS), placed[1].replace(radius=OUTER_RADIUS)]
    return tuple(placed)
