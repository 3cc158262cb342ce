"""Number formats that are more than a dtype: FP8 with a scale per row, NVFP4 with two levels of scale.

    Fp8     value = data * row_scale                                   e4m3, largest magnitude 448
    Nvfp4   value = e2m1(data) * block_scale * global_scale            e2m1 in blocks of 16, largest magnitude 6

The last axis is K, the axis a matrix product contracts. Canonical layout is ONNX's: the even column of an
NVFP4 pair is the low nibble, block scales are linear, not tiled. Foreign dialects are converted at the door.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

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


Activation = Tensor | Fp8 | Nvfp4


@dataclass(frozen=True)
class Quant:
    """How a producer writes its output for the layer that reads it.

    Attributes:
        format: number format of the activation.
        rule: where its scale comes from: `row`, the row's own largest magnitude (the producer holds the whole row);
            `bound`, an upper bound known before the row is (a fused matrix product sees only its tile);
            `static`, the calibrated scalar `scale`.
        scale: fp32 scalar, for `static` only.
        keep: hand the unquantised activation on as well.
    """

    format: Literal["fp8", "nvfp4"]
    rule: Literal["row", "bound", "static"]
    scale: Tensor | None = None
    keep: bool = False
