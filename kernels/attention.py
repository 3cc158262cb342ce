"""Attention over the joint sequence:  o = softmax(q kᵀ / sqrt(d)) v,  no mask.

    q, k, v  [B, L, H, d]   d contiguous
    o        [B, L, H * d]  heads side by side, head-major

In FP8, q and k are `Fp8` with one scale for all tokens of an image's head (`row_scale [B, L, H]`, its stride over L
is 0): RMSNorm bounds their elements by sqrt(d) * max|weight|, so their scale is a constant of the layer and costs the
inner loop nothing. v is `Values`.

Precision: softmax statistics in fp32.    Cost: 4*B*H*L*L*d flops.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fluxkiln.kernels.formats import Activation, Quant

V_BLOCK = 128  # tokens that share one scale of v: the rows of the matrix product's tile that wrote them


@dataclass(frozen=True)
class Values:
    """v as the projection's kernel hands it to the attention kernel; `reference` takes plain tensors.

    Tokens come in blocks of `V_BLOCK`: the first `split` tokens (text) fill blocks of their own, the rest (image)
    start a new one, so a block never straddles streams; with `split == 0` there is one stream.

    Attributes:
        data: bf16 `[B, L, H, d]`; or e4m3 `[B, H, d, blocks * 128]`, tokens contiguous and in the order of
            `interleaved`, what a stream's last block has too many being anything finite.
        scale: fp32 `[B, H, blocks]`, largest magnitude of each block and head / 448. e4m3 data are to be multiplied
            by it; bf16 data are not, there it only bounds attention's output.
        split: tokens of the first stream.
        dtype: the model's dtype, that of an output which is not quantised.
    """

    data: Tensor
    scale: Tensor
    split: int
    dtype: torch.dtype = torch.bfloat16


def interleaved(token: Tensor) -> Tensor:
    """Place of each token within its e4m3 block.

    In every 16, token 8*b + 2*t + c is at 4*t + 2*b + c (b, c < 2, t < 4): the columns that a thread holds of the
    scores, two by two, are then the four neighbours that it holds of the 8-bit operand of p v, with no shuffle.
    """
    return (token & ~15) + ((token >> 1 & 3) << 2) + ((token >> 3 & 1) << 1) + (token & 1)


# --- reference --------------------------------------------------------------------------------


def reference(q: Tensor, k: Tensor, v: Tensor, out: Quant | None = None) -> Activation:
    o = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return o.transpose(1, 2).flatten(2)
