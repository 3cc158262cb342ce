"""Compile what is shipped, with no GPU:  python -m fluxkiln.kernels sm_90 [--op linear] [--part 0/2]"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from fluxkiln.kernels import registry
from fluxkiln.kernels.arch import ARCHS, parse
from fluxkiln.kernels.compile import compile_launch


def main(argv: list[str]) -> None:
    """Print one JSON object a line for each shipped configuration of the architectures named."""
    parser = argparse.ArgumentParser(prog="python -m fluxkiln.kernels", description=main.__doc__)
    parser.add_argument("arch", nargs="+", type=parse)
    parser.add_argument("--op", nargs="+", choices=registry.OPS, help="only these operations")
    parser.add_argument("--part", default="0/1", help="i/n: every n-th configuration, from the i-th")
    args = parser.parse_args(argv)
    part, parts = map(int, args.part.split("/"))
    shipped = [(arch, c) for arch in args.arch for c in registry.configurations(arch) if c.op in (args.op or [c.op])]
    for arch, configuration in shipped[part::parts]:
        row = {"op": configuration.op, "arch": str(ARCHS[arch]), "format": configuration.format}
        row["config"] = configuration.name
        try:
            resources = compile_launch(configuration.launch, arch)
            row |= dataclasses.asdict(resources) | {"broken": resources.broken(configuration)}
        except Exception as error:  # one kernel's failure must not hide the others'
            row["broken"] = [f"does not compile: {str(error).splitlines()[0]}"]
        print(json.dumps(row), flush=True)


main(sys.argv[1:])
