"""`fluxkiln bench kernels`: every operation at every shape of FLUX.1, held to float64 and then timed.

Each kind of call in a step (see `cases`) is a case; its contestants are

    triton      the launches that the graph does
    eager       the operation's reference, emulated where the format has no library product
    unfused     the library's product and one torch operation after the other, quantisation included
    product     the library's bare product: no bias, no epilogue; in FP8 by row scales, with fast accumulation and
                without, and with one scale for all
    flash, cudnn     torch's attention, in bf16
    triton, raw q    the variant in which attention does the norm and rotation of q: both its halves

A result is a file of JSON lines, written as soon as they are measured: first the machine, its versions and its roofs
(copy bandwidth and the library's large matrix products, by the same timer) and what that timer finds for a kernel that
has nothing to do (`us_empty`, part of every other time), then a row for each case and contestant.
Run again, it goes on where it stopped; other kernels, another GPU or other versions start anew.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fluxkiln.kernels
from fluxkiln.bench import report
from fluxkiln.bench.cases import SIZES, Case, arguments, everything, raw_query
from fluxkiln.bench.measure import DIED, LOST, Samples, empty, lost, measure, roofs, watched
from fluxkiln.bench.step import TINY
from fluxkiln.cli import above_zero
from fluxkiln.config import DEV
from fluxkiln.kernels import RefusedError, formats, registry
from fluxkiln.kernels.backend import native_arch, refuse
from fluxkiln.kernels.formats import FP8_MAX, Activation, Quant
from fluxkiln.kernels.language import Launch, on
from fluxkiln.kernels.layers import Linear, Streams
from fluxkiln.kernels.qkv_rope import Projection
from fluxkiln.load import default_device
from fluxkiln.record import versions
from fluxkiln.verify import allowed, error, exact, sums_of, values
from fluxkiln.workload import Tokens

TINY_SIZES = {"tiny": Tokens(text=24, image=40)}
ROWS_OF_TRUTH = 256  # of q, at most, in float64: all scores of a large picture would be gigabytes

Run = Callable[[], Any]


# --- contestants ------------------------------------------------------------------------------


def launches(op: str, args: Sequence[Any], device: torch.device) -> tuple[Any, list[Launch]] | str:
    """The output and launches of an operation given as `arguments` are, or why there are none."""
    if reason := registry.unavailable(device):
        return reason
    arch = native_arch(device)
    operands = registry.packed(op, args)
    if reason := refuse(registry.OPS[op], operands, arch):
        return reason
    return registry.OPS[op].launch(*operands, arch=arch)


def contestants(case: Case, args: tuple[Any, ...], device: torch.device) -> Iterator[tuple[str, Run]]:
    """All but the launches that the graph does."""
    if (others := raw_query(case, args)) is not None:
        yield "triton, raw q", _launched(case.op, others, device)
    reference = registry.OPS[case.op].reference
    if "nvfp4" not in (case.format, case.result):  # its emulation copies a table to the GPU, which no graph captures
        yield "eager", lambda: reference(*args)
    if case.op == "attention":
        yield from _library_attention(args)
    elif case.call.gemms:
        yield from _library_products(case, args, device)
    elif case.call.result_format == "fp8":
        yield "unfused", lambda: _quantise_by_row(reference(*args[:-1], None))


def _launched(op: str, args: Sequence[Any], device: torch.device) -> Run:
    @functools.cache
    def prepared() -> list[Launch]:
        found = launches(op, args, device)
        if isinstance(found, str):
            raise RefusedError(found)
        return found[1]

    def run() -> None:
        for launch in prepared():
            launch()

    return run


def _library_attention(args: tuple[Any, ...]) -> Iterator[tuple[str, Run]]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v, _ = args
    if not isinstance(q, Tensor):
        return
    heads = [x.transpose(1, 2) for x in (q, k, v.data)]
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):

        def run(backend: Any = backend) -> Tensor:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(*heads)

        yield name, run


def _library_products(case: Case, args: tuple[Any, ...], device: torch.device) -> Iterator[tuple[str, Run]]:
    g = torch.Generator(device).manual_seed(1)
    products = []
    for gemm in case.call.gemms:
        x, w = (torch.randn(n, gemm.k, generator=g, device=device).bfloat16() for n in (gemm.m, gemm.n))
        products.append((x, w / gemm.k**0.5))
    batch = range(case.tokens.batch)
    if case.format == "bf16":
        yield "product", lambda: [x @ w.T for x, w in products for _ in batch]
        return
    if case.format != "fp8":
        return
    codes = [tuple(_quantise_by_row(t) for t in pair) for pair in products]
    one = torch.ones((), device=device)

    def by_row(fast: bool) -> list[Tensor]:
        return [_scaled_mm(x, w, fast) for x, w in codes for _ in batch]

    yield "product", lambda: by_row(True)
    yield "product, slow accumulation", lambda: by_row(False)
    yield (
        "product, one scale",
        lambda: [
            torch._scaled_mm(x, w.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)
            for (x, _), (w, _) in codes
            for _ in batch
        ],
    )
    chain = _with_library(case, args)
    yield "unfused", lambda: registry.OPS[case.op].reference(*chain)


def _quantise_by_row(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x [..., K]` as e4m3 with a scale for each row, in torch operations."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp_min(formats.TINY) / FP8_MAX
    return (x / scale).to(torch.float8_e4m3fn), scale


def _scaled_mm(x: tuple[Tensor, Tensor], w: tuple[Tensor, Tensor], fast: bool, bias: Tensor | None = None) -> Tensor:
    return torch._scaled_mm(
        x[0], w[0].T, scale_a=x[1], scale_b=w[1].T, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=fast
    )


@dataclass(frozen=True)
class LibraryLinear(Linear):
    """A linear as a library user writes it: quantise the input, `torch._scaled_mm`, result in bf16."""

    def __call__(self, *xs: Activation) -> Tensor:
        x = torch.cat([each for each in xs if isinstance(each, Tensor)], dim=-1)
        codes, scale = _quantise_by_row(x.flatten(0, -2))
        weight = (self.weight.data, self.weight.row_scale[:, None])
        return _scaled_mm((codes, scale), weight, True, self.bias).unflatten(0, x.shape[:-1])


def _with_library(case: Case, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with dense activations and linears that call the library."""

    def change(x: Any) -> Any:
        if isinstance(x, Streams):
            return Streams(LibraryLinear(each.weight, each.bias) for each in x)
        if isinstance(x, Projection):
            return dataclasses.replace(x, streams=change(x.streams), attention="bf16")
        if isinstance(x, Quant):
            return None
        if isinstance(x, tuple):
            return tuple(map(change, x))
        return formats.dequantize(x).bfloat16() if isinstance(x, formats.Fp8) else x

    return tuple(map(change, args))


# --- parity -----------------------------------------------------------------------------------


def parity(case: Case, args: tuple[Any, ...], got: Any) -> dict[str, Any]:
    """Errors of the kernel's output, of eager's and of the tensor cores' sums against float64, relative, in the mean
    square."""
    reference = registry.OPS[case.op].reference
    if case.op == "attention":
        length = args[0].shape[1]
        rows = torch.linspace(0, length - 1, min(ROWS_OF_TRUTH, length // 2)).long().to(args[0].data.device)
        args = (args[0][:, rows], *args[1:])
        got = got[:, rows]
    truth = values(reference(*map(_unquantised, args)))
    mine = error(values(got, half_layout=case.op == "qkv_rope"), truth)
    eagers = error(values(reference(*args)), truth)
    sums = sums_of(args)
    return {"error": mine, "eager_error": eagers, "sums": sums, "passed": mine <= allowed(eagers, sums)}


def _unquantised(x: Any) -> Any:
    """An argument in float64, that asks for no rounding of the output."""
    if isinstance(x, Quant):
        return None
    return exact(dataclasses.replace(x, attention="bf16") if isinstance(x, Projection) else x)


# --- results ----------------------------------------------------------------------------------


class Results:
    """A file of JSON lines that grows, and knows what it has."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path, self.identity = path, dict(identity)
        self._begun = path.with_suffix(".begun")
        self.rows: list[dict[str, Any]] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.read_bytes().endswith(b"\n"):  # a run was stopped while it wrote
            with path.open("a") as file:
                file.write("\n")
        current = False
        for row in report.lines(path) if path.exists() else ():
            if row["kind"] == "run":  # its rows follow; those of another identity do not count
                current = row["identity"] == self.identity
            elif current:
                self.rows.append(row)

    def add(self, row: Mapping[str, Any]) -> None:
        line = dict(row)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if line["kind"] != "run":
            self.rows.append(line)
            self._begun.unlink(missing_ok=True)

    def begin(self, row: Mapping[str, Any]) -> None:
        """Leave behind what there is to say, should this process not live to `add` anything better."""
        self._begun.write_text(json.dumps(dict(row)))

    def bury(self, died: bool) -> bool:
        """Add what the last process left behind if it `died`; if it was stopped, that is no fault of its work."""
        if not self._begun.exists():
            return False
        row = self._begun.read_text()
        self._begun.unlink()
        if died:
            self.add(json.loads(row))
        return died

    def has(self, **wanted: Any) -> bool:
        return any(all(row.get(name) == value for name, value in wanted.items()) for row in self.rows)


def identity(device: torch.device) -> dict[str, Any]:
    """Two measurements with the same identity are of the same thing."""
    return {"versions": versions(device), "source": source_digest()}


@functools.cache
def source_digest() -> str:
    """Of the kernels' source and measured tables."""
    folder = Path(fluxkiln.kernels.__file__).parent
    digest = hashlib.sha256()
    for path in sorted((*folder.glob("*.py"), *folder.glob("tiles.json"))):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def card(device: torch.device) -> dict[str, Any]:
    """What the machine says of itself, as far as it does."""
    found: dict[str, Any] = {"date": datetime.now(UTC).isoformat(timespec="seconds")}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"multiprocessors": properties.multi_processor_count, "memory": properties.total_memory}
        found |= _nvidia_smi(properties.uuid)
    return found


def _nvidia_smi(uuid: Any) -> dict[str, str]:
    import subprocess

    fields = "clocks.sm,clocks.max.sm,clocks.mem,power.limit,power.draw,temperature.gpu"
    try:
        command = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={fields}", "--format=csv,noheader"]
        line = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return {}
    return dict(zip(fields.split(","), (value.strip() for value in line.split(",")), strict=False))


def rates(case: Case, samples: Samples, found: Mapping[str, float]) -> dict[str, Any]:
    """FLOP/s, bytes/s and how much of what the roofs allow; of what is bound by memory it may be more than 100 %, see
    `roofs`."""
    seconds, nbytes = samples.median, case.call.bytes()
    floor = max(case.call.flops / found.get(case.format, float("inf")), nbytes / found["copy"])
    row = {"gbytes_per_s": round(nbytes / seconds / 1e9, 1), "percent_of_roof": round(100 * floor / seconds, 1)}
    if case.call.flops:
        row["tflops"] = round(case.call.flops / seconds / 1e12, 2)
    return row


# --- command ----------------------------------------------------------------------------------


def bench(
    device: torch.device,
    results: Results,
    chosen: Sequence[Case],
    budget: float = 0.3,
    side: int = 8192,
    deadline: float = float("inf"),
    progress: Callable[[dict[str, Any]], None] = lambda row: None,
) -> bool:
    """Measure what `results` lacks; True if nothing is left.

    Args:
        device: where.
        results: what was measured before, and where to write.
        chosen: what to measure.
        budget: seconds of samples for each contestant.
        side: of the matrices whose product is the roof.
        deadline: `time.monotonic()` at which no new case is begun.
        progress: told every row.

    A kernel that faults, or never ends, ends the process with `LOST`, once its row is written.
    """
    left = [case for case in chosen if not results.has(kind="done", case=case.key)]
    if not left:
        return True
    found = roofs(device, registry.FORMATS, side, budget)
    nothing = round(1e6 * empty(device, budget), 3)
    results.add(
        {"kind": "run", "identity": results.identity, "card": card(device), "roofs": found, "us_empty": nothing}
    )
    for case in left:
        if time.monotonic() > deadline:
            return False
        for row in _measured(case, device, results, budget, found):
            results.add(row)
            progress(row)
            if "failed" in row and lost(device):
                os._exit(LOST)  # with an exception every tensor's destructor would fail as well
        results.add({"kind": "done", "case": case.key})
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return True


def _measured(
    case: Case, device: torch.device, results: Results, budget: float, found: Mapping[str, float]
) -> Iterator[dict[str, Any]]:
    what = {
        "kind": "kernel", "case": case.key, "op": case.op, "place": case.name, "size": case.size, "shape": case.shape,
        "format": case.format, "result": case.result, "count": case.count, "flops": case.call.flops,
        "bytes": case.call.bytes(), "roofs": found,
    }  # fmt: skip
    args = arguments(case, device)

    def ours() -> dict[str, Any]:
        launched = launches(case.op, args, device)
        if isinstance(launched, str):
            return {"refused": launched}
        output, todo = launched

        def run() -> None:
            for launch in todo:
                launch()

        run()
        held = parity(case, args, output)
        return timing(run) | held | {"config": _options(todo[-1])}

    def timing(run: Run) -> dict[str, Any]:
        samples = measure(run, device, budget)
        return samples.row() | rates(case, samples, found)

    others = ((name, functools.partial(timing, run)) for name, run in contestants(case, args, device))
    for name, attempt in itertools.chain([("triton", ours)], others):
        if results.has(kind="kernel", case=case.key, contestant=name):
            continue
        row = what | {"contestant": name}
        results.begin(row | {"failed": DIED})
        with watched(device, lambda why, row=row: results.add(row | {"failed": why})):
            try:
                row |= attempt()
            except Exception as failure:  # one contestant must not hide the others
                row["failed"] = f"{type(failure).__name__}: {failure}"[:500]
        yield row


def _options(launch: Launch) -> str:
    tile = "x".join(str(v) for k, v in launch.options.items() if k.startswith("BLOCK_") or k == "ROWS")
    return f"{tile} w{launch.options['num_warps']} s{launch.options['num_stages']}"


def slug(device: torch.device) -> str:
    """The device's name in a file name."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return "-".join(name.lower().replace("/", " ").split())


def line(row: Mapping[str, Any]) -> str:
    """A row for people."""
    head = f"{row['size']:18} {row['place']:22} {row['format']:>5} -> {row['result']:5} {row['contestant']:27}"
    if "us" not in row:
        return f"{head} {row.get('refused') or row.get('failed')}"
    rate = f"{row['tflops']:8.1f} TFLOP/s" if "tflops" in row else f"{row['gbytes_per_s']:8.0f} GB/s   "
    held = f"  error {row['error']:.1e}, eager's {row['eager_error']:.1e}" if "error" in row else ""
    held += " WRONG" if row.get("passed") is False else ""
    return f"{head} {row['us']:10.1f} us {rate} {row['percent_of_roof']:6.1f} % of roof{held}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tiny", action="store_true", help="a tiny model: a rehearsal that a CPU can do")
    parser.add_argument("--op", nargs="+", choices=registry.OPS, help="only these operations")
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES), help="only these sizes of pictures")
    parser.add_argument("--results", type=Path, metavar="FOLDER", default=Path("bench/results"))
    parser.add_argument("--budget", type=above_zero, default=0.3, metavar="S", help="seconds for each (default 0.3)")
    parser.add_argument("--device", help="default: cuda if there is one")
    parser.add_argument("--json", action="store_true", help="print rows as JSON")


def run(args: argparse.Namespace) -> int:
    device = default_device(args.device)
    if device.type == "cpu" and not args.tiny:
        raise ValueError("FLUX.1's shapes take hours in the interpreter: use a GPU, or --tiny for a rehearsal")
    arch = native_arch(device)
    precisions = [f for f in registry.FORMATS if registry.refuse_format(f, arch) is None]
    config, sizes = (TINY, TINY_SIZES) if args.tiny else (DEV, {name: SIZES[name] for name in args.size})
    chosen = [case for case in everything(config, sizes, precisions) if not args.op or case.op in args.op]
    results = Results(args.results / f"kernels-{slug(device)}{'-tiny' * args.tiny}.jsonl", identity(device))
    print(f"{len(chosen)} cases on {device}, results in {results.path}", file=sys.stderr)
    show = (lambda row: print(json.dumps(row), flush=True)) if args.json else (lambda row: print(line(row), flush=True))
    with torch.inference_mode(), on(device):
        bench(device, results, chosen, args.budget, 256 if args.tiny else 8192, progress=show)
    return 0
