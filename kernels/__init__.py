"""The operations of the FLUX.1 graph, cut at its fusion boundaries, and who runs them.

`EAGER` is the definition: run in the model's dtype it is the eager backend, run in float64 it is the truth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fluxkiln.kernels import attention, linear, linear_gate_residual, linear_gelu, norm_modulate, qkv_rope
from fluxkiln.kernels.formats import Activation
from fluxkiln.kernels.layers import Streams


@dataclass(frozen=True)
class Ops:
    """One implementation of each operation, as the graph calls them.

    `pack` and `pack_qkv` turn a layer's native weights, once at load, into what the other operations take.
    """

    pack: Callable[..., Streams]
    pack_qkv: Callable[..., Any]
    norm_modulate: Callable[..., Activation]
    qkv_rope: Callable[..., tuple[Tensor, Tensor, Tensor]]
    attention: Callable[..., Activation]
    linear_gelu: Callable[..., Activation]
    linear_gate_residual: Callable[..., Tensor]
    linear: Callable[..., Tensor]


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
