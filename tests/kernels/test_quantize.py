"""Rows to FP8 and NVFP4 in Triton, against the formats' definition and ml_dtypes."""

import importlib

import ml_dtypes
import numpy as np
import pytest
import torch
from accuracy import NOISE, SQNR, Canaries, assert_as_good_as_eager, run, sqnr, values

from fluxkiln.kernels.formats import F16_PEAK, Fp8, Nvfp4, Quant, unpack_e2m1
from fluxkiln.kernels.language import Launch, jit, tl

op = importlib.import_module("fluxkiln.kernels.quantize")

RULES = {
    "fp8": Quant("fp8", "row"),
    "fp8 static": Quant("fp8", "static", torch.tensor(0.05)),
    "fp8 for fp16 sums": Quant("fp8", "row", peak=F16_PEAK),
    "fp8 static for fp16 sums": Quant("fp8", "static", torch.tensor(0.05), peak=F16_PEAK),
    "nvfp4": Quant("nvfp4", "row", keep=True),
    "nvfp4 static": Quant("nvfp4", "static", torch.tensor(0.003)),
}


def awkward(B: int, L: int, K: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Rows take turns: ordinary, mean 30, one outlier of 1e4, zeros, tiny, a single value."""
    x = torch.randn(B, L, K, generator=torch.Generator().manual_seed(0))
    x[:, 1::6] += 30
    x[:, 2::6, K // 3] = 1e4
    x[:, 3::6] = 0
    x[:, 4::6] *= 1e-5
    x[:, 5::6, 1:] = 0
    return x.to(dtype)


@pytest.mark.parametrize("quant", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize(("B", "L", "K"), [(2, 6, 192), (1, 6, 3072), (1, 3, 15360), (1, 1, 16), (1, 77, 48)])
def test_parity(quant: Quant, B: int, L: int, K: int):
    x = awkward(B, L, K)
    op.check(x, quant)
    assert op.refuse(x, quant) is None
    canaries = Canaries()
    got = run(op.launch(x, quant, arch=90, empty=canaries), canaries)
    want = op.reference(x, quant)
    assert_as_good_as_eager(got, want, x.double())
    scale = "row_scale" if isinstance(got, Fp8) else "global_scale"
    assert torch.allclose(getattr(got, scale), getattr(want, scale), rtol=1e-6)
    if quant.rule == "row":
        assert sqnr(got, x.double()) > SQNR[quant.format]
        assert got.row_norm is not None
        assert torch.allclose(got.row_norm, want.row_norm, rtol=1e-5)
    if isinstance(got, Fp8):
        assert got.data.float().abs().max() <= quant.peak
    if quant.keep:
        assert torch.equal(got.dense, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_strides_and_axes(dtype: torch.dtype):
    every = awkward(3, 12, 64, dtype)
    for x in (every[1:, ::2], every[0, 0], every[0], every.unflatten(1, (4, 3)).transpose(0, 1)):
        got = run(op.launch(x, Quant("fp8", "row"), arch=90))
        assert_as_good_as_eager(got, op.reference(x, Quant("fp8", "row")), x.double())


@pytest.mark.parametrize("quant", RULES.values(), ids=RULES.keys())
def test_a_nan_never_becomes_a_number(quant: Quant):
    x = awkward(1, 6, 48)
    x[0, 2, 21] = torch.nan
    got = values(run(op.launch(x, quant, arch=90)))
    assert got[0, 2, 21].isnan()
    assert got[0, [0, 1, 3, 4, 5]].isfinite().all()


def test_an_image_of_a_batch_is_what_it_is_alone():
    x = awkward(3, 5, 96)
    for quant in RULES.values():
        together = values(run(op.launch(x, quant, arch=90)))
        for i in range(3):
            assert torch.equal(values(run(op.launch(x[i : i + 1], quant, arch=90)))[0], together[i])


@jit
def _pairs_kernel(x_ptr, y_ptr, N: tl.constexpr):
    lo, hi = tl.split(tl.reshape(tl.load(x_ptr + tl.arange(0, N)), (N // 2, 2)))
    tl.store(y_ptr + tl.arange(0, N // 2), op.e2m1_pairs(lo, hi, False))


def test_e2m1_codes_equal_ml_dtypes_on_every_tie_and_beside_it():
    every = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    finite = np.unique(every)
    points = np.concatenate([finite, (finite[1:] + finite[:-1]) / 2, [7, -1e9, 1e-30]]).astype(np.float32)
    points = np.concatenate([points, *(np.nextafter(points, np.float32(s * np.inf)) for s in (-1, 1))])
    x = torch.zeros(128)
    x[: len(points)] = torch.from_numpy(points)
    y = torch.empty(64, dtype=torch.uint8)
    Launch(_pairs_kernel, (1,), (x, y, 128), {})()
    want = x.clamp(-6, 6).numpy().astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert torch.equal(unpack_e2m1(y), torch.from_numpy(want))


def test_the_scale_of_a_block_reaches_its_own_sixteen_values():
    x = torch.zeros(1, 1, 64, dtype=torch.bfloat16)
    for block, largest in enumerate((6.0, 0.75, 0.0, 3.0)):
        x[..., 16 * block + block] = largest
    got = run(op.launch(x, Quant("nvfp4", "row"), arch=100))
    assert isinstance(got, Nvfp4)
    assert torch.allclose(got.block_scale.float()[0, 0], torch.tensor([448.0, 56.0, 0.0, 224.0]))
    assert torch.allclose(values(got), x.double(), rtol=NOISE)


def test_bad_calls_and_refusals_say_why():
    x = awkward(1, 2, 24)
    with pytest.raises(ValueError, match="multiple of 16, got 24"):
        op.check(x, Quant("nvfp4", "row"))
    with pytest.raises(ValueError, match="use the rule 'row' or 'static'"):
        op.check(x, Quant("fp8", "bound"))
    assert "float64" in op.refuse(x.double(), Quant("fp8", "row"))
    assert "16400" in op.refuse(torch.empty(1, 1, 16400), Quant("fp8", "row"))
    assert "contiguous" in op.refuse(x.mT, Quant("fp8", "row"))
