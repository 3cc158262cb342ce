"""The loss curves of a run as a picture."""

from __future__ import annotations

import json
import math
from pathlib import Path

from PIL import Image, ImageDraw

WIDTH, HEIGHT = 640, 240  # of a panel, pixels


def losses(log: Path, picture: Path) -> None:
    """One panel per stage, loss on a logarithmic scale over the steps."""
    stages: dict[str, list[tuple[int, float]]] = {}
    for line in log.read_text().splitlines():
        entry = json.loads(line)
        stages.setdefault(entry["stage"], []).append((entry["step"], entry["loss"]))
    image = Image.new("RGB", (WIDTH, HEIGHT * max(1, len(stages))), "white")
    pen = ImageDraw.Draw(image)
    for row, (stage, points) in enumerate(stages.items()):
        low, high = (math.log10(f(loss for _, loss in points)) for f in (min, max))
        last = max(step for step, _ in points)
        scale = [
            (
                50 + (WIDTH - 60) * step / last,
                (row + 0.1 + 0.8 * (high - math.log10(loss)) / max(high - low, 1e-9)) * HEIGHT,
            )
            for step, loss in points
        ]
        pen.line(scale, fill=(200, 60, 40), width=2)
        pen.text((55, row * HEIGHT + 4), f"{stage}: loss {10**high:.3g} .. {10**low:.3g}, {last} steps", fill="black")
        pen.rectangle((50, (row + 0.1) * HEIGHT, WIDTH - 10, (row + 0.9) * HEIGHT), outline=(180, 180, 180))
    image.save(picture)
