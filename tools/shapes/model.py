"""The five trained parts of the "shapes" pipeline, and the diffusers folder that they are kept in."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from fluxkiln.autoencoder import Autoencoder, AutoencoderConfig, load_autoencoder
from fluxkiln.autoencoder import diffusers_tensors as autoencoder_to_diffusers
from fluxkiln.bench.peers import diffusers_state
from fluxkiln.checkpoint import open_checkpoint
from fluxkiln.config import FluxConfig
from fluxkiln.transformer import Transformer

from . import vocabulary

AUTOENCODER = AutoencoderConfig(block_out_channels=(16, 32, 48, 64), layers_per_block=1, norm_num_groups=8)
TRANSFORMER = FluxConfig(
    hidden_size=192,
    num_heads=3,
    depth=2,
    depth_single_blocks=6,
    context_in_dim=128,
    vec_in_dim=128,
    axes_dim=(8, 28, 28),
)
PICTURE = 64  # default side in pixels
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}


class Denoiser(nn.Module):
    """Prompt to velocity: the transformer's tensors and both text encoders as one trainable module.

    Args:
        tokenizers: folder with `tokenizer` (CLIP) and `tokenizer_2` (T5).
    """

    def __init__(self, tokenizers: Path) -> None:
        super().__init__()
        self.clip_tokenizer = CLIPTokenizer.from_pretrained(tokenizers / "tokenizer")
        self.t5_tokenizer = T5Tokenizer.from_pretrained(tokenizers / "tokenizer_2")
        self.clip = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(self.clip_tokenizer),
                hidden_size=TRANSFORMER.vec_in_dim,
                intermediate_size=2 * TRANSFORMER.vec_in_dim,
                projection_dim=TRANSFORMER.vec_in_dim,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=vocabulary.MAX_LENGTH,
                bos_token_id=self.clip_tokenizer.bos_token_id,
                eos_token_id=self.clip_tokenizer.eos_token_id,
                pad_token_id=self.clip_tokenizer.pad_token_id,
                tokenizer_sha256=_digest(tokenizers / "tokenizer"),
            )
        )
        self.t5 = T5EncoderModel(
            T5Config(
                vocab_size=len(self.t5_tokenizer),
                d_model=TRANSFORMER.context_in_dim,
                d_kv=32,
                d_ff=2 * TRANSFORMER.context_in_dim,
                num_layers=3,
                num_heads=4,
                dropout_rate=0.0,
                feed_forward_proj="gated-gelu",
                is_encoder_decoder=False,
                use_cache=False,
                tokenizer_sha256=_digest(tokenizers / "tokenizer_2"),
            )
        )
        _order(self.t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight)
        self.tensors = nn.ParameterDict(
            {_flat(name): _initial(name, shape) for name, shape in TRANSFORMER.tensor_shapes().items()}
        )

    def tokenize(self, captions: Sequence[str], length: int = vocabulary.MAX_LENGTH) -> tuple[Tensor, Tensor]:
        """CLIP's and T5's ids, each `[B, 32]`, or `[B, length]` where nothing but padding is cut off."""
        kwargs = {
            "padding": "max_length",
            "truncation": True,
            "max_length": vocabulary.MAX_LENGTH,
            "return_tensors": "pt",
        }
        tokenizers = self.clip_tokenizer, self.t5_tokenizer
        found = [(tokenizer(list(captions), **kwargs).input_ids, tokenizer.pad_token_id) for tokenizer in tokenizers]
        clip, t5 = (ids[:, :length] if (ids[:, length:] == padding).all() else ids for ids, padding in found)
        return clip, t5

    def length(self, caption: str) -> int:
        """Tokens of a caption, by whichever tokenizer makes more of it; both count how it begins or ends."""
        return max(len(tokenizer(caption).input_ids) for tokenizer in (self.clip_tokenizer, self.t5_tokenizer))

    def encode(self, captions: Sequence[str], length: int = vocabulary.MAX_LENGTH) -> tuple[Tensor, Tensor]:
        """Text sequence `[B, L, 128]` and pooled text `[B, 128]`; as in FLUX.1, padding is not masked."""
        clip_ids, t5_ids = (ids.to(self.t5.device) for ids in self.tokenize(captions, length))
        return self.t5(t5_ids).last_hidden_state, self.clip(clip_ids).pooler_output

    def native(self) -> dict[str, Tensor]:
        return {name: self.tensors[_flat(name)] for name in TRANSFORMER.tensor_shapes()}

    def forward(
        self, img: Tensor, txt: Tensor, pooled: Tensor, timestep: Tensor, guidance: Tensor, img_ids: Tensor
    ) -> Tensor:
        """Velocity `[B, L_img, 64]`; reference tokens are part of `img`."""
        model = Transformer(TRANSFORMER, self.native())
        return model(img, txt, pooled, timestep, guidance, img_ids, img_ids.new_zeros(txt.shape[1], 3))


def _digest(tokenizer: Path) -> str:
    """What ties an encoder to the vocabulary that it was trained with: another one garbles every prompt, silently."""
    return hashlib.sha256((tokenizer / "tokenizer.json").read_bytes()).hexdigest()


@torch.no_grad()
def _order(bias: Tensor) -> None:
    """Give T5's heads a sense of order: one looks back, one ahead, one around, one anywhere.

    Args:
        bias: `[32, 4]` by bucket and head: 16 buckets of distance to earlier tokens, then 16 to later ones.

    Only these biases tell "a red star on a blue ..." from "a blue star on a red ...": FLUX.1 gives text no positions.
    As T5 draws them they stayed below 1 for thousands of steps, and colours and shapes were mixed up for as long.
    """
    distance = torch.arange(16.0)
    near, far = -(distance - 1).abs(), torch.full((16,), -4.0)
    earlier = torch.stack((near, far, -distance / 2, 0 * distance), 1)
    later = torch.stack((far, near, -distance / 2, 0 * distance), 1)
    bias.copy_(torch.cat((earlier, later)))


def _flat(name: str) -> str:
    return name.replace(".", "/")


def _initial(name: str, shape: tuple[int, ...]) -> nn.Parameter:
    """Xavier weights, ones for norms, zeros for biases and whatever makes a fresh block the identity (adaLN-zero)."""
    if name.endswith(".scale"):
        return nn.Parameter(torch.ones(shape))
    weight = torch.zeros(shape)
    zero = (".lin.", "_mod.", "final_layer.")
    if name.endswith(".weight") and not any(part in name for part in zero):
        if name.startswith(("time_in", "vector_in", "guidance_in")):
            nn.init.normal_(weight, std=0.02 if not name.startswith("vector_in.in") else shape[1] ** -0.5)
        else:
            nn.init.xavier_uniform_(weight)
    return nn.Parameter(weight)


def position_ids(height: int, width: int, index: int = 0) -> Tensor:
    """`[height * width, 3]`: index (0 noise, 1 reference), row, column of each token."""
    ids = torch.zeros(height, width, 3)
    ids[..., 0] = index
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)
    return ids.reshape(-1, 3)


def pack(latents: Tensor) -> Tensor:
    """`[B, 16, 2h, 2w]` to tokens `[B, h * w, 64]`."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens `[B, height * width, 64]` to latents `[B, 16, 2 height, 2 width]`."""
    b, _, c = tokens.shape
    return (
        tokens.view(b, height, width, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, 2 * height, 2 * width)
    )


def velocity(
    predict: Callable[..., Tensor],
    img: Tensor,
    reference: Tensor | None,
    size: tuple[int, int],
    txt: Tensor,
    pooled: Tensor,
    t: Tensor,
    guidance: Tensor,
) -> Tensor:
    """What `predict`, a `Denoiser` or a compiled one, says of the tokens `img` alone.

    Args:
        reference: tokens of the pictures to edit.
        size: (width, height) of both in pixels.
    """
    width, height = (side // 16 for side in size)
    tokens, ids = img, position_ids(height, width)
    if reference is not None:
        tokens = torch.cat((img, reference), 1)
        ids = torch.cat((ids, position_ids(height, width, 1)))
    return predict(tokens, txt, pooled, t, guidance, ids.to(img.device))[:, : img.shape[1]]


def path(of: Callable[[Tensor, Tensor], Tensor], x: Tensor, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Plain Euler steps from noise `x` by the velocity `of(x, t [B])`: the time and x before each step, and at the end
    0 and what was made."""
    times = torch.linspace(1, 0, steps + 1)
    times = 1.58 * times / (1 + 0.58 * times)  # FLUX.1's shift for 16 tokens
    for now, after in itertools.pairwise(times):
        yield now, x
        x = x + (after - now) * of(x, now.expand(len(x)).to(x.device)).float()
    yield times[-1], x


@torch.no_grad()
def sample(
    model: Denoiser,
    autoencoder: Autoencoder,
    captions: Sequence[str],
    references: Tensor | None = None,
    *,
    height: int = PICTURE,
    width: int = PICTURE,
    steps: int = 12,
    guidance: float = 3.5,
    seed: int = 0,
) -> Tensor:
    """Pictures `[B, 3, H, W]` in -1..1; `references` are pictures to edit."""
    h, w = height // 16, width // 16
    text = model.encode(captions)
    x = torch.randn(len(captions), h * w, 64, generator=torch.Generator().manual_seed(seed))
    extra = None if references is None else pack(autoencoder.encode(references))
    strength = torch.full((len(captions),), guidance)
    of = lambda x, t: velocity(model, x, extra, (width, height), *text, t, strength)  # noqa: E731
    *_, (_, made) = path(of, x, steps)
    return autoencoder.decode(unpack(made, h, w)).clamp(-1, 1)


def _save(tensors: dict[str, Tensor], folder: Path, name: str, config: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    data = {key: value.detach().to(torch.bfloat16).contiguous() for key, value in tensors.items()}
    save_file(data, folder / f"{name}.tmp", metadata={"format": "pt"})
    os.replace(folder / f"{name}.tmp", folder / name)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def load_pipeline(folder: Path) -> tuple[Denoiser, Autoencoder]:
    """What `save_pipeline` wrote, in fp32."""
    model, stored = Denoiser(folder), open_checkpoint(folder)
    for name, tensor in model.native().items():
        tensor.copy_(stored.dense(name, torch.float32))
    for part, module in (("text_encoder", model.clip), ("text_encoder_2", model.t5)):
        module.load_state_dict(type(module).from_pretrained(folder / part).state_dict())
    return model, load_autoencoder(folder)


def save_tokenizers(folder: Path) -> None:
    texts = vocabulary.corpus()
    vocabulary.save_clip(folder / "tokenizer", texts)
    vocabulary.save_t5(folder / "tokenizer_2", texts)


def save_pipeline(folder: Path, model: Denoiser, autoencoder: Autoencoder) -> None:
    """Write everything but the tokenizers and the card: bf16 safetensors in diffusers' names."""
    weights = "diffusion_pytorch_model.safetensors"
    _save(diffusers_state(model.native()), folder / "transformer", weights, TRANSFORMER.to_diffusers())
    _save(
        autoencoder_to_diffusers(autoencoder.state_dict()),
        folder / "vae",
        weights,
        AUTOENCODER.to_diffusers() | {"sample_size": PICTURE},
    )
    for part, module in (("text_encoder", model.clip), ("text_encoder_2", model.t5)):
        copy.deepcopy(module).to(torch.bfloat16).save_pretrained(folder / part)
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER, indent=2) + "\n")
    parts = {
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "T5EncoderModel",
        "tokenizer": "CLIPTokenizer",
        "tokenizer_2": "T5TokenizerFast",
        "transformer": "FluxTransformer2DModel",
        "vae": "AutoencoderKL",
    }
    ours = ("scheduler", "transformer", "vae")
    index = {"_class_name": "FluxKontextPipeline"} | {
        k: ["diffusers" if k in ours else "transformers", v] for k, v in parts.items()
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
