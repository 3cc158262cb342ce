"""`fluxkiln bench image ablate`: which linears of the blocks tolerate FP8 and FP4.

One row per kind of layer and format, that kind alone quantised: how far one step and a whole denoise from the same
noise end from those of the unquantised model, how far the pictures do, and, for a suite with scenes, what the judge
says. The last rows quantise everything at once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fluxkiln.bench import image
from fluxkiln.bench.fidelity import fidelity
from fluxkiln.bench.image import Settings
from fluxkiln.bench.suite import Item
from fluxkiln.files import write_text
from fluxkiln.kernels.recipe import BY_NORM, BY_TILE, Recipe, Rule

if TYPE_CHECKING:
    from fluxkiln.pipeline import Pipeline
    from fluxkiln.transformer import Transformer

KINDS = {
    "double qkv": ("double_blocks.*_attn.qkv",),
    "double proj": ("double_blocks.*_attn.proj",),
    "double mlp in": ("double_blocks.*_mlp.0",),
    "double mlp out": ("double_blocks.*_mlp.2",),
    "single linear1": ("single_blocks.*.linear1",),
    "single linear2": ("single_blocks.*.linear2",),
    "all": (*BY_NORM, *BY_TILE),
}


def latents(pipe: Pipeline, items: Sequence[Item], settings: Settings) -> list[Tensor]:
    """Final latents `[L, C]` of each item in fp64."""
    outputs = (image.request(pipe, item, settings, output_type="latent") for item in items)
    return [output.images[0].double() for output in outputs]


class _Ends:
    """Callback of a pipeline that keeps the latents `[L, C]` after the last step of each picture, in fp64."""

    def __init__(self) -> None:
        self.latents: list[Tensor] = []

    def __call__(self, step: int, sigma: float, x: Tensor) -> None:
        if step:
            self.latents.pop()
        self.latents.append(x[0].double())


def relative_errors(results: Sequence[Tensor], truths: Sequence[Tensor]) -> float:
    """Median of the relative distances in the Euclidean norm."""
    pairs = zip(results, truths, strict=True)
    return statistics.median(((a - b).norm() / b.norm()).item() for a, b in pairs)


def step_errors(pipe: Pipeline, model: str, items: Sequence[Item], settings: Settings) -> dict[str, float]:
    """How far one and four steps end from those of eager in bf16, from identical noise: medians over the items.

    Args:
        pipe: left with that transformer, so that two of them never share the memory.
        model: what its transformer was opened from.
    """
    import torch

    import fluxkiln

    device, runs = pipe.device, {n: replace(settings, steps=n) for n in (1, 4)}
    found = {n: latents(pipe, items, run) for n, run in runs.items()}
    pipe.transformer = None
    pipe.transformer = fluxkiln.load_transformer(model, backend="eager", device=device, dtype=torch.bfloat16)
    return {f"{n} steps": relative_errors(found[n], latents(pipe, items, run)) for n, run in runs.items()}


def ablate(
    pipe: Pipeline,
    recipes: Mapping[str, Recipe],
    load: Callable[[Recipe], Transformer],
    items: Sequence[Item],
    settings: Settings,
    tell: Callable[[dict[str, Any]], object] = lambda row: None,
) -> list[dict[str, Any]]:
    """A row for the unquantised model and one for each recipe.

    Args:
        pipe: left with the last recipe's transformer: only one at a time is in memory.
        load: makes a recipe's transformer.
        tell: gets each row as soon as there is one.
    """
    first, rows = replace(settings, steps=1), list[dict[str, Any]]()
    one, all_steps = latents(pipe, items, first), list[Tensor]()
    with tempfile.TemporaryDirectory() as scratch:
        truth = Path(scratch) / "unquantised"
        for i, (name, recipe) in enumerate({"unquantised": None, **recipes}.items()):
            folder = truth if recipe is None else Path(scratch) / str(i)
            row: dict[str, Any] = {"layers": name}
            if recipe is not None:
                pipe.transformer = None
                pipe.transformer = load(recipe)
                row["one_step_error"] = relative_errors(latents(pipe, items, first), one)
            ends = _Ends()
            image.make(pipe, items, folder, settings, progress=False, callback=ends)
            if recipe is None:
                all_steps = ends.latents
            else:
                row["error"] = relative_errors(ends.latents, all_steps)
                row |= fidelity(folder, truth)
            if judged := [verdict for verdict in image.measure(items, folder) if "ok" in verdict]:
                row |= {"right": sum(verdict["ok"] for verdict in judged), "of": len(judged)}
            rows.append(row)
            tell(row)
    return rows


def recipes(formats: Sequence[str], scale: str = "row") -> dict[str, Recipe]:
    """A recipe for each format and kind of layer; `scale` is of inputs that are written by a fused product."""
    found = {}
    for form in formats:
        for kind, patterns in KINDS.items():
            rules = tuple((p, Rule(form, scale if p in BY_TILE else "row")) for p in patterns)
            found[f"{form} {kind}"] = Recipe(f"{form} {kind}", rules)
    return found


def _line(row: dict[str, Any]) -> str:
    numbers = {"one_step_error": ".2e", "error": ".2e", "psnr": ".1f", "ssim": ".4f", "flip": ".4f"}
    cells = [f"{row[key]:{form}}" if row.get(key) is not None else "-" for key, form in numbers.items()]
    right = f"{row['right']}/{row['of']}" if "right" in row else "-"
    return f"{row['layers']:24} " + " ".join(f"{cell:>9}" for cell in (*cells, right))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    image.add_model_arguments(parser)
    parser.add_argument("--guidance", type=float, help="distilled guidance (default: the model's)")
    parser.add_argument("--format", nargs="+", default=["fp8", "nvfp4"], choices=["fp8", "nvfp4"])
    parser.add_argument("--scale", default="row", choices=["row", "bound"], help="of inputs behind a fused product")
    parser.add_argument("--out", type=Path, help="JSON file to write")


def run(args: argparse.Namespace) -> int:
    items = image.select(args)

    import fluxkiln

    pipe = fluxkiln.Pipeline.from_pretrained(args.model, **image.model_options(args))

    def load(recipe: Recipe) -> Any:
        options = image.model_options(args)
        return fluxkiln.load_transformer(args.model, recipe=recipe, **options)

    heading = ("one step", f"{args.steps} steps", "PSNR", "SSIM", "FLIP", "right")
    if not args.json:
        print(f"{'quantised':24} " + " ".join(f"{cell:>9}" for cell in heading))
    settings = Settings(args.steps, args.guidance, args.seed)
    tell = (lambda row: None) if args.json else (lambda row: print(_line(row), flush=True))
    rows = ablate(pipe, recipes(args.format, args.scale), load, items, settings, tell)
    results: dict[str, Any] = {"suite": args.suite, "model": args.model, "items": len(items), **asdict(settings)}
    if args.model == "shapes":
        results["note"] = image.SHAPES_NOTE
    results["rows"] = rows
    if args.json:
        print(json.dumps(results))
    elif "note" in results:
        print(results["note"])
    if args.out:
        write_text(args.out, json.dumps(results, indent=1) + "\n")
    return 0
