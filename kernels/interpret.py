"""A repair of Triton's interpreter, so that kernels can be checked, exactly, on a machine without a GPU.

Launch a fluxkiln kernel on CPU tensors (`backend="triton", device="cpu"`) and it runs here; nothing has to be set,
`TRITON_INTERPRET` neither needed nor in the way. The interpreter is made for checking: programs run one after
another in numpy, thousands of times slower than a GPU, and races stay invisible.

What the interpreter of Triton 3.6 to 3.9 gets wrong, and this module puts right:

    bf16                    arithmetic, comparisons, reductions and dots run on the bit patterns; constants fail;
                            rounding truncates           -> each operation in fp32, rounded once to nearest even
    fp32 -> fp8             loses the carry of the mantissa, overflows into NaN or finite garbage
                            -> to nearest even, saturating, NaN kept: what `cvt.rn.satfinite` does
    fp8 -> fp32             the NaN code reads as 480     -> NaN
    dot of fp16 and fp8     sums in the output's dtype    -> exact products summed in fp32, rounded once
    dot_scaled              missing (3.6, 3.7), wrong for NVFP4 (3.9)
    maximum, minimum, clamp keep a NaN (3.6, 3.7)         -> give the number, unless asked to propagate the NaN
    masked load, no `other` fills with zeros, hiding the omission -> all bits one (NaN), as good as undefined
    int(tensor)             fails with numpy >= 2.4 (3.6)

The repair holds while a fluxkiln kernel runs and is taken back after: other interpreted kernels see none of it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.experimental.gluon  # noqa: F401  (the launcher imports it late: not while the language is patched)
import triton.language as tl
import triton.runtime.interpreter as stock
from triton._C.libtriton import ir
from triton.language.semantic import TritonSemantic
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle
from triton.runtime.jit import JITFunction

from fluxkiln.kernels.formats import E2M1

TORCH = {
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
}
STORAGE = {tl.bfloat16: torch.uint16, tl.float8e4nv: torch.uint8, tl.float8e5: torch.uint8}  # numpy has no such floats
FP8_MAX = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}


def launch(kernel: JITFunction, grid: Any, args: tuple, options: dict[str, Any]) -> None:
    """Run every program of `kernel[grid](*args, **options)` on CPU tensors, one after another."""
    with repaired(), np.errstate(all="ignore"):  # a GPU does not warn of infinities
        GridExecutor(_rewritten(kernel.fn), kernel.arg_names, grid)(*args, **options)


def call(function: JITFunction, *args: Any, **options: Any) -> Any:
    """A Triton function called from an interpreted one."""
    return _rewritten(function.fn)(*args, **options)


@contextmanager
def repaired() -> Iterator[None]:
    """Put the repaired parts in their places in `triton.runtime.interpreter` and `triton.language`, and back."""
    if stock.interpreter_builder is BUILDER:  # a kernel launched from within one
        yield
        return
    scope = stock._LangPatchScope()
    patch_tensor = stock._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def dot_scaled(*args: Any, **options: Any) -> Any:
        wrap = lambda value: tl.constexpr(value) if isinstance(value, str) else value  # noqa: E731
        options = {name: wrap(value) for name, value in options.items()}
        return tl.core.dot_scaled(*map(wrap, args), **options)

    try:
        scope.set_attr(stock, "interpreter_builder", BUILDER)
        scope.set_attr(stock, "interpreter_semantic", SEMANTIC)
        scope.set_attr(stock, "InterpreterBuilder", Builder)
        scope.set_attr(stock, "_convert_float", convert)
        scope.set_attr(stock, "_patch_lang_tensor", patch_lang_tensor)
        scope.set_attr(stock.ReduceScanOpInterface, "apply", _reduce_in_fp32(stock.ReduceScanOpInterface.apply))
        for place in (tl.standard, tl):
            for name, value in list(vars(place).items()):
                if isinstance(value, JITFunction):  # the standard library, unless TRITON_INTERPRET did it already
                    scope.set_attr(place, name, _interpreted(value.fn))
        for name, value in list(vars(tl.tensor).items()):
            if isinstance(value, JITFunction):
                scope.set_attr(tl.tensor, name, functools.partialmethod(_interpreted(value.fn)))
        scope.set_attr(tl, "dot_scaled", dot_scaled)
        language = stock._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        try:
            yield
        finally:
            language.restore()
    finally:
        scope.restore()


@dataclass(frozen=True)
class StandardFunction:
    """Stands for a function of Triton's standard library while a kernel is interpreted."""

    fn: Callable[..., Any]

    def __call__(self, *args: Any, **options: Any) -> Any:
        return _rewritten(self.fn)(*args, **options)


class Rewriter(stock.FunctionRewriter):
    """Adds to a function's assignments what the interpreter needs, and keeps file and line for tracebacks."""

    def _get_jit_fn_file_line(self) -> tuple[str, int]:
        lines, first = inspect.getsourcelines(self.fn)
        definition = next(i for i, line in enumerate(lines) if line.lstrip().startswith("def "))
        return self.fn.__code__.co_filename, first + definition


@functools.cache
def _interpreted(fn: Callable[..., Any]) -> StandardFunction:
    return StandardFunction(fn)


@functools.cache
def _rewritten(fn: Callable[..., Any]) -> Callable[..., Any]:
    return Rewriter(fn).rewrite_ast()


# --- numbers ----------------------------------------------------------------------------------


def decode(data: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    """Stored bits to numpy floats, exactly."""
    return torch.from_numpy(_writable(data)).view(TORCH[dtype]).float().numpy() if dtype in STORAGE else data


def encode(x: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    """numpy floats to stored bits, to nearest even; FP8 saturates and keeps NaN."""
    t = torch.from_numpy(_writable(x))
    if dtype in FP8_MAX:
        t = t.clamp(-FP8_MAX[dtype], FP8_MAX[dtype])
    t = t.to(TORCH[dtype])
    return t.view(STORAGE.get(dtype, t.dtype)).numpy()


def convert(x: np.ndarray, source: tl.dtype, target: tl.dtype, rounding: Any) -> np.ndarray:
    if source not in TORCH or target not in TORCH or rounding == ir.ROUNDING_MODE.RTZ:
        return _STOCK_CONVERT(x, source, target, rounding)
    bits = np.dtype(f"uint{target.primitive_bitwidth}")
    return encode(decode(x, source), target).view(bits).reshape(x.shape)


_STOCK_CONVERT = stock._convert_float


def _writable(x: np.ndarray) -> np.ndarray:
    return np.require(x, requirements=("C", "W"))


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widen(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(decode(handle.data, tl.bfloat16), tl.float32) if _is_bf16(handle) else handle


def _narrow(handle: TensorHandle) -> TensorHandle:
    """Back to bf16; a comparison's result is a truth value already."""
    if handle.data.dtype == np.bool_:
        return handle
    return TensorHandle(encode(handle.data.astype(np.float32), tl.bfloat16), tl.bfloat16)


def _reduce_in_fp32(apply: Callable[..., Any]) -> Callable[..., Any]:
    def repaired(self: Any, x: Any) -> Any:
        if isinstance(x, tuple) or x.dtype != tl.bfloat16:
            return apply(self, x)
        wide = tl.tensor(_widen(x.handle), tl.block_type(tl.float32, x.shape))
        y = apply(self, wide)
        return tl.tensor(_narrow(y.handle), tl.block_type(tl.bfloat16, y.shape) if y.type.is_block() else tl.bfloat16)

    return repaired


def _scaled_operand(x: TensorHandle, scale: TensorHandle | None, format: Any, k_packed: bool, rhs: bool) -> np.ndarray:
    """fp32 values of one side of `dot_scaled`: the right side is `[K, N]`, its scale `[N, K / block]`."""
    kinds = ir.ScaleDotElemTypeTY
    if format == kinds.E2M1:
        axis = (-2 if rhs else -1) if k_packed else (-1 if rhs else -2)
        pairs = np.moveaxis(x.data.view(np.uint8), axis, -1)
        nibbles = np.stack((pairs & 15, pairs >> 4), axis=-1).reshape(*pairs.shape[:-1], -1)
        value = np.moveaxis(E2M1.numpy()[nibbles], -1, axis)
    else:
        dtype = {kinds.E4M3: tl.float8e4nv, kinds.E5M2: tl.float8e5, kinds.BF16: tl.bfloat16, kinds.FP16: tl.float16}
        value = decode(x.data.view(stock._get_np_dtype(dtype[format])), dtype[format]).astype(np.float32)
    if scale is None:
        return value
    if scale.dtype.scalar == tl.float8e4nv:
        factor = decode(scale.data, tl.float8e4nv)
    else:  # E8M0
        bits = scale.data.view(np.uint8)
        factor = np.where(bits == 255, np.nan, np.exp2(bits.astype(np.float32) - 127)).astype(np.float32)
    factor = np.repeat(factor, value.shape[-2 if rhs else -1] // factor.shape[-1], axis=-1)
    return value * (np.swapaxes(factor, -1, -2) if rhs else factor)


class Builder(InterpreterBuilder):
    """The interpreter's operations, with the ones above put right."""

    def cast_impl(self, source: TensorHandle, type: Any) -> TensorHandle:
        s, d = source.dtype.scalar, type.scalar
        if s == d or tl.bfloat16 not in (s, d):
            return super().cast_impl(source, type)
        x = decode(source.data, s)
        if d == tl.bfloat16:
            return TensorHandle(encode(x.astype(np.float32), d), d)
        return TensorHandle(x.astype(stock._get_np_dtype(d)), d)

    def get_bf16(self, value: float) -> TensorHandle:
        return TensorHandle(encode(np.array([value], np.float32), tl.bfloat16), tl.bfloat16)

    def unary_op(self, x: TensorHandle, op: Any) -> TensorHandle:
        return _narrow(super().unary_op(_widen(x), op)) if _is_bf16(x) else super().unary_op(x, op)

    def binary_op(self, x: TensorHandle, y: TensorHandle, op: Any) -> TensorHandle:
        if _is_bf16(x) or _is_bf16(y):
            return _narrow(super().binary_op(_widen(x), _widen(y), op))
        return super().binary_op(x, y, op)

    def create_fma(self, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        if _is_bf16(z):
            return _narrow(super().create_fma(_widen(x), _widen(y), _widen(z)))
        return super().create_fma(x, y, z)

    def create_maxnumf(self, x: TensorHandle, y: TensorHandle) -> TensorHandle:
        return self.binary_op(x, y, np.fmax)

    def create_minnumf(self, x: TensorHandle, y: TensorHandle) -> TensorHandle:
        return self.binary_op(x, y, np.fmin)

    def create_clampf(self, x: TensorHandle, lo: TensorHandle, hi: TensorHandle, nans: Any) -> TensorHandle:
        larger, smaller = (np.maximum, np.minimum) if nans == tl.PropagateNan.ALL else (np.fmax, np.fmin)
        return self.binary_op(self.binary_op(x, lo, larger), hi, smaller)

    def create_masked_load(self, pointers: TensorHandle, mask: Any, other: Any, *rest: Any, **options: Any) -> Any:
        if other is None:
            type = pointers.get_element_ty()
            undefined = np.full(pointers.data.shape, 255, np.uint8).repeat(stock._get_np_dtype(type).itemsize, axis=-1)
            other = TensorHandle(undefined.view(stock._get_np_dtype(type)), type)
        return super().create_masked_load(pointers, mask, other, *rest, **options)

    def create_dot(self, x: TensorHandle, y: TensorHandle, z: TensorHandle, *options: Any) -> TensorHandle:
        if not x.dtype.scalar.is_floating():
            return super().create_dot(x, y, z, *options)
        wide = np.promote_types(z.data.dtype, np.float32)
        a, b = (decode(h.data, h.dtype.scalar).astype(wide) for h in (x, y))
        return TensorHandle((np.matmul(a, b) + z.data).astype(z.data.dtype), z.dtype.scalar)

    def create_dot_scaled(
        self,
        x: Any,
        scale_x: Any,
        format_x: Any,
        y: Any,
        scale_y: Any,
        format_y: Any,
        fast: Any,
        kx: Any,
        ky: Any,
        z: Any,
    ) -> TensorHandle:
        a = _scaled_operand(x, scale_x, format_x, kx, rhs=False)
        b = _scaled_operand(y, scale_y, format_y, ky, rhs=True)
        return TensorHandle(np.matmul(a, b) + z.data, tl.float32)


BUILDER = Builder()
SEMANTIC = TritonSemantic(BUILDER)
