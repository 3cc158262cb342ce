"""Up-projection and activation:  y = gelu(x Wᵀ + b),  the tanh form.

    x      [B, L, K]     joint stream, text rows [:split] first; dtype of the model, FP8 or NVFP4
    layer  S x [N, K]    S = 1 or 2 streams
    y      [B, L, N]     dtype of x's model, or FP8 or NVFP4 with the scale of each row from its bound (or calibrated)

A tile sees only some of a row, so the scale of a row cannot be its largest magnitude. No output exceeds
‖x_row‖₂ max_n ‖w_n‖₂ + max|b|, and gelu only shrinks: that is known before the first product.

Precision: products as in `matmul`; gelu in fp32; one rounding at the end.    Cost: 2*B*L*N*K flops.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fluxkiln.kernels import formats, matmul, packed, tiles
from fluxkiln.kernels.compile import Configuration
from fluxkiln.kernels.formats import NVFP4_MAX, TINY, Activation, Quant
from fluxkiln.kernels.language import Launch, constexpr, jit, tl
from fluxkiln.kernels.layers import Linear, Streams, by_stream
from fluxkiln.kernels.packed import Packed, meta_input, meta_layer
from fluxkiln.kernels.quantize import Empty, fp8_codes, fresh, has_e2m1, nbytes, nvfp4_blocks, outputs, pointers
from fluxkiln.kernels.tiles import Problem, Tile

# --- constants and launch table ---------------------------------------------------------------

OP = "linear_gelu"

TILES: tiles.Table = {
    # Ada: two blocks of 4 warps hide each other's epilogue; 8 warps where sums in registers need more of them.
    (89, "bf16", "f32"): (Tile(128, 128, 32, 4, 4, pieces=2, blocks=2),),
    (89, "fp8", "f32"): (Tile(128, 128, 64, 4, 4, pieces=4, blocks=2),),
    (89, "fp8", "promote128"): (Tile(128, 128, 128, 8, 3, pieces=2),),
    (89, "fp8", "f16"): (Tile(128, 128, 128, 8, 3),),
    # Hopper: 128 x 256 reads three quarters of the operand bytes of 128 x 128, which leaves less of a last wave idle
    # and hides its epilogue behind a second block. Promotion keeps a second set of sums: not at 128 x 256.
    (90, "bf16", "f32"): (Tile(128, 256, 64, 8, 4, pieces=2), Tile(128, 128, 64, 8, 3, pieces=4, blocks=2)),
    (90, "fp8", "f32"): (Tile(128, 256, 128, 8, 4, pieces=2), Tile(128, 128, 128, 8, 3, pieces=4, blocks=2)),
    (90, "fp8", "promote128"): (Tile(128, 128, 128, 8, 4),),
    # Blackwell: the sums are in tensor memory, so that warps of their own can feed the products.
    (100, "bf16", "f32"): (Tile(128, 256, 64, 8, 3, pieces=2, specialize=True),),
    (100, "fp8", "f32"): (Tile(128, 256, 128, 8, 3, pieces=2, specialize=True),),
    (100, "fp8", "promote128"): (Tile(128, 128, 128, 8, 4, pieces=2),),
    (100, "nvfp4", "f32"): (Tile(128, 128, 256, 8, 3),),
    # Consumer Blackwell: 99 KiB of shared memory, sums in registers.
    (120, "bf16", "f32"): (Tile(128, 128, 32, 4, 4, pieces=2, blocks=2),),
    (120, "fp8", "f32"): (Tile(128, 128, 64, 8, 3, blocks=2),),
    (120, "fp8", "promote128"): (Tile(128, 128, 128, 8, 3),),
    (120, "nvfp4", "f32"): (Tile(128, 128, 256, 8, 3, pieces=2),),
}


def pick(problem: Problem) -> Tile:
    return tiles.pick(problem, TILES)


def candidates(problem: Problem) -> Iterator[Tile]:
    return tiles.candidates(problem, TILES)


# --- contract ---------------------------------------------------------------------------------


def check(x: Activation, layer: Streams | Packed, split: int, out: Quant | None = None) -> None:
    """Raise ValueError on a call that is wrong for every backend."""
    packed.check(OP, (x,), layer, split)
    if out is not None and out.rule == "row":
        raise ValueError(
            f"{OP}: a tile does not see a row's largest magnitude; the output's rule is 'bound' or 'static'"
        )


def refuse(x: Activation, layer: Packed, split: int, out: Quant | None = None, *, arch: int) -> str | None:
    """Why the Triton kernel cannot take a valid call, or None."""
    if out is not None and out.rule == "bound" and not isinstance(x, Tensor) and x.row_norm is None:
        return "the bound of the output needs the norm of x's rows, which their producer did not emit"
    if out is not None and out.rule == "bound" and isinstance(x, Tensor):
        return "the bound of the output needs the norm of x's rows, which an unquantised x does not carry"
    return packed.refuse((x,), layer, arch)


# --- reference --------------------------------------------------------------------------------


def reference(x: Activation, layer: Streams, split: int, out: Quant | None = None) -> Activation:
    def run(x: Activation, linear: Linear) -> Tensor:
        return torch.nn.functional.gelu(linear(x), approximate="tanh")

    def bound(x: Activation, linear: Linear) -> Tensor:
        return linear.bound(x)

    y = by_stream(run, x, split, layer)
    ceiling = by_stream(bound, x, split, layer) if out is not None and out.rule == "bound" else None
    return formats.quantize(y, out, layer[0].dtype, ceiling)


# --- kernel -----------------------------------------------------------------------------------


_TINY = constexpr(TINY)


@jit
def _gelu(x, PTX: tl.constexpr):
    """0.5 x (1 + tanh u), u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    if PTX:  # to 2**-11: nothing beside the rounding to FP8, and one special-function instruction instead of two
        u = x * (0.7978845608 + 0.0356774081 * (x * x))
        tanh = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1)
        half = 0.5 * x
        y = half + half * tanh
    else:  # x sigmoid(2u), with log2(e) folded in
        y = x / (1.0 + tl.exp2(x * (-2.302208198 - 0.1029432397 * (x * x))))
    return y


@jit
def _linear_gelu(
    y, b, row, mask_m, offs_n, mask_n, stream, part, L, split, N,
    data_ptr, scale_ptr, block_scale_ptr, _, dense_ptr, static_ptr,  # [B, L, N], [B, L], [B, L, N / 16], [B, L, N]
    row_norm_ptr, bound_ptr,                   # of x, [B, L]; of the layer, [S, 2]
    CONSTANTS: tl.constexpr,
):  # fmt: skip
    FORMAT: tl.constexpr = CONSTANTS[0]
    LARGEST: tl.constexpr = CONSTANTS[1]  # what the bound becomes
    TANH: tl.constexpr = CONSTANTS[2]  # there is an instruction for it, and for e2m1
    E2M1: tl.constexpr = CONSTANTS[3]
    M: tl.constexpr = y.shape[0]
    WIDTH: tl.constexpr = y.shape[1]
    # 64-bit up to the image, 32-bit within: pointers are what the epilogue's registers are short of.
    first = b.to(tl.int64) * L
    rows = row + tl.arange(0, M)
    mask = mask_m[:, None] & mask_n[None, :]

    y = _gelu(y, TANH)
    if dense_ptr is not None:
        tl.store(
            dense_ptr + first * N + rows[:, None] * N + offs_n[None, :], y.to(dense_ptr.dtype.element_ty), mask=mask
        )
    if FORMAT == "dense":
        tl.store(data_ptr + first * N + rows[:, None] * N + offs_n[None, :], y.to(data_ptr.dtype.element_ty), mask=mask)
    else:
        if static_ptr is not None:
            scale = tl.zeros((M,), tl.float32) + tl.load(static_ptr)
        else:
            norm = tl.load(row_norm_ptr + first + rows, mask=mask_m, other=0.0)
            bound = norm * tl.load(bound_ptr + 2 * stream) + tl.load(bound_ptr + 2 * stream + 1)
            scale = bound * (1.0 / LARGEST)
        scale = tl.maximum(scale, _TINY)
        # Every tile of a row finds the same scale: who writes it does not matter.
        tl.store(scale_ptr + first + rows, scale, mask=mask_m)
        if FORMAT == "fp8":
            codes = fp8_codes(y, scale[:, None], LARGEST)  # quantisation noise in x may take y beyond its bound
            tl.store(data_ptr + first * N + rows[:, None] * N + offs_n[None, :], codes, mask=mask)
        else:
            codes, block_scale = nvfp4_blocks(y, scale, M, WIDTH, E2M1)
            n = tl.min(offs_n, axis=0)
            offs_pair = n // 2 + tl.arange(0, WIDTH // 2)
            offs_block = n // 16 + tl.arange(0, WIDTH // 16)
            mask_pair = mask_m[:, None] & (offs_pair < N // 2)[None, :]
            mask_block = mask_m[:, None] & (offs_block < N // 16)[None, :]
            tl.store(data_ptr + first * (N // 2) + rows[:, None] * (N // 2) + offs_pair[None, :], codes, mask=mask_pair)
            block_ptrs = block_scale_ptr + first * (N // 16) + rows[:, None] * (N // 16) + offs_block[None, :]
            tl.store(block_ptrs, block_scale, mask=mask_block)


# --- launch -----------------------------------------------------------------------------------


def launch(
    x: Activation, layer: Packed, split: int, out: Quant | None = None, *,
    arch: int, empty: Empty | None = None, tile: Tile | None = None,
) -> tuple[Activation, list[Launch]]:  # fmt: skip
    """The output and the launches that fill it, in order; `empty` gives buffers, `tile` overrides the table."""
    B, L, _ = x.shape
    device = layer.weight.device
    empty = empty or fresh(device)
    y = outputs(out, (B, L, layer.n), layer.dtype, empty)
    format = "dense" if out is None else out.format
    tile = tile or pick(matmul.problem(OP, layer, matmul.streams_of(split, L, layer), arch, format))
    side, before = matmul.side_input((x,), layer, split, arch=arch, empty=empty)
    norm = None if isinstance(x, Tensor) else x.row_norm
    largest = NVFP4_MAX if format == "nvfp4" else out.peak if out is not None else 0.0
    run = matmul.plan(
        _linear_gelu, tile, (x,), layer, split,
        tensors=(*pointers(y, out), norm, layer.bound),
        constants=(format, largest, out is not None and device.type != "cpu", has_e2m1(device, arch)),
        side=side, arch=arch,
    )  # fmt: skip
    return y, [*before, run]


def configurations(arch: int) -> Iterator[Configuration]:
    for (number, format, accumulate), shipped in TILES.items():
        if number != arch:
            continue
        out = None if format == "bf16" else Quant(format, "bound", keep=format == "nvfp4")
        x = meta_input(format, 3072)
        for tile in shipped:
            for streams, rank in ((2, 0), (1, 32 if format == "nvfp4" else 0)):
                layer = meta_layer(format, accumulate, streams, 12288, 3072, rank=rank)
                launches = launch(x, layer, 512 * (streams - 1), out, arch=arch, tile=tile)[1]
                note = f"S={streams}" + " low-rank" * bool(rank)
                yield matmul.configuration(OP, arch, layer, tile, launches, note)


# --- cost -------------------------------------------------------------------------------------


def cost(x: Activation, layer: Packed, y: Activation) -> tuple[int, int]:
    """(flops, bytes) of one call."""
    return matmul.cost((x,), layer, nbytes(y))
