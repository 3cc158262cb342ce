"""The learning curve: what the judge says of every snapshot of a run.

    python -m shapes.evaluate --run RUN          in tools/

Quicker than `fluxkiln bench image`, since it samples in batches; the numbers that count are the benchmark's.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fluxkiln.autoencoder import Autoencoder
from fluxkiln.bench import image, shapes_judge, suite
from fluxkiln.bench.suite import Item

from .model import Denoiser, sample
from .train import load_autoencoder, load_denoiser

BATCH = 32


def to_pictures(pixels: Tensor) -> list[np.ndarray]:
    """`[B, 3, H, W]` in -1..1 to arrays `[H, W, 3]`, uint8."""
    return list(((pixels.detach() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy())


def generate(
    model: Denoiser, autoencoder: Autoencoder, items: list[Item], steps: int, guidance: float
) -> list[np.ndarray]:
    """A picture for each item, in batches of text to image and of edits."""
    result: dict[str, np.ndarray] = {}
    for edits in (False, True):
        chosen = [item for item in items if (item.before is not None) == edits]
        for at in range(0, len(chosen), BATCH):
            part = chosen[at : at + BATCH]
            references = None
            if edits:
                sources = np.stack([np.asarray(item.source()) for item in part])
                references = torch.from_numpy(sources).permute(0, 3, 1, 2).float() / 127.5 - 1
            prompts = [item.prompt for item in part]
            made = sample(model, autoencoder, prompts, references, steps=steps, guidance=guidance, seed=at)
            result |= dict(zip((item.id for item in part), to_pictures(made), strict=True))
    return [result[item.id] for item in items]


def judge(items: list[Item], pictures: list[np.ndarray]) -> list[dict]:
    """Rows as `fluxkiln.bench.image.summarize` takes them."""
    rows = []
    for item, pixels in zip(items, pictures, strict=True):
        assert item.scene is not None
        if item.before is None:
            verdict = shapes_judge.judge(pixels, item.scene)
        else:
            verdict = shapes_judge.judge_edit(np.asarray(item.source()), pixels, item.before, item.scene)
        rows.append({"id": item.id, "category": item.category, "ok": verdict.ok, "checks": verdict.checks})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Judge the snapshots of a training run.")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--each", type=int, default=30, help="held-out items of each category")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--guidance", type=float, default=3.5)
    parser.add_argument("--last", type=int, help="only so many snapshots")
    parser.add_argument("--sheet", type=Path, help="contact sheet of the last snapshot")
    args = parser.parse_args()
    autoencoder = load_autoencoder(args.run / "autoencoder.pt")
    counts: dict[str, int] = {}
    items = []
    for item in suite.load("shapes"):
        counts[item.category] = counts.get(item.category, 0) + 1
        if counts[item.category] <= args.each:
            items.append(item)
    snapshots = sorted(args.run.glob("average-*.pt"))[-(args.last or 10**6) :]
    for snapshot in snapshots:
        pictures = generate(load_denoiser(args.run, snapshot), autoencoder, items, args.steps, args.guidance)
        summary = image.summarize(judge(items, pictures))
        print(f"\n{snapshot.stem}\n{image.table(summary)}", flush=True)
        with open(args.run / "accuracy.jsonl", "a") as file:
            shares = {category: entry["right"] / entry["n"] for category, entry in summary.items()}
            file.write(json.dumps({"snapshot": snapshot.stem, "each": args.each, **shares}) + "\n")
    if args.sheet and snapshots:
        rows = []
        for item, pixels in zip(items, pictures, strict=True):
            source = item.source()
            made = [Image.fromarray(pixels)]
            rows.append((item.prompt, made if source is None else [source, *made]))
        image.contact_sheet(rows, 64).save(args.sheet)


if __name__ == "__main__":
    main()
