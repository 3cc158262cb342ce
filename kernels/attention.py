"""Attention over the joint sequence:  o = softmax(q kᵀ / sqrt(d)) v,  no mask.

    q, k, v  [B, L, H, d]   bf16 or fp16, d contiguous; or in FP8:
             q, k  Fp8      one scale for all tokens of an image's head: RMSNorm bounds the elements by
                            sqrt(d) * max|weight|, so it is a constant of the layer and costs the inner loop nothing
             v     Values
             q     Query    before its norm and rotation, which then happen inside
    o        [B, L, H * d]  heads side by side, head-major; or FP8 or NVFP4 by the bound max|v| of the image

Precision: exact products summed in fp32; softmax statistics in fp32; its weights are rounded to the format of v
before they meet it (in FP8 to e4m3 of 448 times the weight relative to the row's largest); one rounding at the end.
Cost: 4*B*H*L*L*d flops.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fluxkiln.kernels import formats
from fluxkiln.kernels.compile import INSTRUCTIONS, Configuration
from fluxkiln.kernels.formats import FP8_MAX, TINY, Activation, Fp8, Quant
from fluxkiln.kernels.language import Launch, TensorDescriptor, constexpr, jit, tl
from fluxkiln.kernels.layers import EPS
from fluxkiln.kernels.matmul import cut
from fluxkiln.kernels.quantize import (
    Empty,
    fp8_codes,
    fresh,
    has_e2m1,
    largest,
    nbytes,
    nvfp4_blocks,
    outputs,
    pointers,
)
from fluxkiln.kernels.tiles import section

# --- operands ---------------------------------------------------------------------------------

V_BLOCK = 128  # tokens that share one scale of v: the rows of the matrix product's tile that wrote them


@dataclass(frozen=True)
class Values:
    """v in FP8, or with what bounds it.

    Tokens come in blocks of `V_BLOCK`: the first `split` tokens (text) fill blocks of their own, the rest (image)
    start a new one, so a block never straddles streams; with `split == 0` there is one stream.

    Attributes:
        data: `[B, L, H, d]` in the model's dtype; or e4m3 `[B, H, d, blocks * 128]`, tokens contiguous and in the
            order of `interleaved`, what a stream's last block has too many being anything finite.
        scale: fp32 `[B, H, blocks]`, largest magnitude of each block and head / 448. e4m3 data are to be multiplied
            by it; others are not, there it only bounds attention's output.
        split: tokens of the first stream.
        dtype: the model's dtype, that of an output which is not quantised.
    """

    data: Tensor
    scale: Tensor
    split: int
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Query:
    """q as the projection leaves it: the attention kernel does its RMSNorm and rotation.

    Channels of a head are in k's order, the even ones first, then the odd ones, so that pairs are `d / 2` apart.

    Attributes:
        data: `[B, L, H, d]`, d contiguous.
        norm: RMSNorm weights `[S, d]`, S = 1 or 2 streams.
        rope: `[1 or B, L, d/2, 2]` fp32, cos and sin of each pair.
        split: tokens of the first stream.
        scale: for FP8 k and v, the scale to quantise q with, fp32 `[1]`.
    """

    data: Tensor
    norm: Tensor
    rope: Tensor
    split: int
    scale: Tensor | None = None


def interleaved(token: Tensor) -> Tensor:
    """Place of each token within its e4m3 block.

    In every 16, token 8*b + 2*t + c is at 4*t + 2*b + c (b, c < 2, t < 4): the columns that a thread holds of the
    scores, two by two, are then the four neighbours that it holds of the 8-bit operand of p v, with no shuffle.
    """
    return (token & ~15) + ((token >> 1 & 3) << 2) + ((token >> 3 & 1) << 1) + (token & 1)


def blocks(split: int, length: int) -> int:
    """Number of blocks of v."""
    return -(-split // V_BLOCK) + -(-(length - split) // V_BLOCK)


def slots(split: int, length: int, device: torch.device) -> Tensor:
    """Where e4m3 `Values.data` hold each token, `[L]`."""
    token = torch.arange(length, device=device)
    pad = -split % V_BLOCK
    return interleaved(torch.where(token < split, token, token + pad))


def quantize_values(v: Tensor, split: int, dtype: torch.dtype) -> Values:
    """`v [B, L, H, d]`, unrounded, in FP8 with a scale for each block and head."""
    B, L, H, d = v.shape
    at = slots(split, L, v.device)
    padded = v.new_zeros(B, H, d, blocks(split, L) * V_BLOCK)
    padded[..., at] = v.permute(0, 2, 3, 1)
    tiles = padded.unflatten(-1, (-1, V_BLOCK))
    scale = (tiles.abs().amax((2, 4)) / FP8_MAX).float().clamp_min(TINY)  # [B, H, blocks]
    return Values(formats.to_e4m3(tiles / scale[:, :, None, :, None]).flatten(-2), scale, split, dtype)


def dequantize_values(v: Values, length: int, dtype: torch.dtype) -> Tensor:
    """The values that `v` stands for, `[B, L, H, d]`."""
    if v.data.dtype != torch.float8_e4m3fn:
        return v.data.to(dtype)
    wide = v.data.to(dtype).unflatten(-1, (-1, V_BLOCK)) * v.scale.to(dtype)[:, :, None, :, None]
    return wide.flatten(-2)[..., slots(v.split, length, v.data.device)].permute(0, 3, 1, 2)


def bounded(v: Tensor | Values) -> Values:
    """v with a bound on its magnitudes."""
    if isinstance(v, Values):
        return v
    return Values(v, (v.abs().amax((1, 3)).float() / FP8_MAX)[..., None], 0, v.dtype)


# --- constants and launch table ---------------------------------------------------------------

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 128)

_TINY = constexpr(TINY)


@dataclass(frozen=True)
class Tile:
    """Rows of q and tokens of k and v that a program holds; `copies` says how the latter reach it."""

    m: int
    n: int
    warps: int
    stages: int
    copies: Literal["cp.async", "tma"]
    specialize: bool = False  # loads, matrix products and softmax in warps of their own, where no block is masked

    def __str__(self) -> str:
        return f"{self.m}x{self.n} w{self.warps} s{self.stages} {self.copies}" + " specialised" * self.specialize


# (architecture, format of k and v, head dim) -> tile. On Hopper four warps, so that two programs share a
# multiprocessor: one has its softmax beside the other's products, where eight warps of one would wait for each other.
TILES = {
    (89, "bf16", 128): Tile(128, 64, 8, 3, "cp.async"),
    (89, "bf16", 64): Tile(128, 64, 8, 3, "cp.async"),
    (89, "fp8", 128): Tile(128, 64, 8, 3, "cp.async"),
    (89, "fp8", 64): Tile(128, 64, 8, 4, "cp.async"),
    (90, "bf16", 128): Tile(128, 64, 4, 2, "tma"),
    (90, "bf16", 64): Tile(128, 64, 4, 3, "tma"),
    (90, "fp8", 128): Tile(128, 64, 4, 3, "tma"),
    (90, "fp8", 64): Tile(128, 64, 4, 3, "tma"),
    (100, "bf16", 128): Tile(128, 128, 8, 2, "tma", specialize=True),
    (100, "bf16", 64): Tile(128, 128, 8, 3, "tma"),
    (100, "fp8", 128): Tile(128, 128, 8, 3, "tma"),
    (100, "fp8", 64): Tile(128, 128, 8, 3, "tma"),
    (120, "bf16", 128): Tile(128, 64, 8, 3, "tma"),
    (120, "bf16", 64): Tile(128, 64, 8, 3, "tma"),
    (120, "fp8", 128): Tile(128, 64, 8, 3, "tma"),
    (120, "fp8", 64): Tile(128, 64, 8, 4, "tma"),
}

# With norm and rotation of q inside, those would have each wgmma of Hopper wait for the last: at head dim 128, four
# warps have too few registers; at 64, ptxas sees those of q written between two of them.
TILES_INSIDE = {
    (90, "bf16", 64): Tile(128, 128, 8, 3, "tma"),
    (90, "fp8", 64): Tile(128, 128, 8, 3, "tma"),
    (90, "bf16", 128): Tile(128, 64, 8, 2, "tma"),
    (90, "fp8", 128): Tile(128, 64, 8, 3, "tma"),
}


# --- contract ---------------------------------------------------------------------------------


def check(q: Tensor | Fp8 | Query, k: Tensor | Fp8, v: Tensor | Values, out: Quant | None) -> None:
    """Raise ValueError on a call that is wrong for every backend."""
    shape = _data(k).shape
    if len(shape) != 4:
        raise ValueError(f"attention: k must be [B, L, H, d], got {list(shape)}")
    if _data(q).shape != shape:
        raise ValueError(f"attention: q must be {list(shape)} as k is, got {list(_data(q).shape)}")
    B, L, H, d = shape
    if isinstance(k, Fp8):
        if not isinstance(v, Values) or v.data.dtype != torch.float8_e4m3fn:
            raise ValueError("attention: k is FP8, so v must be FP8 Values")
        if isinstance(q, Tensor) or (isinstance(q, Query) and q.scale is None):
            raise ValueError("attention: k is FP8, so q must be FP8, or a Query with a scale")
        want = (B, H, d, blocks(v.split, L) * V_BLOCK)
    else:
        want = (B, L, H, d)
        for name, x in (("q", q), ("v", v)):
            if _data(x).dtype != k.dtype:
                raise ValueError(f"attention: {name} must be {k.dtype} as k is, got {_data(x).dtype}")
    if tuple(_data(v).shape) != want:
        raise ValueError(f"attention: v must be {list(want)}, got {list(_data(v).shape)}")
    if isinstance(q, Query):
        if tuple(q.norm.shape) not in ((1, d), (2, d)):
            raise ValueError(f"attention: norms of q must be [1 or 2, {d}], got {list(q.norm.shape)}")
        if q.rope.shape[0] not in (1, B) or tuple(q.rope.shape[1:]) != (L, d // 2, 2):
            raise ValueError(f"attention: rope must be [1 or {B}, {L}, {d // 2}, 2], got {list(q.rope.shape)}")
    if out is not None and out.rule == "row":
        raise ValueError("attention: a program sees one head of a row; quantise by the rule 'bound' or 'static'")


def refuse(q: Tensor | Fp8 | Query, k: Tensor | Fp8, v: Tensor | Values, out: Quant | None = None) -> str | None:
    """Why the Triton kernel cannot take a valid call, or None."""
    fp8 = isinstance(k, Fp8)
    d = _data(k).shape[-1]
    if v.dtype not in DTYPES:
        return f"dtype {v.dtype} is not one of bf16, fp16"
    if d not in HEAD_DIMS:
        return f"head dim {d} is not one of {', '.join(map(str, HEAD_DIMS))}"
    if any(_data(x).stride(-1) != 1 for x in (q, k, v)):
        return "the last axis of q, k and v must be contiguous"
    if isinstance(q, Query) and (q.rope.dtype != torch.float32 or not q.rope[0].is_contiguous()):
        return f"rope must be fp32 and contiguous, got {q.rope.dtype}"
    if fp8 and any(isinstance(x, Fp8) and _varies(x.row_scale) for x in (q, k)):
        return "q and k in FP8 must have one scale for all tokens of a head"
    return None


def _data(x: Any) -> Tensor:
    return x if isinstance(x, Tensor) else x.data


def _varies(row_scale: Tensor) -> bool:
    return row_scale.shape[1] > 1 and row_scale.stride(1) != 0


# --- reference --------------------------------------------------------------------------------


def reference(
    q: Tensor | Fp8 | Query, k: Tensor | Fp8, v: Tensor | Values, out: Quant | None = None
) -> Activation:  # fmt: skip
    if isinstance(q, Query):
        q = normed(q)
    dtype = v.dtype
    if isinstance(k, Fp8):
        wide = torch.promote_types(dtype, torch.float32)
        values = dequantize_values(v, k.shape[1], wide)
        o = _fp8_attention(
            formats.dequantize(q, wide), formats.dequantize(k, wide), values, exact=dtype == torch.float64
        )
    else:
        heads = (x.transpose(1, 2) for x in (q, k, _data(v)))
        o = torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2)
    bound = None
    if out and out.rule == "bound":
        largest_v = v.scale.amax((1, 2)) * FP8_MAX if isinstance(v, Values) else v.abs().amax((1, 2, 3))
        bound = largest_v[:, None].to(torch.promote_types(dtype, torch.float32))
    return formats.quantize(o.flatten(2), out, dtype, bound)


def normed(q: Query) -> Tensor | Fp8:
    """RMSNorm and rotation, and quantisation where q has a scale."""
    weight = q.norm[:1].expand(q.data.shape[1], -1)
    if len(q.norm) == 2:
        weight = torch.cat((q.norm[:1].expand(q.split, -1), q.norm[1:].expand(q.data.shape[1] - q.split, -1)))
    wide = q.data.to(torch.promote_types(q.data.dtype, torch.float32))
    wide = torch.nn.functional.rms_norm(wide, wide.shape[-1:], eps=EPS) * weight[:, None].to(wide.dtype)
    even, odd = wide.chunk(2, dim=-1)
    cos, sin = q.rope[:, :, None].unbind(-1)
    y = torch.cat((cos * even - sin * odd, sin * even + cos * odd), dim=-1)
    return y.to(q.data.dtype) if q.scale is None else formats.quantize_fp8(y, q.scale)


def _fp8_attention(q: Tensor, k: Tensor, v: Tensor, exact: bool) -> Tensor:
    """One head at a time: the scores of all heads of a large picture are gigabytes."""
    o = torch.empty_like(q)
    for b, h in torch.cartesian_prod(torch.arange(q.shape[0]), torch.arange(q.shape[2])).tolist():
        scores = q[b, :, h] @ k[b, :, h].T / math.sqrt(q.shape[-1])
        p = torch.exp(scores - scores.amax(-1, keepdim=True))
        rounded = p if exact else formats.to_e4m3(p * FP8_MAX).to(p.dtype) / FP8_MAX
        o[b, :, h] = rounded @ v[b, :, h] / p.sum(-1, keepdim=True)
    return o


# --- kernel -----------------------------------------------------------------------------------


@jit
def _tokens(
    x, strides, b, h, n, end,                  # [B, L, H, D], pointer or descriptor
    MASKED: tl.constexpr, TMA: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Tokens [n, n + BLOCK) of one head, [BLOCK, D]."""
    if TMA:
        y = tl.reshape(x.load([b, n, h, 0]), (BLOCK, D))
    else:
        stride_b, stride_l, stride_h = strides
        # 64-bit up to the first token, 32-bit within the block: registers are what the loop is short of.
        start = x + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + tl.cast(n, tl.int64) * stride_l
        offs_n = tl.arange(0, BLOCK)
        ptrs = start + (offs_n[:, None] * stride_l + tl.arange(0, D)[None, :])
        y = tl.load(ptrs, mask=(n + offs_n < end)[:, None], other=0.0) if MASKED else tl.load(ptrs)
    return y


@jit
def _transposed(x, strides, b, h, at, TMA: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr):
    """Places [at, at + BLOCK) of one head of e4m3 v [B, H, D, blocks * 128], as [BLOCK, D]; a block has no end."""
    if TMA:
        y = tl.reshape(x.load([b, h, 0, at]), (D, BLOCK))
    else:
        stride_b, stride_h, stride_d = strides
        start = x + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + at
        y = tl.load(start + (tl.arange(0, D)[:, None] * stride_d + tl.arange(0, BLOCK)[None, :]))
    return y.T


@jit
def _norm_and_rotate(
    x, norm_ptr, rope_ptr, rows, L, split,     # [BLOCK_M, D]; [S, D]; [L, D / 2, 2]
    STREAMS: tl.constexpr, EPS: tl.constexpr, BLOCK_M: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    x = x.to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x, axis=1) / D + EPS)[:, None]
    offs_d = tl.arange(0, D)
    weight = tl.load(norm_ptr + offs_d).to(tl.float32)[None, :]
    if STREAMS == 2:
        weight = tl.where((rows < split)[:, None], weight, tl.load(norm_ptr + D + offs_d).to(tl.float32)[None, :])
    even, odd = tl.split(tl.permute(tl.reshape(x * weight, (BLOCK_M, 2, D // 2)), (0, 2, 1)))
    rope_ptrs = rope_ptr + rows[:, None] * D + 2 * tl.arange(0, D // 2)[None, :]
    cos = tl.load(rope_ptrs, mask=(rows < L)[:, None], other=1.0)
    sin = tl.load(rope_ptrs + 1, mask=(rows < L)[:, None], other=0.0)
    rotated = tl.join(cos * even - sin * odd, sin * even + cos * odd)  # [BLOCK_M, D / 2, 2]
    return tl.reshape(tl.permute(rotated, (0, 2, 1)), (BLOCK_M, D))


@jit
def _dot(x, y, acc, UNIT_SCALES: tl.constexpr):
    if UNIT_SCALES:
        # Scales of 2**(127 - 127): sm_120 multiplies FP8 at full rate only through the block-scaled instruction.
        unit_x = tl.full((x.shape[0], x.shape[1] // 32), 127, tl.uint8)
        unit_y = tl.full((y.shape[1], y.shape[0] // 32), 127, tl.uint8)
        acc = tl.dot_scaled(x, unit_x, "e4m3", y, unit_y, "e4m3", acc)
    else:
        acc = tl.dot(x, y, acc)
    return acc


@jit
def _attend(
    acc, l, m, unit,                           # acc is in multiples of `unit`, the scale of the block of v
    q, k, strides_k, v, strides_v, v_scale_ptr, b, h, lo, hi, at, scale,
    MASKED: tl.constexpr, BRANCH: tl.constexpr, FP8: tl.constexpr, UNIT_SCALES: tl.constexpr, TMA: tl.constexpr,
    SPECIALIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Tokens [lo, hi), MASKED if they do not fill the last BLOCK_N; e4m3 v has token lo in block at / 128.

    A mask costs a select for each score: BRANCH around it but for the last block. (On sm_89 and sm_120 a branch would
    send the scores through shared memory; there the last block has a loop of its own.)
    """
    for n in tl.range(lo, hi, BLOCK_N, warp_specialize=SPECIALIZE):
        k_n = _tokens(k, strides_k, b, h, n, hi, MASKED, TMA, BLOCK_N, D)
        s = _dot(q, k_n.T, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), UNIT_SCALES)  # [BLOCK_M, BLOCK_N]
        if MASKED and (not BRANCH or n + BLOCK_N > hi):
            s = tl.where((n + tl.arange(0, BLOCK_N) < hi)[None, :], s, float("-inf"))

        # Base 2, with log2(e) in the scale, which is positive: a fused multiply-add and an ex2 for each score.
        m_new = tl.maximum(m, tl.max(s, axis=1) * scale)
        alpha = tl.exp2(m - m_new)
        # The largest weight of a row becomes 448, so that e4m3 has all of its range below; l is scaled alike.
        shift = m_new - 8.807354922057604 if FP8 else m_new
        p = tl.exp2(s * scale - shift[:, None])
        l = l * alpha + tl.sum(p, axis=1)
        m = m_new

        if FP8:
            v_n = _transposed(v, strides_v, b, h, at + n - lo, TMA, BLOCK_N, D)
            unit_n = tl.load(v_scale_ptr + (at + n - lo) // 128)
            acc *= (alpha * (unit / unit_n))[:, None]
            unit = unit_n
            # `interleaved`: in every 16 tokens, (b, t, c) to (t, b, c); to the compiler a renaming of registers.
            p = tl.permute(tl.reshape(p.to(tl.float8e4nv), (BLOCK_M, BLOCK_N // 16, 2, 4, 2)), (0, 1, 3, 2, 4))
            acc = _dot(tl.reshape(p, (BLOCK_M, BLOCK_N)), v_n, acc, UNIT_SCALES)
        else:
            v_n = _tokens(v, strides_v, b, h, n, hi, MASKED, TMA, BLOCK_N, D)
            acc = tl.dot(p.to(v_n.dtype), v_n, acc * alpha[:, None])
    return acc, l, m, unit


@jit
def _largest(ptr, count):
    """Largest of `count` positive numbers."""
    offs = tl.arange(0, 1024)
    largest = tl.zeros((1024,), tl.float32)
    for i in range(0, count, 1024):
        largest = tl.maximum(largest, tl.load(ptr + i + offs, mask=i + offs < count, other=0.0))
    return tl.max(largest, axis=0)


@jit(do_not_specialize=["L", "split", "q_split", "blocks"], repr=lambda _: "attention")
def _attention_kernel(
    q, k, v,                                   # k and v: pointers, or descriptors of what `_tokens` loads
    norm_ptr, rope_ptr,                        # of a Query, or None
    q_scale_ptr, k_scale_ptr, v_scale_ptr,     # [B, H], [B, H], [B, H, blocks], or None
    data_ptr, scale_ptr, block_scale_ptr, row_norm_ptr, dense_ptr, static_ptr,
    stride_qb, stride_ql, stride_qh,           # q  [B, L, H, D]
    stride_kb, stride_kl, stride_kh,           # k  [B, L, H, D]
    stride_v0, stride_v1, stride_v2,           # v  [B, L, H, D], or e4m3 [B, H, D, blocks * 128]
    stride_rb,                                 # rope  [B, L, D / 2, 2]
    stride_sb, stride_sh,                      # q_scale
    stride_tb, stride_th,                      # k_scale
    L, split, q_split, blocks,                 # split: where the blocks of v start anew
    H: tl.constexpr, D: tl.constexpr, EPS: tl.constexpr, SOFTMAX_SCALE: tl.constexpr,
    STREAMS: tl.constexpr, RAGGED: tl.constexpr, EVEN: tl.constexpr, BRANCH: tl.constexpr,
    FP8: tl.constexpr, UNIT_SCALES: tl.constexpr, FORMAT: tl.constexpr, LARGEST: tl.constexpr, PTX: tl.constexpr,
    TMA: tl.constexpr, SPECIALIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    # One program computes BLOCK_M rows of one head of one image; the grid is (blocks of rows, H, B).
    first = tl.program_id(0) * BLOCK_M
    h = tl.program_id(1)
    b = tl.program_id(2)
    rows = first + tl.arange(0, BLOCK_M)
    mask_m = rows < L

    scale = SOFTMAX_SCALE
    if FP8:
        q_scale = tl.load(q_scale_ptr + b * stride_sb + h * stride_sh)
        scale *= q_scale * tl.load(k_scale_ptr + b * stride_tb + h * stride_th)
    strides_q = (stride_qb, stride_ql, stride_qh)
    # By pointers, so that q stays in shared memory: by descriptor it would take 64 of the 255 registers of a thread.
    q_m = _tokens(q, strides_q, b, h, first, L, True, False, BLOCK_M, D)
    if STREAMS > 0:
        x = _norm_and_rotate(q_m, norm_ptr, rope_ptr + b * stride_rb, rows, L, q_split, STREAMS, EPS, BLOCK_M, D)
        q_m = (x / q_scale).to(tl.float8e4nv) if FP8 else x.to(q.dtype.element_ty)

    head_scale_ptr = v_scale_ptr + (b * H + h) * blocks if FP8 else v_scale_ptr
    strides_k, strides_v = (stride_kb, stride_kl, stride_kh), (stride_v0, stride_v1, stride_v2)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    unit = tl.full((), 1.0, tl.float32)
    if RAGGED:
        acc, l, m, unit = _attend(
            acc, l, m, unit, q_m, k, strides_k, v, strides_v, head_scale_ptr, b, h, 0, split, 0, scale,
            True, BRANCH, FP8, UNIT_SCALES, TMA, False, BLOCK_M, BLOCK_N, D,
        )  # fmt: skip
        acc, l, m, unit = _attend(
            acc, l, m, unit, q_m, k, strides_k, v, strides_v, head_scale_ptr, b, h, split, L, tl.cdiv(split, 128) * 128,
            scale, True, BRANCH, FP8, UNIT_SCALES, TMA, False, BLOCK_M, BLOCK_N, D,
        )  # fmt: skip
    elif EVEN or BRANCH:
        acc, l, m, unit = _attend(
            acc, l, m, unit, q_m, k, strides_k, v, strides_v, head_scale_ptr, b, h, 0, L, 0, scale,
            not EVEN, BRANCH, FP8, UNIT_SCALES, TMA, SPECIALIZE, BLOCK_M, BLOCK_N, D,
        )  # fmt: skip
    else:
        full = L // BLOCK_N * BLOCK_N
        acc, l, m, unit = _attend(
            acc, l, m, unit, q_m, k, strides_k, v, strides_v, head_scale_ptr, b, h, 0, full, 0, scale,
            False, BRANCH, FP8, UNIT_SCALES, TMA, SPECIALIZE, BLOCK_M, BLOCK_N, D,
        )  # fmt: skip
        acc, l, m, unit = _attend(
            acc, l, m, unit, q_m, k, strides_k, v, strides_v, head_scale_ptr, b, h, full, L, full, scale,
            True, BRANCH, FP8, UNIT_SCALES, TMA, False, BLOCK_M, BLOCK_N, D,
        )  # fmt: skip
    norm = unit / l

    if FORMAT != "dense":
        if static_ptr is not None:
            out_scale = tl.load(static_ptr)
        else:
            out_scale = _largest(v_scale_ptr + b * H * blocks, H * blocks) * (448.0 / LARGEST)
        out_scale = tl.zeros((BLOCK_M,), tl.float32) + tl.maximum(out_scale, _TINY)
        tl.store(scale_ptr + b.to(tl.int64) * L + rows, out_scale, mask=mask_m & (h == 0))
    # In two halves where a whole tile of epilogue does not fit the registers; 64-bit up to the image, 32-bit within.
    image = b.to(tl.int64) * L * (H * D)
    WIDTH: tl.constexpr = D // PIECES
    pieces = cut(acc, PIECES)
    for i in tl.static_range(PIECES):
        o = pieces[i] * norm[:, None]
        elements = rows[:, None] * (H * D) + h * D + i * WIDTH
        ptrs = elements + tl.arange(0, WIDTH)[None, :]
        if dense_ptr is not None:
            tl.store(dense_ptr + image + ptrs, o.to(dense_ptr.dtype.element_ty), mask=mask_m[:, None])
        if FORMAT == "dense":
            tl.store(data_ptr + image + ptrs, o.to(data_ptr.dtype.element_ty), mask=mask_m[:, None])
        elif FORMAT == "fp8":
            tl.store(data_ptr + image + ptrs, fp8_codes(o, out_scale[:, None], LARGEST), mask=mask_m[:, None])
        else:
            codes, block_scale = nvfp4_blocks(o, out_scale, BLOCK_M, WIDTH, PTX)
            pairs = elements // 2 + tl.arange(0, WIDTH // 2)[None, :]
            tl.store(data_ptr + image // 2 + pairs, codes, mask=mask_m[:, None])
            sixteens = elements // 16 + tl.arange(0, WIDTH // 16)[None, :]
            tl.store(block_scale_ptr + image // 16 + sixteens, block_scale, mask=mask_m[:, None])


# --- launch -----------------------------------------------------------------------------------


def pick(arch: int, format: str, head_dim: int, length: int, inside: bool = False) -> Tile:
    """The tile for k and v in `format`: the one measured fastest at the nearest length, or the table's.

    `inside` says whether q is a `Query`.
    """
    if inside and (arch, format, head_dim) in TILES_INSIDE:
        return TILES_INSIDE[arch, format, head_dim]
    kind = {"arch": arch, "format": format, "head_dim": head_dim}
    known = {
        row["problem"]["length"]: row["tile"] for row in section("attention") if kind.items() <= row["problem"].items()
    }
    if known:
        return Tile(**known[min(known, key=lambda timed: abs(math.log(timed / length)))])
    return TILES[arch, format, head_dim]


def candidates(arch: int, format: str, head_dim: int) -> Iterator[Tile]:
    """What is worth timing: the table's tile, then its variations; each has still to compile without spills."""
    shipped = TILES[arch, format, head_dim]
    yield shipped
    for m, n, warps, stages in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
        for specialize in (False, True) if arch == 100 else (False,):
            tile = replace(shipped, m=m, n=n, warps=warps, stages=stages, specialize=specialize)
            if tile != shipped:
                yield tile


def launch(
    q: Tensor | Fp8 | Query, k: Tensor | Fp8, v: Tensor | Values, out: Quant | None = None, *, arch: int,
    empty: Empty | None = None, tile: Tile | None = None,
) -> tuple[Activation, list[Launch]]:  # fmt: skip
    """The output and the launches that fill it; `empty` gives the output's buffers, `tile` overrules the table."""
    B, L, H, D = _data(k).shape
    fp8 = isinstance(k, Fp8)
    values = bounded(v) if out and out.rule == "bound" else v
    tensors = (_data(q), _data(k), _data(values))
    inside = isinstance(q, Query)
    tile = tile or pick(arch, "fp8" if fp8 else "bf16", D, L, inside)
    y = outputs(out, (B, L, H * D), v.dtype, empty or fresh(tensors[0].device))

    # One pass over all tokens, unless v's first stream ends within a block.
    split = values.split if fp8 and values.split % V_BLOCK and values.split < L else 0
    even = split == 0 and L % tile.n == 0
    k_arg, v_arg = tensors[1:]
    if tile.copies == "tma":
        k_arg = TensorDescriptor.from_tensor(addressable(k_arg), [1, tile.n, 1, D])
        v_arg = TensorDescriptor.from_tensor(addressable(v_arg), [1, 1, D, tile.n] if fp8 else [1, tile.n, 1, D])
    norm = rope = q_scale = k_scale = None
    q_split, streams, stride_r = 0, 0, 0
    if fp8:
        q_scale, k_scale = q.row_scale if isinstance(q, Fp8) else q.scale.expand(B, L, H), k.row_scale
    if inside:
        norm, rope, q_split, streams = q.norm.contiguous(), q.rope, q.split, len(q.norm)
        stride_r = q.rope.stride(0) if len(q.rope) > 1 else 0
    scale = values.scale if isinstance(values, Values) else None
    args = (
        tensors[0], k_arg, v_arg,
        norm, rope,
        q_scale, k_scale, scale,
        *pointers(y, out),
        *tensors[0].stride()[:3],
        *tensors[1].stride()[:3],
        *tensors[2].stride()[:3],
        stride_r,
        *((q_scale.stride(0), q_scale.stride(2), k_scale.stride(0), k_scale.stride(2)) if fp8 else (0, 0, 0, 0)),
        L, split, q_split, scale.shape[2] if scale is not None else 0,
    )  # fmt: skip
    constants = {
        "H": H, "D": D, "EPS": EPS, "SOFTMAX_SCALE": math.log2(math.e) / math.sqrt(D),
        "STREAMS": streams, "RAGGED": split > 0, "EVEN": even, "BRANCH": arch in (90, 100),
        "FP8": fp8, "UNIT_SCALES": fp8 and arch == 120, "TMA": tile.copies == "tma",
        "SPECIALIZE": tile.specialize and even,
        "FORMAT": out.format if out else "dense", "LARGEST": largest(out), "PTX": has_e2m1(tensors[0].device, arch),
        "BLOCK_M": tile.m, "BLOCK_N": tile.n, "PIECES": 2 if tile.m * D > 64 * 32 * tile.warps else 1,
    }  # fmt: skip
    grid = (-(-L // tile.m), H, B)
    options = constants | {"num_warps": tile.warps, "num_stages": tile.stages}
    return y, [Launch(_attention_kernel, grid, args, options)]


def addressable(x: Tensor) -> Tensor:
    """x, or a copy that the tensor memory accelerator can address: 16-byte strides from a 16-byte boundary."""
    strides = [stride * x.element_size() for stride in x.stride()[:-1]]
    if x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(s > 0 and s % 16 == 0 for s in strides):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def configurations(arch: int) -> Iterator[Configuration]:
    """Full and ragged lengths, each output format, q with its norm and rotation inside, both head dims."""

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Any:
        return torch.empty(shape, dtype=dtype, device="meta")

    for number, format, D in TILES:
        if number != arch:
            continue
        H = 3072 // D
        for L, split, result, inside in (
            (4608, 512, None, False), (4608, 512, "fp8", False), (4608, 512, "nvfp4", False), (4608, 512, "fp8", True),
            (4173, 512, "fp8", False), (4173, 77, "fp8", False),
        ):  # fmt: skip
            if (result == "nvfp4" and arch < 100) or (split == 77 and format == "bf16"):
                continue
            q, k = meta(1, L, H, D), meta(1, L, H, D)
            scale = meta(1, dtype=torch.float32)
            v: Any = Values(meta(1, L, H, D), meta(1, H, blocks(split, L), dtype=torch.float32), split)
            if format == "fp8":
                f8 = torch.float8_e4m3fn
                constant = scale.expand(1, L, H)
                k = Fp8(meta(1, L, H, D, dtype=f8), constant)
                v = Values(meta(1, H, D, blocks(split, L) * V_BLOCK, dtype=f8), v.scale, split)
                q = q if inside else Fp8(meta(1, L, H, D, dtype=f8), constant)
            if inside:
                rope = meta(1, L, D // 2, 2, dtype=torch.float32)
                q = Query(q, meta(2, D), rope, split, scale if format == "fp8" else None)
            out = Quant(result, "bound") if result else None
            tile = pick(arch, format, D, L, inside=inside)
            run = launch(q, k, v, out, arch=arch, tile=tile)[1][0]
            name = f"d={D} L={L} split={split} {tile}" + f" -> {result or 'bf16'}" + " norm and rope inside" * inside
            programs = 2 if arch == 90 and tile.warps == 4 else 1
            yield Configuration("attention", format, name, run, INSTRUCTIONS[arch, format], tile.copies, programs)


# --- cost -------------------------------------------------------------------------------------


def cost(q: Any, k: Any, v: Any, y: Activation) -> tuple[int, int]:
    """(flops, bytes) of one call."""
    B, L, H, D = _data(k).shape
    return 4 * B * H * L * L * D, sum(_data(x).nbytes for x in (q, k, v)) + nbytes(y)
