"""Up-projection and activation:  y = gelu(x Wᵀ + b),  the tanh form.

    x      [B, L, K]     joint stream, text rows [:split] first
    layer  S x [N, K]    S = 1 or 2 streams
    y      [B, L, N]

Cost: 2*B*L*N*K flops.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fluxkiln.kernels.formats import Activation, Quant
from fluxkiln.kernels.layers import Linear, Streams, by_stream

# --- reference --------------------------------------------------------------------------------


def reference(x: Tensor, layer: Streams, split: int, out: Quant | None = None) -> Activation:
    def run(x: Tensor, linear: Linear) -> Tensor:
        return torch.nn.functional.gelu(linear(x), approximate="tanh")

    return by_stream(run, x, split, layer)
