"""Which model a command runs and how: its options, and the pipeline that they mean."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fluxkiln.pipeline import Pipeline
    from fluxkiln.record import Record

DEFAULT_MODEL = "shapes"
FILES = ("transformer", "vae", "clip", "t5", "tokenizers")
OPTIONS = ("variant", "precision", "recipe", "backend", "fallback", "engine", "device")


def add_arguments(parser: argparse._ActionsContainer) -> None:
    """All of `FILES` and `OPTIONS`."""
    add_source(parser)
    parser.add_argument("--precision", help="fp32, bf16, fp8 or nvfp4 (default bf16)")
    parser.add_argument("--recipe", metavar="FILE", help="JSON: which layer gets which format")
    parser.add_argument("--backend", help="auto, eager, triton or trt (default auto: the fastest that can run it)")
    parser.add_argument("--fallback", action="store_true", help="take another backend if that one cannot, and say so")
    parser.add_argument(
        "--engine", metavar="KEY|FOLDER", help="which engine --backend trt runs (default: one that fits)"
    )
    parser.add_argument("--device", help="cuda, cuda:1 or cpu (default: cuda if there is one)")


def add_source(parser: argparse._ActionsContainer) -> None:
    """Which model: whole, or as single files."""
    parser.add_argument("--model", help=f"hub name, folder or bundled model (default {DEFAULT_MODEL})")
    parser.add_argument("--transformer", metavar="FILE", help="instead of --model: single files, as ComfyUI has them")
    for part in ("vae", "clip", "t5"):
        parser.add_argument(f"--{part}", metavar="FILE")
    parser.add_argument("--tokenizers", metavar="FOLDER", help="for single files: tokenizer/ and tokenizer_2/")
    parser.add_argument("--variant", help="dev, schnell, kontext, fill, canny or depth, where the files do not tell")


def model_files(args: argparse.Namespace) -> dict[str, Any]:
    """The single files that were given instead of a model, by the names that `Pipeline.from_files` has for them.

    Raises:
        ValueError: a model was given too, or no transformer.
    """
    files = {name: getattr(args, name) for name in FILES if getattr(args, name) is not None}
    if files and args.model:
        raise ValueError(f"give either --model or single files, not both (--{next(iter(files))})")
    if files and "transformer" not in files:
        raise ValueError("single files need --transformer FILE")
    return files


def open_pipeline(args: argparse.Namespace, record: Record | None = None) -> Pipeline:
    """The pipeline that the options name; with a record, as that ran unless an option says otherwise."""
    from fluxkiln.pipeline import Pipeline

    options = {name: getattr(args, name) for name in OPTIONS}
    if record is not None:
        import torch

        from fluxkiln.kernels.recipe import Recipe
        from fluxkiln.opening import ENGINE

        options |= {
            name: options[name] or getattr(record, name) for name in ("precision", "backend", "device", "variant")
        }
        options["dtype"] = getattr(torch, record.dtype)
        if record.recipe and not (args.precision or args.recipe):
            options["recipe"] = Recipe.from_json(record.recipe)
        engine = next((part.source for part in record.parts if part.name == ENGINE), None)
        options["engine"] = options["engine"] or (engine if options["backend"] == "trt" else None)
    options = {name: value for name, value in options.items() if value}
    if files := model_files(args):
        return Pipeline.from_files(**files, **options)
    return Pipeline.from_pretrained(args.model or _recorded_model(args, record), **options)


def _recorded_model(args: argparse.Namespace, record: Record | None) -> str:
    """The default model, or the one that a record names.

    Raises:
        FileNotFoundError: a record has names of files, but not where they are.
    """
    from fluxkiln.hub import BUNDLED

    if record is None:
        return DEFAULT_MODEL
    from fluxkiln.opening import ENGINE

    sources = {part.name: part.source for part in record.parts if part.name != ENGINE}
    names = set(sources.values())
    if len(names) == 1 and ("/" in (name := names.pop()) or name in BUNDLED):
        return name
    files = ", ".join(f"{part} {source}" for part, source in sources.items())
    raise FileNotFoundError(f"{args.repeat} was made with {files}: say where that is with --model or --transformer …")
