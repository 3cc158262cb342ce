"""Other people's implementations on our weights, so that a comparison measures the code and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fluxkiln.config import FluxConfig
from fluxkiln.names import SWAPPED, to_diffusers


def diffusers_state(config: FluxConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Native tensors under diffusers' names: views, but for the final modulation, whose halves change places."""
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in SWAPPED:
            tensor = torch.cat(tuple(reversed(tensor.chunk(2))))
        parts = to_diffusers(name)
        # q, k and v are equal; the fourth part, a single block's MLP, has the rows that are left.
        width = tensor.shape[0] // len(parts) if len(parts) < 4 else config.hidden_size
        sizes = [width] * (len(parts) - 1)
        state.update(zip(parts, tensor.split([*sizes, tensor.shape[0] - sum(sizes)]), strict=True))
    return state


def diffusers_transformer(config: FluxConfig, tensors: Mapping[str, Tensor]) -> torch.nn.Module:
    """diffusers' `FluxTransformer2DModel` over the storage of our tensors: a second model costs no second memory."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(config.to_diffusers())
    model.load_state_dict(diffusers_state(config, tensors), assign=True)
    return model.eval()


def diffusers_velocity(model: Callable[..., Any], x: Mapping[str, Tensor | None]) -> Tensor:
    """`model` called with the inputs of a `fluxkiln.transformer.Transformer`."""
    return model(
        hidden_states=x["img"],
        encoder_hidden_states=x["txt"],
        pooled_projections=x["pooled"],
        timestep=x["timestep"],
        guidance=x["guidance"],
        img_ids=x["img_ids"],
        txt_ids=x["txt_ids"],
        return_dict=False,
    )[0]
