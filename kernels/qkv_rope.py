"""Projection to q, k, v, then per-head RMSNorm and rotary embedding on q and k, joint over both streams.

    x           [B, L, D]       joint stream, text rows [:split] first
    projection  S x [3D, D]     rows: q of all heads, then k, then v; S = 1 or 2 streams;
                S x 2 x [d]     RMSNorm weights of q and k, shared by the heads
    rope        [1 or B, L, d/2, 2]   cos and sin of each rotated pair, fp32
    q, k, v     [B, L, H, d]

Precision: each linear, each norm and each rotation rounds once to the model's dtype; the rotation itself is fp32.
Cost: 6*B*L*D*D flops.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fluxkiln.kernels.formats import Quant
from fluxkiln.kernels.layers import EPS, QKNorm, Streams


@dataclass(frozen=True)
class Projection:
    """The qkv layer of a block: one linear and one pair of norms for each stream."""

    streams: Streams
    norms: tuple[QKNorm, ...]

    @property
    def input(self) -> Quant | None:
        return self.streams.input


# --- reference --------------------------------------------------------------------------------


def reference(x: Tensor, projection: Projection, rope: Tensor, split: int) -> tuple[Tensor, Tensor, Tensor]:
    head_dim = projection.norms[0].query.shape[0]
    rows = (x,) if len(projection.streams) == 1 else (x[:, :split], x[:, split:])
    streams = []
    for x_s, linear, norm in zip(rows, projection.streams, projection.norms, strict=True):
        q, k, v = linear(x_s).unflatten(-1, (3, -1, head_dim)).unbind(2)
        streams.append((rms_norm(q, norm.query), rms_norm(k, norm.key), v))
    q, k, v = streams[0] if len(streams) == 1 else (torch.cat(pair, dim=1) for pair in zip(*streams, strict=True))
    return rotate(q, rope), rotate(k, rope), v


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x, weight.shape, weight, EPS)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate the channel pairs (2i, 2i+1) of `x [B, L, H, d]` by `rope [1 or B, L, d/2, 2]`, in at least fp32."""
    cos, sin = rope[:, :, None].unbind(-1)
    a, b = x.to(torch.promote_types(x.dtype, rope.dtype)).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((cos * a - sin * b, sin * a + cos * b), dim=-1).flatten(-2).to(x.dtype)
