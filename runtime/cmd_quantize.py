"""`fluxkiln quantize`: a checkpoint in fp8 or nvfp4, written once, so that loading it quantises nothing."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

CALIBRATION_STEPS = 8  # of the schedule: inputs are largest near its ends, and both are seen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="checkpoint, folder, hub repository or bundled model")
    parser.add_argument("target", type=Path, help="safetensors file to write")
    parser.add_argument("--precision", default="fp8", choices=("fp8", "nvfp4"))
    parser.add_argument("--recipe", type=Path, help="JSON file of a recipe, instead of the precision's own")
    parser.add_argument("--rank", type=int, metavar="R", help="low-rank branch beside every NVFP4 weight, e.g. 32")
    parser.add_argument(
        "--calibrate",
        type=Path,
        metavar="PROMPTS",
        help="text file with a prompt a line: smooth NVFP4 inputs and store input scales; SOURCE is a whole pipeline",
    )
    parser.add_argument("--device", help="where to quantise (default: the GPU if there is one)")
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from fluxkiln.checkpoint import open_checkpoint
    from fluxkiln.hub import resolve
    from fluxkiln.kernels.recipe import RECIPES
    from fluxkiln.load import default_device
    from fluxkiln.quantize import quantize_file, read_recipe

    recipe = read_recipe(args.recipe) if args.recipe else RECIPES[args.precision]
    if args.rank is not None:
        if all(rule.format != "nvfp4" for _, rule in recipe.rules):
            raise ValueError(f"--rank is of branches beside NVFP4 weights, and the recipe {recipe.name} has none")
        ranked = (
            (pattern, dataclasses.replace(rule, rank=args.rank) if rule.format == "nvfp4" else rule)
            for pattern, rule in recipe.rules
        )
        recipe = dataclasses.replace(recipe, rules=tuple(ranked))
    source, device = resolve(args.source, ("transformer",)), default_device(args.device)
    total = len(open_checkpoint(source).names)
    statistics = _calibrate(args) if args.calibrate else None
    if not args.json:
        print(recipe)
    with tqdm(total=total, desc="quantise", unit="tensor", leave=False, disable=None) as bar:
        counts = quantize_file(source, args.target, recipe, device, statistics, progress=lambda name: bar.update())
    size = args.target.stat().st_size
    if args.json:
        print(json.dumps({"target": str(args.target), "bytes": size, "layers": counts, "recipe": recipe.name}))
    else:
        layers = ", ".join(f"{count} {format}" for format, count in sorted(counts.items()))
        print(f"{args.target}: {size / 1e9:.2f} GB, linears: {layers}")
    return 0


def _calibrate(args: argparse.Namespace) -> dict:
    """Largest inputs of every layer, over the prompts of the file."""
    import fluxkiln
    from fluxkiln.batch import read_jobs
    from fluxkiln.quantize import calibrate

    prompts = [job["prompt"] for job in read_jobs(args.calibrate)]
    pipe = fluxkiln.Pipeline.from_pretrained(args.source, precision="bf16", backend="eager", device=args.device)

    def images() -> None:
        for seed, prompt in enumerate(prompts):
            pipe(prompt, seed=seed, num_inference_steps=CALIBRATION_STEPS)

    return calibrate(pipe.transformer, images)
