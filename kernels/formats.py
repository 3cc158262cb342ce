"""Number formats that are more than a dtype: FP8 with a scale per row, NVFP4 with two levels of scale.

    Fp8     value = data * row_scale                                   e4m3, largest magnitude 448
    Nvfp4   value = e2m1(data) * block_scale * global_scale            e2m1 in blocks of 16, largest magnitude 6

The last axis is K, the axis a matrix product contracts. Canonical layout is ONNX's: the even column of an
NVFP4 pair is the low nibble, block scales are linear, not tiled. Foreign dialects are converted at the door.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Fp8:
    """`data [..., K]` float8_e4m3fn and `row_scale [...]` fp32, one scale for each row."""

    data: Tensor
    row_scale: Tensor


@dataclass(frozen=True)
class Nvfp4:
    """`data [..., K/2]` uint8, `block_scale [..., K/16]` float8_e4m3fn, `global_scale` fp32, scalar or `[...]`."""

    data: Tensor
    block_scale: Tensor
    global_scale: Tensor
