"""What a FLUX.1 transformer is made of: its sizes, the variants that share them, and the shape of every tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TIME_EMBED_DIM = 256  # width of the sinusoidal embedding of timestep and guidance
PATCH = 2  # the sampler packs 2x2 latent pixels into one token
LATENT_SCALE = 8  # pixels per latent pixel
TOKEN_PIXELS = PATCH * LATENT_SCALE  # pixels per token, along each side
_COUNTS = (
    *("in_channels", "out_channels", "hidden_size", "num_heads", "depth", "depth_single_blocks"),
    *("context_in_dim", "vec_in_dim"),
)


@dataclass(frozen=True)
class FluxConfig:
    """Sizes of a FLUX.1 transformer; the defaults are FLUX.1 [dev].

    Attributes use the names of the original release; `from_diffusers` reads the other spelling.
    """

    in_channels: int = 64
    out_channels: int = 64
    hidden_size: int = 3072
    num_heads: int = 24
    depth: int = 19
    depth_single_blocks: int = 38
    mlp_ratio: float = 4.0
    context_in_dim: int = 4096
    vec_in_dim: int = 768
    guidance_embed: bool = True
    axes_dim: tuple[int, int, int] = (16, 56, 56)
    theta: int = 10_000

    def __post_init__(self) -> None:
        for name in _COUNTS:
            if type(value := getattr(self, name)) is not int or value < (0 if name.startswith("depth") else 1):
                raise ValueError(f"{name} must be a whole number, got {value!r}")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if len(self.axes_dim) != 3 or sum(self.axes_dim) != self.head_dim or any(a % 2 for a in self.axes_dim):
            raise ValueError(f"axes_dim {self.axes_dim} must be three, even, and sum to the head dim {self.head_dim}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def mlp_hidden(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def variant(self) -> str:
        """`schnell`, `fill`, `control` or `dev`, as far as the sizes tell (Kontext and Krea have dev's sizes)."""
        if not self.guidance_embed:
            return "schnell"
        extra = self.in_channels // self.out_channels
        return {1: "dev", 2: "control", 6: "fill"}.get(extra, "custom")

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> FluxConfig:
        """Read a `transformer/config.json` of diffusers; absent keys have diffusers' defaults."""
        heads, head_dim = config.get("num_attention_heads", 24), config.get("attention_head_dim", 128)
        in_channels = config.get("in_channels", 64)
        return cls(
            in_channels=in_channels,
            out_channels=config.get("out_channels") or in_channels,
            hidden_size=heads * head_dim,
            num_heads=heads,
            depth=config.get("num_layers", 19),
            depth_single_blocks=config.get("num_single_layers", 38),
            context_in_dim=config.get("joint_attention_dim", 4096),
            vec_in_dim=config.get("pooled_projection_dim", 768),
            guidance_embed=bool(config.get("guidance_embeds", False)),
            axes_dim=tuple(config.get("axes_dims_rope") or scaled_axes(head_dim)),
        )

    def to_diffusers(self) -> dict[str, Any]:
        """The `transformer/config.json` that diffusers needs to build the same network."""
        return {
            "_class_name": "FluxTransformer2DModel",
            "patch_size": 1,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "num_layers": self.depth,
            "num_single_layers": self.depth_single_blocks,
            "attention_head_dim": self.head_dim,
            "num_attention_heads": self.num_heads,
            "joint_attention_dim": self.context_in_dim,
            "pooled_projection_dim": self.vec_in_dim,
            "guidance_embeds": self.guidance_embed,
            "axes_dims_rope": list(self.axes_dim),
        }

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> FluxConfig:
        """Read the sizes off the tensor shapes of a file in native names.

        Raises:
            ValueError: a tensor that every FLUX.1 transformer has is missing.
        """
        try:
            hidden, in_channels = shapes["img_in.weight"]
            (head_dim,) = shapes["double_blocks.0.img_attn.norm.key_norm.scale"]
            return cls(
                in_channels=in_channels,
                out_channels=shapes["final_layer.linear.weight"][0],
                hidden_size=hidden,
                num_heads=hidden // head_dim,
                depth=_count(shapes, "double_blocks"),
                depth_single_blocks=_count(shapes, "single_blocks"),
                mlp_ratio=shapes["double_blocks.0.img_mlp.0.bias"][0] / hidden,
                context_in_dim=shapes["txt_in.weight"][1],
                vec_in_dim=shapes["vector_in.in_layer.weight"][1],
                guidance_embed="guidance_in.in_layer.weight" in shapes,
                axes_dim=scaled_axes(head_dim),
            )
        except KeyError as missing:
            raise ValueError(f"not a FLUX.1 transformer: no tensor named {missing}") from None

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Native name -> shape of every tensor, in the order of the forward pass."""
        d, m, h = self.hidden_size, self.mlp_hidden, self.head_dim
        shapes: dict[str, tuple[int, ...]] = {}

        def linear(name: str, out: int, inp: int) -> None:
            shapes[f"{name}.weight"] = (out, inp)
            shapes[f"{name}.bias"] = (out,)

        def mlp_embedder(name: str, inp: int) -> None:
            linear(f"{name}.in_layer", d, inp)
            linear(f"{name}.out_layer", d, d)

        def qk_norm(name: str) -> None:
            shapes[f"{name}.query_norm.scale"] = (h,)
            shapes[f"{name}.key_norm.scale"] = (h,)

        linear("img_in", d, self.in_channels)
        linear("txt_in", d, self.context_in_dim)
        mlp_embedder("time_in", TIME_EMBED_DIM)
        if self.guidance_embed:
            mlp_embedder("guidance_in", TIME_EMBED_DIM)
        mlp_embedder("vector_in", self.vec_in_dim)
        for i in range(self.depth):
            for stream in ("img", "txt"):
                block = f"double_blocks.{i}.{stream}"
                linear(f"{block}_mod.lin", 6 * d, d)
                linear(f"{block}_attn.qkv", 3 * d, d)
                qk_norm(f"{block}_attn.norm")
                linear(f"{block}_attn.proj", d, d)
                linear(f"{block}_mlp.0", m, d)
                linear(f"{block}_mlp.2", d, m)
        for i in range(self.depth_single_blocks):
            block = f"single_blocks.{i}"
            linear(f"{block}.modulation.lin", 3 * d, d)
            linear(f"{block}.linear1", 3 * d + m, d)
            qk_norm(f"{block}.norm")
            linear(f"{block}.linear2", d, d + m)
        linear("final_layer.adaLN_modulation.1", 2 * d, d)
        linear("final_layer.linear", self.out_channels, d)
        return shapes


DEV = FluxConfig()
SCHNELL = dataclasses.replace(DEV, guidance_embed=False)
FILL = dataclasses.replace(DEV, in_channels=384)
CONTROL = dataclasses.replace(DEV, in_channels=128)


def scaled_axes(head_dim: int) -> tuple[int, int, int]:
    """RoPE axes for a head dim: FLUX.1's 16/56/56 of 128, scaled, each kept even."""
    index = max(2, 2 * round(head_dim / 16))
    rows = 2 * ((head_dim - index) // 4)
    return (head_dim - 2 * rows, rows, rows)


def _count(shapes: Mapping[str, Sequence[int]], blocks: str) -> int:
    return len({name.split(".")[1] for name in shapes if name.startswith(f"{blocks}.")})
