"""Down-projection, gate and residual in Triton, one input and two, against torch in float64."""

import pytest
import torch
from accuracy import assert_as_good_as_eager, run, values
from products import AWKWARD, KINDS, activation, awkward, joint, layer, noise, small, with_row_scale
from torch import Tensor

from fluxkiln.kernels import linear_gate_residual as op
from fluxkiln.kernels.formats import Activation, columns, dequantize
from fluxkiln.kernels.layers import Streams
from fluxkiln.kernels.packed import pack
from fluxkiln.kernels.tiles import Tile


def gates(batch: int, streams: int, n: int) -> Tensor:
    """`[B, S, N]` as the graph cuts it out of all modulations: strided over B and S."""
    return noise(batch, streams, 6, n, seed=5).bfloat16()[:, :, 2]


def truth(xs: list[Activation], streams: Streams, gate: Tensor, residual: Tensor, split: int) -> Tensor:
    if len(xs) == 1:
        y = joint(xs[0], streams, split)
    else:  # of one stream: the products of both inputs
        weight, k = streams[0].weight, xs[0].shape[-1]
        parts = columns(weight, 0, k), columns(weight, k, k + xs[1].shape[-1])
        parts = [p.double() if isinstance(p, Tensor) else dequantize(p, torch.float64) for p in parts]
        y = sum(values(x) @ p.T for x, p in zip(xs, parts, strict=True)) + streams[0].bias.double()
        if side := streams[0].low_rank:
            dense = torch.cat([x.double() if isinstance(x, Tensor) else x.dense.double() for x in xs], dim=-1)
            y = y + dense @ side.down.double().T @ side.up.double().T
    rows = torch.arange(y.shape[1]) >= split if len(streams) == 2 else torch.zeros(y.shape[1], dtype=torch.long)
    return residual.double() + gate.double()[:, rows.long()] * y


def launched(
    xs: list[Activation], streams: Streams, gate: Tensor, residual: Tensor, split: int, arch: int, tile: Tile
) -> Tensor:
    packed = pack(streams)
    op.check(xs, packed, gate, residual, split)
    assert op.refuse(xs, packed, gate, residual, split, arch=arch) is None
    held = torch.full((3, *residual.shape[1:]), torch.nan, dtype=residual.dtype).repeat(residual.shape[0], 1, 1)
    buffer = held[1 : 1 + residual.shape[0]]  # NaN images on both sides
    buffer.copy_(residual)
    got = run(op.launch(xs, packed, gate, buffer, split, arch=arch, tile=tile))
    assert got.data_ptr() == buffer.data_ptr(), "the residual is the output"
    assert held[[0, *range(1 + len(residual), len(held))]].isnan().all(), "wrote outside of the output"
    return got


def check(
    xs: list[Activation], streams: Streams, split: int, arch: int, tile: Tile, residual: Tensor | None = None
) -> None:
    batch, length, n = *xs[0].shape[:2], streams[0].bias.shape[0]
    residual = noise(batch, length, n, seed=6).bfloat16() if residual is None else residual
    gate = gates(batch, len(streams), n)
    got = launched(xs, streams, gate, residual, split, arch, tile)
    eager = op.reference(xs, streams, gate, residual, split)
    assert_as_good_as_eager(got, eager, truth(xs, streams, gate, residual, split))


@pytest.mark.parametrize(("arch", "format", "accumulate"), KINDS)
def test_two_streams(arch: int, format: str, accumulate: str):
    xs = [activation(noise(2, 50, 256), format, accumulate)]
    check(xs, layer(format, 80, 256, 2, accumulate), 21, arch, small(format))


@pytest.mark.parametrize("rank", [0, 32])
@pytest.mark.parametrize(("arch", "format", "accumulate"), KINDS)
def test_two_inputs_with_scales_of_their_own(arch: int, format: str, accumulate: str, rank: int):
    """The second one's values a thousand times the first's; neither a multiple of a step of K."""
    keep = bool(rank)
    xs = [activation(scale * noise(2, 40, k), format, accumulate, keep) for scale, k in ((1e-2, 160), (10, 416))]
    check(xs, layer(format, 80, 576, 1, accumulate, rank), 0, arch, small(format))


@pytest.mark.parametrize("factor", [2.0**-40, 2.0**40])
def test_scales_of_two_inputs_as_unlike_as_can_be(factor: float):
    xs = [activation(noise(1, 20, 64), "fp8"), activation(noise(1, 20, 128), "fp8")]
    check([with_row_scale(xs[0], factor), xs[1]], layer("fp8", 32, 192), 0, 90, small("fp8"))
    check([xs[0], with_row_scale(xs[1], factor)], layer("fp8", 32, 192), 0, 90, small("fp8"))


@pytest.mark.parametrize(("format", "arch"), [("bf16", 90), ("fp8", 89), ("fp8", 90), ("nvfp4", 120)])
def test_a_whole_single_block(format: str, arch: int):
    """K = 3072 + 12288, of one sign: all of what a single block sums."""
    streams = layer(format, 32, 15360, weight=noise(32, 15360, seed=1).abs() / 15360)
    xs = [activation(awkward("one sign", 1, 20, k), format) for k in (3072, 12288)]
    check(xs, streams, 0, arch, small(format))


@pytest.mark.parametrize("kind", AWKWARD)
@pytest.mark.parametrize(("format", "arch"), [("bf16", 89), ("fp8", 90), ("nvfp4", 120)])
def test_awkward_inputs(format: str, arch: int, kind: str):
    check([activation(awkward(kind, 1, 20, 3072), format)], layer(format, 32, 3072), 0, arch, small(format))


def test_a_large_residual_and_a_zero_row():
    """The rows of the residual that are large are rounded at their size, the others at theirs."""
    residual = (noise(1, 40, 80) * torch.tensor([1e4, 1.0, 0.0, 1e-4]).repeat(10)[:, None]).bfloat16()
    check([noise(1, 40, 64).bfloat16()], layer("bf16", 80, 64), 0, 90, small("bf16"), residual)


@pytest.mark.parametrize(("arch", "format", "accumulate"), KINDS)
def test_the_shipped_tiles(arch: int, format: str, accumulate: str):
    for tile in op.TILES[arch, format, accumulate]:
        xs = [activation(noise(1, 40, 160), format, accumulate), activation(noise(1, 40, 192), format, accumulate)]
        check(xs, layer(format, 144, 352, 1, accumulate), 0, arch, tile)


@pytest.mark.parametrize("format", ["bf16", "fp8"])
def test_an_image_of_a_batch_is_what_it_is_alone(format: str):
    xs, streams = [activation(noise(3, 50, 256), format)], layer(format, 48, 256, 2)
    gate, residual = gates(3, 2, 48), noise(3, 50, 48, seed=6).bfloat16()
    together = launched(xs, streams, gate, residual, 21, 90, small(format))
    alone = launched([xs[0][1:2]], streams, gate[1:2], residual[1:2], 21, 90, small(format))
    assert torch.equal(alone, together[1:2])


def test_bad_calls_and_refusals():
    streams, x = layer("bf16", 32, 64, 2), noise(1, 8, 64).bfloat16()
    gate, residual = gates(1, 2, 32), noise(1, 8, 32).bfloat16()
    with pytest.raises(ValueError, match=r"gate must be \[1, 2, 32\], got \[1, 1, 32\]"):
        op.check([x], streams, gate[:, :1], residual, 3)
    with pytest.raises(ValueError, match=r"residual must be \[1, 8, 32\], got \[1, 7, 32\]"):
        op.check([x], streams, gate, residual[:, :7], 3)
    packed = pack(streams)
    assert "residual must be contiguous" in op.refuse([x], packed, gate, residual.mT.contiguous().mT, 3, arch=90)
    assert op.refuse([x], packed, gate, residual, 3, arch=90) is None


def test_cost_counts_each_operand_once():
    xs, streams = [noise(2, 8, 16).bfloat16(), noise(2, 8, 48).bfloat16()], layer("bf16", 32, 64)
    gate, residual = gates(2, 1, 32), noise(2, 8, 32).bfloat16()
    flops, moved = op.cost(xs, pack(streams), gate, residual)
    assert flops == 2 * 2 * 8 * 32 * 64
    assert moved == 2 * 8 * 64 * 2 + 32 * 64 * 2 + 32 * 4 + 2 * (2 * 8 * 32 * 2) + 2 * 32 * 2
