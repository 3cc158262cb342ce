"""`fluxkiln info`: what a model file is, or how an image was made."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="FILE", help="a model's file or folder, a bundled one, or an image")
    parser.add_argument("--json", action="store_true", help="for machines")


def run(args: argparse.Namespace) -> int:
    from fluxkiln import metadata

    if args.path.suffix.lower() in metadata.SUFFIXES:
        record = metadata.read(args.path)
        print(record.to_json(indent=2) if args.json else record)
    else:
        from fluxkiln import hub, info

        description = info.describe(hub.resolve(str(args.path)) if str(args.path) in hub.BUNDLED else args.path)
        print(info.to_json(description) if args.json else info.to_text(description))
    return 0
