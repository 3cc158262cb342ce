"""Plain projections of one or two streams into one joint sequence:  y = cat(x_s W_sᵀ + b_s).

    xs     S x [B, L_s, K_s]   each stream with its own width (text and image embedders), or one stream
    layer  S x [N, K_s]
    y      [B, sum L_s, N]     in the order of the streams

Cost: 2*B*N * sum(L_s * K_s) flops.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fluxkiln.kernels.layers import Streams

# --- reference --------------------------------------------------------------------------------


def reference(xs: Sequence[Tensor], layer: Streams) -> Tensor:
    ys = [linear(x) for x, linear in zip(xs, layer, strict=True)]
    return ys[0] if len(ys) == 1 else torch.cat(ys, dim=1)
