"""Which tile a matrix product runs with: committed data, chosen by a pure function of one image's problem.

Every operation that multiplies has a table of its tiles, for each architecture and format, in the order in which they
are fast when they fill the GPU. `pick` takes the first that nearly fills it, unless `tiles.json` says what was fastest
when it was measured: `fluxkiln bench tune` times the `candidates` on a GPU and writes the winners there, with where
and when. Nothing is tuned at run time, and nothing depends on the number of images.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fluxkiln.kernels.arch import ARCHS

# Multiprocessors of the GPU that each table is made for: RTX 4090, H100 SXM, B200, RTX 5090.
MULTIPROCESSORS = {89: 128, 90: 132, 100: 148, 120: 170}
MEASURED = Path(__file__).with_name("tiles.json")


@dataclass(frozen=True)
class Tile:
    """What one program computes, and how.

    Attributes:
        m: rows.
        n: outputs.
        k: of the contraction in a step of the main loop.
        warps: of the program.
        stages: of the main loop's software pipeline.
        pieces: parts along n in which the epilogue goes over the tile: 1, 2 or 4; more need fewer registers.
        blocks: programs that fit a multiprocessor at once; two hide each other's epilogue.
        group: row tiles that neighbouring programs spread over, for the L2 cache.
        persistent: a program computes several tiles, and loads the next while it stores one.
        specialize: loads, products and epilogue on warps of their own.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    pieces: int = 1
    blocks: int = 1
    group: int = 8
    persistent: bool = False
    specialize: bool = False

    def __str__(self) -> str:
        how = "".join(f" {name}" for name in ("persistent", "specialize") if getattr(self, name))
        return f"{self.m}x{self.n}x{self.k} w{self.warps} s{self.stages}{how}"


@dataclass(frozen=True)
class Problem:
    """One launch, as far as its tile depends on it.

    Attributes:
        op: name of the operation, as in `Ops`.
        arch: one of `arch.NATIVE`.
        format: of the operands: bf16, fp8 or nvfp4.
        rows: of each stream of one image.
        n: outputs of a part.
        k: of the contraction.
        parts: groups of n outputs that no tile straddles (q, k and v).
        accumulate: as in `layers.Linear`.
        out: format of the output.
    """

    op: str
    arch: int
    format: str
    rows: tuple[int, ...]
    n: int
    k: int
    parts: int = 1
    accumulate: str = "f32"
    out: str = "bf16"


Table = Mapping[tuple[int, str, str], Sequence[Tile]]  # (arch, format, accumulate) -> tiles, fastest first


def count(tile: Tile, rows: Sequence[int], n: int, parts: int = 1) -> int:
    """Tiles of one image, `rows` of each stream by `parts` of n outputs."""
    return sum(math.ceil(each / tile.m) for each in rows) * parts * math.ceil(n / tile.n)


def fullness(tile: Tile, problem: Problem) -> float:
    """Useful share of what the multiprocessors could compute while the busiest of them has tiles.

    Blocks that share a multiprocessor share its tensor cores: only tiles for each multiprocessor count.
    """
    multiprocessors = MULTIPROCESSORS[problem.arch]
    waves = math.ceil(count(tile, problem.rows, problem.n, problem.parts) / multiprocessors)
    computed = waves * multiprocessors * tile.m * tile.n
    return sum(problem.rows) * problem.parts * problem.n / computed


def pick(problem: Problem, table: Table) -> Tile:
    """The tile measured fastest for the most similar problem, or the first that fills the GPU nearly as well as any.

    Nearly: nine tenths. A smaller tile fills the last wave better, but reads more of its operands for each product.
    """
    known = measured().get(_key(problem))
    if known:
        return min(known, key=lambda row: abs(math.log(row[0] / max(1, sum(problem.rows)))))[1]
    tiles = table[problem.arch, problem.format, problem.accumulate]
    best = max(fullness(tile, problem) for tile in tiles)
    return next(tile for tile in tiles if fullness(tile, problem) >= 0.9 * best)


def candidates(problem: Problem, table: Table) -> Iterator[Tile]:
    """What is worth timing: the table's tiles, then others; each has still to compile without spills."""
    shipped = tuple(table[problem.arch, problem.format, problem.accumulate])
    yield from shipped
    k = shipped[0].k
    for m, n, warps in ((128, 256, 8), (256, 128, 8), (128, 128, 8), (128, 128, 4), (64, 256, 4), (64, 128, 4)):
        bytes_of_stage = (m + n) * k * _BITS[problem.format] // 8
        deepest = min(6, ARCHS[problem.arch].shared_limit // bytes_of_stage)
        for stages, width, persistent, group in itertools.product(
            range(max(2, deepest - 1), deepest + 1), (128, 64, 32), (False, True), (8, 16)
        ):
            choice = Tile(m, n, k, warps, stages, n // width, 1, group, persistent)
            if n // width <= 4 and choice not in shipped:
                yield choice


_BITS = {"bf16": 16, "fp8": 8, "nvfp4": 4}


@functools.cache
def section(name: str) -> tuple[dict[str, Any], ...]:
    """What `tiles.json` says of an operation that is no matrix product: rows as `bench tune` wrote them."""
    return tuple(json.loads(MEASURED.read_text()).get(name, ())) if MEASURED.exists() else ()


@functools.cache
def measured() -> dict[Problem, list[tuple[int, Tile]]]:
    """Fastest tiles of `tiles.json`, by problem: (rows in all, tile) of each size that was timed."""
    table: dict[Problem, list[tuple[int, Tile]]] = {}
    for row in json.loads(MEASURED.read_text())["rows"] if MEASURED.exists() else ():
        problem = Problem(**row["problem"] | {"rows": tuple(row["problem"]["rows"])})
        table.setdefault(_key(problem), []).append((sum(problem.rows), Tile(**row["tile"])))
    return table


def _key(problem: Problem) -> Problem:
    """The problem at any size: the number of its streams in the place of their rows."""
    return replace(problem, rows=(len(problem.rows),))
