"""The operations of the FLUX.1 graph, cut at its fusion boundaries, and who runs them.

`EAGER` is the definition: run in the model's dtype it is the eager backend, run in float64 it is the truth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from fluxkiln.kernels import attention, linear, linear_gate_residual, linear_gelu, norm_modulate, qkv_rope
from fluxkiln.kernels.formats import Activation, Fp8, Nvfp4
from fluxkiln.kernels.layers import Streams


class RefusedError(RuntimeError):
    """The backend that was asked for, or every one that was allowed, cannot run this; the message says why."""


@dataclass(frozen=True)
class Binding:
    """What an operation with a layer is bound to: a line of the plan.

    Attributes:
        implementation: `eager`, `triton`, `trt`, or the library (`torch`) where that is faster or the only way.
        format: of the weights and products; `dense` is the model's dtype.
        weights: number of weight elements, 0 for an operation without.
        emulated: the format is computed in wider arithmetic than the hardware would use.
    """

    implementation: str
    format: str
    weights: int = 0
    emulated: bool = False


def describe(op: str, layer: Any = None, attention: Literal["bf16", "fp8"] = "bf16") -> Binding:
    """What the eager backend runs an operation with a layer as."""
    if layer is None:
        emulated = op == "attention" and attention == "fp8"
        return Binding("eager", "fp8" if emulated else "dense", emulated=emulated)
    streams = layer.streams if isinstance(layer, qkv_rope.Projection) else layer
    quantised = {Fp8: "fp8", Nvfp4: "nvfp4"}.get(type(streams[0].weight))
    dtype = {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(streams[0].dtype, str(streams[0].dtype))
    weights = sum(linear.weight.shape.numel() for linear in streams)
    return Binding("eager", quantised or dtype, weights, emulated=quantised is not None)


@dataclass(frozen=True)
class Ops:
    """One implementation of each operation, as the graph calls them.

    `pack` and `pack_qkv` turn a layer's native weights, once at load, into what the other operations take; `describe`
    tells what that is. `prepare` compiles what a transformer's steps of a size will need, where something has to be.
    """

    pack: Callable[..., Streams]
    pack_qkv: Callable[..., Any]
    norm_modulate: Callable[..., Activation]
    qkv_rope: Callable[..., tuple[Tensor, Tensor, Tensor]]
    attention: Callable[..., Activation]
    linear_gelu: Callable[..., Activation]
    linear_gate_residual: Callable[..., Tensor]
    linear: Callable[..., Tensor]
    describe: Callable[..., Binding] = describe
    prepare: Callable[..., object] = lambda transformer, batch, text, image: None


EAGER = Ops(
    pack=Streams,
    pack_qkv=qkv_rope.Projection,
    norm_modulate=norm_modulate.reference,
    qkv_rope=qkv_rope.reference,
    attention=attention.reference,
    linear_gelu=linear_gelu.reference,
    linear_gate_residual=linear_gate_residual.reference,
    linear=linear.reference,
)


def eager_ops(attention: Literal["bf16", "fp8"] = "bf16") -> Ops:
    """`EAGER`, with attention in the model's dtype or as FP8 attention computes it."""
    if attention == "bf16":
        return EAGER
    pack_qkv = partial(qkv_rope.Projection, attention=attention)
    return replace(EAGER, pack_qkv=pack_qkv, describe=partial(describe, attention=attention))
