"""`make gpu`: what only a GPU can prove, then what only a GPU can time, in two halves that each fit nine minutes.

    python -m fluxkiln.bench.gpu --half kernels     every operation against float64 on the chip; batches, repetition and
                                                    CUDA graphs to equal bytes; what ran against what was planned; then
                                                    `bench kernels`
    python -m fluxkiln.bench.gpu --half step        one denoise step of the whole model with random weights: Triton,
                                                    eager, compiled, the library's FP8, diffusers

Every row is written as JSON as soon as it is known. A half that runs out of time says so with exit code 3 and goes on
where it stopped when it is called again; exit code 1 says that a proof or a kernel failed. A kernel that faults or
never ends, or a compiler that dies, costs its own row: a fresh process goes on with the next. Needs torch and triton
only, no network and no installed diffusers; `--tiny` rehearses all of it on a CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluxkiln import verify, workload
from fluxkiln.bench import kernels as bench_kernels
from fluxkiln.bench.cases import SIZES, everything
from fluxkiln.bench.kernels import TINY_SIZES, LibraryLinear, Results, identity, line, slug
from fluxkiln.bench.measure import DIED, LOST, captured, lost, watched
from fluxkiln.bench.step import AGREEMENT, TINY, ByRecipe, RandomWeights, Spec, random_inputs
from fluxkiln.config import DEV, FluxConfig
from fluxkiln.kernels import EAGER, Ops, eager_ops, registry
from fluxkiln.kernels.attention import Query, Values
from fluxkiln.kernels.formats import Fp8, Nvfp4, Quant
from fluxkiln.kernels.language import Launch, on
from fluxkiln.kernels.layers import Linear, Projection, QKNorm, Streams
from fluxkiln.kernels.recipe import RECIPES, Recipe
from fluxkiln.load import default_device
from fluxkiln.transformer import Transformer
from fluxkiln.workload import Tokens

DONE, FAILED, OUT_OF_TIME = 0, 1, 3  # exit codes; the last: call again
STEPS = 12  # timed steps of a contestant
ROOM = 2 * 2**30  # bytes beside the weights: CUDA's context, a step's activations, a layer while it is packed
MOST_SECONDS = 300  # of a contestant, compilation included; one that takes longer must not keep the others from running


# --- models -----------------------------------------------------------------------------------


class LibraryLayers(ByRecipe):
    """Quantised layers call `torch._scaled_mm`, with inputs that they quantise themselves."""

    def __getitem__(self, name: str) -> Any:
        layer = super().__getitem__(name)
        return LibraryLinear(layer.weight, layer.bias, name=name) if isinstance(layer, Linear) else layer


def weights(config: FluxConfig, chosen: Recipe, device: torch.device) -> ByRecipe:
    """Random weights of a model, each drawn when it is asked for."""
    return ByRecipe(RandomWeights(config, torch.bfloat16, str(device)), chosen)


def inputs(config: FluxConfig, tokens: Tokens, model: Transformer) -> dict[str, Tensor]:
    """Arguments of `step`, modulation and rotation computed before, as for a whole schedule."""
    x = random_inputs(Spec(config, tokens, "bf16", "bf16", "triton", str(model.device)))
    mods = model.modulate(x["pooled"], x["timestep"], x["guidance"])
    rope = model.rope(x["txt_ids"], x["img_ids"])
    return {"img": x["img"], "txt": x["txt"], "mods": mods, "rope": rope}


def with_attention(precision: str, attention: str) -> Recipe:
    return dataclasses.replace(RECIPES[precision], attention=attention)


# --- first half: proofs -----------------------------------------------------------------------


def proofs(device: torch.device, tiny: bool) -> Iterator[tuple[str, Callable[[], str]]]:
    """(name, proof): a proof returns what it found, or raises."""
    yield "a first kernel runs", lambda: _first_kernel(device)
    arch = bench_kernels.native_arch(device)
    for op, format, args in verify.cases(verify.SMALL if tiny else verify.FLUX, device):
        if registry.refuse_format(format, arch) is None:
            name = f"{verify.named(op, args)} {format}"
            yield f"{name}: error against float64", lambda o=op, a=args: _parity(o, a)
            yield f"{name}: an image of a batch is what it is alone", lambda o=op, a=args: _alone(o, a)
    config = TINY if tiny else dataclasses.replace(DEV, depth=1, depth_single_blocks=1)
    for precision, attention in (("bf16", "bf16"), ("fp8", "bf16"), ("fp8", "fp8"), ("nvfp4", "bf16")):
        if registry.refuse_format(precision, arch):
            continue
        for tokens in (Tokens(24, 40, batch=2),) if tiny else (Tokens(512, 1024, batch=2), Tokens(77, 1000, batch=2)):
            name = f"step {precision}, attention {attention}, {tokens.text} + {tokens.image} tokens"
            step = _Step(config, with_attention(precision, attention), tokens, device)
            yield f"{name}: against eager", step.against_eager
            yield f"{name}: the same bytes again, and for each image alone", step.repeats
            yield f"{name}: a CUDA graph gives the same bytes", step.graph
            yield f"{name}: what ran is what was planned", step.names


def _first_kernel(device: torch.device) -> str:
    if reason := registry.unavailable(device):
        raise RuntimeError(reason)
    return "yes"


def _parity(op: str, args: tuple[Any, ...]) -> str:
    reference = registry.OPS[op].reference
    exact = [None if isinstance(x, Quant) and op != "quantize" else verify.exact(x) for x in args]
    truth = [exact[0]] if op == "quantize" else verify.values(reference(*exact))
    eagers = verify.error(verify.values(reference(*args)), truth)
    got = verify.values(registry.run(op, *args, backend="triton"), half_layout=op == "qkv_rope")
    mine = verify.error(got, truth)
    sums = verify.sums_of(args)
    found = f"error {mine:.2e}, eager's own {eagers:.2e}" + f", the tensor cores' in such sums {sums:.2e}" * bool(sums)
    if not mine <= verify.allowed(eagers, sums):
        raise AssertionError(found)
    return found


def _alone(op: str, args: tuple[Any, ...]) -> str:
    together = verify.values(registry.run(op, *args, backend="triton"))
    for i in range(2):
        alone = verify.values(registry.run(op, *(_image(x, i) for x in args), backend="triton"))
        for a, b in zip(alone, together, strict=True):
            if not torch.equal(a[0], b[i]):
                raise AssertionError(f"image {i} differs in {(a[0] != b[i]).sum().item()} of {a.numel()} values")
    return "yes, bit for bit"


def _image(x: Any, i: int) -> Any:
    """Image i of an argument of two images."""
    part = slice(i, i + 1)
    if isinstance(x, Tensor):
        return x[part] if x.ndim > 2 and len(x) == 2 else x
    if isinstance(x, Values):
        return dataclasses.replace(x, data=x.data[part], scale=x.scale[part])
    if isinstance(x, Query):
        return dataclasses.replace(x, data=x.data[part])
    if isinstance(x, Fp8 | Nvfp4):
        return x[part]
    return tuple(_image(each, i) for each in x) if type(x) is tuple else x


class _Step:
    """Proofs about a step of a small model of FLUX.1's width."""

    def __init__(self, config: FluxConfig, chosen: Recipe, tokens: Tokens, device: torch.device) -> None:
        self.config, self.recipe, self.tokens, self.device = config, chosen, tokens, device
        self._model: Transformer | None = None

    @property
    def model(self) -> Transformer:
        if self._model is None:
            from fluxkiln.kernels.backend import triton_ops

            layers = weights(self.config, self.recipe, self.device)
            self._model = Transformer(self.config, layers, triton_ops(self.device, self.recipe.attention))
            self._model.prepare(self.tokens.batch, self.tokens.text, self.tokens.image)
        return self._model

    def inputs(self) -> dict[str, Tensor]:
        return inputs(self.config, self.tokens, self.model)

    def against_eager(self) -> str:
        layers = weights(self.config, self.recipe, self.device)
        eager = Transformer(self.config, layers, eager_ops(self.recipe.attention)).step(**self.inputs())
        got = self.model.step(**self.inputs())
        difference = verify.error([got.double()], [eager.double()])
        if not difference <= AGREEMENT[self.recipe.name]:
            raise AssertionError(f"differs from eager by {difference:.2e}, allowed is {AGREEMENT[self.recipe.name]}")
        return f"difference {difference:.2e}"

    def repeats(self) -> str:
        x = self.inputs()
        first, again = self.model.step(**x), self.model.step(**x)
        if not torch.equal(first, again):
            raise AssertionError("the second run differs")
        for i in range(self.tokens.batch):
            alone = self.model.step(**{n: t[i : i + 1] if n != "rope" else t for n, t in x.items()})
            if not torch.equal(alone[0], first[i]):
                raise AssertionError(f"image {i} alone differs in {(alone[0] != first[i]).sum().item()} values")
        return "yes, bit for bit"

    def graph(self) -> str:
        if self.device.type != "cuda":
            return "not on a CPU"
        from fluxkiln.kernels.backend import CapturedStep

        x = self.inputs()
        step = CapturedStep(self.model, **x)
        other = x | {"img": x["img"].flip(0) * 0.5}
        for given in (x, other, x):
            if not torch.equal(step(**given), self.model.step(**given)):
                raise AssertionError("a replay differs from the step")
        return "yes, bit for bit"

    def names(self) -> str:
        x = self.inputs()
        triton = self.model.ops.pack.__self__
        with triton.collected() as launches:
            self.model.step(**x)
        planned = [kernel_name(launch) for launch in launches if isinstance(launch, Launch)]
        calls = workload.step(self.config, self.tokens)
        ours = Counter(call.op for call in calls if self.model.describe(call.name, call.op).implementation == "triton")
        for op, count in ours.items():
            if planned.count(op) < count:
                raise AssertionError(f"planned are {count} calls of {op} on our kernels, {planned.count(op)} launches")
        if self.device.type != "cuda":
            return f"{len(planned)} launches planned, nothing to profile on a CPU"
        ran = [name for name, _ in profiled(lambda: self.model.step(**x))]
        if not ran:
            raise RuntimeError("torch's profiler sees nothing here: this user may not read the GPU's counters (CUPTI)")
        found = [name for name in ran if name in set(planned)]
        if found != planned:
            raise AssertionError(f"planned {Counter(planned)}, ran {Counter(found)}, or in another order")
        rest = Counter(name for name in ran if name not in set(planned))
        return f"{len(planned)} launches as planned; besides {dict(rest)}"


def kernel_name(launch: Launch) -> str:
    """The name under which a profiler shows it."""
    epilogue = launch.options.get("EPILOGUE")
    name = launch.kernel.fn.__name__ if epilogue is None else epilogue.__name__
    return name.removesuffix("_kernel").strip("_")


def profiled(run: Callable[[], Any]) -> list[tuple[str, float]]:
    """(name, seconds) of everything that `run` does on the GPU, in order."""
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda event: event.time_range.start)
    return [(event.name, 1e-6 * event.time_range.elapsed_us()) for event in events]


def prove(device: torch.device, results: Results, tiny: bool, deadline: float) -> bool:
    """Run the proofs that `results` lacks; True if none is left."""
    for name, proof in proofs(device, tiny):
        if results.has(kind="proof", name=name, passed=True) or results.has(kind="proof", name=name, final=True):
            continue
        if time.monotonic() > deadline:
            return False
        start = time.perf_counter()
        row: dict[str, Any] = {"kind": "proof", "name": name, "passed": False}
        results.begin(row | {"found": DIED, "final": True})
        with watched(device, lambda why, row=row: results.add(row | {"found": why, "final": True})):
            try:
                row |= {"found": proof(), "passed": True}
            except Exception as failure:  # the other proofs and the timings are worth having all the same
                row |= {"found": f"{type(failure).__name__}: {failure}"[:2000]}
                traceback.print_exc()
            gone = not row["passed"] and lost(device)
        row |= {"seconds": round(time.perf_counter() - start, 2)} | ({"final": True} if gone else {})
        results.add(row)
        print(f"{'ok  ' if row['passed'] else 'FAIL'} {name}: {row['found']} ({row['seconds']} s)", flush=True)
        if gone:
            os._exit(LOST)
    return True


# --- second half: steps -----------------------------------------------------------------------


@dataclass(frozen=True)
class Contestant:
    """One way to compute a step.

    Attributes:
        who: `triton`, `eager`, `compiled` (every operation by torch.compile), `library` and `library compiled` (FP8 by
            `torch._scaled_mm`), `diffusers`, `diffusers compiled` (its repeated blocks).
        precision: of the block linears; attention: its format.
        graph: replayed as a CUDA graph.
    """

    who: str
    precision: str
    attention: str = "bf16"
    graph: bool = False
    size: str = "1024x1024"

    def __str__(self) -> str:
        attention = " and attention" if self.attention == "fp8" else ""
        return f"{self.size}, {self.who} {self.precision}{attention}" + ", CUDA graph" * self.graph


# What matters most first: a half may be cut short. Those that a compiler tunes for minutes come last.
CONTESTANTS = (
    Contestant("triton", "fp8", "fp8", graph=True),
    Contestant("triton", "bf16", graph=True),
    Contestant("triton", "fp8", graph=True),
    Contestant("eager", "bf16"),
    Contestant("library", "fp8"),
    Contestant("triton", "fp8", "fp8"),
    Contestant("triton", "bf16"),
    Contestant("triton", "fp8", "fp8", True, "kontext 1024x1024"),
    Contestant("triton", "bf16", "bf16", True, "kontext 1024x1024"),
    Contestant("triton", "fp8", "fp8", True, "512x512"),
    Contestant("triton", "bf16", "bf16", True, "512x512"),
    Contestant("triton", "nvfp4", graph=True),
    Contestant("diffusers", "bf16"),
    Contestant("diffusers compiled", "bf16"),
    Contestant("library compiled", "fp8"),
    Contestant("compiled", "bf16"),
)


def compete(contestant: Contestant, device: torch.device, tiny: bool) -> dict[str, Any]:
    """Time one contestant: milliseconds of a step, memory, and where the time goes, in parts that add up."""
    config = TINY if tiny else DEV
    tokens = TINY_SIZES["tiny"] if tiny else SIZES[contestant.size]
    start = time.perf_counter()
    run, model = _runner(contestant, config, tokens, device)
    memory = _allocated(device)
    if isinstance(model, Transformer):  # after: what it allocates for outputs is no weight
        model.prepare(tokens.batch, tokens.text, tokens.image + tokens.reference)
    ready = time.perf_counter()
    run()
    _wait(device)
    row: dict[str, Any] = {
        "load_seconds": round(ready - start, 1),
        "first_seconds": round(time.perf_counter() - ready, 1),
    }
    if contestant.graph and device.type == "cuda":
        run = captured(run)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = _seconds(run, device, STEPS if device.type == "cuda" else 1)
    median = statistics.median(seconds)
    row |= {
        "ms": round(1e3 * median, 3), "ms_all": [round(1e3 * s, 3) for s in seconds],
        "tflops": round(sum(call.flops for call in workload.step(config, tokens)) / median / 1e12, 2),
    }  # fmt: skip
    if device.type == "cuda":
        row |= {"weights_bytes": memory, "peak_bytes": torch.cuda.max_memory_allocated(device)}
    if isinstance(model, Transformer):
        parts = (
            _profile_parts(run, median)
            if contestant.who == "triton" and device.type == "cuda"
            else _parts(run, model, device)
        )
        row["parts_ms"] = {name: round(1e3 * s, 3) for name, s in parts.items()}
    return row


def _runner(
    contestant: Contestant, config: FluxConfig, tokens: Tokens, device: torch.device
) -> tuple[Callable[[], Tensor], Any]:  # fmt: skip
    if contestant.who.startswith("diffusers"):
        return _diffusers(contestant, config, tokens, device)
    chosen = with_attention(contestant.precision, contestant.attention)
    layers = weights(config, chosen, device)
    if contestant.who.startswith("library"):
        layers = LibraryLayers(RandomWeights(config, torch.bfloat16, str(device)), chosen)
    if contestant.who == "triton":
        from fluxkiln.kernels.backend import triton_ops

        model = Transformer(config, layers, triton_ops(device, contestant.attention))
    else:
        model = Transformer(config, layers, _compiled(device) if contestant.who.endswith("compiled") else EAGER)
    x = inputs(config, tokens, model)
    return lambda: model.step(**x), model


def _compiled(device: torch.device) -> Ops:
    """Every operation a region of its own for torch.compile, which compiles each kind of layer once."""
    if device.type != "cuda":  # a rehearsal: the code is traced, nothing is generated
        options: dict[str, Any] = {"backend": "eager"}
    else:
        options = {"mode": "max-autotune-no-cudagraphs"}

    def pack(streams: Streams) -> Streams:  # a name of its own would be a constant to compile each layer for
        return Streams(dataclasses.replace(linear, name="") for linear in streams)

    def pack_qkv(streams: Streams, norms: tuple[QKNorm, ...]) -> Projection:
        return EAGER.pack_qkv(pack(streams), norms)

    fields = ("norm_modulate", "qkv_rope", "attention", "linear_gelu", "linear_gate_residual", "linear")
    compiled = {name: torch.compile(getattr(EAGER, name), fullgraph=True, dynamic=False, **options) for name in fields}
    return dataclasses.replace(EAGER, pack=pack, pack_qkv=pack_qkv, **compiled)


def _diffusers(
    contestant: Contestant, config: FluxConfig, tokens: Tokens, device: torch.device
) -> tuple[Callable[[], Tensor], Any]:  # fmt: skip
    """diffusers' whole call, modulation included: it has no step of its own."""
    from fluxkiln.bench import peers

    model = peers.diffusers_transformer(config, dict(RandomWeights(config, torch.bfloat16, str(device))))
    if contestant.who.endswith("compiled"):
        options = {} if device.type == "cuda" else {"backend": "eager"}
        model.compile_repeated_blocks(fullgraph=True, **options)
    x = random_inputs(Spec(config, tokens, "bf16", "bf16", "eager", str(device)))
    return lambda: peers.diffusers_velocity(model, x), model


def _allocated(device: torch.device) -> int | None:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(run: Callable[[], Any], device: torch.device, count: int) -> list[float]:
    """Of steps one after the other, as a denoise runs them."""
    for _ in range(2 if device.type == "cuda" else 0):
        run()
    marks = [_mark(device)]
    for _ in range(count):
        run()
        marks.append(_mark(device))
    return _between(marks, device)


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(marks: Sequence[Any], device: torch.device) -> list[float]:
    _wait(device)
    if device.type != "cuda":
        return [b - a for a, b in itertools.pairwise(marks)]
    return [1e-3 * a.elapsed_time(b) for a, b in itertools.pairwise(marks)]


def _parts(run: Callable[[], Any], model: Transformer, device: torch.device) -> dict[str, float]:
    """Seconds of each operation in one step, from marks between them: they add up to that step."""
    names, marks, plain = ["start"], [_mark(device)], model.ops

    def marked(name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            result = op(*args, **options)
            names.append(name)
            marks.append(_mark(device))
            return result

        return call

    fields = ("norm_modulate", "qkv_rope", "attention", "linear_gelu", "linear_gate_residual", "linear")
    model.ops = dataclasses.replace(plain, **{name: marked(name, getattr(plain, name)) for name in fields})
    try:
        run()
    finally:
        model.ops = plain
    found: dict[str, float] = {}
    for name, seconds in zip(names[1:], _between(marks, device), strict=True):
        found[name] = found.get(name, 0.0) + seconds
    return found


def _profile_parts(run: Callable[[], Any], median: float) -> dict[str, float]:
    """Seconds of each kernel in one step, those that are not ours together, and what is left of the median; nothing
    where the profiler sees nothing."""
    found: dict[str, float] = {}
    events = profiled(run)
    if not events:
        return {}
    for name, seconds in events:
        known = name if name in registry.OPS else "others"
        found[known] = found.get(known, 0.0) + seconds
    found["between kernels"] = median - sum(found.values())
    return found


def compete_all(device: torch.device, results: Results, tiny: bool, deadline: float) -> bool:
    """Time the contestants that `results` lacks, each in a process of its own; True if none is left."""
    for number, contestant in enumerate(CONTESTANTS):
        if tiny and contestant.size != "1024x1024":
            continue
        name = str(contestant)
        if results.has(kind="step", contestant=name):
            continue
        reason = _refused(contestant, device, tiny)
        row = {"kind": "step", "contestant": name, **dataclasses.asdict(contestant)}
        if reason is None:
            left = deadline - time.monotonic()
            if left < (0 if tiny else 45):
                return False
            # -P: the working directory has a folder `kernels`, which transformers would take for a package.
            command = [sys.executable, "-P", "-m", "fluxkiln.bench.gpu", "--contestant", str(number)]
            command += ["--device", str(device), *["--tiny"] * tiny]
            code, output, said = _run(command, min(left, MOST_SECONDS))
            if code is None:
                if left < MOST_SECONDS:
                    return False
                row["failed"] = f"took longer than {MOST_SECONDS} s"
            elif code == 0 and output:
                row |= json.loads(output.splitlines()[-1])
            else:
                row["failed"] = (said.strip().splitlines() or [f"no output, exit code {code}"])[-1][:500]
                print(said, file=sys.stderr)
        else:
            row["refused"] = reason
        results.add(row)
        print(step_line(row), flush=True)
    return True


def _run(command: Sequence[str], timeout: float) -> tuple[int | None, str, str]:
    """Exit code, or None for what took too long, output and errors; nothing that the command started goes on."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=timeout)
    except BaseException as stopped:  # too slow, or interrupted: its compilers too
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()  # ends when the last that could write has gone
        if isinstance(stopped, subprocess.TimeoutExpired):
            return None, "", ""
        raise
    return process.returncode, output, errors


def _refused(contestant: Contestant, device: torch.device, tiny: bool) -> str | None:
    import importlib.util

    if contestant.who.startswith("diffusers") and importlib.util.find_spec("diffusers") is None:
        return "diffusers is not installed"
    if reason := registry.refuse_format(contestant.precision, bench_kernels.native_arch(device)):
        return reason
    if device.type != "cuda":
        return None
    need = workload.weight_bytes(TINY if tiny else DEV, "bf16", lambda name: contestant.precision)
    has = torch.cuda.get_device_properties(device).total_memory
    if need + ROOM <= has:
        return None
    return (
        f"the weights take {need / 2**30:.1f} GiB and a step needs about {ROOM / 2**30:.0f} GiB beside them, "
        f"this GPU has {has / 2**30:.1f}"
    )


def step_line(row: Mapping[str, Any]) -> str:
    """A row for people."""
    if "ms" not in row:
        return f"{row['contestant']:60} {row.get('refused') or row.get('failed')}"
    memory = f" {row['peak_bytes'] / 2**30:6.1f} GiB at most" if "peak_bytes" in row else ""
    return f"{row['contestant']:60} {row['ms']:10.2f} ms {row['tflops']:8.1f} TFLOP/s{memory}"


# --- command ----------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fluxkiln.bench.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--half", choices=("kernels", "step"), help="only this half (default: both)")
    parser.add_argument("--minutes", type=float, default=8.5, metavar="M", help="for each half (default 8.5)")
    parser.add_argument("--results", type=Path, metavar="FOLDER", default=Path("bench/results"))
    parser.add_argument("--device", help="default: cuda if there is one")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: a rehearsal that a CPU can do")
    parser.add_argument("--contestant", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--died", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    device = default_device(args.device)
    if device.type == "cpu" and not args.tiny:
        parser.error("there is no GPU here; --tiny rehearses on a CPU")
    with torch.inference_mode(), on(device):
        if args.contestant is not None:
            print(json.dumps(compete(CONTESTANTS[args.contestant], device, args.tiny)))
            return DONE
        halves = {"kernels": first_half, "step": second_half}
        codes = set()
        for name in [args.half] if args.half else halves:
            alone = device.type != "cuda" or args.worker
            codes.add(halves[name](device, args) if alone else supervised(name, args))
    if OUT_OF_TIME in codes and not args.worker:
        print(f"out of time, there is more to do: call it again (exit code {OUT_OF_TIME})")
    return max(codes)


def supervised(half: str, args: argparse.Namespace) -> int:
    """A half in a process of its own, and in another for as long as there is time and something takes it with it."""
    deadline = time.monotonic() + 60 * args.minutes
    command = [sys.executable, "-P", "-m", "fluxkiln.bench.gpu", "--worker", "--half", half]
    command += ["--results", str(args.results), *(["--device", args.device] if args.device else [])]
    command += ["--tiny"] * args.tiny
    died = False
    while (left := (deadline - time.monotonic()) / 60) > 0:
        code = subprocess.run([*command, "--minutes", f"{left:.3f}", *["--died"] * died]).returncode
        died = code < 0  # by a signal
        if code != LOST and not died:
            return code if code in (DONE, OUT_OF_TIME) else FAILED
    return OUT_OF_TIME


def first_half(device: torch.device, args: argparse.Namespace) -> int:
    deadline = time.monotonic() + 60 * args.minutes
    results, timings = (Results(_file(what, device, args), identity(device)) for what in ("proofs", "kernels"))
    buried = [each.bury(args.died) for each in (results, timings)]
    if args.died and True not in buried:
        return FAILED  # it died before it began anything
    results.add({"kind": "run", "identity": results.identity, "card": bench_kernels.card(device)})
    if not prove(device, results, args.tiny, deadline):
        return OUT_OF_TIME
    arch = bench_kernels.native_arch(device)
    precisions = [f for f in ("fp8", "bf16", "nvfp4") if registry.refuse_format(f, arch) is None]
    chosen = everything(TINY, TINY_SIZES, precisions[:2]) if args.tiny else everything(DEV, SIZES, precisions)
    budget, side = (0.002, 256) if args.tiny else (0.2, 8192)
    show = lambda row: print(line(row), flush=True)  # noqa: E731
    if not bench_kernels.bench(device, timings, chosen, budget, side, deadline, show):
        return OUT_OF_TIME
    proved = {row["name"]: row["passed"] for row in results.rows}  # the last word on each
    ours = [row for row in timings.rows if row.get("contestant") == "triton" and "refused" not in row]
    return DONE if all(proved.values()) and all(row.get("passed") for row in ours) else FAILED


def second_half(device: torch.device, args: argparse.Namespace) -> int:
    if args.died:  # contestants have processes of their own
        return FAILED
    deadline = time.monotonic() + 60 * args.minutes
    results = Results(_file("step", device, args), identity(device))
    results.add({"kind": "run", "identity": results.identity, "card": bench_kernels.card(device)})
    if not compete_all(device, results, args.tiny, deadline):
        return OUT_OF_TIME
    return FAILED if any(row["who"] == "triton" and "failed" in row for row in results.rows) else DONE


def _file(what: str, device: torch.device, args: argparse.Namespace) -> Path:
    return args.results / f"{what}-{slug(device)}{'-tiny' * args.tiny}.jsonl"


if __name__ == "__main__":
    sys.exit(main())
