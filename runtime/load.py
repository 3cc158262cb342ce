"""From a checkpoint to a transformer that runs: where, on which backend, in which precision."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from fluxkiln.checkpoint import Checkpoint, open_checkpoint
from fluxkiln.hub import resolve
from fluxkiln.kernels.recipe import RECIPES, Recipe
from fluxkiln.quantize import Layers, choose_recipe
from fluxkiln.select import Choice, choose
from fluxkiln.transformer import Transformer


@dataclass(frozen=True)
class Loaded:
    """How a transformer was loaded; `model.loaded`.

    Attributes:
        checkpoint: where its weights come from.
        precision: as asked for; recipe: what that means for each layer.
        choice: the backend, and why not the others.
    """

    checkpoint: Checkpoint
    precision: str
    recipe: Recipe
    choice: Choice


def load_transformer(
    path: str | Path,
    *,
    precision: str = "bf16",
    backend: str = "auto",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    recipe: Recipe | str | Path | None = None,
    fallback: bool = False,
) -> Transformer:
    """Open a FLUX.1 transformer of any common kind and make it ready to run.

    Args:
        path: a single file, a diffusers folder (the transformer's or the pipeline's), ComfyUI's files, a hub
            repository, or a bundled model's name.
        precision: of the block linears: `fp32`, `bf16`, `fp8` or `nvfp4`.
        backend: `eager`, `triton`, or `auto`: the fastest that can run it here.
        device: where it runs; None is the GPU if there is one.
        dtype: of everything else; None follows the precision.
        recipe: which layer gets which format, where it is not the precision's own; a JSON file of one will do.
        fallback: take another backend if the one asked for cannot run this, and say so in the record.

    Raises:
        CheckpointError: the path holds something else, or is damaged.
        FileNotFoundError: nothing is there, and nothing on the hub.
        ValueError: an unknown precision, backend or recipe, or float16, which FLUX.1's activations overflow.
        RefusedError: the backend cannot run this here; the message says why.
    """
    if precision not in RECIPES:
        raise ValueError(f"precision must be one of {', '.join(RECIPES)}, got {precision!r}")
    if isinstance(recipe, str | Path):
        recipe = Recipe.from_json(Path(recipe).read_text())
    dtype = dtype or (torch.float32 if precision == "fp32" else torch.bfloat16)
    if dtype == torch.float16:
        raise ValueError("FLUX.1 overflows float16: use dtype=torch.bfloat16 or torch.float32")
    checkpoint = open_checkpoint(resolve(path, ("transformer",)))
    recipe = recipe or choose_recipe(precision, checkpoint)
    recipe.check(name.removesuffix(".weight") for name in checkpoint.names if name.endswith(".weight"))
    place = default_device(device)
    choice = choose(backend, checkpoint.config, recipe, place, dtype, fallback)
    model = Transformer(checkpoint.config, Layers(checkpoint, recipe, place, dtype), choice.ops)
    model.loaded = Loaded(checkpoint, precision, recipe, choice)
    return model


def default_device(device: torch.device | str | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
