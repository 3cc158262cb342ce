"""Number formats against ml_dtypes, against torch's FP8, and against what they promise about themselves."""

import ml_dtypes
import numpy as np
import pytest
import torch

from fluxkiln.kernels import formats
from fluxkiln.kernels.formats import Fp8, Nvfp4, Quant
from fluxkiln.kernels.layers import Linear, LowRank


def awkward(rows: int = 6, width: int = 96, seed: int = 0) -> torch.Tensor:
    """A row each: ordinary, zeros, constant, tiny, one outlier of 1e4, mean 30."""
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    x[1] = 0
    x[2] = -0.37
    x[3] *= 1e-30
    x[4, 7] = 1e4
    x[5] += 30
    return x


def ties_and_neighbours(values: np.ndarray) -> torch.Tensor:
    """Every value of a format, every midpoint, and what lies just beside them."""
    finite = np.unique(values[np.isfinite(values)]).astype(np.float32)
    points = np.concatenate([finite, (finite[1:] + finite[:-1]) / 2])
    beside = [np.nextafter(points, np.float32(sign * np.inf)) for sign in (-1, 1)]
    return torch.from_numpy(np.concatenate([points, *beside]))


def test_e4m3_equals_ml_dtypes_on_every_tie_and_saturates():
    every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    x = ties_and_neighbours(every)
    got = formats.to_e4m3(x)
    assert np.array_equal(got.view(torch.uint8).numpy(), x.numpy().astype(ml_dtypes.float8_e4m3fn).view(np.uint8))
    extremes = formats.to_e4m3(torch.tensor([1e9, -1e9, torch.inf, -torch.inf, 464.01, torch.nan]))
    assert extremes[:5].float().tolist() == [448, -448, 448, -448, 448]
    assert extremes[5].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_e2m1_equals_ml_dtypes_on_every_tie(dtype):
    every = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert torch.equal(formats.E2M1, torch.from_numpy(every))
    x = ties_and_neighbours(every).to(dtype)
    x = torch.nn.functional.pad(x, (0, x.numel() % 2))
    nibbles = formats.pack_e2m1(x)
    assert torch.equal(
        formats.unpack_e2m1(nibbles, dtype),
        torch.from_numpy(x.numpy().astype(ml_dtypes.float4_e2m1fn).astype(np.float64)).to(dtype),
    )
    assert formats.unpack_e2m1(formats.pack_e2m1(torch.tensor([7.0, -1e9]))).tolist() == [6, -6]


def test_the_even_column_is_the_low_nibble():
    assert formats.pack_e2m1(torch.tensor([[1.0, -3.0]])).tolist() == [[0x2 | 0xD << 4]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_fp8_rows(dtype):
    x = awkward().to(dtype)
    q = formats.quantize_fp8(x)
    assert q.data.dtype == torch.float8_e4m3fn
    assert q.row_scale.dtype == torch.float32
    wide = torch.promote_types(dtype, torch.float32)
    assert torch.equal(q.data.float(), (x.to(wide) / q.row_scale[:, None]).to(torch.float8_e4m3fn).float())
    back = formats.dequantize(q, torch.float64)
    normal = x.double().abs() > 2**-6 * x.double().abs().amax(-1, keepdim=True) / 448 + 1e-15
    assert ((back - x).abs() <= x.double().abs() * 2**-4)[normal].all()
    assert (back[1] == 0).all()
    assert (q.data.float().abs().amax(-1)[[0, 2, 4, 5]] == 448).all()


def test_nvfp4_rows():
    x = awkward()
    q = formats.quantize_nvfp4(x)
    assert q.shape == x.shape
    assert q.global_scale.shape == (6,)
    back = formats.dequantize(q, torch.float64)
    blocks = lambda t: t.unflatten(-1, (-1, 16))  # noqa: E731
    # Half the widest gap of e2m1 (between 4 and 6), a block scale wrong by 2^-4, and its underflow (2^-10 of the row).
    step = blocks(x).double().abs().amax(-1) / 6
    least = x.double().abs().amax(-1, keepdim=True) / 2688 * 2**-10
    assert (blocks(back - x).abs().amax(-1) <= step * (1 + 6 / 16) + 6 * least + 1e-15).all()
    assert (back[1] == 0).all()
    tensorwise = formats.quantize_nvfp4(x[:1], x[:1].abs().amax() / formats.NVFP4_MAX)
    assert torch.equal(formats.dequantize(tensorwise), formats.dequantize(formats.quantize_nvfp4(x[:1])))


def test_nvfp4_equals_a_scalar_loop():
    """The definition spelt out, one block at a time, on ml_dtypes' numbers."""
    x = awkward().numpy()
    q = formats.quantize_nvfp4(torch.from_numpy(x))
    values = formats.unpack_e2m1(q.data).numpy()
    for row, codes, scales, unit in zip(x, values, q.block_scale, q.global_scale.numpy(), strict=True):
        assert unit == np.maximum(np.abs(row).max() / np.float32(2688), np.float32(2**-64))
        for b in range(row.size // 16):
            block = row[16 * b : 16 * b + 16]
            scale = (np.abs(block).max() / np.float32(6) / unit).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
            assert scales[b].float().item() == scale
            want = np.clip(block / (scale * unit), -6, 6).astype(ml_dtypes.float4_e2m1fn) if scale else 0 * block
            assert np.array_equal(codes[16 * b : 16 * b + 16], np.asarray(want, dtype=np.float32))


def test_nan_and_infinity_come_out_as_nan():
    for poison in (torch.nan, torch.inf, -torch.inf):
        x = awkward()
        x[0, 3] = poison
        for quantize in (formats.quantize_fp8, formats.quantize_nvfp4):
            back = formats.dequantize(quantize(x))
            assert back[0].isnan().all()
            assert back[1:].isfinite().all()


@pytest.mark.parametrize(("rows", "blocks"), [(128, 4), (256, 192), (1, 1), (130, 6)])
def test_swizzle_is_the_formula_and_comes_back(rows, blocks):
    scale = torch.arange(rows * blocks).remainder(251).to(torch.uint8).reshape(rows, blocks).view(torch.float8_e4m3fn)
    tiles = formats.swizzle(scale)
    flat, wide = tiles.view(torch.uint8).flatten(), -(-blocks // 4)
    assert flat.numel() == -(-rows // 128) * 128 * wide * 4
    for r, c in ((0, 0), (rows - 1, blocks - 1), (rows // 2, blocks // 3)):
        at = ((r // 128) * wide + c // 4) * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4
        assert flat[at] == scale.view(torch.uint8)[r, c]
    assert torch.equal(formats.unswizzle(tiles.flatten(), rows, blocks).view(torch.uint8), scale.view(torch.uint8))


@pytest.mark.parametrize("kind", [formats.quantize_fp8, formats.quantize_nvfp4])
def test_rows_and_columns_are_views_of_the_same_values(kind):
    x = awkward(12)
    q, scalar = kind(x), kind(x.reshape(-1, 96))
    whole = formats.dequantize(q)
    assert torch.equal(formats.dequantize(q[2:5]), whole[2:5])
    assert torch.equal(formats.dequantize(formats.columns(q, 32, 80)), whole[:, 32:80])
    batch = kind(x.unflatten(0, (2, 6)))
    assert torch.equal(formats.dequantize(batch[:, 1:3]), whole.unflatten(0, (2, 6))[:, 1:3])
    assert q[2:5].data.untyped_storage().data_ptr() == q.data.untyped_storage().data_ptr()
    assert scalar.shape == x.shape


@pytest.mark.parametrize("kind", [formats.quantize_fp8, formats.quantize_nvfp4])
def test_a_linear_of_codes_is_the_linear_of_their_values(kind):
    g = torch.Generator().manual_seed(1)
    x, weight, bias = torch.randn(2, 5, 96, generator=g), torch.randn(32, 96, generator=g), torch.randn(32, generator=g)
    low = LowRank(torch.randn(16, 96, generator=g) / 10, torch.randn(32, 16, generator=g))
    qx, qw = kind(x), kind(weight)
    want = formats.dequantize(qx, torch.float64) @ formats.dequantize(qw, torch.float64).T + bias
    got = Linear(qw, bias.double())(qx)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert Linear(qw, bias.bfloat16())(qx).dtype == torch.float32
    halves = (
        formats.quantize(x[..., :32], Quant(quant_name(qx), "row", keep=True), torch.float64),
        formats.quantize(x[..., 32:], Quant(quant_name(qx), "row", keep=True), torch.float64),
    )
    want = (
        torch.cat([formats.dequantize(h, torch.float64) for h in halves], -1) @ formats.dequantize(qw, torch.float64).T
    )
    want += bias + x.double() @ low.down.double().T @ low.up.double().T
    low = LowRank(low.down.double(), low.up.double())
    torch.testing.assert_close(Linear(qw, bias.double(), low_rank=low)(*halves), want, rtol=1e-12, atol=1e-12)


def quant_name(q: Fp8 | Nvfp4) -> str:
    return "fp8" if isinstance(q, Fp8) else "nvfp4"


def test_the_bound_holds_and_costs_no_precision():
    g = torch.Generator().manual_seed(2)
    x, weight, bias = awkward(width=256), torch.randn(512, 256, generator=g), torch.randn(512, generator=g)
    linear = Linear(weight, bias)
    y, bound = linear(x), linear.bound(x)
    q = formats.quantize(y, Quant("fp8", "bound"), torch.float32, bound)
    assert torch.equal(q.row_scale, (bound / 448).clamp_min(formats.TINY))
    exact = formats.quantize_fp8(y)
    for row in (0, 1, 4):  # e4m3 keeps its relative precision over a loose bound
        error = [(formats.dequantize(kind)[row] - y[row]).norm().item() for kind in (q, exact)]
        assert error[0] < 1.1 * error[1]
    weight[5] = 3 * x[5]  # parallel to a row of x: equality in Cauchy and Schwarz
    linear = Linear(weight, bias)
    y, bound = linear(x), linear.bound(x)
    assert (y.abs().amax(-1) <= bound * (1 + 1e-6)).all()
    assert y[5].abs().amax() > 0.9 * bound[5]


def test_quantize_follows_its_rule():
    x = awkward()
    assert formats.quantize(x, None, torch.bfloat16).dtype == torch.bfloat16
    row = formats.quantize(x, Quant("fp8", "row", keep=True), torch.bfloat16)
    torch.testing.assert_close(row.row_norm, x.norm(dim=-1))
    assert torch.equal(row.dense, x.bfloat16())
    static = formats.quantize(x, Quant("nvfp4", "static", scale=torch.tensor(0.01)), torch.bfloat16)
    assert static.global_scale.item() == pytest.approx(0.01)
    assert static.row_norm is None


def test_what_is_missing_is_said():
    q = formats.quantize_fp8(awkward())
    with pytest.raises(ValueError, match="did not keep it"):
        formats.dense(q)
    with pytest.raises(ValueError, match="did not emit it"):
        formats.row_norm(q)
    with pytest.raises(ValueError, match="multiple of 16 values, got 20"):
        formats.quantize_nvfp4(torch.ones(2, 20))
