"""What every layer of a loaded transformer is bound to: the plan that becomes the record."""

from __future__ import annotations

import torch

from fluxkiln import workload
from fluxkiln.record import Determinism, Layer
from fluxkiln.transformer import Transformer

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float64: "fp64"}
PROMISES: dict[str, Determinism] = {"triton": "rows-bitwise", "eager": "rows-to-rounding", "trt": "repeatable"}

# Fields of the graph's blocks -> the native name of a linear that runs there.
_DOUBLE = {"qkv": "img_attn.qkv", "proj": "img_attn.proj", "mlp_in": "img_mlp.0", "mlp_out": "img_mlp.2"}
_SINGLE = {"qkv": "linear1", "mlp_in": "linear1", "out": "linear2"}


def plan_of(model: Transformer) -> tuple[Layer, ...]:
    """One entry for every call of a step, in order."""
    dtype, loaded = DTYPES[model.dtype], model.loaded
    if loaded is None:
        calls = workload.step(model.config, workload.Tokens(1, 1), dtype)
        return tuple(Layer(call.name, call.op, "eager", call.format, call.weights) for call in calls)
    recipe, choice = loaded.recipe, loaded.choice

    def format_of(name: str) -> str:
        block, number, field = name.split(".")
        native = (_DOUBLE if block == "double_blocks" else _SINGLE)[field]
        rule = recipe.rule(f"{block}.{number}.{native}")
        return dtype if rule.format == "dense" else rule.format

    layers = []
    for call in workload.step(model.config, workload.Tokens(1, 1), dtype, format_of):
        format = "fp8" if call.op == "attention" and recipe.attention == "fp8" else call.format
        emulated = choice.emulated and format in ("fp8", "nvfp4")
        layers.append(Layer(call.name, call.op, choice.backend, format, call.weights, emulated))
    return tuple(layers)
