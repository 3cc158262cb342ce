"""Down-projection, gate and residual:  y = residual + gate * (x Wᵀ + b).

    xs        1 or 2 x [B, L, K_i]   inputs side by side on K (a single block's attention, then its MLP)
    layer     S x [N, K_1 + K_2]     S = 1 or 2 streams
    gate      [B, S, N]
    residual  [B, L, N]              may be overwritten
    y         [B, L, N]

Cost: 2*B*L*N*K flops.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fluxkiln.kernels.layers import Linear, Streams, by_stream

# --- reference --------------------------------------------------------------------------------


def reference(xs: Sequence[Tensor], layer: Streams, gate: Tensor, residual: Tensor, split: int) -> Tensor:
    def run(x: Tensor, linear: Linear, gate: Tensor) -> Tensor:
        return gate[:, None] * linear(x)

    x = xs[0] if len(xs) == 1 else torch.cat(tuple(xs), dim=-1)
    return residual + by_stream(run, x, split, layer, gate.unbind(1))
