"""The transformer as training runs it on a CPU: FLUX.1's graph in bf16, each kind of block compiled once for a shape.

Compiling the whole graph takes minutes for each shape of a batch; a block takes seconds, and there are two kinds.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from fluxkiln.kernels import EAGER
from fluxkiln.kernels.formats import Quant
from fluxkiln.kernels.layers import Linear, Projection, Streams, by_stream
from fluxkiln.kernels.qkv_rope import rms_norm
from fluxkiln.transformer import Network, SingleBlock, Transformer

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


def _linear_gelu(x: Tensor, layer: Streams, split: int, out: Quant | None = None) -> Tensor:
    """gelu's tanh as a sigmoid, which is an exponential: compiled, twice as fast."""

    def run(x: Tensor, linear: Linear) -> Tensor:
        y = linear(x)
        wide = y.to(torch.promote_types(y.dtype, torch.float32))
        return (wide * torch.sigmoid(_GELU * (wide + 0.044715 * wide**3))).to(y.dtype)

    return by_stream(run, x, split, layer)


_GELU = 2 * (2 / math.pi) ** 0.5
_OPS = replace(EAGER, qkv_rope=_qkv_rope, attention=_attention, linear_gelu=_linear_gelu)


class _Picture(Transformer):
    """`wanted` of the joint sequence are all that is asked for: the last block makes no other token.

    They are a third to two thirds, as text and references are as long as small pictures.
    """

    wanted: slice

    def single_block(self, block: SingleBlock, x: Tensor, mods: Tensor, rope: Tensor) -> Tensor:
        if block is not self.single_blocks[-1]:
            return self.whole_block(block, x, mods, rope)
        made = self.last_block(block, x, mods, rope)
        return torch.cat((x[:, : self.wanted.start], made, x[:, self.wanted.stop :]), 1)

    def whole_block(self, block: SingleBlock, x: Tensor, mods: Tensor, rope: Tensor) -> Tensor:
        return Transformer.single_block(self, block, x, mods, rope)

    def last_block(self, block: SingleBlock, x: Tensor, mods: Tensor, rope: Tensor) -> Tensor:
        ops, wanted = self.ops, self.wanted
        shift, scale, gate = mods.unbind(1)
        h = ops.norm_modulate(x, shift, scale, 0)
        q, k, v = ops.qkv_rope(h, block.qkv, rope, 0)
        o = ops.attention(q[:, wanted], k, v)
        h = ops.linear_gelu(h[:, wanted], block.mlp_in, 0)
        return ops.linear_gate_residual((o, h), block.out, gate, x[:, wanted], 0)


class _Compiled(_Picture):
    double_block = torch.compile(_Picture.double_block, dynamic=False)
    whole_block = torch.compile(_Picture.whole_block, dynamic=False)
    last_block = torch.compile(_Picture.last_block, dynamic=False)


class Fast:
    """What `model` predicts, in bf16; called as a `Denoiser`. What it says of references means nothing."""

    def __init__(self, model: Denoiser, compiled: bool = False) -> None:
        self.model, self.transformer = model, _Compiled if compiled else _Picture

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
            targets = int((img_ids[:, 0] == 0).sum())
            graph.wanted = slice(txt.shape[1], txt.shape[1] + targets)
            return graph.step(img.bfloat16(), txt.bfloat16(), mods.bfloat16(), rope)
