"""Compile what is shipped, with no GPU:  python -m fluxkiln.kernels sm_90 [--op linear] [--part 0/2]

See `fluxkiln.kernels.resources` for the table that it writes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

import triton

from fluxkiln.kernels import registry, resources
from fluxkiln.kernels.arch import ARCHS, parse
from fluxkiln.kernels.compile import compile_launch


def main(argv: list[str]) -> None:
    """Print one JSON object a line for each shipped configuration of the architectures named."""
    parser = argparse.ArgumentParser(prog="python -m fluxkiln.kernels", description=main.__doc__)
    parser.add_argument("arch", nargs="+", type=parse)
    parser.add_argument("--op", nargs="+", choices=registry.OPS, help="only these operations")
    parser.add_argument(
        "--hungriest",
        action="store_true",
        help="only the one of each operation and format that takes the most registers",
    )
    parser.add_argument("--write", action="store_true", help="put the rows into resources.json")
    parser.add_argument("--part", default="0/1", help="i/n: every n-th configuration, from the i-th")
    args = parser.parse_args(argv)
    part, parts = map(int, args.part.split("/"))
    if args.write and (args.op or parts > 1):
        parser.error("--write replaces all rows of an architecture: it goes without --op and --part")
    shipped = []
    for arch in args.arch:
        configurations = [c for c in registry.configurations(arch) if c.op in (args.op or [c.op])]
        chosen = resources.hungriest(arch, configurations) if args.hungriest else configurations
        shipped += [(arch, configuration) for configuration in chosen]
    rows = []
    for arch, configuration in shipped[part::parts]:
        row = {"op": configuration.op, "arch": str(ARCHS[arch]), "format": configuration.format}
        row |= {"config": configuration.name, "triton": triton.__version__}
        try:
            compiled = compile_launch(configuration.launch, arch)
            row |= dataclasses.asdict(compiled) | {"broken": compiled.broken(configuration)}
        except Exception as error:  # one kernel's failure must not hide the others'
            row["broken"] = [f"does not compile: {str(error).splitlines()[0]}"]
        rows.append(row)
        print(json.dumps(row), flush=True)
    if args.write:
        resources.write(rows)


main(sys.argv[1:])
