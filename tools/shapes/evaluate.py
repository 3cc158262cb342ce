"""The learning curve: what the judge says of every snapshot of a run.

    python -m shapes.evaluate --run RUN          in tools/

Quicker than `fluxkiln bench image`, since it samples in batches; the numbers that count are the benchmark's. The
pictures are kept in `RUN/pictures`, a folder for each snapshot, as `fluxkiln bench image compare` takes them, and the
curve is drawn into `RUN/loss.png`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from fluxkiln import images
from fluxkiln.autoencoder import Autoencoder
from fluxkiln.bench import image, scoring
from fluxkiln.bench.fidelity import contact_sheet
from fluxkiln.bench.suite import Item

from . import autoencoder as ae
from . import denoiser, plot
from .data import pixels
from .model import PICTURE, Denoiser, sample

BATCH = 32


def generate(
    model: Denoiser, autoencoder: Autoencoder, items: Sequence[Item], steps: int, guidance: float
) -> Iterator[tuple[Item, Image.Image]]:
    """Each item with a picture for it, in batches of text to image and then of edits."""
    for edits in (False, True):
        chosen = [item for item in items if item.is_edit is edits]
        for at in range(0, len(chosen), BATCH):
            part = chosen[at : at + BATCH]
            references = pixels([item.before for item in part], PICTURE, PICTURE) if edits else None
            prompts = [item.prompt for item in part]
            made = sample(model, autoencoder, prompts, references, steps=steps, guidance=guidance, seed=at)
            yield from zip(part, images.to_pictures(images.unit(made)), strict=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Judge the snapshots of a training run.")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--each", type=int, default=30, dest="limit", help="held-out items of each category")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--guidance", type=float, default=3.5)
    parser.add_argument("--last", type=int, default=0, help="only so many snapshots; 0: all (default)")
    parser.add_argument("--sheet", type=Path, help="contact sheet of the last snapshot")
    parser.set_defaults(suite="shapes", category=None, size=None)
    args = parser.parse_args()
    items, autoencoder = image.select(args), ae.load(args.run / "autoencoder.pt")
    for snapshot in sorted(args.run.glob("average-*.pt"))[-args.last :]:
        folder = args.run / "pictures" / snapshot.stem
        (folder / "images").mkdir(parents=True, exist_ok=True)
        model = denoiser.load(args.run, snapshot)
        for item, made in generate(model, autoencoder, items, args.steps, args.guidance):
            made.save(folder / "images" / f"{item.id}.png")
        summary = scoring.summarize(scoring.measure(items, folder))
        print(f"\n{snapshot.stem}\n{scoring.table(summary)}", flush=True)
        with open(args.run / "accuracy.jsonl", "a") as file:
            shares = {category: entry["right"] / entry["n"] for category, entry in summary.items()}
            file.write(json.dumps({"snapshot": snapshot.stem, "each": args.limit, **shares}) + "\n")
        plot.curves(args.run)
        if args.sheet:
            rows = ((item.prompt, image.pictures(item, folder, PICTURE)) for item in items)
            contact_sheet(rows, PICTURE).save(args.sheet)


if __name__ == "__main__":
    main()
