"""`fluxkiln bench step`: one denoise step of any configuration, alone or beside a peer on the same weights.

Time: contestants take turns in one process, in changing order, over one set of weights; a ratio is the median of the
ratios of neighbouring runs, so that what slows the machine slows both. Memory: each contestant alone in a fresh
process, in which the peak is counted from the moment that its weights are in place.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import math
import os
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fluxkiln import workload
from fluxkiln.cli import pixels
from fluxkiln.config import CONTROL, DEV, FILL, SCHNELL, FluxConfig, scaled_axes
from fluxkiln.kernels.layers import Linear
from fluxkiln.kernels.recipe import RECIPES, Recipe, quantize
from fluxkiln.load import default_device
from fluxkiln.measurements import TIMED, keep, local_folder
from fluxkiln.record import versions
from fluxkiln.select import Choice, choose
from fluxkiln.transformer import Network, Transformer
from fluxkiln.workload import Tokens

if TYPE_CHECKING:
    from fluxkiln.engines.store import Stored

TINY = FluxConfig(16, 16, 128, 2, 2, 2, 4.0, 64, 32, True, scaled_axes(64))
CONFIGS = {"dev": DEV, "schnell": SCHNELL, "kontext": DEV, "fill": FILL, "control": CONTROL, "tiny": TINY}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
AGREEMENT = {"fp32": 1e-4, "bf16": 0.05, "fp8": 0.2, "nvfp4": 0.5}
"""Largest relative difference of two implementations' velocities at which they still compute the same thing."""

_M_MMAP_THRESHOLD = -3  # of glibc's mallopt


@dataclass(frozen=True)
class Spec:
    """What is measured: everything that a fresh process needs to build it again."""

    config: FluxConfig
    tokens: Tokens
    dtype: str
    precision: str
    backend: str
    device: str


class RandomWeights(Mapping[str, Tensor]):
    """Weights of a network that passes signals on: unit gain in matrices, norms near 1, open gates.

    Each is drawn, always the same, when it is asked for and not kept.
    """

    def __init__(self, config: FluxConfig, dtype: torch.dtype, device: str) -> None:
        self._shapes, self._dtype, self._device = config.tensor_shapes(), dtype, device

    def __getitem__(self, name: str) -> Tensor:
        shape, generator = self._shapes[name], torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        x = torch.empty(shape, dtype=self._dtype, device=self._device).normal_(generator=generator)
        if len(shape) == 2:
            return x.div_(math.sqrt(shape[1]))
        return x.mul_(0.1).add_(1.0 if name.endswith(".scale") else 0.1)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


class ByRecipe(Mapping[str, Any]):
    """Weights as `Transformer` takes them: tensors, and the `Linear` of each layer that the recipe quantises."""

    def __init__(self, tensors: Mapping[str, Tensor], recipe: Recipe) -> None:
        self._tensors, self._recipe = tensors, recipe
        layers = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]
        self._quantised = {name for name in layers if recipe.rule(name).format != "dense"}

    def __getitem__(self, name: str) -> Any:
        if name not in self._quantised:
            return self._tensors[name]
        linear = Linear(self._tensors[f"{name}.weight"], self._tensors[f"{name}.bias"], name=name)
        return quantize(linear, self._recipe.rule(name))

    def __contains__(self, name: object) -> bool:
        return name in self._quantised or name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter((*self._tensors, *self._quantised))

    def __len__(self) -> int:
        return len(self._tensors) + len(self._quantised)


def random_inputs(spec: Spec) -> dict[str, Tensor | None]:
    """Keyword arguments of one call of the transformer."""
    config, tokens, dtype = spec.config, spec.tokens, DTYPES[spec.dtype]
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(spec.device, dtype)

    def ids(index: int, length: int) -> Tensor:
        columns = max(1, math.isqrt(length))
        at = torch.arange(length)
        return torch.stack((torch.full((length,), index), at // columns, at % columns), dim=1).float()

    batch, image = tokens.batch, tokens.image + tokens.reference
    return {
        "img": draw(batch, image, config.in_channels),
        "txt": draw(batch, tokens.text, config.context_in_dim),
        "pooled": draw(batch, config.vec_in_dim),
        "timestep": torch.full((batch,), 0.75, device=spec.device),
        "guidance": torch.full((batch,), 3.5, device=spec.device) if config.guidance_embed else None,
        "img_ids": torch.cat((ids(0, tokens.image), ids(1, tokens.reference))).to(spec.device),
        "txt_ids": torch.zeros(tokens.text, 3, device=spec.device),
    }


# --- contestants ---------------------------------------------------------------------------------

Contestant = Callable[[], Tensor]


def fluxkiln_runs(spec: Spec, tensors: Mapping[str, Tensor]) -> dict[str, Contestant]:
    """The whole call, as a peer's, and the part that a pipeline repeats, its modulation and rotation computed for the
    whole schedule before: one model runs both, as a small GPU does not hold two."""
    model, x = _transformer(spec, tensors), random_inputs(spec)
    mods = model.modulate(x["pooled"], x["timestep"], x["guidance"])
    rope = model.rope(x["txt_ids"], x["img_ids"])
    return {"fluxkiln": lambda: model(**x), TIMED: lambda: model.step(x["img"], x["txt"], mods, rope)}


def diffusers_runs(spec: Spec, tensors: Mapping[str, Tensor]) -> dict[str, Contestant]:
    from fluxkiln.bench import peers

    model, x = peers.diffusers_transformer(spec.config, dict(tensors)), random_inputs(spec)
    return {"diffusers": lambda: peers.diffusers_velocity(model, x)}


CONTESTANTS = {"fluxkiln": fluxkiln_runs, TIMED: fluxkiln_runs, "diffusers": diffusers_runs}


def _transformer(spec: Spec, tensors: Mapping[str, Tensor]) -> Network:
    layers = ByRecipe(tensors, RECIPES[spec.precision])
    choice = _choose(spec.backend, spec.config, spec.precision, torch.device(spec.device), spec.dtype)
    if choice.engine is not None:
        from fluxkiln.engine import EngineTransformer, open_session, supply

        session = open_session(choice.engine, supply(choice.engine, layers), spec.device)
        return EngineTransformer(spec.config, layers, choice.engine, session)
    assert choice.ops is not None
    return Transformer(spec.config, layers, choice.ops)


def _choose(backend: str, config: FluxConfig, precision: str, device: torch.device, dtype: str) -> Choice:
    """A backend; `trt` runs an engine without weights that the store has for such a model, timed slower or not."""
    recipe = RECIPES[precision]

    def shadow() -> ByRecipe:
        shapes = config.tensor_shapes().items()
        return ByRecipe(
            {name: torch.empty(shape, dtype=DTYPES[dtype], device="meta") for name, shape in shapes}, recipe
        )

    def find() -> Stored | str:
        from fluxkiln.engine import find

        return find(config, recipe, device, DTYPES[dtype], shadow)

    return choose(backend, config, recipe, device, DTYPES[dtype], find=find, insist=True)


# --- time ----------------------------------------------------------------------------------------


def take_turns(contestants: Mapping[str, Contestant], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each run, after one that does not count; every other round goes backwards."""
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for run in contestants.values():
        run()
    for i in range(rounds):
        for name in names if i % 2 == 0 else names[::-1]:
            _drain(device)
            start = time.perf_counter()
            contestants[name]()
            _drain(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _drain(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def agreement(a: Tensor, b: Tensor) -> float:
    """Relative difference of two velocities, in the L2 norm."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# --- memory --------------------------------------------------------------------------------------


def memory(spec: Spec, name: str) -> dict[str, int] | None:
    """Bytes of a contestant's weights and of the peak that its step adds, in a process of its own.

    On a GPU what the allocator handed out, elsewhere the resident set; None where the system cannot reset its peak, and
    for an engine, whose weights torch's allocator does not see.
    """
    if spec.backend == "trt" and name != "diffusers":
        return None
    if not spec.device.startswith("cuda") and not Path("/proc/self/clear_refs").exists():
        return None
    with ProcessPoolExecutor(1, get_context("spawn")) as alone:
        return alone.submit(_memory_here, spec, name, torch.get_num_threads()).result()


def _memory_here(spec: Spec, name: str, threads: int) -> dict[str, int]:
    torch.set_num_threads(threads)
    _return_freed_memory()
    if name == "diffusers":
        import diffusers  # noqa: F401  the library itself is not part of the model's memory

    with torch.inference_mode():
        small = dataclasses.replace(spec, config=TINY, tokens=Tokens(8, 16))
        dtype = DTYPES[spec.dtype]
        CONTESTANTS[name](small, RandomWeights(TINY, dtype, spec.device))[name]()  # what loads once, loads here
        before = _memory_now(spec.device)
        run = CONTESTANTS[name](spec, RandomWeights(spec.config, dtype, spec.device))[name]
        weights = _memory_now(spec.device)
        _reset_peak(spec.device)
        run()
        peak = _memory_peak(spec.device)
    return {"weights_bytes": weights - before, "working_bytes": peak - weights, "peak_bytes": peak - before}


def _return_freed_memory() -> None:
    """Let glibc give freed tensors back at once: the peak then counts what is live, not the history of the heap."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**20)


def _memory_now(device: str) -> int:
    return torch.cuda.memory_allocated(device) if device.startswith("cuda") else _status("VmRSS")


def _memory_peak(device: str) -> int:
    return torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else _status("VmHWM")


def _reset_peak(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


# --- result --------------------------------------------------------------------------------------


def measure(
    spec: Spec, peer: str | None = None, rounds: int = 7, say: Callable[[str], object] = lambda what: None
) -> dict[str, Any]:
    """Measure one configuration.

    Args:
        spec: what to run.
        peer: `diffusers` or None.
        rounds: timed runs of each contestant.
        say: told what begins.

    Returns:
        plain data: the configuration, FLOPs, and for each contestant seconds and bytes; ratios are fluxkiln's over
        the peer's, so below 1 is better.

    Raises:
        RuntimeError: the peer computes something else, so that a comparison would mean nothing.
    """
    names = ["fluxkiln", TIMED, *([peer] if peer else [])]
    say(f"memory: {', '.join(names)}, each in a process of its own")
    result: dict[str, Any] = {
        "benchmark": "step",
        **dataclasses.asdict(spec),
        "flops": sum(call.flops for call in workload.step(spec.config, spec.tokens)),
        "parameters": workload.parameters(spec.config),
        "versions": versions(spec.device),
        "load_average": os.getloadavg()[0],  # of the machine before: what else wanted its CPUs
        "contestants": {name: {"memory": memory(spec, name)} for name in names},
    }
    with torch.inference_mode():
        tensors: Mapping[str, Tensor] = RandomWeights(spec.config, DTYPES[spec.dtype], spec.device)
        tensors = dict(tensors) if peer else tensors  # shared by both, so that a peer costs no second memory
        runs: dict[str, Contestant] = {}
        for build in dict.fromkeys(CONTESTANTS[name] for name in names):
            runs |= build(spec, tensors)
        if peer:
            difference = agreement(runs["fluxkiln"](), runs[peer]())
            if not difference <= AGREEMENT[spec.precision]:
                raise RuntimeError(
                    f"{peer} computes something else: its velocity differs by {difference:.1e}, "
                    f"at most {AGREEMENT[spec.precision]:.0e} is the same in {spec.precision}"
                )
            result["agreement"] = difference
        say(f"time: {rounds} rounds of {', '.join(names)}")
        seconds = take_turns(runs, rounds, spec.device)
    for name, values in seconds.items():
        result["contestants"][name] |= {"seconds": statistics.median(values), "runs": values}
    if peer:
        ours, theirs = result["contestants"]["fluxkiln"], result["contestants"][peer]
        result["ratio"] = {
            "time": statistics.median(a / b for a, b in zip(ours["runs"], theirs["runs"], strict=True)),
            "memory": ours["memory"]["peak_bytes"] / theirs["memory"]["peak_bytes"] if ours["memory"] else None,
        }
    return result


def to_text(result: Mapping[str, Any]) -> str:
    """The result as a small table."""
    config, tokens = result["config"], result["tokens"]
    lines = [
        f"{config['depth']} double and {config['depth_single_blocks']} single blocks, width {config['hidden_size']}, "
        f"{tokens['text']} text + {tokens['image']} image + {tokens['reference']} reference tokens, "
        f"batch {tokens['batch']}, {result['dtype']}, precision {result['precision']}, {result['backend']} on "
        f"{result['device']}",
        f"{'':16}{'s/step':>10}{'TFLOP/s':>10}{'weights':>12}{'working':>12}{'peak':>12}",
    ]
    for name, values in result["contestants"].items():
        memory = values["memory"] or {}
        sizes = "".join(
            f"{memory[k] / 2**20:>8,.0f} MiB" if k in memory else f"{'-':>12}"
            for k in ("weights_bytes", "working_bytes", "peak_bytes")
        )
        lines.append(f"{name:16}{values['seconds']:>10.4f}{result['flops'] / values['seconds'] / 1e12:>10.2f}{sizes}")
    if "ratio" in result:
        ratio = result["ratio"]
        memory_ratio = "not measured" if ratio["memory"] is None else f"{ratio['memory']:.3f}"
        lines.append(
            f"fluxkiln / peer: time {ratio['time']:.3f}, memory {memory_ratio}; "
            f"velocities differ by {result['agreement']:.1e}"
        )
    return "\n".join(lines)


# --- command -------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", default="dev", metavar="NAME|PATH", help=f"{', '.join(CONFIGS)}, or a checkpoint for its sizes"
    )
    parser.add_argument("--double", type=int, metavar="N", help="double blocks, instead of the configuration's")
    parser.add_argument("--single", type=int, metavar="N", help="single blocks, instead of the configuration's")
    parser.add_argument("--width", type=int, metavar="D", help="hidden size, instead of the configuration's")
    parser.add_argument(
        "--size", type=pixels, default="1024x1024", metavar="WxH", help="pixels of the image (default 1024x1024)"
    )
    parser.add_argument("--tokens", type=int, metavar="N", help="image tokens, instead of --size")
    parser.add_argument("--text", type=int, default=512, metavar="N", help="text tokens (default 512)")
    parser.add_argument("--reference", action="append", type=pixels, metavar="WxH", help="a reference; may be repeated")
    parser.add_argument("--batch", type=int, default=1, metavar="N")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--precision", choices=AGREEMENT, help="of the blocks' linears (default: the dtype)")
    parser.add_argument("--backend", default="auto", help="auto, eager, triton or trt (default auto)")
    parser.add_argument("--device", help="default: cuda if there is one")
    parser.add_argument("--peer", choices=("diffusers",), help="measure this beside it, on the same weights")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="timed runs of each (default 7)")
    parser.add_argument(
        "--results", type=Path, default=local_folder(), metavar="FOLDER", help="where the result is kept"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    spec = spec_of(args)
    result = measure(spec, args.peer, args.rounds, lambda what: print(what, file=sys.stderr))
    print(f"kept in {keep(result, args.results)}", file=sys.stderr)
    print(json.dumps(result, indent=2) if args.json else to_text(result))
    return 0


def spec_of(args: argparse.Namespace) -> Spec:
    """What the arguments ask for.

    Raises:
        ValueError: a size or configuration that does not exist.
    """
    config = CONFIGS.get(args.config)
    if config is None:
        from fluxkiln.checkpoint import open_checkpoint

        config = open_checkpoint(args.config).config
    changes = {"depth": args.double, "depth_single_blocks": args.single, "hidden_size": args.width}
    changes["num_heads"] = args.width and args.width // config.head_dim
    config = dataclasses.replace(config, **{name: value for name, value in changes.items() if value is not None})
    for name in ("text", "batch", "rounds", *(["tokens"] if args.tokens is not None else [])):
        if getattr(args, name) < (name != "text"):
            raise ValueError(f"--{name} must be at least {int(name != 'text')}, got {getattr(args, name)}")
    references = args.reference or [args.size] * (args.config == "kontext")
    width, height = args.size
    tokens = Tokens.of_size(width, height, args.text, references, args.batch)
    if args.tokens is not None:
        tokens = dataclasses.replace(tokens, image=args.tokens)
    device, precision = default_device(args.device), args.precision or args.dtype
    if args.dtype == "fp32" and precision == "bf16":
        raise ValueError("precision bf16 is a dtype as well: give --dtype bf16")
    choice = _choose(args.backend, config, precision, device, args.dtype)
    return Spec(config, tokens, args.dtype, precision, choice.backend, str(device))
