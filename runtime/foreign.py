"""What a file is, told from its first bytes or its tensor names: a part that is read, or what else, by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fluxkiln.safetensors_file import CheckpointError

Part = Literal["transformer", "vae", "clip", "t5"]

PARTS: dict[Part, str] = {
    "transformer": "a FLUX.1 transformer",
    "vae": "an autoencoder (VAE)",
    "clip": "a CLIP text encoder",
    "t5": "a T5 text encoder",
}
FOLDERS: dict[Part, str] = {"transformer": "transformer", "vae": "vae", "clip": "text_encoder", "t5": "text_encoder_2"}

_PREFIXES: dict[Part, tuple[str, ...]] = {
    "transformer": ("model.diffusion_model.", "diffusion_model.", "transformer.", ""),
    "vae": ("vae.", "first_stage_model.", ""),
    "clip": ("text_encoders.clip_l.transformer.text_model.", "text_encoders.clip_l.transformer.", "text_model.", ""),
    "t5": ("text_encoders.t5xxl.transformer.", ""),
}
_MARKERS: dict[Part, str] = {
    "transformer": r"double_blocks\.\d+\.img_mod\.lin\.weight|transformer_blocks\.\d+\.norm1_context\.linear\.weight",
    "vae": r"decoder\.conv_in\.weight",
    "clip": r"encoder\.layers\.0\.self_attn\.q_proj\.weight",
    "t5": r"encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight",
}

_FULL = "use a bf16, fp8 or nvfp4 safetensors file of the same model"
_FLUX1 = "use a FLUX.1 [dev], [schnell] or [Kontext] model"
_BASE = "it changes a transformer but is not one: use the model it was made for"
_QUANTISED = (
    (r"\.quant_state\.bitsandbytes__nf4$", "bnb-nf4", "a bitsandbytes NF4 model"),
    (r"\.quant_state\.bitsandbytes__fp4$", "bnb-fp4", "a bitsandbytes FP4 model"),
    (r"\.SCB$", "bnb-int8", "a bitsandbytes LLM.int8 model"),
    (r"\.(wscales|smooth_factor|smooth_orig)$", "svdquant", "a nunchaku SVDQuant model"),
    (r"\.qzeros$", "gptq-awq", "a GPTQ or AWQ model"),
    (r"_quantizer\._amax$", "modelopt-state", "a ModelOpt model with its quantisers' state, not yet exported"),
)
_ADAPTERS = (
    (r"\.(hada_w[12]_a|lokr_w[12](_a)?|oft_blocks|oft_diag)$", "lora-lycoris", "a LyCORIS adapter (LoHa, LoKr or OFT)"),
    (r"(^|\.)(ip_adapter|image_proj|ip_adapter_double_stream_\w+|pulid_ca)\.", "ip-adapter", "an IP-Adapter"),
    (r"processor\.\w*lora\w*\.", "lora-xlabs", "a LoRA (XLabs)"),
    (r"^lora_\w+\.(lora_down|lora_up|alpha)", "lora-kohya", "a LoRA (kohya-ss)"),
    (r"^base_model\.model\..*lora_[AB]\.", "lora-peft", "a LoRA (PEFT)"),
    (r"^(diffusion_model|lycoris)\..*lora_(A|B|down|up)\.", "lora-comfyui", "a LoRA (ComfyUI)"),
    (r"lora_B\.bias$", "lora-control", "a control LoRA (FLUX.1 Canny or Depth)"),
    (r"(^|[._])lora_(A|B|down|up)\.", "lora-diffusers", "a LoRA (diffusers)"),
    (r"^(controlnet_\w+|input_hint_block)\.", "controlnet", "a ControlNet"),
    (r"^redux_(up|down)\.", "redux", "the FLUX.1 Redux adapter"),
)
_ARCHITECTURES = (
    (r"double_stream_modulation_(img|txt)\.", "flux.2", "a FLUX.2 transformer"),
    (r"distilled_guidance_layer\.", "chroma", "a Chroma transformer"),
    (r"individual_token_refiner\.|token_refiner\.refiner_blocks", "hunyuan-video", "a HunyuanVideo transformer"),
    (r"(^|\.)joint_blocks\.|^pos_embed\.proj\.weight", "sd3", "a Stable Diffusion 3 transformer"),
    (r"(^|\.)transformer_blocks\.\d+\.img_mod\.", "qwen-image", "a Qwen-Image transformer"),
    (
        r"(^|\.)(input_blocks|down_blocks)\.\d+\..*(attn2|transformer_blocks|emb_layers|time_emb_proj)",
        "unet",
        "a Stable Diffusion UNet",
    ),
)
_VAGUE = (
    (r"^(model\.diffusion_model\.)?(double|single)_blocks\.|transformer_blocks\.", "other", "another transformer"),
    (r"^model\.layers\.\d+\.", "llm", "a language model"),
    (r"vision_model\.encoder\.layers", "vision", "an image encoder"),
)


@dataclass(frozen=True)
class Kind:
    """What a file is.

    Attributes:
        name: short, for machines: `bfl`, `diffusers`, `comfyui`, `all-in-one`, `vae`, `clip`, `t5`, or what else it is.
        what: the same in words.
        parts: the parts that can be read from it, with the prefix of their tensor names.
        advice: for a file that cannot be read, what to use instead.
    """

    name: str
    what: str
    parts: Mapping[Part, str] = field(default_factory=dict)
    advice: str = ""

    def refusal(self, path: Path, part: Part) -> CheckpointError:
        """The sentence for a file that does not hold the part it was given as."""
        own = "one of those" if len(self.parts) > 1 else next(iter(self.parts), "")
        advice = self.advice or f"pass it as {own}, and {PARTS[part]} as {part}"
        return CheckpointError(f"{path} is {self.what}, not {PARTS[part]}; {advice}")


def identify(names: Iterable[str], metadata: Mapping[str, str]) -> Kind:
    """Tell from tensor names and header metadata what a safetensors file (or a set of shards) is."""
    names = list(names)
    if adapter := _first(_ADAPTERS, names):
        return Kind(*adapter, advice=_BASE)
    parts = _parts(names)
    quantised = _first(_QUANTISED, names)
    if not quantised and "svdq" in metadata.get("quantization_config", "").lower():
        quantised = ("svdquant", "a nunchaku SVDQuant model")
    for found, advice in ((quantised, _FULL), (_first(_ARCHITECTURES, names), _FLUX1)):
        if found:
            parts.pop("transformer", None)
            return Kind(*found, parts=parts, advice=advice)
    if not parts:
        return Kind(*(_first(_VAGUE, names) or ("unknown", "no model that is known here")), advice=_FLUX1)
    if len(parts) > 1:
        return Kind("all-in-one", "a checkpoint with " + " and ".join(PARTS[part] for part in parts), parts)
    ((part, prefix),) = parts.items()
    name = str(part)
    if part == "transformer":
        native = any(name.startswith(f"{prefix}double_blocks.") for name in names)
        name = "diffusers" if not native else "comfyui" if prefix else "bfl"
    return Kind(name, PARTS[part], parts)


def refuse_format(path: Path) -> None:
    """Raise for a file whose first bytes or ending say that it is no safetensors file.

    Raises:
        CheckpointError: it is a pickle, GGUF, ONNX or TensorRT file.
    """
    with path.open("rb") as file:
        start = file.read(8)
    ending = path.suffix.lower()
    if start[:4] == b"GGUF" or ending == ".gguf":
        raise CheckpointError(f"{path} is a GGUF file, whose quantisation is not read; {_FULL}")
    # A safetensors file begins with the length of its header, which may have a pickle's first two bytes.
    pickled = start.startswith(b"PK\x03\x04") or (start[:2] == b"\x80\x02" and start[4:] != bytes(4))
    if pickled or ending in (".pt", ".pth", ".bin", ".ckpt", ".pkl"):
        raise CheckpointError(
            f"{path} is a pickle file, which can run any code when it is opened; use the model's safetensors file"
        )
    if ending in (".onnx", ".engine", ".plan"):
        raise CheckpointError(f"{path} is a compiled or exported graph, not weights; {_FULL}")


def _parts(names: list[str]) -> dict[Part, str]:
    parts: dict[Part, str] = {}
    for part, prefixes in _PREFIXES.items():
        for prefix in prefixes:
            marker = re.compile(f"{re.escape(prefix)}(?:{_MARKERS[part]})")
            if part not in parts and any(marker.fullmatch(name) for name in names):
                parts[part] = prefix
    return parts


def _first(table: Iterable[tuple[str, str, str]], names: list[str]) -> tuple[str, str] | None:
    for pattern, name, what in table:
        search = re.compile(pattern).search
        if any(search(each) for each in names):
            return name, what
    return None
