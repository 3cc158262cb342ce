"""`fluxkiln export`: a part of a model as an ONNX file, its weights in one file beside it."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from fluxkiln.engines.store import scratch_for
from fluxkiln.export.arguments import add_graph_arguments

if TYPE_CHECKING:
    from fluxkiln.export.graph import Traced

MODEL, DATA = "model.onnx", "model.onnx.data"
ALIGNMENT = 4096  # bytes, so that runtimes can map each weight


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_graph_arguments(parser, ("fp32", "bf16", "fp8", "nvfp4"))
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write; must not exist")


def run(args: argparse.Namespace) -> int:
    from fluxkiln.export.parts import export

    if args.output.exists():
        raise FileExistsError(f"{args.output} exists already: give a folder that does not")
    exported = export(args.model, args.part, args.precision, args.form, args.recipe)
    for note in exported.notes:
        print(note)
    write(args.output, exported.traced, exported.values())
    nbytes = (args.output / DATA).stat().st_size
    print(f"wrote {args.output / MODEL} and {nbytes / 1e9:.2f} GB of weights beside it")
    return 0


def write(folder: Path, traced: Traced, values: Iterable[tuple[str, Tensor]]) -> None:
    """Write a traced graph and the values of its parameters to a new folder; it has its name once it is whole.

    The weights lie in one file beside the graph: other places (`..`, absolute paths, links) are refused by one ONNX
    tool or another.
    """
    with scratch_for(folder) as scratch:
        initializers = {tensor.name: tensor for tensor in traced.proto.graph.initializer}
        with open(scratch / DATA, "wb") as file:
            for name, value in tqdm(values, total=len(traced.parameters), disable=None):
                file.write(bytes(-file.tell() % ALIGNMENT))
                external = {"location": DATA, "offset": str(file.tell()), "length": str(value.nbytes)}
                file.write(value.reshape(-1).view(torch.uint8).numpy().data)
                initializers[name].ClearField("external_data")
                for key, text in external.items():
                    initializers[name].external_data.add(key=key, value=text)
        (scratch / MODEL).write_bytes(traced.proto.SerializeToString())
        scratch.rename(folder)
