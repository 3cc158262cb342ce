"""Other people's implementations on our weights, so that a comparison measures the code and nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any, get_args

import torch
from PIL import Image
from torch import Tensor

from fluxkiln import images
from fluxkiln.checkpoint import diffusers_tensors
from fluxkiln.config import FluxConfig
from fluxkiln.foreign import Part as PartName
from fluxkiln.hub import resolve
from fluxkiln.load import default_device
from fluxkiln.opening import part
from fluxkiln.record import pixel_digest, versions


def diffusers_state(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Native tensors under diffusers' names: views, but for the final modulation, whose halves change places."""
    return dict(part for name, tensor in tensors.items() for part in diffusers_tensors(name, tensor))


def diffusers_transformer(config: FluxConfig, tensors: Mapping[str, Tensor]) -> torch.nn.Module:
    """diffusers' `FluxTransformer2DModel` over the storage of our tensors: a second model costs no second memory."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(config.to_diffusers())
    model.load_state_dict(diffusers_state(tensors), assign=True)
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


class DiffusersPipeline:
    """diffusers' own pipeline called like ours, for the requests of an image benchmark: the noise floor of a run.

    Its record has what the benchmark reads: the request, the model's parts, versions, and no timings.

    Args:
        model: bundled model, diffusers folder or hub name.
        precision: `fp32` or `bf16`, of everything.
    """

    def __init__(self, model: str, precision: str = "bf16", device: torch.device | str | None = None) -> None:
        from diffusers import DiffusionPipeline

        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        folder, self.device = resolve(model), default_device(device)
        # What every picture is made by.
        self.made_by = {
            "backend": "diffusers",
            "precision": precision,
            "device": str(self.device),
            "parts": [asdict(part(name, folder, model)) for name in get_args(PartName)],
            "versions": {**versions(self.device), "diffusers": version("diffusers")},
        }
        self.pipe = DiffusionPipeline.from_pretrained(folder, dtype=dtype).to(self.device)
        self.pipe.set_progress_bar_config(disable=True)
        self.side = self.pipe.vae.config.sample_size
        guided = self.pipe.transformer.config.guidance_embeds  # all but schnell, which was trained with shorter texts
        self.length = min(512 if guided else 256, self.pipe.tokenizer_2.model_max_length)
        self.steps = 28 if guided else 4

    def __call__(
        self,
        prompt: str,
        *,
        image: Image.Image | None = None,
        width: int | None = None,
        height: int | None = None,
        seed: int = 0,
        dry_run: bool = False,
        progress: bool = False,
        **options: Any,
    ) -> Any:
        """One picture, from the noise that our pipeline draws for this seed, at the size that it makes."""
        call = {"num_inference_steps": self.steps} | {k: value for k, value in options.items() if value is not None}
        usual = (self.side, self.side)
        if image is not None:
            image = images.rgb(image)
            usual = images.kontext_size(*image.size, self.side)
            call |= {"image": images.resize(image, usual), "_auto_resize": False}
        call |= {"width": width or usual[0], "height": height or usual[1], "max_sequence_length": self.length}
        if "Kontext" in type(self.pipe).__name__:  # else it makes about a megapixel, whatever the size asked for
            call["max_area"] = call["width"] * call["height"]
        asked = {name: value for name, value in call.items() if name != "image"} | {"prompt": prompt, "seed": seed}
        record = {
            **self.made_by,
            "request": asked,
            "pictures": [] if image is None else [pixel_digest(image)],
        }
        text = json.dumps(record, sort_keys=True)
        made = []
        if not dry_run:
            made = self.pipe(prompt=prompt, generator=torch.Generator().manual_seed(seed), **call).images
        return SimpleNamespace(
            images=made,
            record=SimpleNamespace(key=hashlib.sha256(text.encode()).hexdigest(), to_json=lambda: text),
        )
