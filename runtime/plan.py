"""What every layer of a loaded transformer is bound to: the plan that becomes the record."""

from __future__ import annotations

import torch

from fluxkiln import workload
from fluxkiln.record import Determinism, Layer
from fluxkiln.transformer import Network

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float64: "fp64"}
PROMISES: dict[str, Determinism] = {"triton": "rows-bitwise", "eager": "rows-to-rounding", "trt": "repeatable"}


def plan_of(model: Network) -> tuple[Layer, ...]:
    """One entry for every call of a step, in order, as whoever runs it describes it."""
    dtype = DTYPES[model.dtype]
    layers = []
    for call in workload.step(model.config, workload.Tokens(1, 1), dtype):
        bound = model.describe(call.name, call.op)
        format = dtype if bound.format == "dense" else bound.format
        layers.append(Layer(call.name, call.op, bound.implementation, format, bound.weights, bound.emulated))
    return tuple(layers)
