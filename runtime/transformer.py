"""The FLUX.1 transformer, written once over the operations of `fluxkiln.kernels`.

    modulate   everything that depends on timestep, guidance and pooled text: shift, scale and gate of every block.
               27 % of the weights, needed once for a whole schedule, not once a step.
    step       everything else: image and text tokens to velocity, the part that repeats.

The stream is joint, `[B, L_txt + L_img, D]`, text first, in the double blocks too. Tensor names are the original
release's. The graph is given its operations and names no backend; what runs `step` by other means (`fluxkiln.engine`)
shares `Network` with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fluxkiln.config import TIME_EMBED_DIM, FluxConfig
from fluxkiln.kernels import EAGER, Binding, Ops
from fluxkiln.kernels.layers import Linear, QKNorm, Streams, rows
from fluxkiln.kernels.qkv_rope import Projection

if TYPE_CHECKING:
    from fluxkiln.load import Loaded


@dataclass(frozen=True)
class DoubleBlock:
    """A block in which text and image have weights of their own; each field holds (text, image)."""

    qkv: Projection
    proj: Streams
    mlp_in: Streams
    mlp_out: Streams


@dataclass(frozen=True)
class SingleBlock:
    """A block in which text and image share weights, and attention runs beside the MLP."""

    qkv: Projection
    mlp_in: Streams
    out: Streams


class Network:
    """FLUX.1's velocity network but for `step`: the modulation, the rotation, and how they are called.

    Args:
        config: its sizes.
        tensors: as for `Transformer`; only those of the modulation are asked for.
    """

    def __init__(self, config: FluxConfig, tensors: Mapping[str, Any]) -> None:
        self.config = config
        self.loaded: Loaded | None = None  # how it was loaded, by whoever loaded it
        self.embedders = {
            name: (_linear(tensors, f"{name}_in.in_layer"), _linear(tensors, f"{name}_in.out_layer"))
            for name in ("time", "guidance", "vector")
            if name != "guidance" or config.guidance_embed
        }
        names = [f"double_blocks.{i}.{stream}_mod.lin" for i in range(config.depth) for stream in ("txt", "img")]
        names += [f"single_blocks.{i}.modulation.lin" for i in range(config.depth_single_blocks)]
        self.modulations = [_linear(tensors, name) for name in (*names, "final_layer.adaLN_modulation.1")]

    @property
    def dtype(self) -> torch.dtype:
        return self.modulations[0].bias.dtype

    @property
    def device(self) -> torch.device:
        return self.modulations[0].bias.device

    def __call__(
        self,
        img: Tensor,
        txt: Tensor,
        pooled: Tensor,
        timestep: Tensor,
        guidance: Tensor | None,
        img_ids: Tensor,
        txt_ids: Tensor,
    ) -> Tensor:
        """Velocity at one timestep.

        Args:
            img: packed latents `[B, L_img, C_in]`; reference tokens appended by the caller.
            txt: text sequence `[B, L_txt, D_ctx]`.
            pooled: pooled text `[B, D_vec]`.
            timestep: `[B]`, 1 = noise, 0 = image.
            guidance: `[B]`, for example 3.5; None where the model has no guidance embedding.
            img_ids: positions `[L_img, 3]` or `[B, L_img, 3]`: index, row, column.
            txt_ids: positions `[L_txt, 3]` or `[B, L_txt, 3]`.

        Returns:
            velocity `[B, L_img, C_out]`.

        Raises:
            ValueError: a shape that does not fit, or guidance missing where the model needs it.
        """
        self._check(img, txt, pooled, timestep, img_ids, txt_ids)
        mods = self.modulate(pooled, timestep, guidance)
        return self.step(img.to(self.dtype), txt.to(self.dtype), mods, self.rope(txt_ids, img_ids))

    def modulate(self, pooled: Tensor, timestep: Tensor, guidance: Tensor | None) -> Tensor:
        """All modulation vectors `[N, M, D]` for N rows of (pooled, timestep, guidance), in the order of use.

        A double block has 12 (text: shift, scale, gate before attention, then the same before the MLP; then
        image likewise), a single block 3 (shift, scale, gate), the end 2 (shift, scale). The rows may be images,
        steps of a schedule, or both: they do not see each other.
        """
        vec = self._embed("time", sinusoidal(timestep.to(self.dtype) * 1000).to(self.dtype))
        if self.config.guidance_embed:
            if guidance is None:
                raise ValueError(
                    "this model has a guidance embedding: guidance must be [B] (for example 3.5), got None"
                )
            vec = vec + self._embed("guidance", sinusoidal(guidance.to(self.dtype) * 1000).to(self.dtype))
        vec = torch.nn.functional.silu(vec + self._embed("vector", pooled.to(self.dtype)))
        return torch.cat([linear(vec) for linear in self.modulations], dim=-1).unflatten(-1, (-1, vec.shape[-1]))

    def rope(self, txt_ids: Tensor, img_ids: Tensor) -> Tensor:
        """cos and sin of every rotated pair, `[1 or B, L, d/2, 2]`, for text then image positions."""
        txt_ids, img_ids = (ids if ids.ndim == 3 else ids[None] for ids in (txt_ids, img_ids))
        batch = max(len(txt_ids), len(img_ids))
        ids = torch.cat((txt_ids.expand(batch, -1, -1), img_ids.expand(batch, -1, -1)), dim=1).to(self.device)
        # Angles in fp64, whatever the model's dtype: fp32 angles lose a bit per octave of the position.
        angles = [
            ids[..., axis, None].double()
            * self.config.theta ** (-torch.arange(0, dim, 2, device=ids.device).double() / dim)
            for axis, dim in enumerate(self.config.axes_dim)
        ]
        angle = torch.cat(angles, dim=-1)
        return torch.stack((angle.cos(), angle.sin()), dim=-1).to(torch.promote_types(self.dtype, torch.float32))

    def step(self, img: Tensor, txt: Tensor, mods: Tensor, rope: Tensor) -> Tensor:
        """Velocity `[B, L_img, C_out]` from `img [B, L_img, C_in]`, `txt [B, L_txt, D_ctx]`, `mods [B, M, D]` and what
        `rope` made."""
        raise NotImplementedError

    def prepare(self, batch: int, text: int, image: int) -> None:
        """Compile what `step` will need for so many images and tokens, where something has to be."""

    def describe(self, name: str, op: str) -> Binding:
        """What runs a call of `step`, by its name and operation in `fluxkiln.workload`."""
        raise NotImplementedError

    def refuse(self, image: int, text: int) -> str | None:
        """Why `step` cannot take so many image tokens (references included) and text tokens, or None."""
        return None

    def _embed(self, name: str, x: Tensor) -> Tensor:
        inner, outer = self.embedders[name]
        return outer(torch.nn.functional.silu(inner(x)))

    def _check(
        self, img: Tensor, txt: Tensor, pooled: Tensor, timestep: Tensor, img_ids: Tensor, txt_ids: Tensor
    ) -> None:
        c, b = self.config, img.shape[0]
        for name, tensor, shape in (
            ("img", img, (b, "L_img", c.in_channels)),
            ("txt", txt, (b, "L_txt", c.context_in_dim)),
            ("pooled", pooled, (b, c.vec_in_dim)),
            ("timestep", timestep, (b,)),
        ):
            fits = len(shape) == tensor.ndim and all(
                w in (n, "L_img", "L_txt") for w, n in zip(shape, tensor.shape, strict=True)
            )
            if not fits:
                raise ValueError(f"{name} must be [{', '.join(map(str, shape))}], got {list(tensor.shape)}")
        for name, ids, length in (("img_ids", img_ids, img.shape[1]), ("txt_ids", txt_ids, txt.shape[1])):
            if ids.shape not in ((length, 3), (1, length, 3), (b, length, 3)):
                raise ValueError(f"{name} must be [{length}, 3] or [{b}, {length}, 3], got {list(ids.shape)}")


class Transformer(Network):
    """The graph over the operations of `fluxkiln.kernels`.

    Args:
        config: its sizes.
        tensors: native name -> tensor, all of one dtype and device (parameters work: eager is differentiable);
            native name of a layer -> `Linear`, for layers that are more than weight and bias. Each is asked for once.
        ops: who runs the operations.
    """

    def __init__(self, config: FluxConfig, tensors: Mapping[str, Any], ops: Ops = EAGER) -> None:
        def qk_norm(name: str) -> QKNorm:
            return QKNorm(tensors[f"{name}.query_norm.scale"], tensors[f"{name}.key_norm.scale"])

        super().__init__(config, tensors)
        self.ops, linear = ops, partial(_linear, tensors)
        self.embed = ops.pack(Streams((linear("txt_in"), linear("img_in"))))
        self.double_blocks: list[DoubleBlock] = []
        self.single_blocks: list[SingleBlock] = []
        for i in range(config.depth):
            text, image = f"double_blocks.{i}.txt", f"double_blocks.{i}.img"
            self.double_blocks.append(
                DoubleBlock(
                    qkv=ops.pack_qkv(
                        Streams((linear(f"{text}_attn.qkv"), linear(f"{image}_attn.qkv"))),
                        (qk_norm(f"{text}_attn.norm"), qk_norm(f"{image}_attn.norm")),
                    ),
                    proj=ops.pack(Streams((linear(f"{text}_attn.proj"), linear(f"{image}_attn.proj")))),
                    mlp_in=ops.pack(Streams((linear(f"{text}_mlp.0"), linear(f"{image}_mlp.0")))),
                    mlp_out=ops.pack(Streams((linear(f"{text}_mlp.2"), linear(f"{image}_mlp.2")))),
                )
            )
        for i in range(config.depth_single_blocks):
            block = f"single_blocks.{i}"
            both, cut = linear(f"{block}.linear1"), 3 * config.hidden_size
            self.single_blocks.append(
                SingleBlock(
                    qkv=ops.pack_qkv(Streams((rows(both, slice(None, cut)),)), (qk_norm(f"{block}.norm"),)),
                    mlp_in=ops.pack(Streams((rows(both, slice(cut, None)),))),
                    out=ops.pack(Streams((linear(f"{block}.linear2"),))),
                )
            )
        self.final = ops.pack(Streams((linear("final_layer.linear"),)))

    def step(self, img: Tensor, txt: Tensor, mods: Tensor, rope: Tensor) -> Tensor:
        """Velocity `[B, L_img, C_out]` from `img [B, L_img, C_in]`, `txt [B, L_txt, D_ctx]` and `mods [B, M, D]`."""
        ops, split, at = self.ops, txt.shape[1], 0
        x = ops.linear((txt, img), self.embed)
        for double in self.double_blocks:
            x = self.double_block(double, x, mods[:, at : at + 12].unflatten(1, (2, 6)), rope, split)
            at += 12
        for single in self.single_blocks:
            x = self.single_block(single, x, mods[:, at : at + 3, None], rope)
            at += 3
        shift, scale = mods[:, at:, None].unbind(1)
        return ops.linear((ops.norm_modulate(x[:, split:], shift, scale, 0),), self.final)

    def double_block(self, block: DoubleBlock, x: Tensor, mods: Tensor, rope: Tensor, split: int) -> Tensor:
        """The joint stream `[B, L, D]` after a double block; `mods [B, 2, 6, D]`, text first."""
        ops = self.ops
        shift1, scale1, gate1, shift2, scale2, gate2 = mods.unbind(2)
        h = ops.norm_modulate(x, shift1, scale1, split, out=block.qkv.input)
        o = ops.attention(*ops.qkv_rope(h, block.qkv, rope, split), out=block.proj.input)
        x = ops.linear_gate_residual((o,), block.proj, gate1, x, split)
        h = ops.norm_modulate(x, shift2, scale2, split, out=block.mlp_in.input)
        h = ops.linear_gelu(h, block.mlp_in, split, out=block.mlp_out.input)
        return ops.linear_gate_residual((h,), block.mlp_out, gate2, x, split)

    def single_block(self, block: SingleBlock, x: Tensor, mods: Tensor, rope: Tensor) -> Tensor:
        """The joint stream `[B, L, D]` after a single block; `mods [B, 3, 1, D]`."""
        ops = self.ops
        shift, scale, gate = mods.unbind(1)
        h = ops.norm_modulate(x, shift, scale, 0, out=block.qkv.input)
        o = ops.attention(*ops.qkv_rope(h, block.qkv, rope, 0), out=block.out.input)
        h = ops.linear_gelu(h, block.mlp_in, 0, out=block.out.input)
        return ops.linear_gate_residual((o, h), block.out, gate, x, 0)

    def prepare(self, batch: int, text: int, image: int) -> None:
        self.ops.prepare(self, batch, text, image)

    def describe(self, name: str, op: str) -> Binding:
        """What the operations bind a call to."""
        *block, field = name.split(".")
        holder = getattr(self, block[0])[int(block[1])] if block else self
        return self.ops.describe(op, getattr(holder, field, None))


def _linear(tensors: Mapping[str, Any], name: str) -> Linear:
    if name in tensors:
        return tensors[name]
    return Linear(tensors[f"{name}.weight"], tensors[f"{name}.bias"], name=name)


def sinusoidal(t: Tensor) -> Tensor:
    """Embedding `[N, 256]` of `t [N]`: cosines then sines of geometrically spaced frequencies, in at least fp32."""
    half = TIME_EMBED_DIM // 2
    dtype = torch.promote_types(t.dtype, torch.float32)
    frequency = torch.exp(-math.log(10_000) * torch.arange(half, dtype=dtype, device=t.device) / half)
    angle = t[:, None].to(dtype) * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1)
