"""Random scenes and edits, and the sentences that describe them.

`text_to_image(rng)` gives (caption, scene), `edit(rng)` gives (instruction, scene before, scene after). Both draw the
whole world, held-out combinations included; `data.training_sample` leaves those to the benchmark.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

from fluxkiln.bench.shapes_scene import (
    CELLS,
    COLORS,
    COUNT_CENTERS,
    FONT,
    RELATIONS,
    SHAPES,
    SIZES,
    STYLES,
    Background,
    Scene,
    Thing,
    held_out,
    things_in_relation,
)

NUMBERS = {2: ("two", "2"), 3: ("three", "3"), 4: ("four", "4")}
PLACES = {
    "left": ("on the left", "at the left"),
    "right": ("on the right", "at the right"),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
    "center": ("in the center", "in the middle"),
    **{c: (f"at the {c}", f"in the {c} corner") for c in CELLS if " " in c},
}
RELATION_WORDS = {
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
    "above": ("above",),
    "below": ("below", "under"),
    "inside": ("inside", "in"),
}
# fmt: off
WORDS = [
    "ART", "BALL", "BEE", "BIG", "BIRD", "BLUE", "BOAT", "BOOK", "BOX", "BUS", "BYE", "CAKE", "CAR", "CAT", "COLD",
    "COW", "CUP", "DAY", "DOG", "DOOR", "DUCK", "EAR", "EAST", "EGG", "EYE", "FAST", "FISH", "FIVE", "FLUX", "FOX",
    "FROG", "FUN", "GAME", "GIFT", "GO", "GOLD", "GOOD", "HAND", "HAT", "HELP", "HI", "HOME", "HOT", "ICE", "JAM",
    "JAR", "JUMP", "KEY", "KILN", "KING", "KITE", "LAMP", "LEAF", "LION", "LOVE", "MAP", "MILK", "MOON", "MUD",
    "NEST", "NEW", "NEXT", "NO", "NOON", "NUT", "OAK", "OIL", "OK", "ON", "ONE", "OPEN", "OWL", "PEN", "PIG",
    "PLAY", "QUIZ", "RAIN", "RED", "ROAD", "ROCK", "RUN", "SALE", "SEA", "SHIP", "SHOP", "SKY", "SNOW", "SOFT",
    "SONG", "STAR", "STOP", "SUN", "TEA", "TEN", "TOP", "TOY", "TREE", "TWO", "UP", "VAN", "VASE", "WALK", "WARM",
    "WAVE", "WEST", "WIND", "WISH", "YAK", "YES", "ZEBU", "ZOO",
]
# fmt: on


EDITS = ("recolor", "remove", "add", "move", "resize", "background", "style", "reference")
# How often training draws each kind: text to image (single, pair, count, word, empty), then EDITS.
TEXT_SHARES = (21, 38, 16, 24, 1)
EDIT_SHARES = (8, 2, 3, 2, 4, 11, 8, 4)


@dataclass(frozen=True)
class Sample:
    """A picture to make: `before` is the reference of an edit, None for text to image."""

    kind: str
    caption: str
    scene: Scene
    before: Scene | None = None

    @property
    def combination(self) -> str:
        """The held-out unit: a scene for text to image; where it came from and what became of it for an edit."""
        return self.ways[0]

    @property
    def ways(self) -> tuple[str, ...]:
        """Every combination that asks for the same; the order of two things says which of them is meant, or nothing."""
        if self.before is None:
            return self.scene.ways
        pairs = [(self.before, self.scene)]
        if self.kind == "remove":  # what goes comes first
            things = sorted(self.before.things, key=lambda thing: thing in self.scene.things)
            pairs = [(self.before.replace(things=tuple(things)), self.scene)]
        elif self.kind == "background":
            pairs.append(tuple(scene.replace(things=scene.things[::-1]) for scene in pairs[0]))
        return tuple(dict.fromkeys(f"{self.kind}: {a.combination} -> {b.combination}" for a, b in pairs))

    @property
    def held_out(self) -> bool:
        """In all ways: one that is trained on in another is none for the benchmark."""
        return all(map(held_out, self.ways))

    @property
    def shows_held_out(self) -> bool:
        """What it asks for is held out in some way, or a picture of it is."""
        scenes = [scene for scene in (self.before, self.scene) if scene is not None]
        return any(map(held_out, (*self.ways, *(way for scene in scenes for way in scene.ways))))


def _article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def describe_background(rng: Random, background: Background) -> str:
    """A noun phrase with its article."""
    a, b = background.color, background.color2
    if background.kind == "plain":
        return _article(f"{a} background")
    if background.kind == "striped":
        return rng.choice((f"a striped {a} and {b} background", f"a background with {a} and {b} stripes"))
    return rng.choice((f"a gradient from {a} to {b}", f"a {a} to {b} gradient background"))


def describe_thing(thing: Thing, size: bool = True, color: bool = True, style: bool = True) -> str:
    """A noun phrase without article: adjectives and the shape."""
    words = [thing.size] if size else []
    if style and thing.style != "plain":
        words.append(thing.style)
    if color:
        words.append(thing.color)
    return " ".join([*words, thing.shape])


def _sentence(rng: Random, text: str) -> str:
    """Capital and full stop come and go, as people write."""
    if rng.random() < 0.15:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.15 else text


def caption_of(rng: Random, scene: Scene, complete: bool = False) -> str:
    """A caption. Unless `complete`, size, place or background may be left unsaid, so that the seed decides them."""
    say = (lambda probability: True) if complete else (lambda probability: rng.random() < probability)
    background = describe_background(rng, scene.background) if say(0.75) else None
    on = f" on {background}" if background else ""
    if scene.word is not None:
        forms = [
            f'the word "{scene.word}" in {scene.word_color}{on}',
            f'{scene.word_color} text "{scene.word}"{on}',
            f'"{scene.word}" written in {scene.word_color}{on}',
        ]
        return _sentence(rng, rng.choice(forms))
    if not scene.things:
        return _sentence(rng, background or "a background")
    first = scene.things[0]
    if scene.relation:
        a, b = (describe_thing(t, size=scene.relation != "inside" and say(0.7)) for t in scene.things)
        relation = rng.choice(RELATION_WORDS[scene.relation])
        subject = f"{_article(a)} {relation} {_article(b)}"
    elif len(scene.things) > 1:
        number = rng.choice(NUMBERS[len(scene.things)])
        subject = f"{number} {describe_thing(first, size=say(0.7))}{'es' if first.shape == 'cross' else 's'}"
    else:
        noun = describe_thing(first, size=say(0.7))
        if say(0.8):
            place = rng.choice(PLACES[first.cell])
            forms = [f"{_article(noun)} {place}{on}", f"{_article(noun)}{on}, {place}"]
            if background:
                forms += [f"{_article(noun)} {place} of {background}", f"{background} with {_article(noun)} {place}"]
            if not complete:
                forms.append(f"{noun} {place}")
            return _sentence(rng, rng.choice(forms))
        subject = _article(noun) if complete or rng.random() < 0.8 else noun
    forms = [subject + on, f"{rng.choice(('a picture of', 'an image of', 'there is'))} {subject}{on}"]
    if background:
        forms.append(f"{background} with {subject}")
    return _sentence(rng, rng.choice(forms))


def random_background(rng: Random, kinds: tuple[str, ...] = ("plain", "plain", "striped", "gradient")) -> Background:
    kind = rng.choice(kinds)
    colors = rng.sample(list(COLORS), 2)
    return Background(kind, colors[0], None if kind == "plain" else colors[1])


def _color_for(rng: Random, *taken: str) -> str:
    return rng.choice([c for c in COLORS if c not in taken])


def _style(rng: Random, shape: str, radius: float) -> str:
    """Now and then striped or outlined; thin shapes are not outlined when small."""
    choices = ["plain"] * 6 + ["striped"]
    if radius > SIZES["small"] and shape not in ("star", "cross"):
        choices.append("outlined")
    return rng.choice(choices)


def random_thing(rng: Random, taken: tuple[str, ...]) -> Thing:
    """A thing in a colour that is not `taken`, in any of the nine cells."""
    shape, size = rng.choice(SHAPES), rng.choice(list(SIZES))
    thing = Thing.of(shape, _color_for(rng, *taken), size, rng.choice(list(CELLS)))
    return thing.replace(style=_style(rng, shape, thing.radius))


def _styled_thing(rng: Random, style: str) -> Thing:
    shapes, sizes = list(SHAPES), list(SIZES)
    if style == "outlined":  # thin shapes and small ones are not
        shapes, sizes = [s for s in shapes if s not in ("star", "cross")], [s for s in sizes if s != "small"]
    thing = Thing.of(rng.choice(shapes), rng.choice(list(COLORS)), rng.choice(sizes), rng.choice(list(CELLS)))
    return thing.replace(style=style)


def _two_things(rng: Random, background: Background) -> tuple[tuple[Thing, ...], str]:
    relation = rng.choice(RELATIONS)
    colors = [c for c in rng.sample(list(COLORS), len(COLORS)) if c not in background.colors][:2]
    looks = [(rng.choice(SHAPES), color, rng.choice(list(SIZES))) for color in colors]
    things = things_in_relation(relation, looks)
    if relation != "inside":
        things = tuple(t.replace(style=_style(rng, t.shape, t.radius)) for t in things)
    return things, relation


def text_to_image(rng: Random, kind: str | None = None, complete: bool = False) -> Sample:
    """One of single, pair, count, word, empty; the mix of training unless `kind` is given."""
    while not (sample := _text_to_image(rng, kind, complete)).scene.legible:
        pass
    return sample


def edit(rng: Random, kind: str | None = None) -> Sample:
    """One of `EDITS`: an instruction, the scene before and the scene after."""
    while True:
        sample = _edit(rng, kind or rng.choices(EDITS, EDIT_SHARES)[0])
        if sample.before is not None and sample.before.legible and sample.scene.legible:
            return sample


def _text_to_image(rng: Random, kind: str | None, complete: bool) -> Sample:
    kind = kind or rng.choices(("single", "pair", "count", "word", "empty"), TEXT_SHARES)[0]
    background = random_background(rng)
    if kind == "single":
        scene = Scene(background, (random_thing(rng, background.colors),))
    elif kind == "pair":
        things, relation = _two_things(rng, background)
        scene = Scene(background, things, relation)
    elif kind == "count":
        n = rng.randint(2, 4)
        thing = random_thing(rng, background.colors)
        if n == 3 or thing.size == "large":
            thing = thing.replace(radius=SIZES["small"], style="plain")
        scene = Scene(background, tuple(thing.replace(x=x, y=y) for x, y in COUNT_CENTERS[n]))
    elif kind == "word":
        background = random_background(rng, ("plain",))
        letters = "".join(rng.choice(list(FONT)) for _ in range(rng.randint(2, 4)))
        word = rng.choice(WORDS) if rng.random() < 0.5 else letters
        scene = Scene(background, word=word, word_color=_color_for(rng, *background.colors))
    elif kind == "empty":
        scene = Scene(background)
    else:
        raise ValueError(f"expected single, pair, count, word or empty; got {kind!r}")
    return Sample(kind, caption_of(rng, scene, complete), scene)


def _jitter(rng: Random, scene: Scene) -> Scene:
    """Nudge the things off the grid, so that an edit has to look at its reference."""
    if rng.random() < 0.5:
        return scene
    nudge = [(round(rng.uniform(-0.03, 0.03), 3), round(rng.uniform(-0.03, 0.03), 3)) for _ in scene.things]
    things = (
        t.replace(x=round(t.x + dx, 3), y=round(t.y + dy, 3)) for t, (dx, dy) in zip(scene.things, nudge, strict=True)
    )
    return scene.replace(things=tuple(things))


def apart(a: Thing, b: Thing) -> bool:
    """Two things that do not touch, nudged or not."""
    return math.dist((a.x, a.y), (b.x, b.y)) > 1.15 * (a.radius + b.radius) + 0.02


def _edit(rng: Random, kind: str) -> Sample:
    background = random_background(rng)
    one = kind in ("add", "move", "resize") or rng.random() < 0.5
    if one:
        thing = random_thing(rng, background.colors)
        if kind == "add" and thing.size == "large":  # leaves no room
            thing = thing.replace(radius=SIZES["medium"])
        before = Scene(background, (thing,))
    else:
        while True:
            first = random_thing(rng, background.colors)
            second = random_thing(rng, (*background.colors, first.color))
            if second.shape != first.shape and apart(first, second):
                break
        before = Scene(background, (first, second))
    before = _jitter(rng, before)
    thing, rest = before.things[0], before.things[1:]
    colored = rng.random() < 0.5
    name = f"the {describe_thing(thing, size=False, color=colored, style=False)}"
    if kind == "recolor":
        color = _color_for(rng, *background.colors, *(t.color for t in before.things))
        after = before.replace(things=(thing.replace(color=color), *rest))
        forms = [
            f"make {name} {color}",
            f"change the color of {name} to {color}",
            f"turn {name} {color}",
            f"recolor {name} {color}",
        ]
    elif kind == "remove":
        after = before.replace(things=rest)
        forms = [f"remove {name}", f"delete {name}", f"take {name} away"]
    elif kind == "add":
        while True:
            new = random_thing(rng, (*background.colors, thing.color))
            if apart(new, thing):
                break
        after = before.replace(things=(*before.things, new))
        forms = [
            f"{verb} {_article(describe_thing(new))} {rng.choice(PLACES[new.cell])}" for verb in ("add", "put", "draw")
        ]
    elif kind == "move":
        cell = rng.choice([c for c in CELLS if c != thing.cell])
        x, y = CELLS[cell]
        after = before.replace(things=(thing.replace(x=x, y=y), *rest))
        forms = [f"move {name} to the {cell}", f"put {name} {rng.choice(PLACES[cell])}"]
    elif kind == "resize":
        size = rng.choice([s for s in SIZES if s != thing.size])
        if size == "small" and thing.style == "outlined":
            size = "large" if thing.size == "medium" else "medium"
        after = before.replace(things=(thing.replace(radius=SIZES[size]), *rest))
        forms = [f"make {name} {size}", f"change the size of {name} to {size}"]
    elif kind == "background":
        while True:
            new_background = random_background(rng)
            if new_background != background and Scene(new_background, before.things).legible:
                break
        after = before.replace(background=new_background)
        phrase = describe_background(rng, new_background)
        same = (
            "the same picture" if rest else f"the same {describe_thing(thing, size=False, color=colored, style=False)}"
        )
        forms = [
            f"change the background to {phrase}",
            f"{same} on {phrase}",
            f"put {name if not rest else 'them'} on {phrase}",
        ]
    elif kind == "style":
        styles = ["plain", "striped"] + (
            ["outlined"] if thing.radius > 0.14 and thing.shape not in ("star", "cross") else []
        )
        style = rng.choice([s for s in styles if s != thing.style])
        after = before.replace(things=(thing.replace(style=style), *rest))
        words = {"striped": ("striped",), "outlined": ("outlined",), "plain": ("plain", "solid")}[style]
        forms = [f"make {name} {rng.choice(words)}", f"draw {name} {rng.choice(words)}"]
    elif kind == "reference":
        # Another thing somewhere else, and the words do not say in which style.
        style = rng.choice(STYLES)
        before, after = (Scene(random_background(rng, ("plain",)), (_styled_thing(rng, style),)) for _ in range(2))
        new, on = after.things[0], describe_background(rng, after.background)
        forms = [
            f"{_article(describe_thing(new, style=False))} {rng.choice(PLACES[new.cell])} of {on} in {which} style"
            for which in ("the same", "this")
        ]
    else:
        raise ValueError(f"expected one of {', '.join(EDITS)}; got {kind!r}")
    return Sample(kind, _sentence(rng, rng.choice(forms)), after, before)
