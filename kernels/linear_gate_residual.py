"""Down-projection, gate and residual:  y = residual + gate * (x Wᵀ + b).

    xs        1 or 2 x [B, L, K_i]   inputs side by side on K (a single block's attention, then its MLP), each the
                                     model's dtype, FP8 or NVFP4, with scales of its own
    layer     S x [N, K_1 + K_2]     S = 1 or 2 streams; text rows [:split] first
    gate      [B, S, N]              any strides over B and S
    residual  [B, L, N]              contiguous; may be overwritten, and the kernel does
    y         [B, L, N]

Precision: products as in `matmul`; gate and residual in fp32; one rounding at the end.    Cost: 2*B*L*N*K flops.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fluxkiln.kernels import matmul, packed, tiles
from fluxkiln.kernels.compile import Configuration
from fluxkiln.kernels.formats import Activation
from fluxkiln.kernels.language import Launch, jit, tl
from fluxkiln.kernels.layers import Streams
from fluxkiln.kernels.packed import Packed, meta_input, meta_layer
from fluxkiln.kernels.quantize import Empty, fresh
from fluxkiln.kernels.tiles import Problem, Tile

# --- constants and launch table ---------------------------------------------------------------

OP = "linear_gate_residual"

TILES: tiles.Table = {
    # Ada: two blocks of 4 warps hide each other's epilogue; 8 warps where sums in registers need more of them.
    (89, "bf16", "f32"): (Tile(128, 128, 32, 4, 4, pieces=2, blocks=2),),
    (89, "fp8", "f32"): (Tile(128, 128, 64, 4, 4, pieces=4, blocks=2),),
    (89, "fp8", "promote128"): (Tile(128, 128, 64, 8, 4),),
    (89, "fp8", "f16"): (Tile(128, 128, 128, 8, 3),),
    # Hopper: 128 x 256 reads three quarters of the operand bytes of 128 x 128, but N = 3072 makes few tiles, and
    # a last wave of 128 x 128 leaves less idle; two blocks hide the residual's way from memory and back.
    (90, "bf16", "f32"): (Tile(128, 256, 64, 8, 4, pieces=4), Tile(128, 128, 64, 8, 3, pieces=4, blocks=2)),
    (90, "fp8", "f32"): (Tile(128, 256, 128, 8, 4, pieces=2), Tile(128, 128, 128, 8, 3, pieces=4, blocks=2)),
    (90, "fp8", "promote128"): (Tile(128, 128, 128, 8, 4, pieces=2),),
    (100, "bf16", "f32"): (Tile(128, 256, 64, 8, 4, pieces=2), Tile(128, 128, 64, 8, 4)),
    (100, "fp8", "f32"): (Tile(128, 256, 128, 8, 4, pieces=2), Tile(128, 128, 128, 8, 4)),
    (100, "fp8", "promote128"): (Tile(128, 128, 128, 8, 4, pieces=2),),
    (100, "nvfp4", "f32"): (Tile(128, 128, 256, 8, 3),),
    # Consumer Blackwell: 99 KiB of shared memory, sums in registers.
    (120, "bf16", "f32"): (Tile(128, 128, 32, 4, 4, pieces=2, blocks=2),),
    (120, "fp8", "f32"): (Tile(128, 128, 64, 4, 4, pieces=4, blocks=2),),
    (120, "fp8", "promote128"): (Tile(128, 128, 128, 8, 3),),
    (120, "nvfp4", "f32"): (Tile(128, 128, 256, 8, 3, pieces=2),),
}


def pick(problem: Problem) -> Tile:
    return tiles.pick(problem, TILES)


def candidates(problem: Problem) -> Iterator[Tile]:
    return tiles.candidates(problem, TILES)


# --- contract ---------------------------------------------------------------------------------


def check(xs: Sequence[Activation], layer: Streams | Packed, gate: Tensor, residual: Tensor, split: int) -> None:
    """Raise ValueError on a call that is wrong for every backend."""
    packed.check(OP, xs, layer, split)
    B, L = xs[0].shape[:2]
    S, N, _ = packed.extent(layer)
    for name, tensor, shape in (("gate", gate, (B, S, N)), ("residual", residual, (B, L, N))):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{OP}: {name} must be {list(shape)}, got {list(tensor.shape)}")


def refuse(
    xs: Sequence[Activation], layer: Packed, gate: Tensor, residual: Tensor, split: int, *, arch: int
) -> str | None:
    """Why the Triton kernel cannot take a valid call, or None."""
    if not residual.is_contiguous() or gate.stride(-1) != 1:
        return "residual must be contiguous, and gate over N"
    return packed.refuse(xs, layer, arch)


# --- reference --------------------------------------------------------------------------------


def reference(xs: Sequence[Activation], layer: Streams, gate: Tensor, residual: Tensor, split: int) -> Tensor:
    streams = (slice(None),) if len(layer) == 1 else (slice(None, split), slice(split, None))
    ys = [
        gate_s[:, None] * linear(*(x[:, rows] for x in xs))
        for rows, linear, gate_s in zip(streams, layer, gate.unbind(1), strict=True)
    ]
    return (residual + (ys[0] if len(ys) == 1 else torch.cat(ys, dim=1))).to(residual.dtype)


# --- kernel -----------------------------------------------------------------------------------


@jit
def _linear_gate_residual(
    y, b, row, mask_m, offs_n, mask_n, stream, part, L, split, N,
    residual_ptr,                              # [B, L, N], also the output
    gate_ptr, stride_gb, stride_gs,            # [B, S, N]
    CONSTANTS: tl.constexpr,
):  # fmt: skip
    rows = row + tl.arange(0, y.shape[0])
    residual_ptrs = residual_ptr + b.to(tl.int64) * L * N + rows[:, None] * N + offs_n[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    gate = tl.load(gate_ptr + b * stride_gb + stream * stride_gs + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    y = residual + gate[None, :] * y
    tl.store(residual_ptrs, y.to(residual_ptr.dtype.element_ty), mask=mask)


# --- launch -----------------------------------------------------------------------------------


def launch(
    xs: Sequence[Activation], layer: Packed, gate: Tensor, residual: Tensor, split: int, *,
    arch: int, empty: Empty | None = None, tile: Tile | None = None,
) -> tuple[Tensor, list[Launch]]:  # fmt: skip
    """`residual`, and the launches that turn it into the output; `tile` overrides the table."""
    L = residual.shape[1]
    tile = tile or pick(matmul.problem(OP, layer, matmul.streams_of(split, L, layer), arch))
    side, before = matmul.side_input(xs, layer, split, arch=arch, empty=empty or fresh(residual.device))
    run = matmul.plan(
        _linear_gate_residual, tile, xs, layer, split,
        tensors=(residual, gate, gate.stride(0), gate.stride(1)), side=side, arch=arch,
    )  # fmt: skip
    return residual, [*before, run]


def configurations(arch: int) -> Iterator[Configuration]:
    residual = torch.empty(1, packed.LENGTH, 3072, dtype=torch.bfloat16, device="meta")
    for (number, format, accumulate), shipped in TILES.items():
        if number != arch:
            continue
        for tile in shipped:
            for streams, widths, rank in ((2, (12288,), 0), (1, (3072, 12288), 32 if format == "nvfp4" else 0)):
                layer = meta_layer(format, accumulate, streams, 3072, sum(widths), rank=rank)
                xs = [meta_input(format, k) for k in widths]
                gate = torch.empty(1, streams, 3072, dtype=torch.bfloat16, device="meta")
                launches = launch(xs, layer, gate, residual, 512 * (streams - 1), arch=arch, tile=tile)[1]
                note = f"S={streams}" + " low-rank" * bool(rank)
                yield matmul.configuration(OP, arch, layer, tile, launches, note)


# --- cost -------------------------------------------------------------------------------------


def cost(xs: Sequence[Activation], layer: Packed, gate: Tensor, residual: Tensor) -> tuple[int, int]:
    """(flops, bytes) of one call."""
    return matmul.cost(xs, layer, 2 * residual.nbytes + gate.nbytes)
