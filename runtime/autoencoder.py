"""The autoencoder: pixels to latents and back, 8x smaller on each side.

    encode   pixels [B, 3, H, W] in -1..1  ->  latents [B, 16, H/8, W/8], shifted and scaled as the transformer wants
    decode   the way back

Tensor names are the original release's (`decoder.up.3.block.0.conv1.weight`); `diffusers_tensors` and
`native_tensors` translate whole state dicts to diffusers' names and back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn.functional import interpolate, pad, scaled_dot_product_attention, silu

from fluxkiln.checkpoint import open_vae
from fluxkiln.fit import check_fit
from fluxkiln.safetensors_file import CheckpointError
from fluxkiln.tiled import Cut, Norm, affine, run_tiled

NORM_EPS = 1e-6
TILED_ABOVE = 2 << 20  # pixels: larger images go through in tiles of
TILE = 1024  # pixels on each side
SMALLEST_TILE = 128  # pixels; margins are 32 to 56 wide


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

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> AutoencoderConfig:
        """Read the sizes off the tensor shapes of a file, in native names or diffusers'; the rest is FLUX.1's.

        Raises:
            ValueError: a tensor that every FLUX.1 autoencoder has is missing, or FLUX.1's 32 groups do not fit.
        """
        block = re.compile(r"encoder\.(?:down\.(\d+)\.block|down_blocks\.(\d+)\.resnets)\.(\d+)\.conv1\.weight")
        found = {
            (int(m[1] or m[2] or 0), int(m[3])): shape[0] for n, shape in shapes.items() if (m := block.fullmatch(n))
        }
        levels = sorted({level for level, _ in found})
        if (0, 0) not in found or len(shapes.get("decoder.conv_in.weight", ())) != 4:
            raise ValueError("no encoder.down.0.block.0.conv1.weight or no decoder.conv_in.weight [C, c, 3, 3]")
        channels = tuple(found[level, 0] for level in levels if (level, 0) in found)
        if any(c % cls.norm_num_groups for c in channels):
            raise ValueError(f"its channels {channels} are no multiples of 32: put its config.json beside it")
        return cls(
            block_out_channels=channels,
            layers_per_block=1 + max(j for _, j in found),
            latent_channels=shapes["decoder.conv_in.weight"][1],
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


def group_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """GroupNorm of whole images `[B, C, h, w]`."""
    low = x.dtype in (torch.bfloat16, torch.float16)
    if low and not x.requires_grad and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        # On a GPU PyTorch's own returns the contiguous layout, which the next convolution would have to turn back.
        groups = x.unflatten(1, (norm.num_groups, -1))
        mean = groups.mean((2, 3, 4), dtype=torch.float32)
        square = vector_norm(groups, dim=(2, 3, 4), dtype=torch.float32).square() / groups[0, 0].numel()
        return affine(norm, x, mean, (square - mean * mean).clamp_min(0) + norm.eps)
    return norm(x)


def _silu(x: Tensor) -> Tensor:
    """SiLU of a tensor that nobody else holds: in place where no gradient is kept."""
    return silu(x, inplace=not x.requires_grad)


class ResBlock(nn.Module):
    def __init__(self, inp: int, out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inp, NORM_EPS)
        self.conv1 = nn.Conv2d(inp, out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out, NORM_EPS)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inp, out, 1) if inp != out else None

    def forward(self, x: Tensor, norm: Norm) -> Tensor:
        h = self.conv1(_silu(norm(self.norm1, x)))
        h = self.conv2(_silu(norm(self.norm2, h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class Attention(nn.Module):
    """One head over all positions, as wide as the channels."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, NORM_EPS)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, norm: Norm) -> Tensor:
        h = norm(self.norm, x)
        # Only with contiguous channels do PyTorch's fused kernels apply; the other one holds all HW x HW scores.
        q, k, v = (conv(h).flatten(2).mT.contiguous()[:, None] for conv in (self.q, self.k, self.v))  # [B, 1, HW, C]
        o = scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])
        return x + self.proj_out(o)


class Middle(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, groups)
        self.attn_1 = Attention(channels, groups)
        self.block_2 = ResBlock(channels, channels, groups)

    def forward(self, x: Tensor, norm: Norm) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x, norm), norm), norm)


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution, and the step to the next one: `downsample`, `upsample` or neither."""

    def __init__(
        self,
        inp: int,
        out: int,
        blocks: int,
        groups: int,
        downsample: Downsample | None = None,
        upsample: Upsample | None = None,
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(inp if j == 0 else out, out, groups) for j in range(blocks))
        self.downsample, self.upsample = downsample, upsample

    def forward(self, x: Tensor, norm: Norm) -> Tensor:
        return self.resample(self.blocks(x, norm))

    def blocks(self, x: Tensor, norm: Norm) -> Tensor:
        for block in self.block:
            x = block(x, norm)
        return x

    def resample(self, x: Tensor) -> Tensor:
        step = self.downsample or self.upsample
        return x if step is None else step(x)


class Encoder(nn.Module):
    """Pixels `[B, 3, H, W]` to moments `[B, 2C, H/8, W/8]`: mean, then log-variance.

    In two parts, so that the first can run tile by tile: it sees no more than `margin` pixels around a place.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.down = nn.ModuleList()
        for i, out in enumerate(channels):
            step = Downsample(out) if i < config.levels - 1 else None
            inp = channels[max(i - 1, 0)]
            self.down.append(Level(inp, out, config.layers_per_block, groups, downsample=step))
        self.mid = Middle(channels[-1], groups)
        self.norm_out = nn.GroupNorm(groups, channels[-1], NORM_EPS)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)
        reach = 0  # of one point at latent resolution, in pixels of the level; a resolution below it, twice that
        for _ in range(config.levels - 1):
            reach = 2 * reach + 2 + 2 * config.layers_per_block
        self.margin = -(-(reach + 1) // config.factor) * config.factor

    def forward(self, pixels: Tensor) -> Tensor:
        return self.moments(self.features(pixels))

    def features(self, pixels: Tensor, norm: Norm = group_norm) -> Tensor:
        """Everything above latent resolution: `[B, C_deep, H/8, W/8]`."""
        x = self.conv_in(pixels)
        for level in self.down[:-1]:
            x = level(x, norm)
        return x

    def moments(self, features: Tensor) -> Tensor:
        """Everything at latent resolution, attention included."""
        x = self.mid(self.down[-1](features, group_norm), group_norm)
        return self.conv_out(_silu(group_norm(self.norm_out, x)))


class Decoder(nn.Module):
    """Raw latents `[B, C, h, w]` to pixels `[B, 3, 8h, 8w]`, in two parts as the encoder."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, channels[-1], 3, padding=1)
        self.mid = Middle(channels[-1], groups)
        self.up = nn.ModuleList()
        for i, out in enumerate(channels):  # up.0 is full resolution, although it runs last
            step = Upsample(out) if i > 0 else None
            inp = channels[min(i + 1, config.levels - 1)]
            self.up.append(Level(inp, out, config.layers_per_block + 1, groups, upsample=step))
        self.norm_out = nn.GroupNorm(groups, channels[0], NORM_EPS)
        self.conv_out = nn.Conv2d(channels[0], 3, 3, padding=1)
        reach = 1
        for _ in range(config.levels - 1):  # blocks, then the convolution after upsampling, then half as many points
            reach = -(-(reach + 2 * (config.layers_per_block + 1) + 1) // 2)
        self.margin = reach * config.factor

    def forward(self, latents: Tensor) -> Tensor:
        return self.pixels(self.features(latents))

    def features(self, latents: Tensor) -> Tensor:
        """Everything at latent resolution, attention included: `[B, C_deep, h, w]`."""
        return cast(Level, self.up[-1]).blocks(self.mid(self.conv_in(latents), group_norm), group_norm)

    def pixels(self, features: Tensor, norm: Norm = group_norm) -> Tensor:
        """Everything above latent resolution."""
        x = cast(Level, self.up[-1]).resample(features)
        for level in reversed(self.up[:-1]):
            x = level(x, norm)
        return self.conv_out(_silu(norm(self.norm_out, x)))


class Autoencoder(nn.Module):
    """FLUX.1's autoencoder. A new one has random weights; `load_autoencoder` opens a trained one.

    Without a gradient to keep, images go through one at a time, so that a batch cannot change a row, and images above
    `TILED_ABOVE` pixels go through in tiles.

    `tile` in the methods below is the side of a tile in pixels; None lets the size of the image decide, 0 never tiles.
    Tiling bounds memory: beside one tile with its margin, only the features at latent resolution are whole
    (`[C_deep, H/8, W/8]`, a few copies of them). It shows no seam: tiles are cut where no convolution sees the cut, and
    all of them share the statistics of every GroupNorm (see `fluxkiln.tiled`). Largest difference from the untiled
    image, in tiles of 256 pixels: 0.1/255 with the bundled model, below 1/255 with random weights. It costs 2 to 6
    times the arithmetic.
    """

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

    def encode_moments(self, pixels: Tensor, tile: int | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log-variance `[B, C, H/8, W/8]` of the raw latents, neither shifted nor scaled.

        Raises:
            ValueError: `pixels` is not `[B, 3, H, W]` with H, W >= 8.
        """
        side = self.config.factor
        if pixels.ndim != 4 or pixels.shape[1] != 3 or min(pixels.shape) < 1 or min(pixels.shape[2:]) < side:
            raise ValueError(f"pixels must be [B, 3, H, W] with H, W >= {side}, got {list(pixels.shape)}")
        mean, logvar = self._run(self.encoder, self._encode_tiled, pixels.to(self.device, self.dtype), tile, 1).chunk(
            2, dim=1
        )
        return mean, logvar

    def encode(self, pixels: Tensor, tile: int | None = None) -> Tensor:
        """Latents `[B, C, H/8, W/8]` of `pixels [B, 3, H, W]` in -1..1: the mean, shifted and scaled.

        Sides that are no multiple of 8 are rounded down.

        Raises:
            ValueError: `pixels` is not `[B, 3, H, W]` with H, W >= 8.
        """
        mean, _ = self.encode_moments(pixels, tile)
        return (mean - self.config.shift_factor) * self.config.scaling_factor

    def decode(self, latents: Tensor, tile: int | None = None) -> Tensor:
        """Pixels `[B, 3, 8h, 8w]`, about -1..1 (not clamped), of shifted and scaled `latents [B, C, h, w]`.

        Raises:
            ValueError: `latents` has another shape.
        """
        channels = self.config.latent_channels
        if latents.ndim != 4 or latents.shape[1] != channels or min(latents.shape) < 1:
            raise ValueError(f"latents must be [B, {channels}, h, w], got {list(latents.shape)}")
        raw = latents.to(self.device, self.dtype) / self.config.scaling_factor + self.config.shift_factor
        return self._run(self.decoder, self._decode_tiled, raw, tile, self.config.factor)

    def _run(
        self, whole: nn.Module, tiled: Callable[[Tensor, int], Tensor], x: Tensor, tile: int | None, pixels: int
    ) -> Tensor:
        """Send `x`, with so many `pixels` per point and side, through the network `whole`, or through it in tiles."""
        if tile is not None and tile != 0 and tile < SMALLEST_TILE:
            raise ValueError(f"tile must be 0 (never tile) or at least {SMALLEST_TILE} pixels, got {tile}")
        if self.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last):
            x = x.contiguous(memory_format=torch.channels_last)
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in whole.parameters())):
            return whole(x)
        height, width = x.shape[2] * pixels, x.shape[3] * pixels
        if tile is None:
            tile = TILE if height * width > TILED_ABOVE else 0
        with torch.no_grad():
            rows = [tiled(row, tile) if 0 < tile < max(height, width) else whole(row) for row in x.split(1)]
        return torch.cat(rows) if len(rows) > 1 else rows[0]

    def _encode_tiled(self, pixels: Tensor, tile: int) -> Tensor:
        factor = self.config.factor
        cut = Cut((pixels.shape[2], pixels.shape[3]), tile, self.encoder.margin, factor)
        return self.encoder.moments(run_tiled(self.encoder.features, pixels, cut, 1, factor))

    def _decode_tiled(self, raw: Tensor, tile: int) -> Tensor:
        factor = self.config.factor
        cut = Cut((raw.shape[2] * factor, raw.shape[3] * factor), tile, self.decoder.margin, factor)
        return run_tiled(self.decoder.pixels, self.decoder.features(raw), cut, factor, 1)


def load_autoencoder(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Autoencoder:
    """Open a trained autoencoder.

    Args:
        path: the folder of a diffusers pipeline or its `vae/`, the original `ae.safetensors`, a file in diffusers'
            names, or an all-in-one file of ComfyUI.
        device: where it runs; on a GPU its weights lie channels-last, as tensor cores want them.
        dtype: fp32, or bf16 or fp16 for a GPU.

    Raises:
        CheckpointError: it is something else, damaged, or of another model; the message says what is wrong.
        FileNotFoundError: nothing is there.
    """
    tensors = open_vae(path)
    try:
        known = "block_out_channels" in tensors.config
        shapes = {name: tensors.shape(name) for name in tensors}
        config = AutoencoderConfig.from_diffusers(tensors.config) if known else AutoencoderConfig.from_shapes(shapes)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} does not fit FLUX.1's autoencoder: {error}") from None
    names = native_names(shapes, config)
    expected = tensor_shapes(config)
    found = {names[name]: _native_shape(names[name], shape) for name, shape in shapes.items()}
    check_fit(f"{path} does not fit FLUX.1's autoencoder", expected, found)
    state = {}
    for name in shapes:
        state[names[name]] = torch.empty(expected[names[name]], dtype=dtype, device=device)
        tensors.read_into(state[names[name]].view(shapes[name]), name)
    with torch.device("meta"):
        model = Autoencoder(config)
    model.load_state_dict(state, assign=True)
    if torch.device(device).type == "cuda":
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
    return model.requires_grad_(False).eval()


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
    names = native_names(tensors, config)
    return {names[name]: t.view(_native_shape(names[name], t.shape)) for name, t in tensors.items()}


def native_names(names: Iterable[str], config: AutoencoderConfig) -> dict[str, str]:
    """Name in a file (native, diffusers' or diffusers' old one) -> native name; unknown names map to themselves."""
    native = {diffusers_name(name, config.levels): name for name in tensor_shapes(config)}
    result = {}
    for name in names:
        new = name
        for old, part in _OLD_PARTS:
            new = new.replace(f"attentions.0.{old}", f"attentions.0.{part}")
        result[name] = native.get(new, name)
    return result


def tensor_shapes(config: AutoencoderConfig) -> dict[str, tuple[int, ...]]:
    """Native name -> shape of every tensor."""
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in Autoencoder(config).state_dict().items()}


def _level(blocks: str, number: Callable[[str], int]) -> Callable[[re.Match[str]], str]:
    return lambda m: f"{blocks}.{number(m[1])}." + ("resnets." if m[2] else "")


def _is_projection(native: str) -> bool:
    return ".attn_1." in native and native.endswith(".weight") and ".norm." not in native


def _native_shape(native: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape, 1, 1) if _is_projection(native) and len(shape) == 2 else tuple(shape)
