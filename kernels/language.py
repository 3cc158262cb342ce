"""Triton, where there is one: what a kernel's file needs to be written, imported and run anywhere.

    from fluxkiln.kernels.language import jit, tl

A kernel launched on CUDA tensors is compiled, launched on CPU tensors it runs in Triton's interpreter, repaired by
`fluxkiln.kernels.interpret`; `fluxkiln.kernels.compile` compiles it for a GPU that is not there. One process can do
all three. Without Triton the file still imports, its reference still runs, and launching the kernel says what to
install.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

try:
    import triton.language as tl
    from triton.runtime.jit import JITFunction
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # no wheel for this platform
    tl = JITFunction = TensorDescriptor = None

__all__ = ["MISSING", "Launch", "TensorDescriptor", "constexpr", "jit", "on", "tl"]

MISSING = "Triton is not installed: pip install 'triton>=3.6' (Linux), or use backend='eager'"


class Absent:
    """Stands where a kernel would be, on a machine without Triton."""

    def __getitem__(self, grid: Any) -> Any:
        raise ImportError(MISSING)


class Kernel(JITFunction or object):
    """A Triton function that is interpreted when its first argument lives in the CPU's memory."""

    def run(self, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        device = getattr(args[0], "base", args[0]).device  # a descriptor has a base
        if not warmup and device.type == "cpu":
            from fluxkiln.kernels import interpret

            return interpret.launch(self, grid, args, options)
        with on(device):
            return super().run(*args, grid=grid, warmup=warmup, **options)

    def __call__(self, *args: Any, **options: Any) -> Any:
        """One Triton function calls another: only ever reached in the interpreter."""
        from fluxkiln.kernels import interpret

        return interpret.call(self, *args, **options)


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Inside, a GPU is the current one: Triton compiles for that and launches on it, wherever the arguments are; events
    and streams are made on it."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def jit(fn: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`triton.jit`, for kernels that run on CPU tensors too. Options as there (`do_not_specialize`, ...)."""
    if fn is None:
        return lambda fn: jit(fn, **options)
    return Kernel(fn, **options) if tl else Absent()


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, ready to run: `launch()`. Made the same way for tensors of any device."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]  # the kernel's constexprs, num_warps, num_stages, ...

    def __call__(self) -> None:
        # Triton 3.10 turns the contraction of multiply and add off unless asked.
        self.kernel[self.grid](*self.args, **self.options, enable_fp_fusion=True)


def constexpr(value: Any) -> Any:
    """`tl.constexpr`, for a constant of a kernel's file."""
    return tl.constexpr(value) if tl else value
