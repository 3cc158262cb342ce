"""What the judge says of pictures that are there already, ours or anybody's: `fluxkiln bench image judge`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fluxkiln.bench import fidelity, image


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", type=Path, nargs="+", help="each with a picture ID.png for every item, or for some")
    parser.add_argument("--suite", default="shapes", help="bundled suite or JSONL file")
    parser.add_argument("--category", nargs="+", help="only these categories")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.set_defaults(size=None, limit=None)


def run(args: argparse.Namespace) -> int:
    items = image.select(args)
    if not any(item.scene for item in items):
        raise ValueError(f"nothing to judge by: no item of {args.suite} has a scene")
    # Side by side means of the same items.
    there = fidelity.shared(*args.folders, names=[item.id for item in items])
    shared = [item for item in items if item.id in there]
    results = {str(folder): image.summarize(image.measure(shared, folder)) for folder in args.folders}
    if args.json:
        print(json.dumps(results))
        return 0
    for name, summary in results.items():
        print(f"{name}: {len(shared)} of {len(items)} items\n{image.table(summary)}")
    if len(results) > 1:
        print(image.sweep_table(results))
    return 0
