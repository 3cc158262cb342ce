"""Teach T5 to read before it is asked to paint: from its output alone, say what a caption is about.

FLUX.1's T5 knew English when the transformer met it. Learned from the pictures alone, ours left "a red star above a
blue cross" as loose words for thousands of steps: a probe of its output named a thing's shape in two of three pairs
and its colour no better than by chance among the colours mentioned.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fluxkiln.bench.shapes_scene import CELLS, COLORS, FONT, RELATIONS, SHAPES, SIZES, STYLES, Thing

from . import captions, workers
from .data import training_sample
from .model import Denoiser
from .muon import Muon, matrices
from .workers import average_gradients

BATCH = 128  # captions of a step and worker
LEARNING_RATE = 2e-3
_THING = {"shape": SHAPES, "color": COLORS, "size": SIZES, "style": STYLES, "cell": CELLS}
NOTHING = "nothing"
HALVES = 8  # columns of half a letter, across the picture
FIELDS: dict[str, tuple[str, ...]] = {
    "kind": ("single", "pair", "count", "word", "empty", *captions.EDITS),
    **{f"{field} {i}": tuple(values) for i in range(2) for field, values in _THING.items()},
    "background": ("plain", "striped", "gradient"),
    **{f"background {i}": tuple(COLORS) for i in range(2)},
    "relation": RELATIONS,
    "number": ("2", "3", "4"),
    "word": tuple(COLORS),
    # What is where, as whoever paints a part of the picture will ask.
    **{f"{cell}: shape": (*SHAPES, NOTHING) for cell in CELLS},
    **{f"{cell}: color": tuple(COLORS) for cell in CELLS},
    **{f"letter at {i}": (*FONT, NOTHING) for i in range(HALVES)},
}


def facts(sample: captions.Sample) -> dict[str, str]:
    """What the caption says, by field; the things of an edit are the one that is named and what becomes of it."""
    scene, before, kind = sample.scene, sample.before, sample.kind
    said = sample.caption.lower()
    if before is None:
        things = dict(enumerate(scene.things[: 1 if kind == "count" else 2]))
    else:
        things = {} if kind in ("add", "reference") else {0: before.things[0]}
        if kind != "remove":
            things[1] = scene.things[-1 if kind == "add" else 0]
    found = {"kind": kind}
    striped = f"striped {' and '.join(scene.background.colors)} background"
    for i, thing in things.items():
        fields = _THING if before is None or i else ("shape", "color")
        for field in fields:
            value = getattr(thing, field)
            # Said once of a pair that shares it, as sizes may be, it is anybody's.
            sharing = sum(getattr(other, field) == value for other in things.values()) if before is None else 1
            if said.replace(striped, "").count(value) >= sharing:
                found[f"{field} {i}"] = value
    told = ("background" in said or "gradient" in said) and all(color in said for color in scene.background.colors)
    if told and (before is None or kind in ("background", "reference")):
        found["background"] = scene.background.kind
        found |= {f"background {i}": color for i, color in enumerate(scene.background.colors)}
    if kind == "pair":
        found["relation"] = scene.relation or ""
    if kind == "count":
        found["number"] = str(len(scene.things))
    if kind == "word":
        word = scene.word or ""
        first = HALVES // 2 - len(word)
        found |= {"word": scene.word_color or ""}
        found |= {
            f"letter at {i}": word[(i - first) // 2] if first <= i < first + 2 * len(word) else NOTHING
            for i in range(HALVES)
        }
    return found | _layout(sample, said)


def _layout(sample: captions.Sample, said: str) -> dict[str, str]:
    """Shape and colour in each cell, if the caption settles them; of an edit, where something is added or moved to."""
    scene, kind = sample.scene, sample.kind
    if kind in ("add", "move"):
        things: tuple[Thing, ...] = (scene.things[-1 if kind == "add" else 0],)
        cells = [things[0].cell]
    elif kind in ("pair", "count") or (
        kind == "single" and any(p in said for p in captions.PLACES[scene.things[0].cell])
    ):
        things, cells = scene.things, list(CELLS)
    else:
        return {}
    found = {f"{cell}: shape": NOTHING for cell in cells}
    for thing in things[::-1]:  # the inner one of two last: it is the one that is seen
        found[f"{thing.cell}: shape"] = thing.shape
        if thing.color in said:
            found[f"{thing.cell}: color"] = thing.color
    return found


class Reader(nn.Module):
    """One question per field: it looks over the text's tokens `[B, L, D]` and answers from what it saw."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.question = nn.Parameter(torch.randn(len(FIELDS), width))
        self.key, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.answers = nn.ModuleList(nn.Linear(width, len(values)) for values in FIELDS.values())

    def forward(self, txt: Tensor) -> list[Tensor]:
        txt = self.norm(txt)
        weights = torch.softmax(self.question @ self.key(txt).mT / txt.shape[-1] ** 0.5, -1)
        seen = weights @ self.value(txt)
        return [answer(seen[:, i]) for i, answer in enumerate(self.answers)]


def loss_and_right(answers: list[Tensor], samples: list[captions.Sample]) -> tuple[Tensor, float]:
    """Mean cross-entropy over what the captions say, and the share of it that was read rightly."""
    told = [facts(sample) for sample in samples]
    losses, right, asked = [], 0, 0
    for (field, values), answer in zip(FIELDS.items(), answers, strict=True):
        asked_of = [values.index(facts[field]) if field in facts else -1 for facts in told]
        target = torch.tensor(asked_of, device=answer.device)
        losses.append(cross_entropy(answer, target, ignore_index=-1, reduction="sum"))
        right += int((answer.argmax(1) == target).sum())
        asked += int((target >= 0).sum())
    return torch.stack(losses).sum() / asked, right / asked


def train(
    rank: int, run: Path, out: Path, steps: int, seed: int, device: torch.device, log: Callable[..., None]
) -> None:
    """One worker's loop; worker 0 writes the state of a T5 that can read to `out`."""
    torch.manual_seed(seed)  # the first weights; what a step draws is decided by its number
    model = Denoiser(run / "tokenizers").to(device)
    reader = Reader(model.t5.config.d_model).to(device)
    hidden, other = matrices(model.t5)
    optimizer = Muon(hidden, [*other, *reader.parameters()])
    both, start, total = nn.ModuleList([model.t5, reader]), 0, 0.0
    parameters = list(both.parameters())
    partial = out.with_suffix(".partial")
    if partial.exists():
        state = torch.load(partial, map_location=device)
        both.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    for step in range(start, steps):
        rng = Random(f"{seed} reading {step} {rank}")
        samples = [training_sample(rng, edit=i % 2 == 1) for i in range(BATCH)]
        optimizer.zero_grad()
        _, ids = model.tokenize([s.caption for s in samples])
        with torch.autocast(device.type, torch.bfloat16):
            answers = reader(model.t5(ids.to(device)).last_hidden_state)
        loss, right = loss_and_right([a.float() for a in answers], samples)
        loss.backward()
        average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 50, 2 * (1 - step / steps))
        optimizer.step()
        if rank:
            continue
        done = step + 1
        total += right
        if done % 50 == 0:
            log(stage="reading", step=done, of=steps, loss=loss.item(), right=total / 50)
            total = 0.0
        if done % workers.SAVE_EVERY == 0 and done < steps:
            workers.save({"model": both.state_dict(), "optimizer": optimizer.state_dict(), "step": done}, partial)
    if rank == 0:
        workers.save(model.t5.state_dict(), out)
        partial.unlink(missing_ok=True)
