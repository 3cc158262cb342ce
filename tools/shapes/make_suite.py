"""Write the benchmark's held-out suites: `python -m shapes.make_suite FOLDER` (in tools/).

shapes            prompts and edits, one by one
shapes-turns      edits in sequence, each of the picture that the one before it made
shapes-negative   prompts that leave the background open, and a colour that it should not have
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random

from fluxkiln.bench.shapes_scene import CELLS, COLORS, SHAPES, SIZES, Scene, Thing, held_out

from . import captions
from .captions import Sample

COUNTS = {"single": 150, "pair": 150, "count": 100, "word": 100}
EDITS_EACH = 72  # of each kind
SEQUENCES, TURNS = 50, 5
NEGATIVES = 96  # as many for each colour


def samples(seed: int = 2024) -> list[Sample]:
    """Held-out samples, each combination once, every attribute said in the caption."""
    rng, seen, result = Random(seed), set[str](), list[Sample]()
    wanted = {**COUNTS, **dict.fromkeys(captions.EDITS, EDITS_EACH)}
    for kind, n in wanted.items():
        while n:
            sample = _drawn(rng, kind)
            if held_out(sample.combination) and sample.combination not in seen:
                seen.add(sample.combination)
                result.append(sample)
                n -= 1
    # What can be asked for in another way gives way to its like, of which every way is held out. The others stay as
    # they were: none of them is among the edits by which the bundled weights were chosen.
    other = Random(f"{seed} every way")
    return [sample if sample.held_out else _like(other, sample, seen) for sample in result]


def _drawn(rng: Random, kind: str) -> Sample:
    return captions.edit(rng, kind) if kind in captions.EDITS else captions.text_to_image(rng, kind, True)


def _like(rng: Random, sample: Sample, seen: set[str]) -> Sample:
    while True:
        made = _drawn(rng, sample.kind)
        alike = made.scene.relation == sample.scene.relation and len(made.scene.things) == len(sample.scene.things)
        if alike and made.held_out and not seen.intersection(made.ways):
            seen.update(made.ways)
            return made


def sequences(seed: int = 2025) -> list[list[Sample]]:
    """Chains of held-out edits of one object, which stays; what is added is removed in the next turn."""
    rng = Random(seed)
    return [_sequence(rng) for _ in range(SEQUENCES)]


def _sequence(rng: Random) -> list[Sample]:
    scene = captions.text_to_image(rng, "single", True).scene
    turns: list[Sample] = []
    while len(turns) < TURNS:
        last = turns[-1].kind if turns else None
        kinds = [k for k in captions.EDITS if k not in (last, "remove", "reference")]
        kinds = ["remove"] if len(scene.things) > 1 else kinds
        turn = next((t for t in (_turn(rng, rng.choice(kinds), scene) for _ in range(1000)) if t is not None), None)
        if turn is None:  # nothing held out leads on from here
            return _sequence(rng)
        turns.append(turn)
        scene = turn.scene
    return turns


def _turn(rng: Random, kind: str, before: Scene) -> Sample | None:
    """A held-out edit of the scene, None where chance did not find one."""
    thing, name = before.things[0], f"the {before.things[0].shape}"
    free = [c for c in COLORS if c not in (*before.background.colors, *thing.colors)]
    after = before
    if kind == "recolor":
        color = rng.choice(free)
        after, text = before.replace(things=(thing.replace(color=color),)), f"make {name} {color}"
    elif kind == "move":
        cell = rng.choice(list(CELLS))
        x, y = CELLS[cell]
        after, text = before.replace(things=(thing.replace(x=x, y=y),)), f"move {name} to the {cell}"
    elif kind == "resize":
        size = rng.choice(list(SIZES))
        if thing.style != "outlined" or size != "small":
            after = before.replace(things=(thing.replace(radius=SIZES[size]),))
        text = f"make {name} {size}"
    elif kind == "style":
        style = rng.choice(("plain", "striped"))
        after, text = before.replace(things=(thing.replace(style=style),)), f"make {name} {style}"
    elif kind == "background":
        background = captions.random_background(rng)
        text = f"change the background to {captions.describe_background(rng, background)}"
        after = before.replace(background=background)
    elif kind == "add":
        shape, size = rng.choice([s for s in SHAPES if s != thing.shape]), rng.choice(("small", "medium"))
        new = Thing.of(shape, rng.choice(free), size, rng.choice(list(CELLS)))
        text = f"add a {captions.describe_thing(new)} {captions.PLACES[new.cell][0]}"
        if thing.size != "large" and captions.apart(new, thing):
            after = before.replace(things=(thing, new))
    else:
        extra = before.things[1]
        after, text = before.replace(things=(thing,)), f"remove the {extra.color} {extra.shape}"
    sample = Sample(kind, text, after, before)
    return sample if after != before and sample.held_out and after.legible else None


def negatives(seed: int = 2026) -> list[tuple[Sample, str]]:
    """Held-out prompts for one thing that leave the background open, each with a colour that it should not have."""
    rng, result = Random(seed), []
    while len(result) < NEGATIVES:
        sample = captions.text_to_image(rng, "single", True)
        color = list(COLORS)[len(result) % len(COLORS)]
        thing = sample.scene.things[0]
        if sample.held_out and color not in thing.colors:
            text = f"a {captions.describe_thing(thing)} {captions.PLACES[thing.cell][0]}"
            result.append((Sample("negative", text, sample.scene), color))
    return result


def lines() -> dict[str, list[dict]]:
    """Every suite by its name, as objects of the format."""
    suites: dict[str, list[dict]] = {"shapes": [], "shapes-turns": [], "shapes-negative": []}
    numbers: dict[str, int] = {}
    for sample in samples():
        number = numbers[sample.kind] = numbers.get(sample.kind, -1) + 1
        suites["shapes"].append(_item(f"{sample.kind}-{number:03}", sample.kind, sample))
    for i, turns in enumerate(sequences()):
        for j, sample in enumerate(turns, 1):
            item = _item(f"sequence-{i:02}-{j}", f"turn {j}", sample)
            suites["shapes-turns"].append(item if j == 1 else item | {"follows": f"sequence-{i:02}-{j - 1}"})
    for i, (sample, color) in enumerate(negatives()):
        item = _item(f"negative-{i:02}", "negative", sample)
        suites["shapes-negative"].append(item | {"negative_prompt": f"a {color} background", "without": color})
    return suites


def _item(name: str, category: str, sample: Sample) -> dict:
    item = {"id": name, "category": category, "prompt": sample.caption, "scene": sample.scene.to_dict()}
    if sample.before:
        item["before"] = sample.before.to_dict()
    if sample.scene.word:
        item["text"] = sample.scene.word
    return item


def main() -> None:
    for name, items in lines().items():
        text = "".join(json.dumps(item, separators=(",", ":")) + "\n" for item in items)
        (Path(sys.argv[1]) / f"{name}.jsonl").write_text(text)


if __name__ == "__main__":
    main()
