"""The curves of a run as a picture: its losses, and what the judge said of its snapshots."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

WIDTH, HEIGHT = 640, 240  # of a panel, pixels
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 24, 24  # around a panel's frame
COLORS = ((200, 60, 40), (40, 90, 200), (40, 150, 70), (150, 80, 170), (230, 140, 30))
JUDGED = ("single", "pair", "count", "word", "edits")  # what the judge's panel shows

Curve = Sequence[tuple[int, float]]  # steps and values


def curves(run: Path) -> None:
    """Write `run/loss.png`: a panel of the loss, on a logarithmic scale, for each stage in `log.jsonl`, and one of the
    shares that are right if `accuracy.jsonl` has any."""
    stages: dict[str, dict[int, float]] = {}
    for entry in _entries(run / "log.jsonl"):  # a resumed run repeats the steps that were not saved
        stages.setdefault(entry["stage"], {})[entry["step"]] = math.log10(entry["loss"])
    panels: list[tuple[str, Mapping[str, Curve], float, float]] = []
    for stage, losses in stages.items():
        points, low, high = list(losses.items()), min(losses.values()), max(losses.values())
        title = f"{stage}: loss {10**high:.3g} .. {10**low:.3g}, {points[-1][0]} steps"
        panels.append((title, {"": points}, low, high))
    if (run / "accuracy.jsonl").exists():
        judged = list(_entries(run / "accuracy.jsonl"))
        shares = {
            name: sorted((int(entry["snapshot"].split("-")[-1]), entry[name]) for entry in judged if name in entry)
            for name in JUDGED
        }
        panels.append((f"held out, {judged[-1]['each']} of each kind: all right, 0 .. 100 %", shares, 0.0, 1.0))
    image = Image.new("RGB", (WIDTH, HEIGHT * max(1, len(panels))), "white")
    for row, panel in enumerate(panels):
        image.paste(_panel(*panel), (0, row * HEIGHT))
    image.save(run / "loss.png")


def _entries(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _panel(title: str, lines: Mapping[str, Curve], low: float, high: float) -> Image.Image:
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen, wide, tall = ImageDraw.Draw(image), WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    steps = [step for points in lines.values() for step, _ in points]
    first, span = min(steps), max(1, max(steps) - min(steps))
    pen.text((LEFT, 6), title, fill="black")
    pen.rectangle((LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM), outline=(180, 180, 180))
    for step, anchor in ((first, "la"), (max(steps), "ra")):
        pen.text((LEFT + wide * (step - first) / span, HEIGHT - BOTTOM + 4), str(step), fill="black", anchor=anchor)
    for i, ((name, points), color) in enumerate(zip(lines.items(), COLORS, strict=False)):
        place = [
            (LEFT + wide * (step - first) / span, TOP + tall * (high - value) / max(high - low, 1e-9))
            for step, value in points
        ]
        pen.line(place, fill=color, width=2)
        pen.text((4, TOP + 14 * i), name, fill=color)
    return image
