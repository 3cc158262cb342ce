"""Rows to FP8 or NVFP4, and the device functions with which other kernels quantise what they computed.

    x  [..., K]       any strides over B and L of [B, L, K], K contiguous
    y  Fp8 | Nvfp4    of the same shape; for the rule `row` with `row_norm`, and with x as `dense` where it is kept

Precision: fp32 from load to store; the scale is each row's largest magnitude (`row`) or a calibrated scalar
(`static`), what exceeds it saturates.    Cost: memory-bound, each element read once and written once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fluxkiln.kernels import formats
from fluxkiln.kernels.compile import Configuration
from fluxkiln.kernels.formats import BLOCK, NVFP4_MAX, TINY, Activation, Fp8, Nvfp4, Quant
from fluxkiln.kernels.language import Launch, constexpr, jit, tl

# --- constants and launch table ---------------------------------------------------------------

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_K = 16384  # one program holds a row in registers

_TINY = constexpr(TINY)


def warps(block_k: int) -> int:
    """32 elements a thread: four 16-byte loads of bf16 in flight, and registers for eight blocks of 4 warps."""
    return min(16, max(1, block_k // 1024))


# --- contract ---------------------------------------------------------------------------------


def check(x: Tensor, quant: Quant) -> None:
    """Raise ValueError on a call that is wrong for every backend."""
    if quant.rule == "bound":
        raise ValueError("quantize: only an operation knows a bound of its output; use the rule 'row' or 'static'")
    if quant.format == "nvfp4" and x.shape[-1] % BLOCK:
        raise ValueError(f"quantize: NVFP4 needs K to be a multiple of {BLOCK}, got {x.shape[-1]}")


def refuse(x: Tensor, quant: Quant) -> str | None:
    """Why the Triton kernel cannot take a valid call, or None."""
    if x.dtype not in DTYPES:
        return f"dtype {x.dtype} is not one of bf16, fp16, fp32"
    if x.shape[-1] > MAX_K:
        return f"K = {x.shape[-1]} is more than the {MAX_K} that fit the registers of a program"
    if x.stride(-1) != 1:
        return "K must be contiguous"
    return None


# --- reference --------------------------------------------------------------------------------


def reference(x: Tensor, quant: Quant) -> Activation:
    return formats.quantize(x, quant, x.dtype)


# --- kernel -----------------------------------------------------------------------------------


@jit
def e2m1_pairs(lo, hi, PTX: tl.constexpr):
    """Two e2m1 codes in a byte, `lo` in the low nibble: to nearest, ties to the even code, saturating at 6."""
    if PTX:  # one instruction, on sm_100 and later
        pairs = tl.inline_asm_elementwise(
            "{ .reg .b8 pair; cvt.rn.satfinite.e2m1x2.f32 pair, $2, $1; cvt.u32.u8 $0, pair; }",
            "=r,f,f",
            [lo, hi],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        ).to(tl.uint8)
    else:
        pairs = _e2m1(lo) | (_e2m1(hi) << 4)
    return pairs


@jit
def _e2m1(x):
    # Thresholds halfway between 0, 0.5, 1, 1.5, 2, 3, 4 and 6; a tie belongs to the even code.
    a = tl.abs(x)
    code = (a > 0.25).to(tl.uint8) + (a >= 0.75).to(tl.uint8) + (a > 1.25).to(tl.uint8) + (a >= 1.75).to(tl.uint8)
    code += (a > 2.5).to(tl.uint8) + (a >= 3.5).to(tl.uint8) + (a > 5.0).to(tl.uint8)
    return code | ((x < 0.0).to(tl.uint8) << 3)


@jit
def fp8_codes(y, scale, PEAK: tl.constexpr):
    """e4m3 of `y / scale`: to nearest even, saturating at `PEAK`."""
    codes = y * (1.0 / scale)
    if PEAK < 448.0:  # at 448 the conversion saturates by itself
        codes = tl.clamp(codes, -PEAK, PEAK, propagate_nan=tl.PropagateNan.ALL)
    return codes.to(tl.float8e4nv)


@jit
def nvfp4_blocks(y, global_scale, M: tl.constexpr, N: tl.constexpr, PTX: tl.constexpr):
    """Codes `[M, N / 2]` uint8 and block scales `[M, N / 16]` e4m3 of `y [M, N]` fp32, given `global_scale [M]`."""
    blocks = tl.reshape(y, (M, N // 16, 16))
    inverse = 1.0 / global_scale
    # As integers, magnitudes keep their order, and a NaN is the largest: e2m1 has none, the scale of its block has.
    bits = tl.max(blocks.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=2)  # [M, N / 16]
    amax = bits.to(tl.float32, bitcast=True)
    block_scale = (amax * (inverse * (1.0 / 6.0))[:, None]).to(tl.float8e4nv)
    step = block_scale.to(tl.float32)
    # A block whose scale rounds to zero becomes zeros; 2**-9 is the least e4m3 above zero.
    factor = tl.where(step > 0.0, inverse[:, None] / tl.maximum(step, 0.001953125), 0.0)
    lo, hi = tl.split(tl.reshape(blocks * factor[:, :, None], (M, N // 2, 2)))
    return e2m1_pairs(lo, hi, PTX), block_scale


@jit
def store_rows(
    y, rows, mask_rows,        # [ROWS, BLOCK_K] fp32, zero past K; int64 row numbers in the contiguous outputs
    data_ptr, scale_ptr, block_scale_ptr, row_norm_ptr, dense_ptr,
    static_ptr,                # calibrated scale, or None: each row's largest magnitude
    K: tl.constexpr, FORMAT: tl.constexpr, LARGEST: tl.constexpr, PTX: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write whole rows as `FORMAT`, with all that their reader wants; a pointer is None where it does not."""
    offs_k = tl.arange(0, BLOCK_K)
    mask = mask_rows[:, None] & (offs_k < K)[None, :]
    if row_norm_ptr is not None:
        tl.store(row_norm_ptr + rows, tl.sqrt(tl.sum(y * y, axis=1)), mask=mask_rows)
    if dense_ptr is not None:
        tl.store(dense_ptr + rows[:, None] * K + offs_k[None, :], y.to(dense_ptr.dtype.element_ty), mask=mask)
    if FORMAT == "dense":
        tl.store(data_ptr + rows[:, None] * K + offs_k[None, :], y.to(data_ptr.dtype.element_ty), mask=mask)
    else:
        if static_ptr is not None:
            scale = tl.zeros((ROWS,), tl.float32) + tl.load(static_ptr)
        else:
            scale = tl.max(tl.abs(y), axis=1) / LARGEST
        scale = tl.maximum(scale, _TINY)
        tl.store(scale_ptr + rows, scale, mask=mask_rows)
        if FORMAT == "fp8":
            codes = fp8_codes(y, scale[:, None], LARGEST)
            tl.store(data_ptr + rows[:, None] * K + offs_k[None, :], codes, mask=mask)
        else:
            codes, block_scale = nvfp4_blocks(y, scale, ROWS, BLOCK_K, PTX)
            offs_pair = tl.arange(0, BLOCK_K // 2)
            offs_block = tl.arange(0, BLOCK_K // 16)
            mask_pair = mask_rows[:, None] & (offs_pair < K // 2)[None, :]
            mask_block = mask_rows[:, None] & (offs_block < K // 16)[None, :]
            tl.store(data_ptr + rows[:, None] * (K // 2) + offs_pair[None, :], codes, mask=mask_pair)
            tl.store(block_scale_ptr + rows[:, None] * (K // 16) + offs_block[None, :], block_scale, mask=mask_block)


@jit(repr=lambda _: "quantize")
def _quantize_kernel(
    x_ptr, stride_xb, stride_xl,            # x  [B, L, K], K contiguous
    data_ptr, scale_ptr, block_scale_ptr, row_norm_ptr, dense_ptr, static_ptr,
    K: tl.constexpr, FORMAT: tl.constexpr, LARGEST: tl.constexpr, PTX: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # One program quantises one row; the grid is (L, B).
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    b = tl.program_id(1).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    y = tl.load(
        x_ptr + b * stride_xb + row[:, None] * stride_xl + offs_k[None, :], mask=(offs_k < K)[None, :], other=0.0
    ).to(tl.float32)  # [1, BLOCK_K]
    store_rows(
        y, b * tl.num_programs(0) + row, row >= 0,
        data_ptr, scale_ptr, block_scale_ptr, row_norm_ptr, dense_ptr, static_ptr,
        K, FORMAT, LARGEST, PTX, 1, BLOCK_K,
    )  # fmt: skip


# --- launch -----------------------------------------------------------------------------------

Empty = Callable[[str, tuple[int, ...], torch.dtype], Tensor]  # the output buffer of a name, shape and dtype


def outputs(quant: Quant | None, shape: tuple[int, ...], dtype: torch.dtype, empty: Empty) -> Activation:
    """Buffers for an activation `shape` of a model in `dtype`, as its reader wants it."""
    if quant is None:
        return empty("data", shape, dtype)
    rows, k = shape[:-1], shape[-1]
    norm = empty("row_norm", rows, torch.float32) if quant.rule == "row" else None
    dense = empty("dense", shape, dtype) if quant.keep else None
    if quant.format == "fp8":
        return Fp8(empty("data", shape, torch.float8_e4m3fn), empty("row_scale", rows, torch.float32), norm, dense)
    block_scale = empty("block_scale", (*rows, k // BLOCK), torch.float8_e4m3fn)
    global_scale = empty("global_scale", rows, torch.float32)
    return Nvfp4(empty("data", (*rows, k // 2), torch.uint8), block_scale, global_scale, norm, dense)


def pointers(y: Activation, quant: Quant | None) -> tuple[Tensor | None, ...]:
    """`outputs` as kernels take them: data, scale, block scale, row norm, dense, then the calibrated scale."""
    if isinstance(y, Tensor) or quant is None:
        return y, None, None, None, None, None
    scale, block_scale = (y.row_scale, None) if isinstance(y, Fp8) else (y.global_scale, y.block_scale)
    return y.data, scale, block_scale, y.row_norm, y.dense, quant.scale


def largest(quant: Quant | None) -> float:
    """What the largest magnitude of a row becomes, in units of its FP8 or global scale."""
    return NVFP4_MAX if quant and quant.format == "nvfp4" else quant.peak if quant else 0.0


def has_e2m1(device: torch.device, arch: int) -> bool:
    """Whether the e2m1 conversion is an instruction; the interpreter runs no machine code."""
    return arch >= 100 and device.type != "cpu"


def launch(x: Tensor, quant: Quant, *, arch: int, empty: Empty | None = None) -> tuple[Activation, list[Launch]]:
    """The output and the launches that fill it; `empty` gives the output's buffers."""
    B, L, K = math.prod(x.shape[:-2]), math.prod(x.shape[-2:-1]), x.shape[-1]
    rows = x.reshape(B, L, K)
    y = outputs(quant, tuple(x.shape), x.dtype, empty or fresh(x.device))
    block_k = max(BLOCK, 1 << (K - 1).bit_length())
    args = (rows, rows.stride(0), rows.stride(1), *pointers(y, quant))
    constants = {
        "K": K, "FORMAT": quant.format, "LARGEST": largest(quant), "PTX": has_e2m1(x.device, arch), "BLOCK_K": block_k,
    }  # fmt: skip
    return y, [Launch(_quantize_kernel, (L, B), args, constants | {"num_warps": warps(block_k), "num_stages": 1})]


def fresh(device: torch.device) -> Empty:
    """Buffers that nobody else has."""
    return lambda name, shape, dtype: torch.empty(shape, dtype=dtype, device=device)


def configurations(arch: int) -> Iterator[Configuration]:
    x: Any = torch.empty(1, 4608, 3072, dtype=torch.bfloat16, device="meta")
    for format in ("fp8", "nvfp4") if arch >= 100 else ("fp8",):
        quant = Quant(format, "row")
        run = launch(x, quant, arch=arch)[1][0]
        yield Configuration("quantize", format, f"K=3072 w{run.options['num_warps']}", run, "", None, occupancy=4)


# --- cost -------------------------------------------------------------------------------------


def cost(x: Tensor, y: Activation) -> tuple[int, int]:
    """(flops, bytes) of one call."""
    return 0, x.nbytes + nbytes(y)


def nbytes(y: Activation) -> int:
    """Bytes of an activation with its scales."""
    tensors = (y,) if isinstance(y, Tensor) else vars(y).values()
    return sum(t.nbytes for t in tensors if t is not None)
