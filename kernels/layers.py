"""What the graph hands to an operation: the weights of a layer, once for each stream of the joint sequence.

The sequence is joint, text first: rows `[:split]` belong to the text stream and use `streams[0]`, the rest to
the image stream and use `streams[-1]`. A single block has one stream and `split == 0`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fluxkiln.kernels.formats import Fp8, Nvfp4, Quant

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
    """

    weight: Tensor | Fp8 | Nvfp4
    bias: Tensor
    input: Quant | None = None
    low_rank: LowRank | None = None
    accumulate: Literal["f32", "promote128", "f16"] = "f32"

    def __call__(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)


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


def rows(linear: Linear, part: slice) -> Linear:
    """The linear of some of the outputs: a view, nothing is copied."""
    return replace(linear, weight=linear.weight[part], bias=linear.bias[part])


def by_stream(run: Callable[..., Tensor], x: Tensor, split: int, *streams: Sequence) -> Tensor:
    """Join `run(rows of x, *parts of streams)` over the one or two streams of a joint sequence `x [B, L, ...]`."""
    parts = list(zip(*streams, strict=True))
    if len(parts) == 1:
        return run(x, *parts[0])
    text, image = parts
    return torch.cat((run(x[:, :split], *text), run(x[:, split:], *image)), dim=1)
