"""Up-projection and GELU in Triton, quantised by bound, against torch in float64."""

import dataclasses

import pytest
import torch
from accuracy import SQNR, Canaries, assert_as_good_as_eager, run, sqnr, values
from products import AWKWARD, KINDS, activation, awkward, joint, layer, noise, small
from torch import Tensor

from fluxkiln.kernels import linear_gelu as op
from fluxkiln.kernels.formats import F16_PEAK, Activation, Fp8, Nvfp4, Quant, dequantize
from fluxkiln.kernels.layers import Streams
from fluxkiln.kernels.packed import pack
from fluxkiln.kernels.tiles import Tile

OUTPUTS = {
    "bf16": None,
    "fp8": Quant("fp8", "bound"),
    "fp8 and bf16": Quant("fp8", "bound", keep=True),
    "fp8 for fp16 sums": Quant("fp8", "bound", peak=F16_PEAK),
    "fp8 static": Quant("fp8", "static", torch.tensor(0.02)),
    "nvfp4": Quant("nvfp4", "bound"),
    "nvfp4 and bf16": Quant("nvfp4", "bound", keep=True),
    "nvfp4 static": Quant("nvfp4", "static", torch.tensor(0.002)),
}


def truth(x: Activation, streams: Streams, split: int) -> Tensor:
    return torch.nn.functional.gelu(joint(x, streams, split), approximate="tanh")


def launched(x: Activation, streams: Streams, split: int, out: Quant | None, arch: int, tile: Tile) -> Activation:
    packed = pack(streams)
    op.check(x, packed, split, out)
    assert op.refuse(x, packed, split, out, arch=arch) is None
    canaries = Canaries()
    return run(op.launch(x, packed, split, out, arch=arch, tile=tile, empty=canaries), canaries)


@pytest.mark.parametrize("out", OUTPUTS.values(), ids=OUTPUTS.keys())
@pytest.mark.parametrize(("format", "arch"), [("fp8", 90), ("nvfp4", 120)])
def test_every_output(format: str, arch: int, out: Quant | None):
    streams, split = layer(format, 96, 256, 2), 21
    x = activation(noise(2, 50, 256), format)
    got, eager = launched(x, streams, split, out, arch, small(format)), op.reference(x, streams, split, out)
    want = truth(x, streams, split)
    assert_as_good_as_eager(got, eager, want)
    if out is None:
        assert got.dtype == torch.bfloat16
        return
    assert sqnr(got, want) > SQNR[out.format] - 1  # a bound is looser than the largest magnitude
    assert type(got) is (Fp8 if out.format == "fp8" else Nvfp4)
    scale = "row_scale" if out.format == "fp8" else "global_scale"
    torch.testing.assert_close(getattr(got, scale), getattr(eager, scale).expand(2, 50))
    assert dequantize(got).abs().max() > 0
    if out.format == "fp8":
        assert got.data.float().abs().max() <= out.peak
    if out.keep:
        assert_as_good_as_eager(got.dense, op.reference(x, streams, split), want)
    else:
        assert got.dense is None


@pytest.mark.parametrize(("arch", "format", "accumulate"), KINDS)
def test_the_shipped_tiles(arch: int, format: str, accumulate: str):
    """As they are shipped, but for a short K: what the compiled tier compiles is right."""
    streams = layer(format, 144, 160, 1, accumulate)
    x = activation(noise(1, 40, 160), format, accumulate)
    out = None if format == "bf16" else Quant(format, "bound")
    for tile in op.TILES[arch, format, accumulate]:
        got, eager = launched(x, streams, 0, out, arch, tile), op.reference(x, streams, 0, out)
        assert_as_good_as_eager(got, eager, truth(x, streams, 0))


@pytest.mark.parametrize("kind", AWKWARD)
@pytest.mark.parametrize(("format", "arch"), [("bf16", 89), ("fp8", 90), ("nvfp4", 120)])
def test_awkward_inputs(format: str, arch: int, kind: str):
    streams = layer(format, 32, 3072)
    x = activation(awkward(kind, 1, 20, 3072), format)
    out = None if format == "bf16" else Quant(format, "bound")
    got, eager = launched(x, streams, 0, out, arch, small(format)), op.reference(x, streams, 0, out)
    assert_as_good_as_eager(got, eager, truth(x, streams, 0))


def test_gelu_far_out():
    """Where exp2 overflows or vanishes, gelu is 0 or x."""
    weight = torch.eye(32, 64)
    streams = layer("bf16", 32, 64, weight=weight)
    streams = Streams((dataclasses.replace(streams[0], bias=torch.zeros(32).bfloat16()),))
    x = torch.logspace(-4, 4, 64)[None, :, None].expand(1, 64, 64).clone()
    x[..., ::2] *= -1
    got = launched(x.bfloat16(), streams, 0, None, 90, small("bf16"))
    torch.testing.assert_close(got, torch.nn.functional.gelu(x.bfloat16()[..., :32], approximate="tanh"))
    assert (got[0, -8:, 0] == 0).all()


@pytest.mark.parametrize("out", OUTPUTS.values(), ids=OUTPUTS.keys())
def test_a_nan_never_becomes_a_number(out: Quant | None):
    (linear,) = layer("fp8", 32, 64)
    linear.bias[3] = torch.nan
    got = launched(activation(noise(1, 8, 64), "fp8"), Streams((linear,)), 0, out, 90, small("fp8"))
    assert values(got)[..., 3].isnan().all()


def test_no_row_exceeds_its_bound():
    """Saturation would hide it: held by the codes, which must stay within what the bound became."""
    streams = layer("fp8", 96, 256, 2)
    x = activation(awkward("rows of every size", 1, 50, 256), "fp8")
    bound = torch.cat([each.bound(rows) for each, rows in zip(streams, (x[:, :20], x[:, 20:]), strict=True)], dim=1)
    assert (truth(x, streams, 20).abs().amax(-1) <= 1.07 * bound).all()  # quantised x: each code up to 2**-4 off
    got = launched(x, streams, 20, Quant("fp8", "bound"), 90, small("fp8"))
    torch.testing.assert_close(got.row_scale * 448, bound)


def test_low_rank_with_quantised_output():
    streams = layer("nvfp4", 96, 256, 2, rank=32)
    x = activation(noise(2, 50, 256), "nvfp4", keep=True)
    out = Quant("nvfp4", "bound", keep=True)
    got, eager = launched(x, streams, 21, out, 120, small("nvfp4")), op.reference(x, streams, 21, out)
    assert_as_good_as_eager(got, eager, truth(x, streams, 21))


def test_an_image_of_a_batch_is_what_it_is_alone():
    streams, out = layer("fp8", 96, 256, 2), Quant("fp8", "bound", keep=True)
    x = activation(noise(3, 50, 256), "fp8")
    together = launched(x, streams, 21, out, 90, small("fp8"))
    alone = launched(x[1:2], streams, 21, out, 90, small("fp8"))
    for part in ("data", "row_scale", "dense"):
        a, b = (getattr(y, part).contiguous().view(torch.uint8) for y in (alone, together[1:2]))
        assert torch.equal(a, b), part


def test_bad_calls_and_refusals():
    streams = layer("fp8", 32, 64)
    x = activation(noise(1, 8, 64), "fp8")
    with pytest.raises(ValueError, match="rule is 'bound' or 'static'"):
        op.check(x, streams, 0, Quant("fp8", "row"))
    bound = Quant("fp8", "bound")
    assert "did not emit" in op.refuse(dataclasses.replace(x, row_norm=None), pack(streams), 0, bound, arch=90)
    dense = noise(1, 8, 64).bfloat16()
    assert "does not carry" in op.refuse(dense, pack(layer("bf16", 32, 64)), 0, bound, arch=90)
    assert "is for FP8" in op.refuse(dense, pack(layer("bf16", 32, 64, accumulate="f16")), 0, arch=89)


def test_cost_counts_each_operand_once():
    streams = layer("fp8", 32, 64, 2)
    x = activation(noise(2, 8, 64), "fp8")
    y = op.reference(x, streams, 3, Quant("fp8", "bound"))
    flops, moved = op.cost(x, pack(streams), y)
    assert flops == 2 * 2 * 8 * 32 * 64
    rows = 2 * 8
    assert moved == rows * 64 + 2 * rows * 4 + 2 * (32 * 64 + 2 * 32 * 4) + rows * 32 + rows * 4
