"""`fluxkiln export`: the transformer as an ONNX file, its weights in one file beside it."""

from __future__ import annotations

import argparse
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

if TYPE_CHECKING:
    from fluxkiln.export.graph import Traced

MODEL, DATA = "model.onnx", "model.onnx.data"
ALIGNMENT = 4096  # bytes, so that runtimes can map each weight


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="checkpoint, folder, hub repository or bundled model")
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16", "fp8", "nvfp4"))
    parser.add_argument("--recipe", type=Path, help="JSON file of a recipe, instead of the precision's own")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write; must not exist")


def run(args: argparse.Namespace) -> int:
    from fluxkiln.checkpoint import open_checkpoint
    from fluxkiln.export.graph import trace
    from fluxkiln.export.weights import shadow
    from fluxkiln.hub import resolve
    from fluxkiln.kernels.recipe import Recipe
    from fluxkiln.quantize import Layers, choose_recipe

    if args.output.exists():
        raise FileExistsError(f"{args.output} exists already: give a folder that does not")
    checkpoint = open_checkpoint(resolve(args.model, ("transformer",)))
    recipe = Recipe.from_json(args.recipe.read_text()) if args.recipe else choose_recipe(args.precision, checkpoint)
    dtype = torch.float32 if args.precision == "fp32" else torch.bfloat16
    traced = trace(checkpoint.config, shadow(checkpoint, recipe, dtype), dtype)
    write(args.output, traced, Layers(checkpoint, recipe, torch.device("cpu"), dtype))
    nbytes = (args.output / DATA).stat().st_size
    print(f"wrote {args.output / MODEL} and {nbytes / 1e9:.2f} GB of weights beside it")
    return 0


def write(folder: Path, traced: Traced, tensors: Mapping[str, Any]) -> None:
    """Write a traced graph and its weights to a new folder; it has its name once it is whole.

    The weights lie in one file beside the graph: other places (`..`, absolute paths, links) are refused by one ONNX
    tool or another.
    """
    from fluxkiln.export.weights import values

    scratch = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    scratch.mkdir(parents=True)
    try:
        initializers = {tensor.name: tensor for tensor in traced.proto.graph.initializer}
        with open(scratch / DATA, "wb") as file:
            for name, value in tqdm(values(traced.parameters, tensors), total=len(traced.parameters), disable=None):
                file.write(bytes(-file.tell() % ALIGNMENT))
                external = {"location": DATA, "offset": str(file.tell()), "length": str(value.nbytes)}
                file.write(value.reshape(-1).view(torch.uint8).numpy().data)
                initializers[name].ClearField("external_data")
                for key, text in external.items():
                    initializers[name].external_data.add(key=key, value=text)
        (scratch / MODEL).write_bytes(traced.proto.SerializeToString())
        scratch.rename(folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
