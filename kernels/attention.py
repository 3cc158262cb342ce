"""Attention over the joint sequence:  o = softmax(q kᵀ / sqrt(d)) v,  no mask.

    q, k, v  [B, L, H, d]   d contiguous
    o        [B, L, H * d]  heads side by side, head-major

Precision: softmax statistics in fp32.    Cost: 4*B*H*L*L*d flops.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fluxkiln.kernels.formats import Activation, Quant

# --- reference --------------------------------------------------------------------------------


def reference(q: Tensor, k: Tensor, v: Tensor, out: Quant | None = None) -> Activation:
    o = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return o.transpose(1, 2).flatten(2)
