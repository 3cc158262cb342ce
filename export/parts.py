"""The parts of a pipeline as graphs, and where the values of their parameters come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fluxkiln.autoencoder import load_autoencoder
from fluxkiln.checkpoint import CheckpointError, open_checkpoint, open_clip, open_t5
from fluxkiln.engine import digest
from fluxkiln.engines.flavour import Flavour
from fluxkiln.engines.store import Subject
from fluxkiln.export.autoencoder import trace_decoder, trace_encoder
from fluxkiln.export.build import Profile
from fluxkiln.export.graph import FP8_ATTENTION, Form, Traced, trace
from fluxkiln.export.text import trace_clip, trace_t5
from fluxkiln.export.weights import shadow, tensors_of, values
from fluxkiln.foreign import FOLDERS, Part
from fluxkiln.hub import resolve
from fluxkiln.kernels.recipe import RECIPES, Recipe
from fluxkiln.locate import locate
from fluxkiln.quantize import Layers, choose_recipe, read_recipe
from fluxkiln.text import clip_sizes, t5_sizes

_KINDS: dict[str, Part] = {
    "transformer": "transformer",
    "vae_decoder": "vae",
    "vae_encoder": "vae",
    "clip": "clip",
    "t5": "t5",
}


@dataclass(frozen=True)
class Exported:
    """A part of a model, ready to be written or built.

    Attributes:
        part: its name in the store; another form of the transformer than `step` is another part.
        traced: the graph.
        identity: of the weights.
        recipe: which layer is in which format.
        values: (name, tensor) of every parameter, read when they are asked for.
        notes: where the graph's numbers differ from eager's by rule.
    """

    part: str
    traced: Traced
    identity: str
    recipe: Recipe
    values: Callable[[], Iterator[tuple[str, Tensor]]]
    notes: tuple[str, ...] = ()

    def subject(
        self, precision: str, arch: str, profile: Profile, weights: Literal["inside", "refit"], tool: Flavour
    ) -> Subject:
        """What an engine of it is to the store."""
        shapes = profile.shapes(self.traced.inputs).items()
        return Subject(
            part=self.part,
            graph=digest(self.traced.proto),
            model=self.identity,
            precision=precision,
            recipe=self.recipe.to_json(),
            profile={name: [list(shape) for shape in three] for name, three in shapes},
            arch=arch,
            flavour=tool.name,
            version=tool.version,
            weights=weights,
        )


def export(model: str | Path, part: str, precision: str, form: Form = "step", recipe: Path | None = None) -> Exported:
    """A part of a model as a graph.

    Args:
        model: checkpoint, folder, hub repository or bundled model.
        part: one of `fluxkiln.export.PARTS`.
        precision: `fp32`, `bf16`, and for the transformer `fp8` and `nvfp4`.
        form: of the transformer, see `trace`.
        recipe: JSON file of a recipe, instead of the precision's own.

    Raises:
        CheckpointError, FileNotFoundError: the model lacks that part.
        ValueError: a combination that does not exist; the message says why.
    """
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    kind = _KINDS[part]
    path = resolve(model, (FOLDERS[kind],))
    if part == "transformer":
        return _transformer(path, precision, form, recipe, dtype)
    if precision not in ("fp32", "bf16") or form != "step" or recipe is not None:
        raise ValueError(
            f"the {part} is exported in fp32 or bf16: other precisions, forms and recipes are the transformer's"
        )
    identity, own = locate(path, kind).identity, RECIPES[precision]
    if part in ("vae_decoder", "vae_encoder"):
        vae = load_autoencoder(path, dtype=dtype)
        traced = (trace_decoder if part == "vae_decoder" else trace_encoder)(vae.config, dtype)
        tensors = vae.state_dict()
    elif part == "clip":
        from transformers import CLIPTextConfig

        tensors = open_clip(path, dtype)
        traced = trace_clip(CLIPTextConfig(**(tensors.config or clip_sizes(tensors))), dtype)
    else:
        from transformers import T5Config

        tensors = open_t5(path, dtype)
        embedding = "shared.weight" if "shared.weight" in tensors else "encoder.embed_tokens.weight"
        traced = trace_t5(T5Config(**(tensors.config or t5_sizes(tensors))), embedding, dtype)
    if lacking := sorted(traced.parameters.keys() - set(tensors)):
        raise CheckpointError(f"{path} lacks {len(lacking)} tensors of the {part}: {', '.join(lacking[:3])}")
    return Exported(part, traced, identity, own, lambda: tensors_of(traced.parameters, tensors))


def _transformer(path: Path, precision: str, form: Form, file: Path | None, dtype: torch.dtype) -> Exported:
    checkpoint = open_checkpoint(path)
    recipe = read_recipe(file) if file else choose_recipe(precision, checkpoint)
    layers = shadow(checkpoint, recipe, dtype)
    traced = trace(checkpoint.config, layers, dtype, attention=recipe.attention, form=form)
    return Exported(
        "transformer" if form == "step" else f"transformer_{form}",
        traced,
        checkpoint.identity,
        recipe,
        lambda: values(traced.parameters, Layers(checkpoint, recipe, torch.device("cpu"), dtype)),
        (FP8_ATTENTION,) if recipe.attention == "fp8" else (),
    )
