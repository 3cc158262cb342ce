"""What the shipped kernels need on each architecture, by version of Triton: committed, so that a change shows.

`resources.json` has every shipped configuration on the Triton that constraints.txt pins. On the others it has the
hungriest of each operation and format: the one that takes the most registers there. Its rows are written by

    python -m fluxkiln.kernels sm_89 sm_90 sm_100 sm_120 --write

and, for a Triton beside the installed one (3.6.0 is what torch 2.11 brings),

    pip install --no-deps --target build/triton-3.6.0 triton==3.6.0
    PYTHONPATH=build/triton-3.6.0 python -P -m fluxkiln.kernels sm_89 sm_90 sm_100 sm_120 --hungriest --write
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fluxkiln.files import write_text
from fluxkiln.kernels.arch import ARCHS
from fluxkiln.kernels.compile import Configuration

TABLE = Path(__file__).with_name("resources.json")
PINNED = "3.7.1"
OTHERS = ("3.6.0", "3.9.0")  # versions of which the table has the hungriest
KEY = ("triton", "arch", "op", "format", "config")
FIELDS = (*KEY, "registers", "spill_bytes", "shared_bytes", "occupancy", "instructions", "products", "broken")

Row = dict[str, Any]


def rows(version: str) -> dict[tuple[str, ...], Row]:
    """The table of a version, by `KEY` without the version; empty for one that is not in it."""
    found = json.loads(TABLE.read_text()) if TABLE.exists() else []
    return {key(row)[1:]: row for row in found if row["triton"] == version}


def key(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)


def hungriest(arch: int, configurations: Iterable[Configuration]) -> list[Configuration]:
    """Of each operation and format the configuration that takes the most registers, by the pinned table."""
    table, found = rows(PINNED), {}
    for each in configurations:
        row = table.get((str(ARCHS[arch]), each.op, each.format, each.name), {})
        registers = row.get("registers", 256)  # one that is not in the table comes before all that are
        kind = each.op, each.format
        if kind not in found or registers > found[kind][0]:
            found[kind] = registers, each
    return [each for _, each in found.values()]


def write(fresh: Sequence[Mapping[str, Any]], path: Path = TABLE) -> None:
    """Put rows into the table, in place of all others of the same version and architecture."""
    known = json.loads(path.read_text()) if path.exists() else []
    replaced = {(row["triton"], row["arch"]) for row in fresh}
    kept = [row for row in known if (row["triton"], row["arch"]) not in replaced]
    kept += [{name: row[name] for name in FIELDS if name in row} for row in fresh]
    write_text(path, "[\n" + ",\n".join(json.dumps(row) for row in sorted(kept, key=key)) + "\n]\n")
