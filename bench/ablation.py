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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fluxkiln.bench import image, scoring
from fluxkiln.bench.fidelity import fidelity, files
from fluxkiln.bench.image import Settings
from fluxkiln.bench.suite import Item
from fluxkiln.cli import file_path, finite
from fluxkiln.cli_model import DEFAULT_MODEL
from fluxkiln.files import write_text
from fluxkiln.kernels.recipe import BY_NORM, BY_TILE, Recipe, rules
from fluxkiln.select import choose

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


def latents(pipe: Pipeline, items: Sequence[Item], settings: Settings, made: Path | None = None) -> list[Tensor]:
    """Final latents `[L, C]` of each item in fp64; `made` is the folder of pictures that they may follow."""
    outputs = (image.request(pipe, item, settings, made, output_type="latent") for item in items)
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


def step_errors(
    pipe: Pipeline, model: str, items: Sequence[Item], settings: Settings, made: Path | None = None
) -> dict[str, float]:
    """How far one and four steps end from those of eager in bf16, from identical noise: medians over the items.

    Args:
        pipe: left with that transformer, so that two of them never share the memory.
        model: what its transformer was opened from.
        made: folder of pictures that the items may follow.
    """
    import torch

    import fluxkiln

    device, runs = pipe.device, {n: replace(settings, steps=n) for n in (1, 4)}
    found = {n: latents(pipe, items, run, made) for n, run in runs.items()}
    pipe.transformer = None
    pipe.transformer = fluxkiln.load_transformer(model, backend="eager", device=device, dtype=torch.bfloat16)
    return {f"{n} steps": relative_errors(found[n], latents(pipe, items, run, made)) for n, run in runs.items()}


def ablate(
    pipe: Pipeline,
    recipes: Mapping[str, Recipe],
    load: Callable[[Recipe], Transformer],
    items: Sequence[Item],
    settings: Settings,
) -> Iterator[dict[str, Any]]:
    """A row for the unquantised model and one for each recipe, each as soon as it is measured.

    Args:
        pipe: left with the last recipe's transformer: only one at a time is in memory.
        load: makes a recipe's transformer.
    """
    first = replace(settings, steps=1)
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
            made = image.make(pipe, items, folder, settings, progress=False, callback=ends)
            if recipe is None:
                all_steps = ends.latents
                row["record"] = image.common(made)
            else:
                row["error"] = relative_errors(ends.latents, all_steps)
                originals = files(truth)
                row |= fidelity({name: (path, originals[name]) for name, path in files(folder).items()})
            if judged := [verdict for verdict in scoring.measure(items, folder) if "ok" in verdict]:
                row |= {"right": sum(verdict["ok"] for verdict in judged), "of": len(judged)}
            yield row


def recipes(formats: Sequence[str]) -> dict[str, Recipe]:
    """A recipe for each format and kind of layer."""
    names = {f"{form} {kind}": (form, patterns) for form in formats for kind, patterns in KINDS.items()}
    return {name: Recipe(name, tuple(rules(*what))) for name, what in names.items()}


def _line(row: dict[str, Any]) -> str:
    numbers = {"one_step_error": ".2e", "error": ".2e", "psnr": ".1f", "ssim": ".4f", "flip": ".4f"}
    cells = [f"{row[key]:{form}}" if row.get(key) is not None else "-" for key, form in numbers.items()]
    right = f"{row['right']}/{row['of']}" if "right" in row else "-"
    return f"{row['layers']:24} " + " ".join(f"{cell:>9}" for cell in (*cells, right))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    image.add_model_arguments(parser)
    parser.add_argument("--guidance", type=finite, help="distilled guidance (default: the model's)")
    parser.add_argument("--format", nargs="+", default=["fp8", "nvfp4"], choices=["fp8", "nvfp4"])
    parser.add_argument("--out", type=file_path, help="JSON file to write")


def run(args: argparse.Namespace) -> int:
    items = image.select(args)
    if args.precision not in image.DTYPES:
        wanted = " or ".join(image.DTYPES)
        raise ValueError(f"ablate quantises by itself: --precision must be {wanted}, got {args.precision!r}")
    one_recipe = "ablate changes the recipe, and an engine has one: take --backend eager or triton"
    if args.backend == "trt":
        raise ValueError(one_recipe)
    if turn := next((item.id for item in items if item.follows), None):
        raise ValueError(f"ablate makes every picture from the same input: {turn} follows another, leave it out")

    import fluxkiln

    planned = recipes(args.format)
    pipe = image.open_model(args)
    model = pipe.transformer
    assert model.loaded is not None
    args.backend = model.loaded.choice.backend  # what `auto` chose for the unquantised model makes every row
    if args.backend == "trt":
        raise ValueError(one_recipe)
    for recipe in planned.values():  # a refusal now, not after hours
        choose(args.backend, model.config, recipe, model.device, model.dtype)

    def load(recipe: Recipe) -> Any:
        options = image.model_options(args)
        return fluxkiln.load_transformer(image.source(args), recipe=recipe, **options)

    settings = Settings(image.steps(args), args.guidance, args.seed)
    heading = ("one step", f"{settings.steps or 'all'} steps", "PSNR", "SSIM", "FLIP", "right")
    if not args.json:
        print(f"{'quantised':24} " + " ".join(f"{cell:>9}" for cell in heading))
    results: dict[str, Any] = {
        "suite": args.suite,
        "model": image.source(args),
        "items": len(items),
        **asdict(settings),
    }
    if image.source(args) == DEFAULT_MODEL:
        results["note"] = image.SHAPES_NOTE
    results["rows"] = []
    for row in ablate(pipe, planned, load, items, settings):
        results["rows"].append(row)
        if args.out:
            write_text(args.out, json.dumps(results, indent=1) + "\n")
        if not args.json:
            print(_line(row), flush=True)
    if args.json:
        print(json.dumps(results))
    elif "note" in results:
        print(results["note"])
    return 0
