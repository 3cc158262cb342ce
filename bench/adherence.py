"""What the judge says of pictures that are there already, ours or anybody's: `fluxkiln bench image judge`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fluxkiln.bench import fidelity, image, scoring


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", type=Path, nargs="+", help="each with a picture ID.png for every item, or for some")
    parser.add_argument("--suite", default="shapes", help="bundled suite, JSONL file, or KontextBench folder")
    parser.add_argument("--category", nargs="+", help="only these categories")
    scoring.add_reader_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.set_defaults(size=None, limit=None)


def run(args: argparse.Namespace) -> int:
    items, judges = image.select(args), scoring.readers(args)
    if not (judges.reward or any(item.scene or (item.text and judges.words) for item in items)):
        raise ValueError(f"nothing to judge by: no item of {args.suite} has a scene, or a text that --ocr reads")
    # Side by side means of the same items.
    there = fidelity.shared(*args.folders, names=[item.id for item in items])
    shared = [item for item in items if item.id in there]
    rows = {str(folder): scoring.measure(shared, folder, judges) for folder in args.folders}
    results = {
        name: {"summary": scoring.summarize(of), "image_reward": scoring.rewards(of)} for name, of in rows.items()
    }
    if args.json:
        print(json.dumps(results))
        return 0
    for name, found in results.items():
        print(f"{name}: {len(shared)} of {len(items)} items")
        if found["summary"]:
            print(scoring.table(found["summary"]))
        if found["image_reward"]:
            print(fidelity.line("image_reward", found["image_reward"]))
    summaries = {name: found["summary"] for name, found in results.items() if found["summary"]}
    if len(summaries) > 1:
        print(scoring.sweep_table(summaries))
    return 0
