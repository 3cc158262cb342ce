"""What `fluxkiln build` and `fluxkiln export` are told alike: which graph of which model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fluxkiln.export import FORMS, PARTS


def add_graph_arguments(parser: argparse.ArgumentParser, precisions: Sequence[str]) -> None:
    """Add the arguments of `fluxkiln.export.parts.export`; `precisions` are those that may be asked for."""
    parser.add_argument("--model", required=True, help="checkpoint, folder, hub repository or bundled model")
    parser.add_argument("--part", default="transformer", choices=PARTS, help="of the model")
    parser.add_argument(
        "--form",
        default="step",
        choices=FORMS,
        help="of the transformer: given its modulation (what runs images), "
        "with the inputs of the released ONNX files, or with a LoRA's matrices as inputs",
    )
    parser.add_argument("--precision", default="bf16", choices=precisions)
    parser.add_argument("--recipe", type=Path, help="JSON file of a recipe, instead of the precision's own")
