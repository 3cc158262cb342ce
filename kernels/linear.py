"""Plain projections of one or two streams into one joint sequence:  y = cat(x_s W_sᵀ + b_s).

    xs     S x [B, L_s, K_s]   each stream with its own width (text and image embedders), or one stream;
                               the model's dtype, FP8 or NVFP4
    layer  S x [N, K_s]
    y      [B, sum L_s, N]     dtype of the model, in the order of the streams

Precision: products as in `matmul`, one rounding at the end.    Cost: 2*B*N * sum(L_s * K_s) flops.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fluxkiln.kernels import matmul, packed, tiles
from fluxkiln.kernels.compile import Configuration
from fluxkiln.kernels.formats import Activation
from fluxkiln.kernels.language import Launch
from fluxkiln.kernels.layers import Streams
from fluxkiln.kernels.packed import Packed, meta_input, meta_layer
from fluxkiln.kernels.quantize import Empty, fresh
from fluxkiln.kernels.tiles import Problem, Tile

# --- constants and launch table ---------------------------------------------------------------

OP = "linear"

TILES: tiles.Table = {  # 64 outputs wide for the velocity
    (89, "bf16", "f32"): (Tile(128, 128, 32, 4, 4, pieces=2, blocks=2), Tile(64, 64, 64, 4, 4, blocks=2)),
    (89, "fp8", "f32"): (Tile(128, 128, 64, 4, 4, pieces=4, blocks=2),),
    (89, "fp8", "promote128"): (Tile(128, 128, 64, 8, 4),),
    (89, "fp8", "f16"): (Tile(128, 128, 128, 8, 3),),
    (90, "bf16", "f32"): (Tile(128, 256, 64, 8, 4, pieces=2), Tile(128, 128, 64, 8, 3, pieces=2, blocks=2),
                          Tile(64, 64, 128, 4, 3, blocks=2)),
    (90, "fp8", "f32"): (Tile(128, 256, 128, 8, 4, pieces=2), Tile(128, 128, 128, 8, 3, pieces=4, blocks=2)),
    (90, "fp8", "promote128"): (Tile(128, 128, 128, 8, 4, pieces=2),),
    (100, "bf16", "f32"): (Tile(128, 256, 64, 8, 4, pieces=2), Tile(128, 64, 64, 4, 4, blocks=2)),
    (100, "fp8", "f32"): (Tile(128, 256, 128, 8, 4, pieces=2),),
    (100, "fp8", "promote128"): (Tile(128, 128, 128, 8, 4, pieces=2),),
    (100, "nvfp4", "f32"): (Tile(128, 128, 256, 8, 3, pieces=2),),
    (120, "bf16", "f32"): (Tile(128, 128, 32, 4, 4, pieces=2, blocks=2), Tile(64, 64, 64, 4, 4, blocks=2)),
    (120, "fp8", "f32"): (Tile(128, 128, 64, 8, 3, blocks=2),),
    (120, "fp8", "promote128"): (Tile(128, 128, 128, 8, 3),),
    (120, "nvfp4", "f32"): (Tile(128, 128, 256, 8, 3, pieces=2),),
}  # fmt: skip


def pick(problem: Problem) -> Tile:
    return tiles.pick(problem, TILES)


def candidates(problem: Problem) -> Iterator[Tile]:
    return tiles.candidates(problem, TILES)


# --- pack -------------------------------------------------------------------------------------


def pack(streams: Streams) -> tuple[Packed, ...]:
    """Each stream on its own: their inputs differ in width and live in tensors of their own."""
    return tuple(packed.pack(Streams((linear,))) for linear in streams)


# --- contract ---------------------------------------------------------------------------------


def check(xs: Sequence[Activation], layer: Streams | Sequence[Packed]) -> None:
    """Raise ValueError on a call that is wrong for every backend."""
    if len(xs) != len(layer):
        raise ValueError(f"{OP}: {len(layer)} streams need as many inputs, got {len(xs)}")
    for x, stream in zip(xs, layer, strict=True):
        packed.check(OP, (x,), stream if isinstance(stream, Packed) else Streams((stream,)), 0)


def refuse(xs: Sequence[Activation], layer: Sequence[Packed], *, arch: int) -> str | None:
    """Why the Triton kernel cannot take a valid call, or None."""
    reasons = (packed.refuse((x,), stream, arch) for x, stream in zip(xs, layer, strict=True))
    return next((reason for reason in reasons if reason), None)


# --- reference --------------------------------------------------------------------------------


def reference(xs: Sequence[Activation], layer: Streams) -> Tensor:
    ys = [linear(x).to(linear.dtype) for x, linear in zip(xs, layer, strict=True)]
    return ys[0] if len(ys) == 1 else torch.cat(ys, dim=1)


# --- launch -----------------------------------------------------------------------------------


def launch(
    xs: Sequence[Activation], layer: Sequence[Packed], *,
    arch: int, empty: Empty | None = None, tile: Tile | None = None,
) -> tuple[Tensor, list[Launch]]:  # fmt: skip
    """The output and the launches that fill it, one for each stream; `tile` overrides the table."""
    B, N = xs[0].shape[0], layer[0].n
    empty = empty or fresh(layer[0].weight.device)
    y = empty("y", (B, sum(x.shape[1] for x in xs), N), layer[0].dtype)
    launches: list[Launch] = []
    start = 0
    for x, stream in zip(xs, layer, strict=True):
        if not x.shape[1]:  # no text: nothing to launch, and no descriptor has an empty axis
            continue
        part = y[:, start : start + x.shape[1]]
        start += x.shape[1]
        chosen = tile or pick(matmul.problem(OP, stream, (x.shape[1],), arch))
        side, before = matmul.side_input((x,), stream, 0, arch=arch, empty=empty)
        tensors = (part, part.stride(0))
        launches += [*before, matmul.plan(matmul.linear, chosen, (x,), stream, 0, tensors, side=side, arch=arch)]
    return y, launches


def configurations(arch: int) -> Iterator[Configuration]:
    side, rank = matmul.side_tile(32), meta_layer("bf16", "f32", 1, 32, 3072)
    launches = launch([meta_input("bf16", 3072)], [rank], arch=arch, tile=side)[1]
    yield matmul.configuration(OP, arch, rank, side, launches, "low-rank")
    for (number, format, accumulate), shipped in TILES.items():
        if number != arch:
            continue
        for tile in shipped:
            n, k = (64, 3072) if tile.n <= 64 else (3072, 4096)  # velocity; text embedder
            layer = meta_layer(format, accumulate, 1, n, k)
            launches = launch([meta_input(format, k)], [layer], arch=arch, tile=tile)[1]
            yield matmul.configuration(OP, arch, layer, tile, launches, "")


# --- cost -------------------------------------------------------------------------------------


def cost(xs: Sequence[Activation], layer: Sequence[Packed], y: Tensor) -> tuple[int, int]:
    """(flops, bytes) of one call."""
    flops, moved = zip(*(matmul.cost((x,), stream, 0) for x, stream in zip(xs, layer, strict=True)), strict=True)
    return sum(flops), sum(moved) + y.nbytes
