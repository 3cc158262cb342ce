"""LayerNorm without affine, then modulation:  y = (1 + scale) * norm(x) + shift.

    x      [B, L, D]   joint stream, text rows [:split] first; any strides over B and L, D contiguous
    shift  [B, S, D]   one row per image and stream, S = 1 or 2; any strides over B and S
    scale  [B, S, D]
    y      [B, L, D]   dtype of x, or FP8 or NVFP4 by row, with `row_norm`; contiguous

Precision: fp32 between load and store, the variance of centred values, one rounding (fp64 for fp64); eager rounds
the norm and each modulation step.
Cost: memory-bound, x read once and y written once; 2 calls in a double block, 1 in a single block, 1 at the end.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fluxkiln.kernels import formats
from fluxkiln.kernels.compile import Configuration
from fluxkiln.kernels.formats import BLOCK, Activation, Quant
from fluxkiln.kernels.language import Launch, jit, tl
from fluxkiln.kernels.layers import EPS, by_stream
from fluxkiln.kernels.quantize import Empty, fresh, has_e2m1, largest, nbytes, outputs, pointers, store_rows
from fluxkiln.kernels.tiles import section

# --- constants and launch table ---------------------------------------------------------------

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_D = 8192  # one program holds its rows in registers


@dataclass(frozen=True)
class Tile:
    rows: int
    warps: int


# D rounded up to a power of two -> tile, for every architecture: 32 elements a thread keep four 16-byte loads in
# flight and leave registers for eight blocks; more rows in a program share shift and scale, which L1 holds anyway.
TILES = {1024: Tile(1, 1), 2048: Tile(1, 2), 4096: Tile(1, 4), 8192: Tile(1, 8)}


def power_of_two(d: int) -> int:
    """The least power of two that holds d, and a block of NVFP4."""
    return max(BLOCK, 1 << (d - 1).bit_length())


def pick(d: int, format: str, arch: int) -> Tile:
    """The tile measured fastest for rows of d written as `format`, or the table's."""
    kind = {"arch": arch, "format": format, "width": d}
    known = [row["tile"] for row in section("norm_modulate") if row["problem"] == kind]
    return Tile(**known[0]) if known else TILES[max(power_of_two(d), min(TILES))]


def candidates(d: int) -> Iterator[Tile]:
    """What is worth timing: the table's tile, then its variations."""
    shipped = TILES[max(power_of_two(d), min(TILES))]
    yield shipped
    for rows, warps in itertools.product((1, 2, 4), (1, 2, 4, 8, 16)):
        tile = Tile(rows, warps)
        if tile != shipped and 8 <= rows * power_of_two(d) // (32 * warps) <= 128:  # elements a thread
            yield tile


# --- contract ---------------------------------------------------------------------------------


def check(x: Tensor, shift: Tensor, scale: Tensor, split: int, out: Quant | None) -> None:
    """Raise ValueError on a call that is wrong for every backend."""
    if x.ndim != 3:
        raise ValueError(f"norm_modulate: x must be [B, L, D], got {list(x.shape)}")
    B, L, D = x.shape
    for name, t in (("shift", shift), ("scale", scale)):
        if t.ndim != 3 or t.shape[0] != B or t.shape[1] not in (1, 2) or t.shape[2] != D:
            raise ValueError(f"norm_modulate: {name} must be [{B}, 1 or 2, {D}], got {list(t.shape)}")
        if t.dtype != x.dtype or t.device != x.device:
            raise ValueError(f"norm_modulate: {name} is {t.dtype} on {t.device}, x is {x.dtype} on {x.device}")
    if shift.shape != scale.shape:
        raise ValueError(f"norm_modulate: shift is {list(shift.shape)}, scale is {list(scale.shape)}")
    if not 0 <= split <= L:
        raise ValueError(f"norm_modulate: split must be within 0..{L}, got {split}")
    if out is not None and out.rule == "bound":
        raise ValueError("norm_modulate holds whole rows: quantise its output by the rule 'row' or 'static'")
    if out is not None and out.format == "nvfp4" and D % BLOCK:
        raise ValueError(f"norm_modulate: NVFP4 needs D to be a multiple of {BLOCK}, got {D}")


def refuse(x: Tensor, shift: Tensor, scale: Tensor, split: int, out: Quant | None = None) -> str | None:
    """Why the Triton kernel cannot take a valid call, or None."""
    if x.dtype not in DTYPES:
        return f"dtype {x.dtype} is not one of bf16, fp16, fp32"
    if x.shape[2] > MAX_D:
        return f"D = {x.shape[2]} is more than the {MAX_D} that fit the registers of a program"
    if any(t.stride(2) != 1 for t in (x, shift, scale)):
        return "D must be contiguous"
    return None


# --- reference --------------------------------------------------------------------------------


def reference(x: Tensor, shift: Tensor, scale: Tensor, split: int, out: Quant | None = None) -> Activation:
    def run(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        y = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=EPS)
        return (1 + scale[:, None]) * y + shift[:, None]

    return formats.quantize(by_stream(run, x, split, shift.unbind(1), scale.unbind(1)), out, x.dtype)


# --- kernel -----------------------------------------------------------------------------------


@jit(do_not_specialize=["L", "split"], repr=lambda _: "norm_modulate")
def _norm_modulate_kernel(
    x_ptr, shift_ptr, scale_ptr,
    stride_xb, stride_xl,      # x      [B, L, D]
    stride_hb, stride_hs,      # shift  [B, S, D]
    stride_cb, stride_cs,      # scale  [B, S, D]
    data_ptr, row_scale_ptr, block_scale_ptr, row_norm_ptr, dense_ptr, static_ptr,
    L, split,
    D: tl.constexpr, EPS: tl.constexpr, FORMAT: tl.constexpr, LARGEST: tl.constexpr, PTX: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # One program normalizes ROWS rows of one stream of one image; the grid is (tiles of text and image, B).
    tile = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    text_tiles = tl.cdiv(split, ROWS)
    image = tile >= text_tiles
    stream = image.to(tl.int32)
    first = tl.where(image, split + (tile - text_tiles) * ROWS, tile * ROWS)
    end = tl.where(image, L, split)
    rows = first.to(tl.int64) + tl.arange(0, ROWS)
    mask_rows = rows < end
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    mask = mask_rows[:, None] & mask_d[None, :]

    x_ptrs = x_ptr + b * stride_xb + rows[:, None] * stride_xl + offs_d[None, :]
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_D]
    shift = tl.load(shift_ptr + b * stride_hb + stream * stride_hs + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + b * stride_cb + stream * stride_cs + offs_d, mask=mask_d, other=0.0).to(tl.float32)

    # The row is in registers, so centre first: E[x^2] - mean^2 cancels when |mean| >> std. A constant row makes the
    # mean's last bit a thousand times as large; 16-bit numbers sum and divide exactly there, fp32 takes a second look.
    mean = tl.div_rn(tl.sum(x, axis=1), tl.full((ROWS,), D, tl.float32))
    centred = tl.where(mask, x - mean[:, None], 0.0)
    if x_ptr.dtype.element_ty == tl.float32:
        centred = tl.where(mask, centred - (tl.sum(centred, axis=1) / D)[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / D + EPS)
    y = centred * rstd[:, None] * (1.0 + scale)[None, :] + shift[None, :]  # zero past D, as shift is

    store_rows(
        y, b * L + rows, mask_rows,
        data_ptr, row_scale_ptr, block_scale_ptr, row_norm_ptr, dense_ptr, static_ptr,
        D, FORMAT, LARGEST, PTX, ROWS, BLOCK_D,
    )  # fmt: skip


# --- launch -----------------------------------------------------------------------------------


def launch(
    x: Tensor, shift: Tensor, scale: Tensor, split: int, out: Quant | None = None, *, arch: int,
    empty: Empty | None = None, tile: Tile | None = None,
) -> tuple[Activation, list[Launch]]:  # fmt: skip
    """The output and the launches that fill it; `empty` gives the output's buffers, `tile` overrules the table."""
    B, L, D = x.shape
    split = split if shift.shape[1] == 2 else 0
    y = outputs(out, (B, L, D), x.dtype, empty or fresh(x.device))
    format = out.format if out else "dense"
    t = tile or pick(D, format, arch)
    grid = (-(-split // t.rows) + -(-(L - split) // t.rows), B)
    args = (
        x, shift, scale,
        x.stride(0), x.stride(1),
        shift.stride(0), shift.stride(1) * (shift.shape[1] - 1),  # one stream: its row for all
        scale.stride(0), scale.stride(1) * (scale.shape[1] - 1),
        *pointers(y, out),
        L, split,
    )  # fmt: skip
    constants = {
        "D": D, "EPS": EPS, "FORMAT": format, "LARGEST": largest(out),
        "PTX": has_e2m1(x.device, arch), "ROWS": t.rows, "BLOCK_D": power_of_two(D),
    }  # fmt: skip
    return y, [Launch(_norm_modulate_kernel, grid, args, constants | {"num_warps": t.warps, "num_stages": 1})]


def configurations(arch: int) -> Iterator[Configuration]:
    D = 3072
    x: Any = torch.empty(1, 4608, D, dtype=torch.bfloat16, device="meta")
    mods: Any = torch.empty(1, 2, 6, D, dtype=torch.bfloat16, device="meta")
    for format in ("bf16", "fp8", "nvfp4") if arch >= 100 else ("bf16", "fp8"):
        out = None if format == "bf16" else Quant(format, "row")
        t = pick(D, out.format if out else "dense", arch)
        run = launch(x, mods[:, :, 0], mods[:, :, 1], 512, out, arch=arch)[1][0]
        yield Configuration("norm_modulate", format, f"D={D} {t.rows} row w{t.warps}", run, "", None, occupancy=5)


# --- cost -------------------------------------------------------------------------------------


def cost(x: Tensor, shift: Tensor, scale: Tensor, y: Activation) -> tuple[int, int]:
    """(flops, bytes) of one call."""
    return 0, x.nbytes + shift.nbytes + scale.nbytes + nbytes(y)
