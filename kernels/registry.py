"""Operations x backends: who can run what, where, and why not.

run("linear_gelu", x, layer, split, backend="triton")      one call, checked, in memory of its own
refuse_model(...)                                          why a model cannot run on the Triton kernels here
configurations(arch)                                       every launch that is shipped for an architecture
matrix(archs)                                              each of them compiled, without a GPU
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fluxkiln.kernels import (
    RefusedError,
    attention,
    linear,
    linear_gate_residual,
    linear_gelu,
    norm_modulate,
    qkv_rope,
)
from fluxkiln.kernels import quantize as quantize_rows
from fluxkiln.kernels.arch import ARCHS, NATIVE, RELATIVE
from fluxkiln.kernels.compile import Configuration
from fluxkiln.kernels.language import MISSING, tl
from fluxkiln.kernels.layers import Projection, Streams
from fluxkiln.kernels.recipe import BY_TILE, Recipe

OPS: dict[str, ModuleType] = {
    "norm_modulate": norm_modulate,
    "qkv_rope": qkv_rope,
    "attention": attention,
    "linear_gelu": linear_gelu,
    "linear_gate_residual": linear_gate_residual,
    "linear": linear,
    "quantize": quantize_rows,
}
FORMATS = ("bf16", "fp8", "nvfp4")
TRITON = (3, 6)  # the oldest that the kernels compile with


# --- one call ---------------------------------------------------------------------------------


def run(op: str, *given: Any, backend: str = "auto", arch: int | None = None, **named: Any) -> Any:
    """Run one operation; layers are given unpacked (`Streams`, `Projection`), nothing that is given is overwritten.

    Args:
        op: a key of `OPS`; the other arguments are those of its `reference`.
        backend: `eager`, `triton`, or `auto`: Triton for tensors on a GPU if it can run them, else eager.
        arch: whose kernels Triton launches, None for the device's.

    Raises:
        ValueError: no such operation or backend, or a call that is wrong for every backend.
        RefusedError: the backend cannot run the call; the message says why.
    """
    if op not in OPS:
        raise ValueError(f"operation must be one of {', '.join(OPS)}, got {op!r}")
    if backend not in ("auto", "eager", "triton"):
        raise ValueError(f"backend must be auto, eager or triton, got {backend!r}")
    module = OPS[op]
    call = inspect.signature(module.reference).bind(*given, **named)
    call.apply_defaults()
    args = call.args
    module.check(*args)
    device = _device(args)
    if backend == "eager" or (backend == "auto" and device.type != "cuda"):
        return module.reference(*args)
    reason = unavailable(device)
    if reason is None:
        from fluxkiln.kernels.backend import Triton, refuse

        kernels = Triton(device, arch=arch)
        operands = packed(op, args)
        reason = refuse(module, operands, kernels.arch)
        if reason is None:
            output, launches = module.launch(*operands, arch=kernels.arch)
            for launch in launches:
                launch()
            return output
    if backend == "auto":
        return module.reference(*args)
    raise RefusedError(f"triton cannot run this {op}: {reason}")


def packed(op: str, args: Sequence[Any]) -> list[Any]:
    """The arguments of an operation's `launch`, given those of its `reference`; a residual, overwritten, is a copy."""
    from fluxkiln.kernels.packed import pack as stacked

    def pack(arg: Any) -> Any:
        if isinstance(arg, Projection):
            return qkv_rope.pack(arg)
        if isinstance(arg, Streams):
            return linear.pack(arg) if op == "linear" else stacked(arg)
        return arg

    operands = [pack(arg) for arg in args]
    if op == "linear_gate_residual":
        operands[3] = operands[3].clone()
    return operands


def _device(args: Sequence[Any]) -> torch.device:
    """Of the first tensor found."""
    for arg in args:
        if isinstance(arg, Tensor):
            return arg.device
        if isinstance(arg, tuple | list):
            return _device(arg)
        if hasattr(arg, "__dataclass_fields__"):
            return _device(tuple(vars(arg).values()))
    raise ValueError("the operation was given no tensor")


# --- this machine -----------------------------------------------------------------------------


@functools.cache
def unavailable(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on a device of this machine, with the remedy; None if they can.

    On a GPU the answer comes from running a first small kernel, once.
    """
    if tl is None:
        return MISSING
    from triton import __version__

    if tuple(map(int, __version__.split(".")[:2])) < TRITON:
        return f"Triton {__version__} is too old: pip install 'triton>={'.'.join(map(str, TRITON))}'"
    if device.type == "cpu":
        return None
    if device.type != "cuda" or torch.version.cuda is None:
        return f"the kernels are for NVIDIA GPUs, this device is {device}"
    major, minor = torch.cuda.get_device_capability(device)
    if 10 * major + minor not in ARCHS:
        return f"this GPU is sm_{major}{minor}; the kernels run on {', '.join(map(str, ARCHS.values()))}"
    compiler = os.environ.get("CC")
    if not any(shutil.which(name) for name in ((compiler,) if compiler else ("gcc", "clang", "cc"))):
        return "Triton needs a C compiler to start its kernels: install gcc or clang, or name one in CC"
    try:
        row = torch.ones(1, 1, 16, dtype=torch.bfloat16, device=device)
        for launch in norm_modulate.launch(row, row, row, 0, arch=RELATIVE.get(10 * major + minor, 10 * major + minor))[
            1
        ]:
            launch()
        torch.cuda.synchronize(device)
    except Exception as error:  # whatever it is, the user has to be told, and eager still runs
        cuda = torch.cuda.driver_version() if hasattr(torch.cuda, "driver_version") else torch.version.cuda
        return (
            f"a first kernel fails here ({error}); CUDA {cuda}, Triton {__version__}: is the NVIDIA driver up to date?"
        )
    return None


def refuse_model(
    head_dim: int, hidden_size: int, recipe: Recipe, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Why a model by a recipe cannot run on the Triton kernels of this machine, or None."""
    from fluxkiln.kernels.backend import native_arch

    if dtype != torch.bfloat16:
        return f"the kernels compute in bfloat16, the model's dtype is {str(dtype).removeprefix('torch.')}"
    if head_dim not in attention.HEAD_DIMS:
        return f"head dim {head_dim} is not one of {', '.join(map(str, attention.HEAD_DIMS))}"
    if hidden_size > norm_modulate.MAX_D:
        return f"hidden size {hidden_size} is more than the {norm_modulate.MAX_D} that one program can normalise"
    if reason := unavailable(device):
        return reason
    arch = native_arch(device)
    own = arch
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        own = 10 * major + minor
    if reason := refuse_format(recipe.attention, own):
        return f"attention: {reason}"
    for pattern, rule in recipe.rules:
        if rule.format == "dense":
            continue
        if reason := refuse_format(rule.format, own):
            return reason
        if hidden_size % 32:
            return f"hidden size {hidden_size} is not a multiple of 32"
        if rule.scale == "row" and pattern in BY_TILE:
            return f"{pattern} wants scales by row, but a tile does not see a row's largest magnitude: use 'bound'"
        if (arch, rule.format, rule.accumulate) not in linear_gelu.TILES:
            return f"no kernel accumulates {rule.format} by {rule.accumulate} on sm_{arch}"
    return None


def refuse_format(format: str, arch: int) -> str | None:
    """Why no kernel multiplies a format on an architecture, or None."""
    if format == "fp8" and arch < 89:
        return f"FP8 tensor cores begin with sm_89, this is {ARCHS[arch]}: use precision='bf16'"
    if format == "nvfp4" and arch < 100:
        return (
            f"NVFP4 needs the block-scaled tensor cores of sm_100 or sm_120, this is {ARCHS[arch]}: use precision='fp8'"
        )
    return None


# --- everything that is shipped ---------------------------------------------------------------


def configurations(arch: int) -> Iterator[Configuration]:
    """Every shipped launch, of every operation, for an architecture or its nearest relative."""
    for module in OPS.values():
        for configuration in module.configurations(RELATIVE.get(arch, arch)):
            if refuse_format(configuration.format.split()[0], arch) is None:
                yield configuration


def refusals(arch: int) -> Iterator[dict[str, str]]:
    """A row for every (operation, format) that has no kernel on an architecture, with the reason."""
    shipped = {(c.op, c.format.split()[0]) for c in configurations(arch)}
    for op in OPS:
        for format in FORMATS:
            if (op, format) in shipped:
                continue
            reason = refuse_format(format, arch)
            if reason is None:
                reason = _NOT_OFFERED.get((op, format), f"{op} in {format} is not shipped for {ARCHS[arch]}")
            yield {"op": op, "backend": "triton", "arch": str(ARCHS[arch]), "format": format, "refused": reason}


_NOT_OFFERED = {
    ("quantize", "bf16"): "a tensor in bf16 needs no quantisation",
    ("attention", "nvfp4"): "softmax weights in 4 bits lose the image: attention is bf16 or fp8",
}


def matrix(
    archs: Sequence[int] = NATIVE,
    ops: Sequence[str] | None = None,
    progress: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Every shipped launch compiled for every architecture, on all cores, and every refusal: `fluxkiln kernels`.

    Processes of their own compile, so that what this one has set (TRITON_INTERPRET, a GPU in use) does not matter.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    workers = os.cpu_count() or 1
    names = [str(ARCHS[arch]) for arch in archs]
    rows: list[dict[str, Any]] = []

    def work(part: int) -> None:
        command = [sys.executable, "-m", "fluxkiln.kernels", *names, "--part", f"{part}/{workers}"]
        command += ["--op", *ops] if ops else []
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                row = {"backend": "triton", **json.loads(line)}
                rows.append(row)
                progress(row)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} failed with exit code {process.returncode}")

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, range(workers)))
    order = {op: i for i, op in enumerate(OPS)}
    rows.sort(key=lambda row: (names.index(row["arch"]), order[row["op"]], row["format"], row["config"]))
    return rows + [row for arch in archs for row in refusals(arch) if row["op"] in (ops or OPS)]


def markdown(archs: Sequence[int] = NATIVE) -> str:
    """The README's table: operation x architecture, and the formats that have kernels."""
    lines = [
        "| operation | eager | " + " | ".join(f"{ARCHS[arch]} {ARCHS[arch].name}" for arch in archs) + " |",
        "|---|---|" + "---|" * len(archs),
    ]
    for op in OPS:
        cells = []
        for arch in archs:
            shipped = {c.format.split()[0] for c in configurations(arch) if c.op == op}
            cells.append(" ".join(format for format in FORMATS if format in shipped) or "–")
        lines.append(f"| `{op}` | any | " + " | ".join(cells) + " |")
    return "\n".join(lines)
