"""LayerNorm without affine, then modulation:  y = (1 + scale) * norm(x) + shift.

    x      [B, L, D]   joint stream, text rows [:split] first; any strides over B and L, D contiguous
    shift  [B, S, D]   one row per image and stream, S = 1 or 2
    scale  [B, S, D]
    y      [B, L, D]   dtype of x

Precision: statistics in fp32 (fp64 for fp64); one rounding at the norm and one at each modulation op in eager.
Cost: memory-bound, 2*B*L*D elements moved; 2 calls in a double block, 1 in a single block, 1 at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fluxkiln.kernels.formats import Activation, Quant
from fluxkiln.kernels.layers import EPS, by_stream

# --- reference --------------------------------------------------------------------------------


def reference(x: Tensor, shift: Tensor, scale: Tensor, split: int, out: Quant | None = None) -> Activation:
    def run(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        y = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=EPS)
        return (1 + scale[:, None]) * y + shift[:, None]

    return by_stream(run, x, split, shift.unbind(1), scale.unbind(1))
