"""What the graph hands to an operation: the weights of a layer, once for each stream of the joint sequence.

The sequence is joint, text first: rows `[:split]` belong to the text stream and use `streams[0]`, the rest to
the image stream and use `streams[-1]`. A single block has one stream and `split == 0`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from fluxkiln.kernels.formats import (
    FP8_MAX,
    TINY,
    Activation,
    Quant,
    Weight,
    columns,
    dense,
    dequantize,
    multiply,
    row_norm,
)

Accumulate = Literal["f32", "promote128", "f16"]

EPS = 1e-6  # of every LayerNorm and RMSNorm in FLUX.1


@dataclass(frozen=True)
class LowRank:
    """A second way through a linear, in the model's dtype: `+ (x downᵀ) upᵀ`, x before quantisation.

    `down [R, K]`, `up [N, R]`; R is padded with zeros to a multiple of 16, what one matrix instruction takes.
    """

    down: Tensor
    up: Tensor


@dataclass(frozen=True)
class Linear:
    """`y = x Wᵀ + b`.

    Attributes:
        weight: `[N, K]`.
        bias: `[N]`.
        input: how the producer of x quantises it; None, not at all.
        low_rank: what is added to the product, for example to make up for the weight's quantisation.
        accumulate: how products are summed: `f32`; `promote128`, tensor-core sums of 128 products, which may be
            narrower than fp32, added up in fp32; `f16`, fp16 sums of 128 products, added up in fp32.
        name: the layer's native name, for plans, recipes and exported graphs.
        start: which of that layer's outputs is the first one here.
    """

    weight: Weight
    bias: Tensor
    input: Quant | None = None
    low_rank: LowRank | None = None
    accumulate: Accumulate = "f32"
    name: str = ""
    start: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype, in which unquantised results are handed on."""
        return self.bias.dtype

    def __call__(self, *xs: Activation) -> Tensor:
        """`y [..., N]` of x, given as its parts side by side on K.

        Without quantisation a plain linear in the model's dtype; with it, in at least fp32, unrounded: the epilogue
        of the operation goes on from there, and rounds or quantises once.
        """
        if isinstance(self.weight, Tensor) and all(isinstance(x, Tensor) for x in xs):
            x = xs[0] if len(xs) == 1 else torch.cat(xs, dim=-1)
            y = torch.nn.functional.linear(x, self.weight, self.bias)
        else:
            wide, y, start = torch.promote_types(self.dtype, torch.float32), self.bias, 0
            for x in xs:
                stop = start + x.shape[-1]
                y = y.to(wide) + multiply(x, columns(self.weight, start, stop), wide)
                start = stop
        if self.low_rank is None:
            return y
        x = torch.cat([dense(x) for x in xs], dim=-1)
        side = torch.nn.functional.linear(x, self.low_rank.down)
        return y + torch.nn.functional.linear(side.to(y.dtype), self.low_rank.up.to(y.dtype))

    @cached_property
    def gain(self) -> Tensor:
        """`max_n ‖w_n‖₂`, fp32 scalar: no output exceeds it times the input's norm, by more than the bias."""
        weight = dequantize(self.weight)
        if self.low_rank is not None:
            weight = weight + self.low_rank.up.float() @ self.low_rank.down.float()
        return torch.linalg.vector_norm(weight, dim=-1).amax()

    @cached_property
    def offset(self) -> Tensor:
        """`max |b|`, fp32 scalar."""
        return self.bias.float().abs().amax()

    def bound(self, x: Activation) -> Tensor:
        """An upper bound `[...]` of the magnitudes in each row of `y`, by Cauchy and Schwarz."""
        norm = row_norm(x)
        return norm * self.gain.to(norm.dtype) + self.offset.to(norm.dtype)


class Streams(tuple[Linear, ...]):
    """One layer's linears, (text, image) or one for both: the unpacked form that the references take."""

    @property
    def input(self) -> Quant | None:
        return self[0].input


@dataclass(frozen=True)
class QKNorm:
    """RMSNorm weights of queries and keys, `[head_dim]` each, shared by all heads."""

    query: Tensor
    key: Tensor


@dataclass(frozen=True)
class Projection:
    """The qkv layer of a block: one linear and one pair of norms for each stream.

    Attributes:
        attention: what q, k and v are written as.
        query: what q is when it leaves; `raw`, without norm and rotation, for an attention kernel that does both.
    """

    streams: Streams
    norms: tuple[QKNorm, ...]
    attention: Literal["bf16", "fp8"] = "bf16"
    query: Literal["rotated", "raw"] = "rotated"

    @property
    def input(self) -> Quant | None:
        return self.streams.input

    @property
    def head_dim(self) -> int:
        return self.norms[0].query.shape[0]

    def scale(self, part: Literal["query", "key"]) -> Tensor:
        """FP8 scale of all q or all k, fp32 `[1]`: rotation keeps the length of a pair, so the bound holds after it."""
        largest = torch.stack([getattr(norm, part).float().abs().amax() for norm in self.norms]).amax()
        return (largest * (math.sqrt(self.head_dim) / FP8_MAX)).clamp_min(TINY).reshape(1)


def rows(linear: Linear, part: slice) -> Linear:
    """The linear of some of the outputs: a view, nothing is copied."""
    start = linear.start + range(linear.bias.shape[0])[part].start
    low_rank = linear.low_rank and replace(linear.low_rank, up=linear.low_rank.up[part])
    return replace(linear, weight=linear.weight[part], bias=linear.bias[part], low_rank=low_rank, start=start)


def by_stream(run: Callable[..., Tensor], x: Tensor, split: int, *streams: Sequence) -> Tensor:
    """Join `run(rows of x, *parts of streams)` over the one or two streams of a joint sequence `x [B, L, ...]`."""
    parts = list(zip(*streams, strict=True))
    if len(parts) == 1:
        return run(x, *parts[0])
    text, image = parts
    return torch.cat((run(x[:, :split], *text), run(x[:, split:], *image)), dim=1)
