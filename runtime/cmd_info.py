"""`fluxkiln info`: what a model file is, or how an image was made."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="FILE", help="a safetensors file, a model's folder, or an image")
    parser.add_argument("--json", action="store_true", help="for machines")


def run(args: argparse.Namespace) -> int:
    from fluxkiln import metadata

    if args.path.suffix.lower() in metadata.SUFFIXES:
        from fluxkiln.report import to_text

        record = metadata.read(args.path)
        print(record.to_json(indent=2) if args.json else to_text(record))
    else:
        from fluxkiln import info

        description = info.describe(args.path)
        print(info.to_json(description) if args.json else info.to_text(description))
    return 0
