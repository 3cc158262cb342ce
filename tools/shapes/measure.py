"""What is published of the bundled model, for its card and docs/image-benchmark.md:

    python -m shapes.measure --runs RUNS --out ../bench/results/image          in tools/

One run after the other, as two share the cores badly. It goes on where it was stopped, and the pictures stay in RUNS.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch

from fluxkiln import images
from fluxkiln.autoencoder import load_autoencoder
from fluxkiln.bench import scoring, suite
from fluxkiln.bench.shapes_scene import draw
from fluxkiln.cli import main as fluxkiln
from fluxkiln.files import write_text
from fluxkiln.foreign import Part
from fluxkiln.hub import resolve
from fluxkiln.opening import part

SIZES = ("64x128", "128x64", "64x96", "96x64", "96x96", "128x128", "128x96", "96x128")
# Options of `fluxkiln bench image` by what is published of them. Several runs in a file are a folder each.
QUANTISED = "--limit 4 --reference {runs}/bf16 --floor {runs}/floor --step-errors 12 --precision"
RUNS = {
    "bf16": "--limit 4 --precision bf16",
    "floor": "--limit 4 --precision bf16 --peer diffusers --backend auto",
    "shapes": "--suite shapes",
    "shapes-turns": "--suite shapes-turns",
    "shapes-fp8": f"{QUANTISED} fp8",
    "shapes-nvfp4": f"{QUANTISED} nvfp4",
    "shapes-guidance": "--limit 10 --guidance 0 1 2 3.5 5",
    "shapes-negative": "--suite shapes-negative --true-cfg-scale 1 2 4",
    **{f"shapes-sizes/{size}": f"--limit 20 --category single pair count word --size {size}" for size in SIZES},
}
UNPUBLISHED = ("bf16", "floor")  # what others are compared with


def bench(*options: str) -> None:
    if status := fluxkiln(["bench", "image", *options]):
        raise SystemExit(status)


def read(results: Path) -> dict[str, Any]:
    """Of single pictures, only what is wrong with those that are."""
    found: dict[str, Any] = json.loads(results.read_text())
    return {key: value for key, value in found.items() if key != "items"} | {"wrong": wrong(found["items"])}


def wrong(rows: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Which checks each picture failed, by its name."""
    failed = {row["id"]: [name for name, right in row.get("checks", {}).items() if not right] for row in rows}
    return {name: checks for name, checks in failed.items() if checks}


def through_autoencoder(folder: Path) -> dict[str, Any]:
    """What the judge says of true pictures, encoded and decoded in bf16: mistakes that no transformer makes."""
    items, path = suite.load("shapes"), resolve("shapes")
    autoencoder = load_autoencoder(path, dtype=torch.bfloat16)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for item in items:
        assert item.scene is not None
        with torch.no_grad():
            made = autoencoder.decode(autoencoder.encode(images.pixels(draw(item.scene))))
        images.to_pictures(images.unit(made))[0].save(folder / "images" / f"{item.id}.png")
    rows = scoring.measure(items, folder)
    parts = [asdict(part(name, path, "shapes")) for name in get_args(Part)]
    return {"suite": "shapes", "summary": scoring.summarize(rows), "wrong": wrong(rows), "record": {"parts": parts}}


def published(runs: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and content of the file of each of `RUNS`."""
    for name in dict.fromkeys(run.split("/")[0] for run in RUNS if run not in UNPUBLISHED):
        folder = runs / name
        if (one := folder / "results.json").exists():
            yield name, read(one)
        else:
            yield name, {path.parent.name: read(path) for path in sorted(folder.glob("*/results.json"))}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure everything that is published of the bundled model.")
    parser.add_argument("--runs", type=Path, required=True, help="folder for pictures")
    parser.add_argument("--out", type=Path, required=True, help="folder for the published files")
    args = parser.parse_args()
    for name, options in RUNS.items():
        print(f"\n{name}", flush=True)
        more = (option.format(runs=args.runs) for option in options.split())
        bench("--backend", "eager", "--out", str(args.runs / name), *more)
    ablation = args.runs / "ablation.json"
    bench("ablate", "--backend", "eager", "--limit", "2", "--out", str(ablation))
    made = {"ablation": json.loads(ablation.read_text()), **dict(published(args.runs))}
    made["shapes-autoencoder"] = through_autoencoder(args.runs / "autoencoder")
    for name, results in made.items():
        write_text(args.out / f"{name}.json", json.dumps(results, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
