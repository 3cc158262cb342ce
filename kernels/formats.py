"""Number formats that are more than a dtype: FP8 with a scale per row, NVFP4 with two levels of scale.

    Fp8     value = data * row_scale                                   e4m3, largest magnitude 448
    Nvfp4   value = e2m1(data) * block_scale * global_scale            e2m1 in blocks of 16, largest magnitude 6

The last axis is K, the axis a matrix product contracts. Canonical layout is ONNX's: the even column of an
NVFP4 pair is the low nibble, block scales are linear, not tiled. Foreign dialects are converted at the door.

The functions here are the definition of quantised numerics, in plain PyTorch, generic in the dtype they compute in:
fp32, or fp64 for the truth. Rounding is to nearest, ties to even; magnitudes beyond the largest saturate; a NaN, or an
infinity under a scale taken from the row itself, comes out as NaN, never as a plausible number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

FP8_MAX = 448.0
E2M1_MAX = 6.0
NVFP4_MAX = FP8_MAX * E2M1_MAX  # of a block's values, in units of the global scale
BLOCK = 16  # columns that share an NVFP4 block scale
F16_PEAK = 22.0  # largest code of both sides of a product summed in fp16: 22 * 22 * 128 stays below 65504
TINY = 2.0**-64  # least scale: rows of zeros divide by it and stay zeros

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])  # code -> value


@dataclass(frozen=True)
class Fp8:
    """`data [..., K]` float8_e4m3fn and `row_scale [...]` fp32, one scale for each row.

    An activation may carry `row_norm [...]` fp32, the L2 norm of each row before quantisation (the next layer's
    output bound needs it), and `dense [..., K]`, the unquantised activation (a low-rank branch reads it).
    """

    data: Tensor
    row_scale: Tensor
    row_norm: Tensor | None = None
    dense: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    def __getitem__(self, rows: Any) -> Fp8:
        """Some of the rows: indexes all axes but the last."""
        return _index(self, rows)


@dataclass(frozen=True)
class Nvfp4:
    """`data [..., K/2]` uint8, `block_scale [..., K/16]` float8_e4m3fn, `global_scale` fp32, scalar or `[...]`.

    `row_norm` and `dense` as in `Fp8`.
    """

    data: Tensor
    block_scale: Tensor
    global_scale: Tensor
    row_norm: Tensor | None = None
    dense: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.data.shape[:-1], 2 * self.data.shape[-1]))

    def __getitem__(self, rows: Any) -> Nvfp4:
        """Some of the rows: indexes all axes but the last."""
        return _index(self, rows)


Activation = Tensor | Fp8 | Nvfp4
Weight = Tensor | Fp8 | Nvfp4


@dataclass(frozen=True)
class Quant:
    """How a producer writes its output for the layer that reads it.

    Attributes:
        format: number format of the activation.
        rule: where its scale comes from: `row`, the row's own largest magnitude (the producer holds the whole row);
            `bound`, an upper bound known before the row is (a fused matrix product sees only its tile);
            `static`, the calibrated scalar `scale`.
        scale: fp32 scalar, for `static` only: the FP8 row scale or the NVFP4 global scale.
        keep: hand the unquantised activation on as well.
        peak: the FP8 code that the largest magnitude (or the bound) becomes: 448, or `F16_PEAK` for a layer that
            accumulates in fp16. e4m3 keeps its precision, 2**-4, down to 2**-6, so a lower peak costs little.
    """

    format: Literal["fp8", "nvfp4"]
    rule: Literal["row", "bound", "static"]
    scale: Tensor | None = None
    keep: bool = False
    peak: float = FP8_MAX


# --- quantise ---------------------------------------------------------------------------------


def quantize_fp8(x: Tensor, row_scale: Tensor | None = None, peak: float = FP8_MAX) -> Fp8:
    """`x [..., K]` in FP8; `row_scale [...]` is the row's largest magnitude / `peak` unless given."""
    x = _wide(x)
    if row_scale is None:
        row_scale = x.abs().amax(-1) / peak
    row_scale = row_scale.float().clamp_min(TINY).expand(x.shape[:-1])
    return Fp8(to_e4m3((x / row_scale[..., None]).clamp(-peak, peak)), row_scale)


def quantize_nvfp4(x: Tensor, global_scale: Tensor | None = None) -> Nvfp4:
    """`x [..., K]` in NVFP4, K a multiple of 16; `global_scale`, scalar or `[...]`, is the row's largest magnitude
    / 2688 unless given. A block whose scale rounds to zero becomes zeros.

    Raises:
        ValueError: K is not a multiple of 16.
    """
    if x.shape[-1] % BLOCK:
        raise ValueError(f"NVFP4 needs rows of a multiple of {BLOCK} values, got {x.shape[-1]}")
    x = _wide(x)
    if global_scale is None:
        global_scale = x.abs().amax(-1) / NVFP4_MAX
    global_scale = global_scale.float().clamp_min(TINY)
    blocks = x.unflatten(-1, (-1, BLOCK))
    unit = global_scale[..., None]  # [..., 1] or [1]
    block_scale = to_e4m3(blocks.abs().amax(-1) / E2M1_MAX / unit)
    step = (block_scale.to(x.dtype) * unit)[..., None]
    return Nvfp4(pack_e2m1(torch.where(step == 0, 0, blocks / step).flatten(-2)), block_scale, global_scale)


def quantize(x: Tensor, quant: Quant | None, dtype: torch.dtype, bound: Tensor | None = None) -> Activation:
    """`x [..., K]`, the unrounded result of an operation, as its reader wants it: the one rounding of the operation.

    Args:
        quant: what the reader wants; None: a tensor of `dtype`.
        dtype: the model's, also of the unquantised activation that `quant.keep` asks for.
        bound: an upper bound of each row's magnitudes, `[...]`, for the rule `bound`.
    """
    if quant is None:
        return x.to(dtype)
    largest = quant.peak if quant.format == "fp8" else NVFP4_MAX
    scale, norm = None, None
    if quant.rule == "static":
        assert quant.scale is not None, "a static quantisation has a scale"
        scale = quant.scale.to(x.device)
    elif quant.rule == "bound":
        assert bound is not None, "this operation has no bound for its output"
        scale = (bound / largest).expand(x.shape[:-1])
    else:
        norm = torch.linalg.vector_norm(_wide(x), dim=-1).float()
    q = quantize_fp8(x, scale, quant.peak) if quant.format == "fp8" else quantize_nvfp4(x, scale)
    return replace(q, row_norm=norm, dense=x.to(dtype) if quant.keep else None)


def to_e4m3(x: Tensor) -> Tensor:
    """To nearest even, saturating; NaN stays NaN. (The bare cast overflows to NaN in some releases of PyTorch.)"""
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def pack_e2m1(x: Tensor) -> Tensor:
    """`x [..., K]` to nibbles `[..., K/2]` uint8, even columns low; to nearest, ties to the even code, saturating."""
    below = lambda t: torch.nextafter(t, t.new_zeros(()))  # noqa: E731
    middle = x.new_tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])  # between neighbours; a tie belongs to the even code
    middle[1::2] = below(middle[1::2])
    code = torch.bucketize(x.abs(), middle, out_int32=True).to(torch.uint8) | (x.signbit().to(torch.uint8) << 3)
    return code[..., 0::2] | (code[..., 1::2] << 4)


def unpack_e2m1(data: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Nibbles `[..., K/2]` to values `[..., K]`."""
    codes = torch.stack((data & 15, data >> 4), dim=-1).flatten(-2)
    return E2M1.to(data.device, dtype)[codes.int()]


# --- use --------------------------------------------------------------------------------------


def codes(x: Activation, dtype: torch.dtype) -> Tensor:
    """What a matrix product multiplies, `[..., K]`: FP8 codes, or e2m1 times its block scale; exact in `dtype`."""
    if isinstance(x, Tensor):
        return x.to(dtype)
    if isinstance(x, Fp8):
        return x.data.to(dtype)
    return (unpack_e2m1(x.data, dtype).unflatten(-1, (-1, BLOCK)) * x.block_scale.to(dtype)[..., None]).flatten(-2)


def factor(x: Activation, dtype: torch.dtype) -> Tensor:
    """What remains to multiply the codes of a row with, `[...]` or a scalar."""
    if isinstance(x, Tensor):
        return torch.ones((), dtype=dtype, device=x.device)
    return (x.row_scale if isinstance(x, Fp8) else x.global_scale).to(dtype)


def dequantize(x: Activation, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values that `x` stands for, `[..., K]`."""
    return codes(x, dtype) * factor(x, dtype)[..., None]


def multiply(x: Activation, weight: Weight, dtype: torch.dtype) -> Tensor:
    """`x Wᵀ [..., N]` of `x [..., K]` and `W [N, K]`: the codes' products summed in `dtype`, then both scales."""
    product = torch.nn.functional.linear(codes(x, dtype), codes(weight, dtype))
    return product * factor(x, dtype)[..., None] * factor(weight, dtype)


def columns(weight: Weight, start: int, stop: int) -> Weight:
    """Columns `start:stop` of K of a weight: views; multiples of 16 for NVFP4."""
    if isinstance(weight, Tensor):
        return weight[..., start:stop]
    if isinstance(weight, Fp8):
        return replace(weight, data=weight.data[..., start:stop])
    data, scale = weight.data[..., start // 2 : stop // 2], weight.block_scale[..., start // BLOCK : stop // BLOCK]
    return replace(weight, data=data, block_scale=scale)


def dense(x: Activation) -> Tensor:
    """The activation before its quantisation.

    Raises:
        ValueError: its producer was not asked to keep it.
    """
    if isinstance(x, Tensor):
        return x
    if x.dense is None:
        raise ValueError("a low-rank branch reads the unquantised activation, but its producer did not keep it")
    return x.dense


def row_norm(x: Activation) -> Tensor:
    """L2 norm `[...]` of each row before quantisation, in at least fp32.

    Raises:
        ValueError: the producer did not emit it.
    """
    if isinstance(x, Tensor):
        return torch.linalg.vector_norm(_wide(x), dim=-1)
    if x.row_norm is None:
        raise ValueError("an output bound needs the norm of the input's rows, but their producer did not emit it")
    return x.row_norm


# --- scale layout of the tensor cores ---------------------------------------------------------


def swizzle(block_scale: Tensor) -> Tensor:
    """Block scales `[R, C]` in tiles of 128 rows x 4 blocks, `[R/128, C/4, 32, 4, 4]`, padded with zeros.

    This is how cuBLAS and the tensor cores of Blackwell read them: inside a tile, row r and block c sit at
    `[r % 32, r // 32, c]`.
    """
    rows, blocks = block_scale.shape
    bits = block_scale.view(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -blocks % 4, 0, -rows % 128))
    tiles = bits.unflatten(0, (-1, 4, 32)).unflatten(-1, (-1, 4))  # [R/128, 4, 32, C/4, 4]
    return tiles.permute(0, 3, 2, 1, 4).contiguous().view(block_scale.dtype)


def unswizzle(tiles: Tensor, rows: int, blocks: int) -> Tensor:
    """Back from `swizzle`, whatever the shape the tiles are stored in: `[rows, blocks]`."""
    tiled = tiles.view(torch.uint8).reshape(-(-rows // 128), -(-blocks // 4), 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiled.flatten(0, 2).flatten(1)[:rows, :blocks].contiguous().view(tiles.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _index(x: Any, rows: Any) -> Any:
    """Index every part that has the rows' axes; a scalar scale belongs to all of them."""

    def of(value: Tensor) -> Tensor:
        if value.dtype != torch.float8_e4m3fn:
            return value[rows]
        return value.view(torch.uint8)[rows].view(value.dtype)  # not every PyTorch gathers FP8, on every device

    return replace(x, **{name: of(value) for name, value in vars(x).items() if value is not None and value.ndim})
