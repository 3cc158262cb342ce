"""Layers, activations and truths for the tests of operations that multiply."""

from __future__ import annotations

from dataclasses import replace

import torch
from accuracy import values
from torch import Tensor

from fluxkiln.kernels.formats import (
    F16_PEAK,
    FP8_MAX,
    Activation,
    Fp8,
    Quant,
    dense,
    dequantize,
    quantize,
    quantize_fp8,
    quantize_nvfp4,
)
from fluxkiln.kernels.layers import Linear, LowRank, Streams
from fluxkiln.kernels.tiles import Tile

# What each architecture multiplies: (arch, format, accumulation).
KINDS = [
    (89, "bf16", "f32"),
    (89, "fp8", "f32"),
    (89, "fp8", "promote128"),
    (89, "fp8", "f16"),
    (90, "bf16", "f32"),
    (90, "fp8", "f32"),
    (90, "fp8", "promote128"),
    (100, "bf16", "f32"),
    (100, "fp8", "f32"),
    (100, "fp8", "promote128"),
    (100, "nvfp4", "f32"),
    (120, "bf16", "f32"),
    (120, "fp8", "f32"),
    (120, "fp8", "promote128"),
    (120, "nvfp4", "f32"),
]


def small(format: str, **fields: object) -> Tile:
    """A tile that the interpreter is quick with, of the k that the shipped ones have."""
    return replace(Tile(32, 32, 64 if format == "bf16" else 128, 4, 3, pieces=2), **fields)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quant(format: str, accumulate: str = "f32", keep: bool = False) -> Quant | None:
    """How a layer's input is quantised."""
    peak = F16_PEAK if accumulate == "f16" else FP8_MAX
    return None if format == "bf16" else Quant(format, "row", keep=keep, peak=peak)


def activation(x: Tensor, format: str, accumulate: str = "f32", keep: bool = False) -> Activation:
    """`x` as a producer would hand it on."""
    return quantize(x, quant(format, accumulate, keep), torch.bfloat16)


def layer(
    format: str, n: int, k: int, streams: int = 1, accumulate: str = "f32", rank: int = 0, weight: Tensor | None = None
) -> Streams:
    """Linears with weights of unit gain (or `weight`), each stream its own."""
    linears = []
    for s in range(streams):
        w = noise(n, k, seed=10 + s) / k**0.5 if weight is None else weight
        codes = {
            "bf16": lambda w: w.bfloat16(),
            "fp8": lambda w: quantize_fp8(w, peak=F16_PEAK if accumulate == "f16" else FP8_MAX),
            "nvfp4": quantize_nvfp4,
        }[format](w)
        side = None
        if rank:
            side = LowRank((noise(rank, k, seed=20 + s) / k**0.5).bfloat16(), noise(n, rank, seed=30 + s).bfloat16())
        bias = noise(n, seed=40 + s).bfloat16()
        linears.append(Linear(codes, bias, quant(format, accumulate, bool(rank)), side, accumulate))
    return Streams(linears)


def product(x: Activation, linear: Linear) -> Tensor:
    """`x Wᵀ + b` and the low-rank branch in float64, of the values that the operands stand for."""
    weight = linear.weight.double() if isinstance(linear.weight, Tensor) else dequantize(linear.weight, torch.float64)
    y = torch.nn.functional.linear(values(x), weight, linear.bias.double())
    if linear.low_rank is not None:
        y = y + dense(x).double() @ linear.low_rank.down.double().T @ linear.low_rank.up.double().T
    return y


def joint(x: Activation, streams: Streams, split: int) -> Tensor:
    """`product` of both streams of a joint sequence."""
    if len(streams) == 1:
        return product(x, streams[0])
    return torch.cat((product(x[:, :split], streams[0]), product(x[:, split:], streams[1])), dim=1)


def awkward(kind: str, *shape: int) -> Tensor:
    """Activations that expose what noise does not."""
    x = noise(*shape, seed=3)
    if kind == "mean 30":
        x += 30
    elif kind == "outlier":
        x[..., 5] = 1e4
    elif kind == "constant":
        x[:] = -0.37
    elif kind == "zeros":
        x[:, ::2] = 0
    elif kind == "one sign":
        x.abs_()
    elif kind == "rows of every size":
        x *= torch.logspace(-6, 4, shape[-2])[:, None]
    return x


AWKWARD = ["noise", "mean 30", "outlier", "constant", "zeros", "one sign", "rows of every size"]


def with_row_scale(x: Activation, factor: float) -> Activation:
    """The same codes, standing for values `factor` times as large."""
    assert not isinstance(x, Tensor)
    name = "row_scale" if isinstance(x, Fp8) else "global_scale"
    return replace(x, **{name: getattr(x, name) * factor})
