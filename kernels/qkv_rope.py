"""Projection to q, k, v, then per-head RMSNorm and rotary embedding on q and k, joint over both streams.

    x           [B, L, K]       joint stream, text rows [:split] first; dtype of the model, FP8 or NVFP4
    projection  S x [3HD, K]    rows: q of all heads, then k, then v; S = 1 or 2 streams;
                S x 2 x [D]     RMSNorm weights of q and k, shared by the heads
    rope        [1 or B, L, D/2, 2]   cos and sin of each rotated pair, fp32
    q, k, v     [B, L, H, D]    dtype of the model, or FP8 for FP8 attention (`attention.Values` for v)

Packed, the rows of q and k are permuted so that a head's even channels come first, then its odd ones, and the norm
weights with them: pairs are then D/2 apart, two halves of a tile, and q kᵀ does not notice. A tile holds whole heads
of one of q, k and v.

Precision: eager rounds to the model's dtype at the linear, the norm and the rotation; the kernel only at the end, all
between in fp32. In FP8, RMSNorm bounds q and k by sqrt(D) max|weight|, a constant of the layer, and v has a scale for
every 128 tokens of a stream and head.    Cost: 6*B*L*K*H*D flops.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fluxkiln.kernels import attention, formats, matmul, packed, tiles
from fluxkiln.kernels.attention import V_BLOCK, Query, Values
from fluxkiln.kernels.compile import Configuration
from fluxkiln.kernels.formats import TINY, Activation, Fp8
from fluxkiln.kernels.language import Launch, constexpr, jit, tl
from fluxkiln.kernels.layers import EPS, Linear, LowRank, Projection, Streams, rows
from fluxkiln.kernels.packed import LENGTH, PackedProjection, meta_input, meta_layer
from fluxkiln.kernels.quantize import Empty, fresh
from fluxkiln.kernels.tiles import Problem, Tile

# --- pack -------------------------------------------------------------------------------------


def pack(projection: Projection) -> PackedProjection:
    head_dim = projection.norms[0].query.shape[0]
    half = half_layout(head_dim)

    def permuted(linear: Linear) -> Linear:
        outputs = linear.bias.shape[0]
        order = torch.arange(outputs).unflatten(0, (3, -1, head_dim))
        order[:2] = order[:2][..., half]
        order = order.flatten().to(linear.bias.device)
        rank = linear.low_rank and LowRank(linear.low_rank.down, linear.low_rank.up[order])
        return replace(linear, weight=linear.weight[order], bias=linear.bias[order], low_rank=rank)

    norms = [torch.stack((norm.query, norm.key))[:, half.to(norm.query.device)] for norm in projection.norms]
    return PackedProjection(
        packed.pack(Streams(map(permuted, projection.streams)), parts=3),
        torch.stack(norms).float(),
        torch.cat((projection.scale("query"), projection.scale("key"))),
        projection.attention,
        projection.query,
    )


def half_layout(head_dim: int) -> Tensor:
    """Channels of a head in packed order: the first of every rotated pair, then the second."""
    return torch.cat((torch.arange(0, head_dim, 2), torch.arange(1, head_dim, 2)))


# --- constants and launch table ---------------------------------------------------------------

OP = "qkv_rope"
HEAD_DIMS = (64, 128)

# 128 rows always: they share a scale of v.
TILES: tiles.Table = {
    (89, "bf16", "f32"): (Tile(128, 128, 64, 8, 3),),
    (89, "fp8", "f32"): (Tile(128, 128, 128, 8, 3),),
    (89, "fp8", "promote128"): (Tile(128, 128, 128, 8, 3),),
    (89, "fp8", "f16"): (Tile(128, 128, 128, 8, 3),),
    # Hopper: 128 x 256 reads three quarters of the operand bytes of 128 x 128; a piece is a head.
    (90, "bf16", "f32"): (Tile(128, 256, 64, 8, 4, pieces=2), Tile(128, 128, 64, 8, 3, blocks=2)),
    (90, "fp8", "f32"): (Tile(128, 256, 128, 8, 4, pieces=2), Tile(128, 128, 128, 8, 4)),
    (90, "fp8", "promote128"): (Tile(128, 128, 128, 8, 4),),
    (100, "bf16", "f32"): (Tile(128, 256, 64, 8, 4, pieces=2), Tile(128, 128, 64, 8, 4)),
    (100, "fp8", "f32"): (Tile(128, 128, 128, 8, 4),),
    (100, "fp8", "promote128"): (Tile(128, 128, 128, 8, 4),),
    (100, "nvfp4", "f32"): (Tile(128, 128, 256, 8, 3),),
    (120, "bf16", "f32"): (Tile(128, 128, 64, 8, 3),),
    (120, "fp8", "f32"): (Tile(128, 128, 128, 8, 3),),
    (120, "fp8", "promote128"): (Tile(128, 128, 128, 8, 3),),
    (120, "nvfp4", "f32"): (Tile(128, 128, 256, 8, 3),),
}


def pick(problem: Problem) -> Tile:
    return tiles.pick(problem, TILES)


def candidates(problem: Problem) -> Iterator[Tile]:
    # An epilogue needs whole heads.
    return (tile for tile in tiles.candidates(problem, TILES) if tile.m == V_BLOCK and tile.n // tile.pieces >= 128)


# --- contract ---------------------------------------------------------------------------------


def check(x: Activation, projection: Projection | PackedProjection, rope: Tensor, split: int) -> None:
    """Raise ValueError on a call that is wrong for every backend."""
    layer = projection.layer if isinstance(projection, PackedProjection) else projection.streams
    packed.check(OP, (x,), layer, split)
    head_dim = projection.head_dim
    B, L = x.shape[:2]
    if rope.shape[0] not in (1, B) or tuple(rope.shape[1:]) != (L, head_dim // 2, 2):
        raise ValueError(f"{OP}: rope must be [1 or {B}, {L}, {head_dim // 2}, 2], got {list(rope.shape)}")


def refuse(x: Activation, projection: PackedProjection, rope: Tensor, split: int, *, arch: int) -> str | None:
    """Why the Triton kernel cannot take a valid call, or None."""
    if projection.head_dim not in HEAD_DIMS:
        return f"head dim {projection.head_dim} is not one of {', '.join(map(str, HEAD_DIMS))}"
    if rope.dtype != torch.float32 or not rope[0].is_contiguous():
        return f"rope must be fp32 and contiguous, got {rope.dtype}"
    return packed.refuse((x,), projection.layer, arch)


# --- reference --------------------------------------------------------------------------------


def reference(x: Activation, projection: Projection, rope: Tensor, split: int) -> tuple[Any, Any, Any]:
    dtype = projection.streams[0].dtype
    q, k, v = _normed(x, projection, split)
    q, k = rotate(q, rope), rotate(k, rope)
    if projection.attention == "bf16":
        return q.to(dtype), k.to(dtype), v.to(dtype)
    q, k = (formats.quantize_fp8(y, projection.scale(part)) for y, part in ((q, "query"), (k, "key")))
    return q, k, attention.quantize_values(v, split, dtype)


def _normed(x: Activation, projection: Projection, split: int) -> tuple[Tensor, ...]:
    """q, k and v before rotation, joint over the streams; on its own, so that what it joins is freed before that."""
    streams = []
    parts = (x,) if len(projection.streams) == 1 else (x[:, :split], x[:, split:])
    for x_s, linear, norm in zip(parts, projection.streams, projection.norms, strict=True):
        # One after the other: a product three times as wide would stay in memory for v's sake.
        width = linear.bias.shape[0] // 3
        q, k, v = (
            rows(linear, slice(i * width, (i + 1) * width))(x_s).unflatten(-1, (-1, norm.query.shape[0]))
            for i in range(3)
        )
        streams.append((rms_norm(q, norm.query), rms_norm(k, norm.key), v))
    return streams[0] if len(streams) == 1 else tuple(torch.cat(pair, dim=1) for pair in zip(*streams, strict=True))


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x, weight.shape, weight.to(x.dtype), EPS)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate the channel pairs (2i, 2i+1) of `x [B, L, H, D]` by `rope [1 or B, L, D/2, 2]`, in at least fp32."""
    wide = x.to(torch.promote_types(x.dtype, rope.dtype)).unflatten(-1, (-1, 2))
    # A product of complex numbers is the rotation, in one pass over memory.
    turned = torch.view_as_complex(wide) * torch.view_as_complex(rope.to(wide.dtype))[:, :, None]
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


# --- kernel -----------------------------------------------------------------------------------

_EPS, _TINY = constexpr(EPS), constexpr(TINY)


@jit
def _rotated(first, second, norm_ptr, rope_ptr, rows, mask_m, M: tl.constexpr, D: tl.constexpr):
    """RMSNorm and rotation of heads given as halves `[M, HEADS, D / 2]`."""
    squares = tl.sum(first * first + second * second, axis=2)  # [M, HEADS]
    rstd = tl.rsqrt(squares / D + _EPS)[:, :, None]
    offs = tl.arange(0, D // 2)
    first *= rstd * tl.load(norm_ptr + offs)[None, None, :]
    second *= rstd * tl.load(norm_ptr + D // 2 + offs)[None, None, :]
    rope_ptrs = rope_ptr + rows[:, None] * D + tl.arange(0, D)[None, :]
    rope = tl.load(rope_ptrs, mask=mask_m[:, None], other=0.0)  # cos and sin in turns
    cos, sin = tl.split(tl.reshape(rope, (M, 1, D // 2, 2)))
    return first * cos - second * sin, first * sin + second * cos


@jit
def _store_halves(first, second, inverse, ptrs, mask, HALF: tl.constexpr):
    ptrs += tl.arange(0, HALF)[None, None, :]
    tl.store(ptrs, (first * inverse).to(ptrs.dtype.element_ty), mask=mask)
    tl.store(ptrs + HALF, (second * inverse).to(ptrs.dtype.element_ty), mask=mask)


@jit
def _qkv_rope(
    y, b, row, mask_m, offs_n, mask_n, stream, part, L, split, N,
    norm_ptr, scale_ptr,                       # [S, 2, D], of FP8 q and k [2]
    rope_ptr, stride_rb,                       # [1 or B, L, D / 2, 2]
    q_ptr, k_ptr,                              # [B, L, H, D]
    v_ptr, v_scale_ptr,                        # [B, L, H, D] or FP8 [B, H, D, blocks * M]; [B, H, blocks]
    CONSTANTS: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = CONSTANTS[0]
    FP8: tl.constexpr = CONSTANTS[1]
    RAW_QUERY: tl.constexpr = CONSTANTS[2]
    M: tl.constexpr = y.shape[0]
    HEADS: tl.constexpr = y.shape[1] // D
    rows = row + tl.arange(0, M)
    heads = tl.min(offs_n, axis=0) // D + tl.arange(0, HEADS)
    mask_h = heads < N // D
    mask = mask_m[:, None, None] & mask_h[None, :, None]
    image = b.to(tl.int64) * L * N
    at = rows[:, None, None] * N + heads[None, :, None] * D  # [M, HEADS, 1]

    if part == 2:
        text_blocks = tl.cdiv(split, M)
        blocks = text_blocks + tl.cdiv(L - split, M)
        block = tl.where(row >= split, text_blocks + (row - split) // M, row // M)
        v = tl.where(mask, tl.reshape(y, (M, HEADS, D)), 0.0)
        scale = tl.maximum(tl.max(tl.max(tl.abs(v), axis=2), axis=0) * (1.0 / 448.0), _TINY)  # [HEADS]
        head = b.to(tl.int64) * (N // D) + heads
        tl.store(v_scale_ptr + head * blocks + block, scale, mask=mask_h)
        if FP8:
            codes = (v * (1.0 / scale)[None, :, None]).to(tl.float8e4nv)
            # Tokens become contiguous, as `attention.interleaved`: 8 b + 2 t + c of every 16 goes to 4 t + 2 b + c.
            codes = tl.permute(tl.reshape(codes, (M // 16, 2, 4, 2, HEADS, D)), (4, 5, 0, 2, 1, 3))
            row_d = head[:, None, None] * D + tl.arange(0, D)[None, :, None]
            ptrs = v_ptr + row_d * (blocks * M) + block * M + tl.arange(0, M)[None, None, :]
            tl.store(ptrs, tl.reshape(codes, (HEADS, D, M)), mask=mask_h[:, None, None])
        else:
            tl.store(v_ptr + image + at + tl.arange(0, D)[None, None, :], v.to(v_ptr.dtype.element_ty), mask=mask)
    else:
        halves = tl.permute(tl.reshape(y, (M, HEADS, 2, D // 2)), (0, 1, 3, 2))
        first, second = tl.split(halves)  # [M, HEADS, D / 2]
        norm_ptrs = norm_ptr + (stream * 2 + part) * D
        rope_ptrs = rope_ptr + b.to(tl.int64) * stride_rb
        if RAW_QUERY:
            if part == 0:
                _store_halves(first, second, 1.0, q_ptr + image + at, mask, D // 2)
            else:
                first, second = _rotated(first, second, norm_ptrs, rope_ptrs, rows, mask_m, M, D)
                inverse = 1.0 / tl.load(scale_ptr + 1) if FP8 else 1.0
                _store_halves(first, second, inverse, k_ptr + image + at, mask, D // 2)
        else:
            first, second = _rotated(first, second, norm_ptrs, rope_ptrs, rows, mask_m, M, D)
            inverse = 1.0 / tl.load(scale_ptr + part) if FP8 else 1.0
            _store_halves(first, second, inverse, tl.where(part == 0, q_ptr, k_ptr) + image + at, mask, D // 2)


# --- launch -----------------------------------------------------------------------------------


def launch(
    x: Activation, projection: PackedProjection, rope: Tensor, split: int, *,
    arch: int, empty: Empty | None = None, tile: Tile | None = None,
) -> tuple[tuple[Any, Any, Any], list[Launch]]:  # fmt: skip
    """q, k and v, and the launches that fill them; `tile` overrides the table."""
    layer, D = projection.layer, projection.head_dim
    (B, L, _), H = x.shape, layer.n // D
    empty = empty or fresh(layer.weight.device)
    fp8, raw = projection.attention == "fp8", projection.query == "raw"
    blocks = attention.blocks(split, L)
    dtype = torch.float8_e4m3fn if fp8 else layer.dtype
    q: Any = empty("q", (B, L, H, D), layer.dtype if raw else dtype)
    k: Any = empty("k", (B, L, H, D), dtype)
    v_data = empty("v", (B, H, D, blocks * V_BLOCK) if fp8 else (B, L, H, D), dtype)
    v = Values(v_data, empty("v_scale", (B, H, blocks), torch.float32), split, layer.dtype)

    tile = tile or pick(matmul.problem(OP, layer, matmul.streams_of(split, L, layer), arch, projection.attention))
    side, before = matmul.side_input((x,), layer, split, arch=arch, empty=empty)
    run = matmul.plan(
        _qkv_rope, tile, (x,), layer, split,
        tensors=(
            projection.norm, projection.scale,
            rope, rope.stride(0) if rope.shape[0] > 1 else 0,
            q, k, v.data, v.scale,
        ),
        constants=(D, fp8, raw), side=side, arch=arch,
    )  # fmt: skip
    if fp8:
        scales = [scale.expand(B, L, H) for scale in projection.scale.split(1)]
        q, k = (q if raw else Fp8(q, scales[0])), Fp8(k, scales[1])
    if raw:
        q = Query(q, projection.norm[:, 0], rope, split, projection.scale[:1] if fp8 else None)
    return (q, k, v), [*before, run]


def configurations(arch: int) -> Iterator[Configuration]:
    def meta(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    for (number, format, accumulate), shipped in TILES.items():
        if number != arch:
            continue
        x = meta_input(format, 3072)
        for tile in shipped:
            for streams, target, query in ((2, "bf16", "rotated"), (2, "fp8", "rotated"), (1, "fp8", "raw")):
                layer = meta_layer(format, accumulate, streams, 3072, 3072, parts=3)
                norm, scale, rope = meta(streams, 2, 128), meta(2), meta(1, LENGTH, 64, 2)
                projection = PackedProjection(layer, norm, scale, target, query)
                launches = launch(x, projection, rope, 512 * (streams - 1), arch=arch, tile=tile)[1]
                note = f"S={streams} -> {target}" + " raw query" * (query == "raw")
                yield matmul.configuration(OP, arch, layer, tile, launches, note)


# --- cost -------------------------------------------------------------------------------------


def cost(x: Activation, projection: PackedProjection, rope: Tensor, q: Any, k: Any, v: Values) -> tuple[int, int]:
    """(flops, bytes) of one call."""
    written = sum((y if isinstance(y, Tensor) else y.data).nbytes for y in (q, k, v)) + v.scale.nbytes
    return matmul.cost((x,), projection.layer, rope.nbytes + written)
