"""The transformer as training runs it on a CPU: FLUX.1's graph in bf16, each kind of block compiled once for a shape.

Compiling the whole graph takes minutes for each shape of a batch; a block takes seconds, and there are two kinds.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fluxkiln.kernels import EAGER
from fluxkiln.kernels.formats import Quant
from fluxkiln.kernels.layers import Projection
from fluxkiln.kernels.qkv_rope import rms_norm
from fluxkiln.transformer import Network, Transformer

from .model import TRANSFORMER, Denoiser


def _qkv_rope(x: Tensor, projection: Projection, rope: Tensor, split: int) -> tuple[Tensor, ...]:
    """One product for q, k and v, where the definition has three; and no complex numbers, which are not compiled."""
    streams = []
    parts = (x,) if len(projection.streams) == 1 else (x[:, :split], x[:, split:])
    for part, linear, norm in zip(parts, projection.streams, projection.norms, strict=True):
        q, k, v = linear(part).unflatten(-1, (3, -1, projection.head_dim)).unbind(2)
        streams.append((rms_norm(q, norm.query), rms_norm(k, norm.key), v))
    q, k, v = streams[0] if len(streams) == 1 else (torch.cat(pair, 1) for pair in zip(*streams, strict=True))
    return _rotate(q, rope), _rotate(k, rope), v


def _rotate(x: Tensor, rope: Tensor) -> Tensor:
    even, odd = x.to(torch.promote_types(x.dtype, rope.dtype)).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rope[:, :, None].unbind(-1)
    return torch.stack((cos * even - sin * odd, sin * even + cos * odd), -1).flatten(-2).to(x.dtype)


def _attention(q: Tensor, k: Tensor, v: Tensor, out: Quant | None = None) -> Tensor:
    """Plain products: at these lengths the fused attention's backward takes twice as long on a CPU."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32))
    weights = torch.softmax(q.shape[-1] ** -0.5 * scores, -1).to(v.dtype)
    return (weights @ v).transpose(1, 2).flatten(2)


_OPS = replace(EAGER, qkv_rope=_qkv_rope, attention=_attention)


class _Compiled(Transformer):
    double_block = torch.compile(Transformer.double_block, dynamic=False)
    single_block = torch.compile(Transformer.single_block, dynamic=False)


class Fast:
    """What `model` predicts, in bf16; called as a `Denoiser`."""

    def __init__(self, model: Denoiser, compiled: bool = False) -> None:
        self.model, self.transformer = model, _Compiled if compiled else Transformer

    def __call__(
        self, img: Tensor, txt: Tensor, pooled: Tensor, timestep: Tensor, guidance: Tensor, img_ids: Tensor
    ) -> Tensor:
        native = self.model.native()
        # Of bf16, a time or a guidance keeps three digits: too few for the angles that they are made into.
        exact = Network(TRANSFORMER, native)
        mods = exact.modulate(pooled, timestep, guidance)
        rope = exact.rope(img_ids.new_zeros(txt.shape[1], 3), img_ids)
        with torch.autocast(img.device.type, enabled=False):
            graph = self.transformer(TRANSFORMER, {name: tensor.bfloat16() for name, tensor in native.items()}, _OPS)
            return graph.step(img.bfloat16(), txt.bfloat16(), mods.bfloat16(), rope)
