"""`fluxkiln bench tune`: find the fastest tile of every launch on this GPU, and write it where the kernels look.

For each kind of call in a step, all candidates of its operation are compiled, on all cores; those that spill registers
or ask for more shared memory than there is are dropped, the rest are timed briefly, the best few again and longer. The
winner must be as right as any kernel has to be; it goes to `tiles.json` beside the kernels, with its time, the shipped
tile's, and where and when. What a library could run as well is timed there too: `kernels.library` chooses by that.
Nothing is tuned when a model runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fluxkiln.bench.cases import SIZES, Case, arguments, everything
from fluxkiln.bench.kernels import TINY_SIZES, parity
from fluxkiln.bench.measure import lost, measure
from fluxkiln.bench.step import TINY
from fluxkiln.cli import above_zero
from fluxkiln.config import DEV
from fluxkiln.files import write_text
from fluxkiln.kernels import (
    attention,
    library,
    linear_gate_residual,
    linear_gelu,
    matmul,
    norm_modulate,
    qkv_rope,
    registry,
)
from fluxkiln.kernels.backend import Arena, native_arch, refuse
from fluxkiln.kernels.formats import Fp8
from fluxkiln.kernels.language import Launch, on
from fluxkiln.kernels.tiles import MEASURED, Problem, Tile
from fluxkiln.load import default_device
from fluxkiln.record import versions

FINALISTS = 5
TUNED = ("norm_modulate", "qkv_rope", "attention", "linear_gelu", "linear_gate_residual")
ALL = (*TUNED, *(op for op in library.LAUNCH if op not in TUNED))  # the rest is only compared with the library

TILE = {
    op: attention.Tile if op == "attention" else norm_modulate.Tile if op == "norm_modulate" else Tile for op in TUNED
}

Search = tuple[str, dict[str, Any], list[Any]]  # section of tiles.json, problem, candidates: the shipped tile first


def search(case: Case, operands: Sequence[Any], arch: int) -> Search:
    """What to search for a case, given the operands of its launch."""
    if case.op == "norm_modulate":
        x, _, _, _, out = operands
        problem = {"arch": arch, "format": out.format if out else "dense", "width": x.shape[-1]}
        return case.op, problem, list(norm_modulate.candidates(x.shape[-1]))
    if case.op == "attention":
        k = operands[1]
        (_, length, _, d), format = (k.data.shape, "fp8") if isinstance(k, Fp8) else (k.shape, "bf16")
        problem = {"arch": arch, "format": format, "head_dim": d, "length": length}
        return case.op, problem, list(attention.candidates(arch, format, d))
    if case.op == "qkv_rope":
        x, projection, _, split = operands
        product, candidates = _product(case, projection.layer, split, arch, projection.attention), qkv_rope.candidates
    elif case.op == "linear_gelu":
        x, layer, split, out = operands
        product, candidates = _product(case, layer, split, arch, out.format if out else "dense"), linear_gelu.candidates
    else:
        _, layer, _, _, split = operands
        product, candidates = _product(case, layer, split, arch, "bf16"), linear_gate_residual.candidates
    return "rows", dataclasses.asdict(product), list(candidates(product))


def _product(case: Case, layer: matmul.Packed, split: int, arch: int, out: str) -> Problem:
    return matmul.problem(case.op, layer, matmul.streams_of(split, case.call.result[0], layer), arch, out)


def tune(
    case: Case, device: torch.device, budget: float, say: Callable[[str], None]
) -> tuple[str, dict[str, Any]] | None:
    """Section and row of `tiles.json` for a case, or None where nothing runs."""
    arch, args = native_arch(device), arguments(case, device)
    operands = registry.packed(case.op, args)
    if reason := refuse(registry.OPS[case.op], operands, arch):
        say(f"{case.key}: {reason}")
        return None
    section, problem, tiles = search(case, operands, arch)
    empty = Arena().of(case.op, device)  # one output for all: more than a hundred would not fit

    def prepare(tile: Any) -> list[Launch]:
        return registry.OPS[case.op].launch(*operands, arch=arch, empty=empty, tile=tile)[1]

    def seconds(tile: Any, budget: float) -> float:
        def run() -> None:
            for launch in ready[tile]:
                launch()

        try:
            return measure(run, device, budget).median
        except Exception as failure:  # a candidate that cannot run has lost
            if lost(device):
                raise
            say(f"{case.key}: {tile}: {failure}")
            return float("inf")

    fit, dropped = usable(tiles, prepare, device)
    ready = {tile: prepare(tile) for tile in fit}
    quick = {tile: seconds(tile, budget / 10) for tile in ready}
    chosen = sorted(quick, key=quick.__getitem__)[:FINALISTS] + [tile for tile in tiles[:1] if tile in ready]
    final = {tile: seconds(tile, budget) for tile in dict.fromkeys(chosen)}
    for tile in sorted(final, key=final.__getitem__):
        # Fresh operands and output: the runs that were timed have overwritten the residual, and one another's.
        output, launches = registry.OPS[case.op].launch(*registry.packed(case.op, args), arch=arch, tile=tile)
        for launch in launches:
            launch()
        held = parity(case, args, output)
        if held["passed"]:
            shipped = final.get(tiles[0])
            return section, {
                "problem": problem, "tile": dataclasses.asdict(tile), "us": round(1e6 * final[tile], 2),
                "us_shipped": None if shipped is None else round(1e6 * shipped, 2),
                "candidates": len(tiles), "usable": len(ready), "dropped": dropped,
                "versions": versions(device), "date": datetime.now(UTC).date().isoformat(),
            }  # fmt: skip
        say(f"{case.key}: {tile} is wrong: error {held['error']:.1e}, eager's {held['eager_error']:.1e}")
    return None


def compare(
    case: Case, tile: Any, device: torch.device, budget: float, say: Callable[[str], None]
) -> dict[str, Any] | None:
    """Row of `tiles.json` that says who is faster, our kernel (with `tile`, or None for the table's) or a library.

    None where only one of them can run the case, or the library is not as right.
    """
    arch, args = native_arch(device), arguments(case, device)
    operands = registry.packed(case.op, args)
    found = library.kind(case.op, operands, arch)
    if isinstance(found, str) or refuse(registry.OPS[case.op], operands, arch):
        return None
    options = {} if tile is None else {"tile": tile}
    ours = registry.OPS[case.op].launch(*operands, arch=arch, **options)[1]
    output, theirs = library.LAUNCH[case.op](*operands, arch=arch)

    def run(calls: Sequence[Callable[[], Any]]) -> None:
        for call in calls:
            call()

    run(theirs)
    if not (held := parity(case, args, output))["passed"]:
        say(f"{case.key}: the library's error is {held['error']:.1e}, eager's {held['eager_error']:.1e}")
        return None
    us, us_library = (round(1e6 * measure(lambda c=c: run(c), device, budget).median, 2) for c in (ours, theirs))
    problem = {**found, "size": case.size, "result": case.result}
    return {
        "problem": problem, "us": us, "us_library": us_library,
        "versions": versions(device), "date": datetime.now(UTC).date().isoformat(),
    }  # fmt: skip


def usable(
    tiles: Sequence[Any], launches: Callable[[Any], list[Launch]], device: torch.device
) -> tuple[list[Any], dict[str, int]]:
    """The tiles whose launches compile, fit and do not spill, and how many of the others failed in which way."""
    if device.type != "cuda":  # a rehearsal: the interpreter runs anything
        return list(tiles[:2]), {}
    from triton import AsyncCompileMode

    def compiled(launch: Launch) -> Any:
        return launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.options, enable_fp_fusion=True)

    todo = {}
    dropped: Counter[str] = Counter()
    for tile in tiles:
        try:
            todo[tile] = launches(tile)
        except (ValueError, AssertionError) as failure:  # no descriptor has such a box
            dropped[f"{type(failure).__name__}: {failure}"[:100]] += 1
    with ThreadPoolExecutor(os.cpu_count()) as pool, AsyncCompileMode(pool, ignore_errors=True):
        for each in todo.values():
            for launch in each:
                compiled(launch)
    found = []
    for tile, each in todo.items():
        try:
            for launch in each:
                kernel = compiled(launch)
                kernel = kernel.result() if hasattr(kernel, "result") else kernel  # of one that failed above
                kernel._init_handles()  # loads it: fails where it asks for too much shared memory
                if kernel.n_spills:
                    raise RuntimeError("spills registers")
        except Exception as failure:  # whatever a compiler says of a candidate: it is out, and counted
            dropped[f"{type(failure).__name__}: {failure}".splitlines()[0][:100]] += 1
        else:
            found.append(tile)
    return found, dict(dropped)


def merge(path: Path, section: str, row: Mapping[str, Any]) -> None:
    """Put a row into the table, in place of one for the same problem."""
    table = json.loads(path.read_text()) if path.exists() else {}
    plain = json.loads(json.dumps(row))
    kept = [old for old in table.get(section, []) if old["problem"] != plain["problem"]]
    table = {"rows": []} | table | {section: [*kept, plain]}
    write_text(path, json.dumps(table, indent=1) + "\n")


# --- command ----------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tiny", action="store_true", help="a tiny model: a rehearsal that a CPU can do")
    parser.add_argument("--op", nargs="+", choices=ALL, default=ALL, help="only these operations")
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["1024x1024"], help="sizes of pictures")
    parser.add_argument("--precision", nargs="+", choices=registry.FORMATS, help="default: all that run here")
    parser.add_argument("--table", type=Path, default=MEASURED, metavar="FILE", help="where winners go")
    parser.add_argument(
        "--budget", type=above_zero, default=0.3, metavar="S", help="seconds for each finalist (default 0.3)"
    )
    parser.add_argument("--minutes", type=above_zero, metavar="M", help="begin nothing new after this long")
    parser.add_argument("--device", help="default: cuda if there is one")
    parser.add_argument("--json", action="store_true", help="print rows as JSON")


def run(args: argparse.Namespace) -> int:
    device = default_device(args.device)
    if device.type == "cpu" and not args.tiny:
        raise ValueError("tiles are timed on a GPU, there is none here; --tiny rehearses on a CPU")
    deadline = time.monotonic() + 60 * args.minutes if args.minutes else float("inf")
    arch = native_arch(device)
    precisions = args.precision or [f for f in registry.FORMATS if registry.refuse_format(f, arch) is None]
    config, sizes = (TINY, TINY_SIZES) if args.tiny else (DEV, {name: SIZES[name] for name in args.size})
    say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    with torch.inference_mode(), on(device):
        for case in everything(config, sizes, precisions):
            if case.op not in args.op or time.monotonic() > deadline:
                continue
            tile = None
            if case.op in TUNED:
                found = tune(case, device, args.budget, say)
                if found is None:
                    continue
                section, row = found
                tile = TILE[case.op](**row["tile"])
                merge(args.table, section, row)
                text = f"{case.key}: {row['us']} us, shipped {row['us_shipped']}: {tile}"
                print(json.dumps(row) if args.json else text, flush=True)
            row = compare(case, tile, device, args.budget, say)
            if row is not None:
                merge(args.table, "library", row)
                text = f"{case.key}: {row['us']} us, the library {row['us_library']}"
                print(json.dumps(row) if args.json else text, flush=True)
    return 0
