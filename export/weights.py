"""The bytes of an exported graph's parameters, made from the layers of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor

from fluxkiln.checkpoint import Checkpoint
from fluxkiln.export.graph import Parameter
from fluxkiln.kernels.formats import BLOCK, Fp8, Nvfp4
from fluxkiln.kernels.layers import Linear, rows
from fluxkiln.kernels.recipe import Recipe
from fluxkiln.quantize import Layers

DTYPE = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.FLOAT8E4M3FN: torch.float8_e4m3fn,
    TensorProto.FLOAT4E2M1: torch.uint8,  # two values a byte
}


def values(parameters: Mapping[str, Parameter], tensors: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """(name, contiguous tensor) of each parameter, layer by layer: each layer is asked for once and let go.

    Args:
        parameters: of a traced graph.
        tensors: as the graph was traced with, now with the weights: layer name -> Linear where it is quantised,
            tensor name -> tensor elsewhere.
    """
    by_layer: dict[str, list[Parameter]] = {}
    for parameter in parameters.values():
        by_layer.setdefault(parameter.layer, []).append(parameter)
    for layer, parts in by_layer.items():
        linear = tensors[layer] if layer in tensors else Linear(tensors[f"{layer}.weight"], tensors[f"{layer}.bias"])
        for part in parts:
            if part.role in ("query", "key"):
                tensor = tensors[f"{layer.rpartition('.')[0]}.norm.{part.role}_norm.scale"]
            else:
                tensor = _value(part, rows(linear, slice(*part.outputs)))
            yield part.name, tensor.to(DTYPE[part.element]).contiguous()


def tensors_of(parameters: Mapping[str, Parameter], tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The same for a graph whose parameters are tensors of the model, by name."""
    for name, part in parameters.items():
        yield name, tensors[name].to(DTYPE[part.element]).contiguous()


def _value(part: Parameter, linear: Linear) -> Tensor:
    weight = linear.weight
    if part.role in ("bias", "gain", "offset"):
        return getattr(linear, part.role)
    if part.role in ("down", "up"):
        return getattr(linear.low_rank, part.role)
    if part.role == "scale":
        scale = weight.row_scale if isinstance(weight, Fp8) else weight.global_scale
        return scale.expand(weight.shape[0])
    first, last = part.inputs or (0, weight.shape[1])
    if part.role == "block_scale":
        return weight.block_scale[:, first // BLOCK : last // BLOCK]
    if isinstance(weight, Nvfp4):
        return weight.data[:, first // 2 : last // 2]
    return (weight.data if isinstance(weight, Fp8) else weight)[:, first:last]


class Shadow:
    """A checkpoint's shapes without its weights, for tracing; calibrated scales are real, since graphs hold them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.names, self._shapes, self.input_scale = checkpoint.names, checkpoint.shape, checkpoint.input_scale

    def dense(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(self._shapes(name), dtype=dtype, device=device)

    def format(self, name: str) -> str:
        return "none"  # so that every weight is quantised, which costs nothing on the meta device

    def pre_quant_scale(self, name: str) -> None:
        return None


def shadow(checkpoint: Checkpoint, recipe: Recipe, dtype: torch.dtype) -> Layers:
    """The layers of a checkpoint by a recipe on the meta device: what `trace` needs."""
    return Layers(Shadow(checkpoint), recipe, torch.device("meta"), dtype)
