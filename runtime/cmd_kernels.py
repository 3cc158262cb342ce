"""`fluxkiln kernels`: every shipped kernel compiled for every architecture, no GPU needed, or why there is none."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = ("op", "format", "config", "registers", "spill_bytes", "shared_bytes", "occupancy", "compile_seconds")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", nargs="+", metavar="sm_NN", help="default: sm_89 sm_90 sm_100 sm_120")
    parser.add_argument("--op", nargs="+", help="only these operations")
    parser.add_argument("--json", action="store_true", help="one object for each shipped configuration, as a list")


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from fluxkiln.kernels import registry
    from fluxkiln.kernels.arch import NATIVE, parse

    archs = [parse(name) for name in args.arch] if args.arch else list(NATIVE)
    if unknown := set(args.op or ()) - set(registry.OPS):
        raise ValueError(f"operation must be one of {', '.join(registry.OPS)}, got {', '.join(sorted(unknown))}")
    total = sum(c.op in (args.op or [c.op]) for arch in archs for c in registry.configurations(arch))
    with tqdm(total=total, desc="compile", unit="kernel", leave=False, disable=None) as bar:
        rows = registry.matrix(archs, args.op, progress=lambda row: bar.update())
    broken = [row for row in rows if row.get("broken")]
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        for name in dict.fromkeys(row["arch"] for row in rows):
            print(table([row for row in rows if row["arch"] == name], name))
    for row in broken:
        print(f"{row['arch']} {row['op']} {row['format']} {row['config']}: {'; '.join(row['broken'])}", file=sys.stderr)
    return 1 if broken else 0


def table(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """The compiled rows of an architecture in columns, then its refusals."""
    cells = [[str(row.get(name, "")) for name in COLUMNS] for row in rows if "refused" not in row]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *cells, strict=True)]
    lines = [f"{title}:"]
    for row in (COLUMNS, *cells):
        lines.append("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    lines += [f"  {row['op']} {row['format']}: none. {row['refused']}" for row in rows if "refused" in row]
    return "\n".join(lines) + "\n"
