"""Plain projections in Triton: streams of their own width into one joint sequence, against torch in float64."""

import pytest
import torch
from accuracy import Canaries, assert_as_good_as_eager, run
from products import KINDS, activation, layer, noise, product, small

from fluxkiln.kernels import linear as op
from fluxkiln.kernels.formats import Activation
from fluxkiln.kernels.layers import Streams
from fluxkiln.kernels.tiles import Tile


def check(xs: list[Activation], streams: Streams, arch: int, tile: Tile | None) -> torch.Tensor:
    packed = op.pack(streams)
    op.check(xs, packed)
    assert op.refuse(xs, packed, arch=arch) is None
    canaries = Canaries()
    got = run(op.launch(xs, packed, arch=arch, tile=tile, empty=canaries), canaries)
    assert got.dtype == torch.bfloat16
    want = torch.cat([product(x, linear) for x, linear in zip(xs, streams, strict=True)], dim=1)
    assert_as_good_as_eager(got, op.reference(xs, streams), want)
    return got


@pytest.mark.parametrize("arch", [89, 90])
def test_text_and_image_embedders(arch: int):
    """A narrow and a wide stream, of unlike lengths, side by side in the output."""
    streams = Streams((layer("bf16", 80, 4096)[0], layer("bf16", 80, 64)[0]))
    check([noise(2, 21, 4096).bfloat16(), noise(2, 40, 64).bfloat16()], streams, arch, small("bf16"))


def test_a_stream_may_be_empty():
    xs = [noise(2, 0, 64).bfloat16(), noise(2, 20, 64).bfloat16()]
    streams = Streams((layer("bf16", 48, 64)[0], layer("bf16", 48, 64)[0]))
    check(xs, streams, 90, None)
    assert len(op.launch(xs, op.pack(streams), arch=90)[1]) == 1


@pytest.mark.parametrize("rank", [0, 32])
@pytest.mark.parametrize(("arch", "format", "accumulate"), KINDS)
def test_every_format(arch: int, format: str, accumulate: str, rank: int):
    streams = Streams(layer(format, 48, k, 1, accumulate, rank)[0] for k in (160, 64))
    xs = [activation(noise(2, n, k), format, accumulate, bool(rank)) for n, k in ((21, 160), (13, 64))]
    check(xs, streams, arch, small(format))


@pytest.mark.parametrize(("arch", "format", "accumulate"), KINDS)
def test_the_shipped_tiles(arch: int, format: str, accumulate: str):
    for tile in op.TILES[arch, format, accumulate]:
        x = activation(noise(1, 40, 160), format, accumulate)
        check([x], layer(format, 144, 160, 1, accumulate), arch, tile)


@pytest.mark.parametrize("arch", [89, 90, 100, 120])
def test_the_velocity_is_64_wide(arch: int):
    """The tile that the table gives it, over a column of activations cut out of a longer sequence."""
    problem = op.matmul.problem(op.OP, op.pack(layer("bf16", 64, 3072))[0], (4096,), arch)
    assert op.pick(problem).n == 64
    check([noise(1, 90, 128).bfloat16()[:, 21:]], layer("bf16", 64, 128), arch, None)


def test_an_image_of_a_batch_is_what_it_is_alone():
    streams = Streams((layer("bf16", 48, 128)[0], layer("bf16", 48, 64)[0]))
    xs = [noise(3, 21, 128).bfloat16(), noise(3, 40, 64).bfloat16()]
    together = check(xs, streams, 90, small("bf16"))
    assert torch.equal(check([x[1:2] for x in xs], streams, 90, small("bf16")), together[1:2])


def test_bad_calls_and_refusals():
    streams, x = layer("bf16", 32, 64, 2), noise(1, 8, 64).bfloat16()
    with pytest.raises(ValueError, match="2 streams need as many inputs, got 1"):
        op.check([x], streams)
    with pytest.raises(ValueError, match="takes K = 64, got 48"):
        op.check([x, x[..., :48]], streams)
    assert "the weight is fp8" in op.refuse([x, x], op.pack(layer("fp8", 32, 64, 2)), arch=90)


def test_cost_counts_each_operand_once():
    streams = Streams((layer("bf16", 32, 128)[0], layer("bf16", 32, 64)[0]))
    xs = [noise(2, 3, 128).bfloat16(), noise(2, 5, 64).bfloat16()]
    flops, moved = op.cost(xs, op.pack(streams), op.reference(xs, streams))
    assert flops == 2 * 2 * 32 * (3 * 128 + 5 * 64)
    assert moved == 2 * (2 * (3 * 128 + 5 * 64) + 32 * 192 + 2 * 8 * 32) + 2 * 32 * 4
