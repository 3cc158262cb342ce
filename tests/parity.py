"""What parity tests share: weights that leave no part of the network idle, and diffusers' model on the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from fluxkiln.bench.peers import diffusers_state, diffusers_velocity
from fluxkiln.config import FluxConfig
from fluxkiln.kernels.layers import Linear
from fluxkiln.kernels.recipe import Recipe, quantize

__all__ = ["SMALL", "diffusers_model", "diffusers_velocity", "layers_of", "random_tensors", "relative"]

# small, with one block of each kind and FLUX.1's head dim: what engines and exported graphs are tried on
SMALL = FluxConfig(
    in_channels=16, out_channels=16, hidden_size=256, num_heads=2, depth=1, depth_single_blocks=1, context_in_dim=48,
    vec_in_dim=24,
)  # fmt: skip


def random_tensors(config: FluxConfig, seed: int = 0) -> dict[str, Tensor]:
    """Weights for which no part of the network is idle: q/k norms near 3, biases (so gates) away from zero."""
    g = torch.Generator().manual_seed(seed)

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        x = torch.randn(shape, generator=g)
        if name.endswith(".scale"):
            return 3 + 0.3 * x
        return x / shape[1] ** 0.5 if len(shape) == 2 else 0.3 * x

    return {name: draw(name, shape) for name, shape in config.tensor_shapes().items()}


def layers_of(config: FluxConfig, recipe: Recipe, dtype: torch.dtype) -> dict[str, Any]:
    """Random weights by a recipe, as `Transformer` takes them."""
    layers: dict[str, Any] = {name: tensor.to(dtype) for name, tensor in random_tensors(config).items()}
    for name in [name.removesuffix(".weight") for name in layers if name.endswith(".weight") and "blocks" in name]:
        if recipe.rule(name).format != "dense" and "mod" not in name:
            linear = Linear(layers[f"{name}.weight"], layers[f"{name}.bias"], name=name)
            layers[name] = quantize(linear, recipe.rule(name))
    return layers


def diffusers_model(config: FluxConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> FluxTransformer2DModel:
    model = FluxTransformer2DModel.from_config(config.to_diffusers())
    model.load_state_dict(diffusers_state(tensors))
    return model.to(dtype).eval()


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()
