"""The autoencoder: pixels to latents and back, 8x smaller on each side.

    encode   pixels [B, 3, H, W] in -1..1  ->  latents [B, 16, H/8, W/8], shifted and scaled as the transformer wants
    decode   the way back

Tensor names are the original release's (`decoder.up.3.block.0.conv1.weight`); `diffusers_tensors` and
`native_tensors` translate whole state dicts to diffusers' names and back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, scaled_dot_product_attention, silu

NORM_EPS = 1e-6


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of an autoencoder; the defaults are FLUX.1's.

    Attributes:
        block_out_channels: channels of each level, full resolution first; each further level halves the sides.
        layers_per_block: residual blocks per level of the encoder; the decoder has one more.
        scaling_factor, shift_factor: the transformer's latents are `(mean - shift_factor) * scaling_factor`.
    """

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 16
    norm_num_groups: int = 32
    scaling_factor: float = 0.3611
    shift_factor: float = 0.1159

    def __post_init__(self) -> None:
        if not self.block_out_channels or any(c % self.norm_num_groups for c in self.block_out_channels):
            raise ValueError(
                f"block_out_channels {self.block_out_channels} must be multiples of norm_num_groups "
                f"{self.norm_num_groups}"
            )

    @property
    def levels(self) -> int:
        return len(self.block_out_channels)

    @property
    def factor(self) -> int:
        """Pixels per latent pixel, along each side."""
        return 2 ** (self.levels - 1)

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> AutoencoderConfig:
        """Read a `vae/config.json` of diffusers; absent keys have `AutoencoderKL`'s defaults.

        Raises:
            ValueError: it asks for a part that FLUX.1's autoencoder does not have.
        """
        fixed = {
            "in_channels": (3, 3),
            "out_channels": (3, 3),
            "act_fn": ("silu", "silu"),
            "use_quant_conv": (False, True),
            "use_post_quant_conv": (False, True),
            "mid_block_add_attention": (True, True),
        }
        for key, (supported, default) in fixed.items():
            if config.get(key, default) != supported:
                raise ValueError(
                    f"not a FLUX.1 autoencoder: {key} is {config.get(key, default)!r}, expected {supported!r}"
                )
        for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            if other := set(config.get(key, ())) - {kind}:
                raise ValueError(f"not a FLUX.1 autoencoder: {key} has {', '.join(sorted(other))}, expected {kind}")
        return cls(
            block_out_channels=tuple(config.get("block_out_channels", (64,))),
            layers_per_block=config.get("layers_per_block", 1),
            latent_channels=config.get("latent_channels", 4),
            norm_num_groups=config.get("norm_num_groups", 32),
            scaling_factor=config.get("scaling_factor", 0.18215),
            shift_factor=config.get("shift_factor") or 0.0,
        )

    def to_diffusers(self) -> dict[str, Any]:
        """The `vae/config.json` that diffusers needs to build the same network."""
        return {
            "_class_name": "AutoencoderKL",
            "in_channels": 3,
            "out_channels": 3,
            "act_fn": "silu",
            "block_out_channels": list(self.block_out_channels),
            "down_block_types": ["DownEncoderBlock2D"] * self.levels,
            "up_block_types": ["UpDecoderBlock2D"] * self.levels,
            "layers_per_block": self.layers_per_block,
            "latent_channels": self.latent_channels,
            "norm_num_groups": self.norm_num_groups,
            "sample_size": 1024,
            "scaling_factor": self.scaling_factor,
            "shift_factor": self.shift_factor,
            "force_upcast": True,
            "mid_block_add_attention": True,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        }


class ResBlock(nn.Module):
    def __init__(self, inp: int, out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inp, NORM_EPS)
        self.conv1 = nn.Conv2d(inp, out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out, NORM_EPS)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        if inp != out:
            self.nin_shortcut = nn.Conv2d(inp, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(silu(self.norm1(x)))
        h = self.conv2(silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    """One head over all positions, as wide as the channels."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, NORM_EPS)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2)[:, None] for conv in (self.q, self.k, self.v))  # [B, 1, HW, C]
        o = scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])
        return x + self.proj_out(o)


class Middle(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, groups)
        self.attn_1 = Attention(channels, groups)
        self.block_2 = ResBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Resample(nn.Module):
    """The convolution of a change of resolution: stride 2 on the way down, 1 on the way up."""

    def __init__(self, channels: int, down: bool) -> None:
        super().__init__()
        self.down = down
        self.conv = nn.Conv2d(channels, channels, 3, stride=2 if down else 1, padding=0 if down else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(pad(x, (0, 1, 0, 1)) if self.down else interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, then `downsample` or `upsample` where another resolution follows."""

    def __init__(self, inp: int, out: int, blocks: int, groups: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(inp if j == 0 else out, out, groups) for j in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x


class Encoder(nn.Module):
    """Pixels `[B, 3, H, W]` to moments `[B, 2C, H/8, W/8]`: mean, then log-variance."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.down = nn.ModuleList()
        for i, out in enumerate(channels):
            level = Level(channels[max(i - 1, 0)], out, config.layers_per_block, groups)
            if i < config.levels - 1:
                level.downsample = Resample(out, down=True)
            self.down.append(level)
        self.mid = Middle(channels[-1], groups)
        self.norm_out = nn.GroupNorm(groups, channels[-1], NORM_EPS)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)
        return self.conv_out(silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Raw latents `[B, C, h, w]` to pixels `[B, 3, 8h, 8w]`."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, channels[-1], 3, padding=1)
        self.mid = Middle(channels[-1], groups)
        self.up = nn.ModuleList()
        for i, out in enumerate(channels):  # up.0 is full resolution, although it runs last
            level = Level(channels[min(i + 1, config.levels - 1)], out, config.layers_per_block + 1, groups)
            if i > 0:
                level.upsample = Resample(out, down=False)
            self.up.append(level)
        self.norm_out = nn.GroupNorm(groups, channels[0], NORM_EPS)
        self.conv_out = nn.Conv2d(channels[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
            if hasattr(level, "upsample"):
                x = level.upsample(x)
        return self.conv_out(silu(self.norm_out(x)))


class Autoencoder(nn.Module):
    """FLUX.1's autoencoder. A new one has random weights; `load_autoencoder` opens a trained one."""

    def __init__(self, config: AutoencoderConfig | None = None) -> None:
        super().__init__()
        self.config = config or AutoencoderConfig()
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.conv_out.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.decoder.conv_out.weight.device

    def encode_moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance `[B, C, H/8, W/8]` of the raw latents, neither shifted nor scaled."""
        mean, logvar = self.encoder(pixels.to(self.device, self.dtype)).chunk(2, dim=1)
        return mean, logvar

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents `[B, C, H/8, W/8]` of `pixels [B, 3, H, W]` in -1..1: the mean, shifted and scaled."""
        mean, _ = self.encode_moments(pixels)
        return (mean - self.config.shift_factor) * self.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels `[B, 3, 8h, 8w]`, about -1..1 (not clamped), of shifted and scaled `latents [B, C, h, w]`."""
        latents = latents.to(self.device, self.dtype)
        return self.decoder(latents / self.config.scaling_factor + self.config.shift_factor)


_PARTS = (
    ("mid.block_1.", "mid_block.resnets.0."),
    ("mid.block_2.", "mid_block.resnets.1."),
    ("mid.attn_1.norm.", "mid_block.attentions.0.group_norm."),
    ("mid.attn_1.proj_out.", "mid_block.attentions.0.to_out.0."),
    ("mid.attn_1.", "mid_block.attentions.0.to_"),
    ("sample.conv.", "samplers.0.conv."),
    ("nin_shortcut.", "conv_shortcut."),
    ("coder.norm_out.", "coder.conv_norm_out."),
)
_OLD_PARTS = (("query.", "to_q."), ("key.", "to_k."), ("value.", "to_v."), ("proj_attn.", "to_out.0."))


def diffusers_name(native: str, levels: int = 4) -> str:
    """The name that diffusers gives to a native tensor of an autoencoder with so many levels."""
    for ours, theirs in _PARTS:
        native = native.replace(ours, theirs)
    native = re.sub(r"^encoder\.down\.(\d+)\.(block\.)?", _level("encoder.down_blocks", int), native)
    # diffusers counts the decoder's levels in the order they run, the native names by resolution.
    return re.sub(
        r"^decoder\.up\.(\d+)\.(block\.)?", _level("decoder.up_blocks", lambda i: levels - 1 - int(i)), native
    )


def diffusers_tensors(tensors: Mapping[str, Tensor], levels: int = 4) -> dict[str, Tensor]:
    """A native state dict in diffusers' names, with the attention's 1x1 convolutions as linear weights `[C, C]`."""
    return {diffusers_name(name, levels): t[:, :, 0, 0] if _is_projection(name) else t for name, t in tensors.items()}


def native_tensors(tensors: Mapping[str, Tensor], config: AutoencoderConfig) -> dict[str, Tensor]:
    """A state dict of diffusers (old attention names too) or a native one, in native names; unknown names stay."""
    native = {diffusers_name(name, config.levels): name for name in tensor_shapes(config)}
    result = {}
    for name, t in tensors.items():
        if "attentions.0." in name:
            for old, new in _OLD_PARTS:
                name = name.replace(f"attentions.0.{old}", f"attentions.0.{new}")
        name = native.get(name, name)
        result[name] = t[:, :, None, None] if _is_projection(name) and t.ndim == 2 else t
    return result


def tensor_shapes(config: AutoencoderConfig) -> dict[str, tuple[int, ...]]:
    """Native name -> shape of every tensor."""
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in Autoencoder(config).state_dict().items()}


def _level(blocks: str, number: Callable[[str], int]) -> Callable[[re.Match[str]], str]:
    return lambda m: f"{blocks}.{number(m[1])}." + ("resnets." if m[2] else "")


def _is_projection(native: str) -> bool:
    return ".attn_1." in native and native.endswith(".weight") and ".norm." not in native
