"""Layers as the matrix product's kernel reads them, and which ones it can read.

Packed weights are private to the Triton backend: never saved, never exported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fluxkiln.kernels.formats import BLOCK, Activation, Fp8, Nvfp4, Quant
from fluxkiln.kernels.layers import Linear, Streams

DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Packed:
    """A layer as the kernel reads it: its streams stacked on the outputs, everything else in fp32.

    Attributes:
        weight: codes `[S * P * N, K]`; NVFP4 pairs `[S * P * N, K / 2]`.
        block_scale: NVFP4, `[S * P * N, K / 16]`.
        scale: FP8 and NVFP4, `[S * P * N]`.
        bias: `[S * P * N]`; None, for a side input.
        bound: `[S, 2]`: a row's outputs are at most `bound[s, 0]` times the norm of its input, plus `bound[s, 1]`.
        streams: S.
        parts: P, groups of outputs that no tile straddles.
        dtype: the model's.
        input, accumulate: as in `Linear`.
        down, up: the low-rank branch, `[S * R, K]` as a layer of R outputs, and `[S * P * N, R]`.
    """

    weight: Tensor
    block_scale: Tensor | None
    scale: Tensor | None
    bias: Tensor | None
    bound: Tensor
    streams: int
    parts: int
    dtype: torch.dtype
    input: Quant | None
    accumulate: str
    down: Packed | None = None
    up: Tensor | None = None

    @property
    def n(self) -> int:
        """Outputs of a part."""
        return self.weight.shape[0] // (self.streams * self.parts)

    @property
    def k(self) -> int:
        return self.weight.shape[1] * (1 if self.block_scale is None else 2)

    @property
    def format(self) -> str:
        return "bf16" if self.scale is None else "fp8" if self.block_scale is None else "nvfp4"


@dataclass(frozen=True)
class PackedProjection:
    """A projection as the kernel reads it: q and k in half layout.

    Attributes:
        layer: of three parts.
        norm: `[S, 2, D]` fp32.
        scale: of q and k in FP8, `[2]` fp32.
        attention, query: as in `Projection`.
    """

    layer: Packed
    norm: Tensor
    scale: Tensor
    attention: Literal["bf16", "fp8"]
    query: Literal["rotated", "raw"]

    @property
    def input(self) -> Quant | None:
        return self.layer.input

    @property
    def head_dim(self) -> int:
        return self.norm.shape[-1]


def pack(streams: Streams, parts: int = 1) -> Packed:
    """The layer as the kernel reads it.

    Raises:
        ValueError: streams of unlike formats.
    """
    weights = [linear.weight for linear in streams]
    kinds = {type(weight).__name__ for weight in weights}
    if len(kinds) != 1:
        raise ValueError(f"both streams of a layer must have one format, got {' and '.join(sorted(kinds))}")
    first = streams[0]
    block_scale = scale = down = up = None
    if isinstance(weights[0], Tensor):
        weight = _stack(weights)
    else:
        weight = _stack([w.data for w in weights])
        rows = [w.row_scale if isinstance(w, Fp8) else w.global_scale for w in weights]
        scale = _stack([r.float().expand(w.data.shape[0]) for r, w in zip(rows, weights, strict=True)])
        if isinstance(weights[0], Nvfp4):
            block_scale = _stack([w.block_scale for w in weights])
    if ranks := [linear.low_rank for linear in streams if linear.low_rank is not None]:
        width = max(16, 1 << (max(len(rank.down) for rank in ranks) - 1).bit_length())  # a power of two, what tiles are
        down = pack(Streams(_down(linear, width) for linear in streams))
        up = _stack([_up(linear, width) for linear in streams])
    return Packed(
        weight=weight,
        block_scale=block_scale,
        scale=scale,
        bias=_stack([linear.bias.float() for linear in streams]),
        bound=torch.stack([torch.stack((linear.gain, linear.offset)) for linear in streams]),
        streams=len(streams),
        parts=parts,
        dtype=first.dtype,
        input=first.input,
        accumulate=first.accumulate,
        down=down,
        up=up,
    )


def _down(linear: Linear, width: int) -> Linear:
    """The first half of the low-rank branch as a linear of `width` outputs, zeros where it has fewer."""
    bias = torch.zeros(width, dtype=linear.dtype, device=linear.bias.device)
    if linear.low_rank is None:
        return Linear(bias.new_zeros(width, linear.weight.shape[-1]), bias)
    return Linear(torch.nn.functional.pad(linear.low_rank.down, (0, 0, 0, width - len(linear.low_rank.down))), bias)


def _up(linear: Linear, width: int) -> Tensor:
    if linear.low_rank is None:
        return linear.bias.new_zeros(len(linear.bias), width)
    return torch.nn.functional.pad(linear.low_rank.up, (0, width - linear.low_rank.up.shape[1]))


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    stacked = (tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors))).contiguous()
    cut = stacked.untyped_storage().nbytes() > stacked.nbytes  # as from linear1: a view would keep all of it alive
    return stacked.clone() if cut or stacked.data_ptr() % 16 else stacked  # a view of a file may lie anywhere


# --- contract ---------------------------------------------------------------------------------


def check(op: str, xs: Sequence[Activation], layer: Streams | Packed, split: int) -> None:
    """Raise ValueError on inputs `[B, L, K_i]` that do not fit the layer, or a split that does not fit them."""
    streams, _, k = extent(layer)
    shape = xs[0].shape
    if len(shape) != 3 or any(x.shape[:-1] != shape[:-1] for x in xs):
        raise ValueError(f"{op}: inputs must be [B, L, K] with the same B and L, got {[list(x.shape) for x in xs]}")
    if sum(x.shape[-1] for x in xs) != k:
        raise ValueError(f"{op}: the layer takes K = {k}, got {' + '.join(str(x.shape[-1]) for x in xs)}")
    if not 0 <= split <= (shape[1] if streams == 2 else 0):
        raise ValueError(f"{op}: a layer of {streams} streams and {shape[1]} rows cannot split them at {split}")
    dtype = layer.dtype if isinstance(layer, Packed) else layer[0].dtype
    if strange := {x.dtype for x in xs if isinstance(x, Tensor)} - {dtype}:
        raise ValueError(f"{op}: the layer's dtype is {dtype}, got an input in {strange.pop()}")


def extent(layer: Streams | Packed) -> tuple[int, int, int]:
    """Streams, outputs and K of a layer."""
    if isinstance(layer, Packed):
        return layer.streams, layer.n * layer.parts, layer.k
    return len(layer), *layer[0].weight.shape


def refuse(xs: Sequence[Activation], layer: Packed, arch: int) -> str | None:
    """Why the kernel cannot multiply these inputs with this layer, or None."""
    format = layer.format
    if layer.dtype not in DTYPES:
        return f"the kernels compute in bf16 or fp16, the model's dtype is {layer.dtype}"
    if format == "nvfp4" and arch < 100:
        return f"NVFP4 needs the block-scaled tensor cores of sm_100 or sm_120, this is sm_{arch}"
    if layer.accumulate == "f16" and arch != 89:
        return f"fp16 sums are for sm_89: sm_{arch} multiplies FP8 as fast with fp32 sums"
    if layer.accumulate != "f32" and format != "fp8":
        return f"accumulation {layer.accumulate!r} is for FP8, the layer is {format}"
    if layer.n % 16:
        return f"N = {layer.n} is not a multiple of 16"
    for x in xs:
        kind = "bf16" if isinstance(x, Tensor) else "fp8" if isinstance(x, Fp8) else "nvfp4"
        unit = 32 if format == "nvfp4" else 16  # rows of 16 bytes, what the tensor memory accelerator addresses
        codes = x if isinstance(x, Tensor) else x.data
        if kind != format:
            return f"the weight is {format}, the input {kind}"
        if x.shape[-1] % unit:
            return f"K = {x.shape[-1]} is not a multiple of {unit}"
        if codes.stride(-1) != 1 or any(s * codes.element_size() % 16 for s in codes.stride()[:-1]):
            return f"rows must be contiguous and 16 bytes aligned, got strides {codes.stride()}"
        if isinstance(x, Nvfp4) and not _alike(x):
            return f"block scales must lie as the codes do, got strides {x.block_scale.stride()} to {codes.stride()}"
        if codes.data_ptr() % 16:
            return "rows must be 16 bytes aligned, but x starts between two multiples of 16 bytes"
    return None


def _alike(x: Nvfp4) -> bool:
    """Whether the strides of the codes find the block scales: 16 elements are 8 bytes of one and 1 of the other."""
    axes = zip(x.data.shape[:-1], x.data.stride(), x.block_scale.stride(), strict=False)
    return x.block_scale.stride(-1) == 1 and all(n == 1 or s == 8 * t for n, s, t in axes)


# --- on the meta device -----------------------------------------------------------------------

LENGTH = 4608  # a 1024 x 1024 image with 512 tokens of text


def meta_layer(format: str, accumulate: str, streams: int, n: int, k: int, parts: int = 1, rank: int = 0) -> Packed:
    """A layer on the meta device, to compile for."""
    rows = streams * parts * n
    codes = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "nvfp4": torch.uint8}[format]
    return Packed(
        weight=_meta(codes, rows, k // 2 if format == "nvfp4" else k),
        block_scale=_meta(torch.float8_e4m3fn, rows, k // BLOCK) if format == "nvfp4" else None,
        scale=None if format == "bf16" else _meta(torch.float32, rows),
        bias=_meta(torch.float32, rows),
        bound=_meta(torch.float32, streams, 2),
        streams=streams,
        parts=parts,
        dtype=torch.bfloat16,
        input=None,
        accumulate=accumulate,
        down=meta_layer("bf16", "f32", streams, rank, k) if rank else None,
        up=_meta(torch.bfloat16, rows, rank) if rank else None,
    )


def meta_input(format: str, k: int, length: int = LENGTH) -> Activation:
    """An activation `[1, L, K]` on the meta device, with all that a producer can send along."""
    dense, norm = _meta(torch.bfloat16, 1, length, k), _meta(torch.float32, 1, length)
    if format == "bf16":
        return dense
    if format == "fp8":
        return Fp8(_meta(torch.float8_e4m3fn, 1, length, k), norm, norm, dense)
    return Nvfp4(
        _meta(torch.uint8, 1, length, k // 2), _meta(torch.float8_e4m3fn, 1, length, k // BLOCK), norm, norm, dense
    )


def _meta(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
