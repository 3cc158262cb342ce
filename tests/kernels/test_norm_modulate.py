"""LayerNorm and modulation in one Triton pass, against torch in float64."""

import dataclasses

import pytest
import torch
from accuracy import SQNR, Canaries, assert_as_good_as_eager, run, sqnr, values

from fluxkiln.kernels import norm_modulate as op
from fluxkiln.kernels.formats import Quant

OUTPUTS = {
    "bf16": None,
    "fp8": Quant("fp8", "row"),
    "nvfp4": Quant("nvfp4", "row", keep=True),
    "fp8 static": Quant("fp8", "static", torch.tensor(0.02)),
}


def awkward(B: int, L: int, D: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    """Rows take turns: ordinary, mean 30, one outlier of 1e4, constant, zeros, tiny."""
    x = torch.randn(B, L, D, generator=torch.Generator().manual_seed(seed))
    x[:, 1::6] += 30
    x[:, 2::6, D // 3] = 1e4
    x[:, 3::6] = -7.3
    x[:, 4::6] = 0
    x[:, 5::6] *= 1e-5
    return x.to(dtype)


def modulation(B: int, S: int, D: int, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> tuple:
    """shift and scale as views of all modulation vectors; the last image's text stream has scale -1."""
    mods = 0.5 * torch.randn(B, S, 6, D, generator=torch.Generator().manual_seed(seed))
    mods[-1, 0, 1] = -1
    return tuple(mods.to(dtype).unbind(2)[:2])


def truth(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, split: int) -> torch.Tensor:
    return op.reference(x.double(), shift.double(), scale.double(), split)


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    B: int
    L: int
    D: int
    split: int
    streams: int = 2


CASES = [
    Case("double block of dev, cut", 1, 14, 3072, 6),
    Case("single block, batch", 2, 7, 3072, 0, streams=1),
    Case("bundled model", 2, 13, 192, 7),
    Case("one token", 1, 1, 256, 0, streams=1),
    Case("no text", 1, 6, 256, 0),
    Case("no image", 1, 6, 256, 6),
    Case("odd width", 1, 6, 1008, 5),
]


@pytest.mark.parametrize("output", OUTPUTS.values(), ids=OUTPUTS.keys())
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_parity(case: Case, output: Quant | None):
    x = awkward(case.B, case.L, case.D)
    mods = modulation(case.B, case.streams, case.D)
    op.check(x, *mods, case.split, output)
    assert op.refuse(x, *mods, case.split, output) is None
    want, canaries = truth(x, *mods, case.split), Canaries()
    got = run(op.launch(x, *mods, case.split, output, arch=90, empty=canaries), canaries)
    assert_as_good_as_eager(got, op.reference(x, *mods, case.split, output), want)
    if output is None:
        return
    if output.rule == "row":
        assert sqnr(got, want) > SQNR[output.format]
        assert got.row_norm is not None
        assert torch.allclose(got.row_norm.double(), want.norm(dim=-1), rtol=1e-5)
    if output.keep:
        assert_as_good_as_eager(got.dense, op.reference(x, *mods, case.split), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes(dtype: torch.dtype):
    x, mods = awkward(1, 12, 192, dtype), modulation(1, 2, 192, dtype)
    got = run(op.launch(x, *mods, 5, arch=90))
    assert got.dtype == dtype
    assert_as_good_as_eager(got, op.reference(x, *mods, 5), truth(x, *mods, 5))


def test_a_long_sequence():
    x, mods = awkward(1, 4097, 64), modulation(1, 2, 64)
    got = run(op.launch(x, *mods, 512, Quant("fp8", "row"), arch=90, tile=op.Tile(32, 4)))
    want = truth(x, *mods, 512)
    assert_as_good_as_eager(got, op.reference(x, *mods, 512, Quant("fp8", "row")), want)


@pytest.mark.parametrize("output", [None, Quant("nvfp4", "row")], ids=["bf16", "nvfp4"])
def test_several_rows_in_a_program_never_mix_streams(output: Quant | None):
    x, mods = awkward(2, 13, 192), modulation(2, 2, 192)
    canaries = Canaries()
    got = run(op.launch(x, *mods, 5, output, arch=90, empty=canaries, tile=op.Tile(4, 2)), canaries)
    assert_as_good_as_eager(got, op.reference(x, *mods, 5, output), truth(x, *mods, 5))


def test_any_strides_over_images_and_rows():
    whole = awkward(3, 20, 192)
    mods = modulation(2, 1, 192)
    for x in (whole[:2, 4:], whole[1:, ::2], whole.transpose(0, 1).contiguous().transpose(0, 1)[:2]):
        got = run(op.launch(x, *mods, 0, arch=90))
        assert torch.equal(got, run(op.launch(x.contiguous(), *mods, 0, arch=90)))
        assert_as_good_as_eager(got, op.reference(x, *mods, 0), truth(x, *mods, 0))


@pytest.mark.parametrize("output", OUTPUTS.values(), ids=OUTPUTS.keys())
def test_an_image_of_a_batch_is_what_it_is_alone(output: Quant | None):
    x, mods = awkward(3, 9, 192), modulation(3, 2, 192)
    together = values(run(op.launch(x, *mods, 4, output, arch=90)))
    for i in range(3):
        alone = run(op.launch(x[i : i + 1], *(m[i : i + 1] for m in mods), 4, output, arch=90))
        assert torch.equal(values(alone)[0], together[i])


def test_bad_calls_say_what_was_expected():
    x, (shift, scale) = awkward(1, 4, 64), modulation(1, 2, 64)
    with pytest.raises(ValueError, match=r"shift must be \[1, 1 or 2, 64\], got \[1, 2, 32\]"):
        op.check(x, shift[..., :32], scale, 2, None)
    with pytest.raises(ValueError, match=r"scale is torch\.float32"):
        op.check(x, shift, scale.float(), 2, None)
    with pytest.raises(ValueError, match=r"split must be within 0\.\.4, got 5"):
        op.check(x, shift, scale, 5, None)
    with pytest.raises(ValueError, match="quantise its output by the rule 'row' or 'static'"):
        op.check(x, shift, scale, 2, Quant("fp8", "bound"))


def test_refusals_give_the_reason():
    x, mods = awkward(1, 4, 64), modulation(1, 2, 64)
    assert "float64" in op.refuse(x.double(), *mods, 2)
    assert "contiguous" in op.refuse(x.mT.contiguous().mT, *mods, 2)
    wide = torch.empty(1, 1, 8208, dtype=torch.bfloat16)
    assert "8208" in op.refuse(wide, wide, wide, 0)
