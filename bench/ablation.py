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
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fluxkiln.bench import image
from fluxkiln.bench.suite import Item
from fluxkiln.kernels.recipe import BY_NORM, BY_TILE, Recipe, Rule

if TYPE_CHECKING:
    from fluxkiln.pipeline import Pipeline

KINDS = {
    "double qkv": ("double_blocks.*_attn.qkv",),
    "double proj": ("double_blocks.*_attn.proj",),
    "double mlp in": ("double_blocks.*_mlp.0",),
    "double mlp out": ("double_blocks.*_mlp.2",),
    "single linear1": ("single_blocks.*.linear1",),
    "single linear2": ("single_blocks.*.linear2",),
    "all": (*BY_NORM, *BY_TILE),
}


def latents(pipe: Pipeline, items: Sequence[Item], steps: int, seed: int) -> list[Tensor]:
    """Final latents `[1, L, C]` of each item after `steps` steps, always from the same noise."""
    return [
        pipe(
            item.prompt,
            image=item.source(pipe.side),
            width=item.width,
            height=item.height,
            seed=seed if item.seed is None else item.seed,
            num_inference_steps=steps,
            output_type="latent",
            progress=False,
        )
        .images[0]
        .double()
        for item in items
    ]


def relative_errors(results: Sequence[Tensor], truths: Sequence[Tensor]) -> float:
    """Median of the relative distances in the Euclidean norm."""
    pairs = zip(results, truths, strict=True)
    return statistics.median(((a - b).norm() / b.norm()).item() for a, b in pairs)


def ablate(pipe: Pipeline, recipes: dict[str, Recipe], load: Any, items: Sequence[Item], steps: int, seed: int) -> list:
    """A row for each recipe; `load(recipe)` makes its transformer. The pipeline is left as it came."""
    whole = pipe.transformer
    one, all_steps = latents(pipe, items, 1, seed), latents(pipe, items, steps, seed)
    settings, rows = image.Settings(steps, None, seed), []
    with tempfile.TemporaryDirectory() as scratch:
        truth = Path(scratch) / "truth"
        image.make(pipe, items, truth, settings, progress=False)
        for i, (name, recipe) in enumerate({"unquantised": None, **recipes}.items()):
            folder = Path(scratch) / str(i)
            row: dict[str, Any] = {"layers": name}
            try:
                if recipe is not None:
                    pipe.transformer = load(recipe)
                    row["one_step_error"] = relative_errors(latents(pipe, items, 1, seed), one)
                    row["error"] = relative_errors(latents(pipe, items, steps, seed), all_steps)
                    image.make(pipe, items, folder, settings, progress=False)
                    row |= image.fidelity(folder, truth)
            finally:
                pipe.transformer = whole
            measured = image.summarize(image.measure(items, folder if recipe is not None else truth))
            if measured:
                row["right"] = measured.get("all", next(iter(measured.values())))["right"]
                row["of"] = sum(item.scene is not None for item in items)
            rows.append(row)
            print(_line(row), flush=True)
    return rows


def _line(row: dict[str, Any]) -> str:
    numbers = {"one_step_error": ".2e", "error": ".2e", "psnr": ".1f", "ssim": ".4f", "flip": ".4f"}
    cells = [f"{row[key]:{form}}" if row.get(key) is not None else "-" for key, form in numbers.items()]
    right = f"{row['right']}/{row['of']}" if "right" in row else "-"
    return f"{row['layers']:24} " + " ".join(f"{cell:>9}" for cell in (*cells, right))


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="fluxkiln bench image ablate", description="Quantise one kind of layer at a time and measure the pictures."
    )
    image.add_model_arguments(parser)
    parser.add_argument("--format", nargs="+", default=["fp8", "nvfp4"], choices=["fp8", "nvfp4"])
    parser.add_argument("--scale", default="row", choices=["row", "bound"], help="of inputs behind a fused product")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    items = image.select(args)

    import fluxkiln

    pipe = fluxkiln.Pipeline.from_pretrained(args.model, **image.model_options(args))

    def load(recipe: Recipe) -> Any:
        options = image.model_options(args)
        return fluxkiln.load_transformer(args.model, recipe=recipe, **options)

    recipes = {}
    for form in args.format:
        for kind, patterns in KINDS.items():
            by_tile = set(patterns) & set(BY_TILE)
            rules = tuple((p, Rule(form, args.scale if p in by_tile else "row")) for p in patterns)
            recipes[f"{form} {kind}"] = Recipe(f"{form} {kind}", rules)
    heading = ("one step", f"{args.steps} steps", "PSNR", "SSIM", "FLIP", "right")
    print(f"{'quantised':24} " + " ".join(f"{cell:>9}" for cell in heading))
    rows = ablate(pipe, recipes, load, items, args.steps, args.seed)
    if args.model == "shapes":
        print(image.SHAPES_NOTE)
    if args.out:
        args.out.write_text(json.dumps({"suite": args.suite, "steps": args.steps, "rows": rows}, indent=1) + "\n")
    return 0
