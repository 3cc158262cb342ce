"""From a checkpoint to a transformer that runs: where, on which backend, in which precision."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fluxkiln.checkpoint import Checkpoint, open_checkpoint
from fluxkiln.hub import resolve
from fluxkiln.kernels.recipe import RECIPES, Recipe
from fluxkiln.plan import DTYPES
from fluxkiln.quantize import Layers, choose_recipe, read_recipe
from fluxkiln.select import Choice, choose
from fluxkiln.transformer import Network, Transformer

if TYPE_CHECKING:
    from fluxkiln.engines.store import Stored


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
    engine: str | Path | None = None,
) -> Network:
    """Open a FLUX.1 transformer of any common kind and make it ready to run.

    Args:
        path: a single file, a diffusers folder (the transformer's or the pipeline's), ComfyUI's files, a hub
            repository, or a bundled model's name.
        precision: of the block linears: `fp32`, `bf16`, `fp8` or `nvfp4`.
        backend: `eager`, `triton`, `trt` (an engine from the store, unless it was timed slower than Triton here), or
            `auto`: the fastest that can run it here.
        device: where it runs; None is the GPU if there is one.
        dtype: of everything else; None follows the precision.
        recipe: which layer gets which format, where it is not the precision's own; a JSON file of one will do.
        fallback: take another backend if the one asked for cannot run this, and say so in the record.
        engine: the one that `trt` runs, slower or not: the beginning of its key, or its folder; None finds one that
            fits. With `auto` it asks for `trt`.

    Raises:
        CheckpointError: the path holds something else, or is damaged.
        FileNotFoundError: nothing is there, and nothing on the hub.
        ValueError: an unknown precision, backend, recipe, device or dtype, or float16, which FLUX.1's activations
            overflow.
        RefusedError: the backend cannot run this here; the message says why.
    """
    if precision not in RECIPES:
        raise ValueError(f"precision must be one of {', '.join(RECIPES)}, got {precision!r}")
    if isinstance(recipe, str | Path):
        recipe = read_recipe(recipe)
    dtype = dtype or (torch.float32 if precision == "fp32" else torch.bfloat16)
    if dtype == torch.float16:
        raise ValueError("FLUX.1 overflows float16: use dtype=torch.bfloat16 or torch.float32")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be torch.bfloat16 or torch.float32, got {dtype}")
    checkpoint = open_checkpoint(resolve(path, ("transformer",)))
    recipe = recipe or choose_recipe(precision, checkpoint)
    recipe.check(name.removesuffix(".weight") for name in checkpoint.names if name.endswith(".weight"))
    place = default_device(device)
    if engine is not None:
        if backend not in ("auto", "trt"):
            raise ValueError(f"engine is for backend trt, got backend {backend!r}")
        backend = "trt"
    config, layers = checkpoint.config, partial(Layers, checkpoint, recipe, dtype=dtype)
    find = partial(_find, checkpoint, recipe, place, dtype, engine)
    choice = choose(backend, config, recipe, place, dtype, fallback, find, insist=engine is not None)
    model: Network
    if (stored := choice.engine) is not None:
        from fluxkiln.engine import EngineTransformer, differences, open_session, supply

        choice = replace(choice, notices=(*choice.notices, *differences(recipe)))
        # What is quantised is quantised on the GPU; what is not comes from the file as it is.
        weights = supply(stored, layers(place if recipe.rules else "cpu"))
        model = EngineTransformer(config, layers(place), stored, open_session(stored, weights, place))
    else:
        assert choice.ops is not None
        model = Transformer(config, layers(place), choice.ops)
    model.loaded = Loaded(checkpoint, precision, recipe, choice)
    return model


def _find(
    checkpoint: Checkpoint, recipe: Recipe, device: torch.device, dtype: torch.dtype, engine: str | Path | None
) -> Stored | str:
    """An engine for a checkpoint, or why there is none."""
    from fluxkiln.engine import find

    def shadow() -> Layers:
        from fluxkiln.export.weights import shadow

        return shadow(checkpoint, recipe, dtype)

    return find(checkpoint.config, recipe, device, dtype, shadow, checkpoint.identity, engine)


def default_device(device: torch.device | str | None) -> torch.device:
    """The device asked for, or the first GPU, or the CPU.

    Raises:
        ValueError: no device's name, or a GPU that torch does not see.
    """
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"device must be cuda, cuda:N or cpu, got {device!r}") from None
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {place}: torch sees {torch.cuda.device_count()} CUDA GPUs here")
    return place
