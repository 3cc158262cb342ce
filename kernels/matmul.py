"""The matrix product under the linear operations: tiles, the loop over K, and what every epilogue starts from.

    y[b, l, n] = x_scale[b, l] * w_scale[s, n] * sum_k x[b, l, k] * w[s, n, k] + (t upᵀ)[b, l, n] + bias[s, n]

    x   [B, L, K]            codes; text rows [:split] are stream s = 0, the others the last stream; K contiguous
    w   [S * P * N, K]       codes; the streams stacked, in each P parts (q, k and v, or 1) of N outputs
    t   [B, L, R]            low-rank side input: x before quantisation times downᵀ, made by a launch of its own

    bf16    codes are the values, no scales
    fp8     e4m3 codes, a scale per row of x and of w
    nvfp4   e2m1 codes in pairs, e4m3 scales per 16 of them, and a scale per row of x and of w

A tile is BLOCK_M rows of one image and one stream by BLOCK_N outputs of one part; it never depends on what else is in
the batch, so a row of a batch comes out as it does alone. There is no split-K and no atomic: one program owns a tile.
An operation adds an epilogue: a Triton function that takes the tile's fp32 values y and stores what it makes of them.

Precision: exact products; summed in fp32 by the tensor core (Hopper's and Ada's FP8 accumulators keep fewer bits than
fp32: `promote128` adds sums of 128 up in fp32 outside, `f16` takes fp16 sums at twice the rate on GeForce); scales,
side input and bias in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fluxkiln.kernels.compile import INSTRUCTIONS, Configuration
from fluxkiln.kernels.formats import Activation, Fp8, Nvfp4, dense
from fluxkiln.kernels.language import Launch, TensorDescriptor, jit, tl
from fluxkiln.kernels.packed import Packed
from fluxkiln.kernels.quantize import Empty, nbytes
from fluxkiln.kernels.tiles import MULTIPROCESSORS, Problem, Tile, count

# --- launch -----------------------------------------------------------------------------------


def problem(op: str, layer: Packed, rows: tuple[int, ...], arch: int, out: str = "bf16") -> Problem:
    """What `tiles.pick` chooses by; `rows` of each stream of one image."""
    return Problem(op, arch, layer.format, rows, layer.n, layer.k, layer.parts, layer.accumulate, out)


def streams_of(split: int, length: int, layer: Packed) -> tuple[int, ...]:
    """Rows of each stream of one image."""
    return (split, length - split) if layer.streams == 2 else (length,)


def plan(
    epilogue: Any,
    tile: Tile,
    xs: Sequence[Activation],
    layer: Packed,
    split: int,
    tensors: tuple[Tensor | int | None, ...],
    constants: tuple[Any, ...] = (),
    side: Tensor | None = None,
    *,
    arch: int,
) -> Launch:
    """The launch that multiplies the inputs, side by side on K, with a layer, and gives the tiles to `epilogue`.

    Args:
        epilogue: Triton function `(y, b, row, mask_m, offs_n, mask_n, stream, part, L, split, N, *tensors, constants)`.
        split: rows of the text stream; 0 for a layer of one stream.
        side: `t [B, L, R]` of the low-rank branch.
    """
    B, L, _ = xs[0].shape
    tma = arch >= 90
    packed = 1 if layer.block_scale is None else 2
    x, x_block, x_scale, stride_xb, stride_xl = _operand(xs[0], tile, tma)
    x2, x2_block, x2_scale, stride_x2b, stride_x2l = _operand(xs[1], tile, tma) if len(xs) == 2 else _NOTHING
    tiles = B * count(tile, streams_of(split, L, layer), layer.n, layer.parts)
    weight = TensorDescriptor.from_tensor(layer.weight, [tile.n, tile.k // packed]) if tma else layer.weight
    args = (
        x, x_block, x_scale,
        x2, x2_block, x2_scale,
        weight, layer.block_scale, layer.scale, layer.bias,
        side, layer.up,
        tensors,
        stride_xb, stride_xl, stride_x2b, stride_x2l, layer.weight.stride(0),
        tiles, L, split, layer.n, xs[0].shape[-1], xs[1].shape[-1] if len(xs) == 2 else 0,
    )  # fmt: skip
    options = {
        "EPILOGUE": epilogue, "CONSTANTS": constants,
        "STREAMS": layer.streams, "PARTS": layer.parts, "RANK": 0 if layer.up is None else layer.up.shape[1],
        "ACCUMULATE": layer.accumulate, "UNIT_SCALES": arch == 120 and layer.format == "fp8", "TMA": tma,
        "EVEN_K": all(x.shape[-1] % tile.k == 0 for x in xs),
        "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP_M": tile.group,
        "PIECES": tile.pieces, "PERSISTENT": tile.persistent, "SPECIALIZE": tile.specialize,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    programs = min(tiles, MULTIPROCESSORS[arch] * tile.blocks) if tile.persistent else tiles
    return Launch(kernel, (programs,), args, options)


def side_input(
    xs: Sequence[Activation], layer: Packed, split: int, *, arch: int, empty: Empty
) -> tuple[Tensor | None, list[Launch]]:
    """`t [B, L, R]` for a layer with a low-rank branch, and the launch that makes it."""
    if layer.down is None:
        return None, []
    B, L, _ = xs[0].shape
    t = empty("side", (B, L, layer.down.n), layer.dtype)
    rows = [dense(x) for x in xs]
    return t, [plan(linear, side_tile(layer.down.n), rows, layer.down, split, (t, t.stride(0)), arch=arch)]


def side_tile(rank: int) -> Tile:
    """Memory-bound: it reads x once, in rows of 128 bytes, and the more of them are under way the better."""
    return Tile(128, rank, 64, 4, 4)


def cost(xs: Sequence[Activation], layer: Packed, moved: int) -> tuple[int, int]:
    """(flops, bytes) of a product; `moved` are the bytes that its epilogue reads and writes."""
    B, L, _ = xs[0].shape
    weights = sum(t.nbytes for t in (layer.weight, layer.block_scale, layer.scale, layer.bias) if t is not None)
    outputs = layer.weight.shape[0] // layer.streams
    return 2 * B * L * outputs * layer.k, weights + sum(map(nbytes, xs)) + moved


Operand = tuple[Any, Tensor | None, Tensor | None, int, int]  # codes, block scales, row scales, strides of the codes

_NOTHING: Operand = (None, None, None, 0, 0)


def _operand(x: Activation, tile: Tile, tma: bool) -> Operand:
    B, L, _ = x.shape
    codes = x if isinstance(x, Tensor) else x.data
    scale = None if isinstance(x, Tensor) else x.row_scale if isinstance(x, Fp8) else x.global_scale
    block = x.block_scale if isinstance(x, Nvfp4) else None
    width = tile.k // 2 if block is not None else tile.k
    source = TensorDescriptor.from_tensor(codes, [1, tile.m, width]) if tma else codes
    return source, block, None if scale is None else scale.expand(B, L).contiguous(), *codes.stride()[:2]


# --- shipped configurations -------------------------------------------------------------------


def configuration(op: str, arch: int, layer: Packed, tile: Tile, launches: list[Launch], note: str) -> Configuration:
    """What `compile` holds the last of an operation's launches to."""
    accumulate = "" if layer.accumulate == "f32" else f" {layer.accumulate}"
    expected = INSTRUCTIONS[arch, layer.format]
    if layer.accumulate == "f16":
        expected = expected.replace(r"\.f32", r"\.f16")
    return Configuration(
        op=op,
        format=layer.format + accumulate,
        name=f"N={layer.n} K={layer.k} {note} {tile}",
        launch=launches[-1],
        instruction=expected,
        copies="tma" if arch >= 90 else "cp.async",
        occupancy=tile.blocks,
    )


# --- kernel -----------------------------------------------------------------------------------


@jit
def _locate(
    tile, L, split, N,
    STREAMS: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Image, stream, part, first row, end of the stream's rows, first output within the part."""
    text_tiles = tl.cdiv(split, BLOCK_M) if STREAMS == 2 else 0
    tiles_m = text_tiles + tl.cdiv(L - split, BLOCK_M)
    part_tiles = tl.cdiv(N, BLOCK_N)
    tiles_n = PARTS * part_tiles
    b = tile // (tiles_m * tiles_n)
    tile = tile % (tiles_m * tiles_n)
    # Programs that run together cover GROUP_M row tiles by a few column tiles, so that L2 serves both operands.
    first_m = tile // (GROUP_M * tiles_n) * GROUP_M
    height = min(tiles_m - first_m, GROUP_M)
    tile = tile % (GROUP_M * tiles_n)
    tile_m = first_m + tile % height
    tile_n = tile // height
    part = tile_n // part_tiles
    n = tile_n % part_tiles * BLOCK_N
    image = tile_m >= text_tiles
    stream = image.to(tl.int32) if STREAMS == 2 else 0
    row = tl.where(image, split + (tile_m - text_tiles) * BLOCK_M, tile_m * BLOCK_M)
    end = tl.where(image, L, split)
    return b, stream, part, row, end, n


@jit
def _product(
    acc, x, x_block_ptr, w, w_block_ptr,
    stride_xb, stride_xl, stride_wn,
    b, row, L, n, rows_w, k_w, K,              # rows [row, ...) of image b; rows [n, ...) of w, its columns from k_w
    ACCUMULATE: tl.constexpr, UNIT_SCALES: tl.constexpr, TMA: tl.constexpr, EVEN_K: tl.constexpr,
    SPECIALIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_M, BLOCK_N] and the sum over K of x times w.

    Rows past a stream's end are those of its neighbour, or zeros (by descriptor) or the last row (by pointer) at the
    end of an image: they are computed, and never stored.
    """
    PACKED: tl.constexpr = 1 if x_block_ptr is None else 2  # codes per element
    WIDTH: tl.constexpr = BLOCK_K // PACKED
    rows = tl.minimum(row + tl.arange(0, BLOCK_M), L - 1)
    outputs = tl.minimum(n + tl.arange(0, BLOCK_N), rows_w - 1)
    if not TMA:
        offs = tl.arange(0, WIDTH)
        x_ptrs = x + b.to(tl.int64) * stride_xb + rows[:, None] * stride_xl + offs[None, :]
        w_ptrs = w + outputs[:, None] * stride_wn + k_w // PACKED + offs[None, :]
    if x_block_ptr is not None:
        offs_block = tl.arange(0, BLOCK_K // 16)
        x_block_ptrs = x_block_ptr + b.to(tl.int64) * (stride_xb // 8) + rows[:, None] * (stride_xl // 8) + offs_block
        w_block_ptrs = w_block_ptr + outputs[:, None] * (stride_wn // 8) + k_w // 16 + offs_block[None, :]

    for k in tl.range(0, K, BLOCK_K, warp_specialize=SPECIALIZE):
        if TMA:
            x_k = x.load([b, row, k // PACKED]).reshape(BLOCK_M, WIDTH)
            w_k = w.load([n, (k_w + k) // PACKED]).T
        elif EVEN_K:
            x_k = tl.load(x_ptrs + k // PACKED)
            w_k = tl.load(w_ptrs + k // PACKED).T
        else:
            mask_k = (offs < (K - k) // PACKED)[None, :]
            x_k = tl.load(x_ptrs + k // PACKED, mask=mask_k, other=0.0)
            w_k = tl.load(w_ptrs + k // PACKED, mask=mask_k, other=0.0).T
        if x_block_ptr is not None:
            if EVEN_K:
                x_block, w_block = tl.load(x_block_ptrs + k // 16), tl.load(w_block_ptrs + k // 16)
            else:
                mask_block = (offs_block < (K - k) // 16)[None, :]
                x_block = tl.load(x_block_ptrs + k // 16, mask=mask_block, other=0.0)
                w_block = tl.load(w_block_ptrs + k // 16, mask=mask_block, other=0.0)
            acc = tl.dot_scaled(x_k, x_block, "e2m1", w_k, w_block, "e2m1", acc)
        elif UNIT_SCALES:
            # Scales of 2**(127 - 127): sm_120 multiplies FP8 at full rate only through the block-scaled instruction.
            x_unit = tl.full((BLOCK_M, BLOCK_K // 32), 127, tl.uint8)
            w_unit = tl.full((BLOCK_N, BLOCK_K // 32), 127, tl.uint8)
            if ACCUMULATE == "promote128":
                acc += tl.dot_scaled(x_k, x_unit, "e4m3", w_k, w_unit, "e4m3")
            else:
                acc = tl.dot_scaled(x_k, x_unit, "e4m3", w_k, w_unit, "e4m3", acc)
        elif ACCUMULATE == "promote128":
            # Without the limit the compiler folds the addition back into the tensor core.
            acc += tl.dot(x_k, w_k, max_num_imprecise_acc=BLOCK_K)
        elif ACCUMULATE == "f16":
            acc += tl.dot(x_k, w_k, out_dtype=tl.float16).to(tl.float32)
        else:
            acc = tl.dot(x_k, w_k, acc)
    return acc


@jit
def cut(acc, PIECES: tl.constexpr):
    """The tile cut into 1, 2 or 4 pieces along N."""
    if PIECES == 1:
        pieces = (acc,)
    else:
        left, right = tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, acc.shape[1] // 2)), (0, 2, 1)))
        pieces = cut(left, PIECES // 2) + cut(right, PIECES // 2)
    return pieces


@jit
def _finish(
    acc, x_scale_ptr, w_scale_ptr, bias_ptr, t_ptr, up_ptr,
    rows, mask_m, outputs, mask_n,             # numbers in [B * L] and [S * P * N]
    RANK: tl.constexpr,
):  # fmt: skip
    """Values of the codes' products: scales, low-rank side input, bias."""
    if x_scale_ptr is not None:
        acc *= tl.load(x_scale_ptr + rows, mask=mask_m, other=0.0)[:, None]
        acc *= tl.load(w_scale_ptr + outputs, mask=mask_n, other=0.0)[None, :]
    if RANK:
        offs_r = tl.arange(0, RANK)
        t = tl.load(t_ptr + rows[:, None] * RANK + offs_r[None, :], mask=mask_m[:, None], other=0.0)
        up = tl.load(up_ptr + outputs[:, None] * RANK + offs_r[None, :], mask=mask_n[:, None], other=0.0)
        acc = tl.dot(t, up.T, acc)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + outputs, mask=mask_n, other=0.0)[None, :]
    return acc


@jit
def linear(
    y, b, row, mask_m, offs_n, mask_n, stream, part, L, split, N,
    y_ptr, stride_yb,                          # [B, L, N]
    CONSTANTS: tl.constexpr,
):  # fmt: skip
    """The plainest epilogue: values as they are."""
    rows = row + tl.arange(0, y.shape[0])
    y_ptrs = y_ptr + b.to(tl.int64) * stride_yb + rows[:, None] * N + offs_n[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


def _name(specialization: Any) -> str:
    """What a profiler shows: the operation, not this file."""
    return specialization.constants["EPILOGUE"].__name__.removeprefix("_")


@jit(do_not_specialize=["tiles", "L", "split"], repr=_name)
def kernel(
    x, x_block_ptr, x_scale_ptr,               # [B, L, K] descriptor or pointer, [B, L, K / 16], [B, L]
    x2, x2_block_ptr, x2_scale_ptr,            # a second input, beside the first on K, or None
    w, w_block_ptr, w_scale_ptr, bias_ptr,     # [S * P * N, K + K2], [.., (K + K2) / 16], [..], [..]
    t_ptr, up_ptr,                             # [B, L, R], [S * P * N, R], or None
    tensors,                                   # the epilogue's own: pointers and strides
    stride_xb, stride_xl, stride_x2b, stride_x2l, stride_wn,
    tiles, L, split, N, K, K2,
    EPILOGUE: tl.constexpr, CONSTANTS: tl.constexpr,
    STREAMS: tl.constexpr, PARTS: tl.constexpr, RANK: tl.constexpr, ACCUMULATE: tl.constexpr,
    UNIT_SCALES: tl.constexpr, TMA: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    PIECES: tl.constexpr, PERSISTENT: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    # Persistent: the loads of a program's next tile are under way while it stores the last.
    count = tl.cdiv(tiles - tl.program_id(0), tl.num_programs(0)) if PERSISTENT else 1
    for i in tl.range(0, count, flatten=PERSISTENT):
        tile = tl.program_id(0) + i * tl.num_programs(0)
        b, stream, part, row, end, n = _locate(tile, L, split, N, STREAMS, PARTS, BLOCK_M, BLOCK_N, GROUP_M)
        base = (stream * PARTS + part) * N  # of the part's outputs in w

        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc = _product(
            acc, x, x_block_ptr, w, w_block_ptr, stride_xb, stride_xl, stride_wn,
            b, row, L, base + n, STREAMS * PARTS * N, 0, K,
            ACCUMULATE, UNIT_SCALES, TMA, EVEN_K, SPECIALIZE, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        mask_m = row + tl.arange(0, BLOCK_M) < end
        rows = b * L + row + tl.arange(0, BLOCK_M)
        scale_ptr = x_scale_ptr
        if x2 is not None:
            if x_scale_ptr is not None:  # from units of the first input's row scale to the second's
                scale = tl.load(x_scale_ptr + rows, mask=mask_m, other=1.0)
                acc *= (scale / tl.load(x2_scale_ptr + rows, mask=mask_m, other=1.0))[:, None]
                scale_ptr = x2_scale_ptr
            acc = _product(
                acc, x2, x2_block_ptr, w, w_block_ptr, stride_x2b, stride_x2l, stride_wn,
                b, row, L, base + n, STREAMS * PARTS * N, K, K2,
                ACCUMULATE, UNIT_SCALES, TMA, EVEN_K, SPECIALIZE, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip

        # In two halves where a whole tile of epilogue does not fit the registers.
        pieces = cut(acc, PIECES)
        for piece in tl.static_range(PIECES):
            y = pieces[piece]
            offs_n = n + piece * (BLOCK_N // PIECES) + tl.arange(0, BLOCK_N // PIECES)
            mask_n = offs_n < N
            y = _finish(y, scale_ptr, w_scale_ptr, bias_ptr, t_ptr, up_ptr, rows, mask_m, base + offs_n, mask_n, RANK)
            EPILOGUE(y, b, row, mask_m, offs_n, mask_n, stream, part, L, split, N, *tensors, CONSTANTS)
