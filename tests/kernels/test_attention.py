"""Attention in Triton, in bf16 and FP8, against torch's softmax attention in float64."""

import dataclasses
import math

import pytest
import torch
from accuracy import NOISE, SQNR, Canaries, assert_as_good_as_eager, errors, run, sqnr, values
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from fluxkiln.kernels import attention as op
from fluxkiln.kernels.formats import FP8_MAX, Fp8, Nvfp4, Quant, dequantize, quantize_fp8

POINTERS = op.Tile(64, 64, 4, 2, "cp.async")
DESCRIPTORS = op.Tile(64, 64, 4, 2, "tma")


def heads(B: int, L: int, H: int, d: int, peak: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q and k of norm `peak * sqrt(d)`, as RMSNorm leaves them: 3 makes a softmax of few tokens, 0 a uniform one."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, B, L, H, d, generator=g).unbind()
    q, k = (peak * math.sqrt(d) * torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    return q, k, v * torch.linspace(0.1, 3, H)[:, None]


def in_format(format: str, q: Tensor, k: Tensor, v: Tensor, split: int = 0) -> tuple:
    """Operands as the projection's kernel hands them over."""
    if format == "bf16":
        return q.bfloat16(), k.bfloat16(), v.bfloat16()
    q_scale, k_scale = ((x.norm(dim=-1).max() / FP8_MAX).clamp_min(1e-6)[None] for x in (q, k))
    return quantize_fp8(q, q_scale), quantize_fp8(k, k_scale), op.quantize_values(v, split, torch.bfloat16)


def truth(q: Tensor | Fp8 | op.Query, k: Tensor | Fp8, v: Tensor | op.Values) -> Tensor:
    """torch's attention over the values that the operands stand for, `[B, L, H * d]` in float64."""
    if isinstance(q, op.Query):
        q = rotated(q)
    length = (k if isinstance(k, Tensor) else k.data).shape[1]
    v = op.dequantize_values(v, length, torch.float64) if isinstance(v, op.Values) else v.double()
    q, k = (x.double() if isinstance(x, Tensor) else dequantize(x, torch.float64) for x in (q, k))
    o = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    return o.transpose(1, 2).flatten(2)


def rotated(q: op.Query) -> Tensor:
    """RMSNorm and diffusers' rotation of the pairs of a `Query`, in float64, channels as they came."""
    L, d = q.data.shape[1], q.data.shape[3]
    text = torch.arange(L)[:, None, None] < (q.split if len(q.norm) == 2 else 0)
    weight = torch.where(text, q.norm[0].double(), q.norm[-1].double())
    x = torch.nn.functional.rms_norm(q.data.double(), (d,), eps=1e-6) * weight
    x = x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)  # diffusers' pairs are neighbours
    cos, sin = (part.repeat_interleave(2, dim=-1) for part in q.rope.double()[0].unbind(-1))
    y = apply_rotary_emb(x.transpose(1, 2), (cos, sin)).transpose(1, 2)
    return y.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


@pytest.mark.parametrize("tile", [POINTERS, DESCRIPTORS], ids=["pointers", "tma"])
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize(
    ("L", "split"), [(1, 0), (77, 5), (128, 64), (200, 77), (192, 128)], ids=lambda n: str(n)
)  # fmt: skip
@pytest.mark.parametrize("format", ["bf16", "fp8"])
def test_parity(format: str, L: int, split: int, d: int, tile: op.Tile):
    q, k, v = in_format(format, *heads(1, L, 2, d), split)
    op.check(q, k, v, None)
    assert op.refuse(q, k, v) is None
    canaries = Canaries()
    got = run(op.launch(q, k, v, arch=90, tile=tile, empty=canaries), canaries)
    assert got.dtype == torch.bfloat16
    assert_as_good_as_eager(got, op.reference(q, k, v), truth(q, k, v))


@pytest.mark.parametrize("arch", [89, 90, 100, 120])
@pytest.mark.parametrize("format", ["bf16", "fp8"])
def test_the_shipped_tiles(format: str, arch: int):
    q, k, v = in_format(format, *heads(1, 300, 1, 128), 40)
    got = run(op.launch(q, k, v, arch=arch))
    assert_as_good_as_eager(got, op.reference(q, k, v), truth(q, k, v))


@pytest.mark.parametrize("format", ["bf16", "fp8"])
def test_a_long_sequence(format: str):
    """Errors must not grow with the number of blocks; eager is asked for some rows only."""
    q, k, v = in_format(format, *heads(1, 4097, 1, 64), 512)
    rows = slice(0, 64), slice(2048, 2112), slice(4033, 4097)
    tile = op.Tile(256, 256, 8, 2, "tma") if format == "bf16" else op.Tile(256, 128, 8, 2, "tma")
    got = run(op.launch(q, k, v, arch=90, tile=tile))
    want, eager = truth(q, k, v), op.reference(q, k, v)
    for part in rows:
        assert_as_good_as_eager(got[:, part], eager[:, part], want[:, part])


@pytest.mark.parametrize("peak", [0.0, 1.0, 3.0, 9.0], ids=lambda p: f"norms {p:g} sqrt(d)")
@pytest.mark.parametrize("format", ["bf16", "fp8"])
def test_from_uniform_to_peaked(format: str, peak: float):
    q, k, v = in_format(format, *heads(1, 150, 2, 64, peak), 0)
    got = run(op.launch(q, k, v, arch=90, tile=DESCRIPTORS))
    assert_as_good_as_eager(got, op.reference(q, k, v), truth(q, k, v))


def test_scores_far_below_zero_and_growing():
    """Every block raises the maximum: what was accumulated is rescaled each time, by as little as 2**-100."""
    q, k, v = heads(1, 256, 1, 64)
    q = torch.full_like(q, 2.0)
    k = torch.linspace(-4, -1, 256)[None, :, None, None].expand_as(k).contiguous()
    for format in ("bf16", "fp8"):
        operands = in_format(format, q, k, v)
        got = run(op.launch(*operands, arch=90, tile=DESCRIPTORS))
        assert_as_good_as_eager(got, op.reference(*operands), truth(*operands))


def test_blocks_of_v_of_very_different_size():
    q, k, v = heads(1, 300, 1, 64)
    v[:, :100] *= 1e4
    v[:, 100:228] = 0
    operands = in_format("fp8", q, k, v, split=100)
    got = run(op.launch(*operands, arch=90, tile=DESCRIPTORS))
    assert_as_good_as_eager(got, op.reference(*operands), truth(*operands))


QUANTS = {
    "fp8": Quant("fp8", "bound"),
    "fp8 for fp16 sums": Quant("fp8", "bound", peak=22.0, keep=True),
    "nvfp4": Quant("nvfp4", "bound"),
    "fp8 static": Quant("fp8", "static", torch.tensor(0.01)),
}


@pytest.mark.parametrize("quant", QUANTS.values(), ids=QUANTS.keys())
@pytest.mark.parametrize("format", ["bf16", "fp8"])
def test_quantised_output(format: str, quant: Quant):
    q, k, v = heads(2, 150, 3, 64, peak=3)
    v[1] *= 50
    q, k, v = in_format(format, q, k, v, split=30)
    want, eager = truth(q, k, v), op.reference(q, k, v, quant)
    canaries = Canaries()
    got = run(op.launch(q, k, v, quant, arch=120, tile=DESCRIPTORS, empty=canaries), canaries)
    assert_as_good_as_eager(got, eager, want)
    scale = "row_scale" if isinstance(got, Fp8) else "global_scale"
    assert torch.allclose(getattr(got, scale), getattr(eager, scale).expand(2, 150), rtol=1e-6)
    if quant.rule == "bound":
        assert sqnr(got, want) > SQNR[quant.format] - 0.5  # the last half: P's own rounding, in FP8
    if quant.keep:
        assert_as_good_as_eager(got.dense, op.reference(q, k, v), want)


def test_a_bound_that_came_with_v_is_used():
    q, k, v = in_format("bf16", *heads(1, 70, 2, 64))
    bounded = op.Values(v, torch.tensor([[[0.5, 2.0], [1.0, 0.25]]]), 6)
    for quant, scale in ((Quant("fp8", "bound"), 2.0), (Quant("nvfp4", "bound"), 2.0 / 6)):
        got = run(op.launch(q, k, bounded, quant, arch=120, tile=DESCRIPTORS))
        assert torch.allclose(got.row_scale if isinstance(got, Fp8) else got.global_scale, torch.tensor(scale))
        assert_as_good_as_eager(got, op.reference(q, k, bounded, quant), truth(q, k, v))


def test_the_bound_is_the_largest_of_however_many():
    """A large picture has more blocks, over all heads, than the kernel reads at once."""
    q, k, v = in_format("bf16", *heads(1, 20, 2, 64))
    scale = torch.full((1, 2, 700), 0.25)
    scale[0, 1, -1] = 3.0
    got = run(op.launch(q, k, op.Values(v, scale, 6), Quant("fp8", "bound"), arch=120, tile=DESCRIPTORS))
    assert torch.equal(got.row_scale, torch.full((1, 20), 3.0))


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("format", ["bf16", "fp8"])
def test_norm_and_rotation_of_q_inside(format: str, d: int, streams: int):
    g = torch.Generator().manual_seed(1)
    raw, k, v = heads(2, 100, 2, d, seed=2)
    angle = 100 * torch.rand(1, 100, d // 2, generator=g)
    norm = (1 + 0.3 * torch.randn(streams, d, generator=g)).bfloat16()
    split = 30 if streams == 2 else 0
    scale = (norm.float().abs().max() * math.sqrt(d) / FP8_MAX)[None]
    _, k, v = in_format(format, raw, k, v, split)
    q = op.Query(
        (30 * raw + 3).bfloat16(), norm, torch.stack((angle.cos(), angle.sin()), dim=-1), split,
        scale if format == "fp8" else None,
    )  # fmt: skip
    op.check(q, k, v, None)
    want = truth(q, k, v)
    for tile in (POINTERS, DESCRIPTORS):
        got = run(op.launch(q, k, v, arch=90, tile=tile))
        assert_as_good_as_eager(got, op.reference(q, k, v), want)


def test_padding_of_v_is_never_seen():
    """A stream's last block may end in anything finite."""
    q, k, v = in_format("fp8", *heads(1, 150, 1, 64), 20)
    data = v.data.clone()
    pad = torch.ones(data.shape[-1], dtype=torch.bool)
    pad[op.slots(20, 150, data.device)] = False
    data.view(torch.uint8)[..., pad] = 0x7E  # 448
    dirty = dataclasses.replace(v, data=data)
    for tile in (POINTERS, DESCRIPTORS):
        assert torch.equal(run(op.launch(q, k, dirty, arch=90, tile=tile)), run(op.launch(q, k, v, arch=90, tile=tile)))


@pytest.mark.parametrize("format", ["bf16", "fp8"])
def test_an_image_of_a_batch_is_what_it_is_alone(format: str):
    three = heads(3, 90, 2, 64)
    three[2][1] = torch.nan  # not even a ruined neighbour shows
    for quant in (None, Quant("fp8", "bound")):
        for tile in (POINTERS, DESCRIPTORS):
            q, k, v = in_format(format, *three, 17)
            together = values(run(op.launch(q, k, v, quant, arch=90, tile=tile)))
            for i in (0, 2):
                part = slice(i, i + 1)
                if format == "fp8":
                    values_i = dataclasses.replace(v, data=v.data[part], scale=v.scale[part])
                    operands = (q[part], k[part], values_i)
                else:
                    operands = (q[part], k[part], v[part])
                alone = values(run(op.launch(*operands, quant, arch=90, tile=tile)))
                assert torch.equal(alone[0], together[i])
                assert alone.isfinite().all()


def test_any_strides():
    """q, k and v cut from one projection, heads outside tokens, and rows that no descriptor can address."""
    joint = torch.cat(heads(2, 40, 3, 64), dim=2).bfloat16()
    want = run(op.launch(*(x.contiguous() for x in joint.chunk(3, dim=2)), arch=90, tile=DESCRIPTORS))
    outside = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in joint.chunk(3, dim=2)]
    for q, k, v in (joint.chunk(3, dim=2), outside):
        for tile in (POINTERS, DESCRIPTORS):
            assert torch.equal(run(op.launch(q, k, v, arch=90, tile=tile)), want)
    odd = [torch.nn.functional.pad(x, (0, 1))[..., :-1] for x in joint.chunk(3, dim=2)]
    assert torch.equal(run(op.launch(*odd, arch=90, tile=DESCRIPTORS)), want)
    one = [x[:1].expand(2, -1, -1, -1) for x in joint.chunk(3, dim=2)]
    assert torch.equal(run(op.launch(*one, arch=90, tile=DESCRIPTORS)), want[:1].expand(2, -1, -1))


def test_values_keep_what_they_are_given():
    v = torch.randn(2, 300, 3, 64, generator=torch.Generator().manual_seed(0))
    packed = op.quantize_values(v, 77, torch.bfloat16)
    assert packed.data.shape == (2, 3, 64, (1 + 2) * 128)
    assert packed.scale.shape == (2, 3, 3)
    for block, (start, stop) in enumerate([(0, 77), (77, 205), (205, 300)]):
        largest = v[:, start:stop].abs().amax((1, 3))
        assert torch.allclose(packed.scale[:, :, block], largest / FP8_MAX)
    assert errors(op.dequantize_values(packed, 300, torch.float64), v.double())[0] < 0.03
    exact = (8 * v.sign()).contiguous()
    exact[:, ::50] *= 4
    assert torch.allclose(
        op.dequantize_values(op.quantize_values(exact, 77, torch.bfloat16), 300, torch.float32), exact, rtol=NOISE
    )


def test_bad_calls_say_what_was_expected():
    q, k, v = in_format("bf16", *heads(1, 4, 2, 64))
    with pytest.raises(ValueError, match=r"q must be \[1, 4, 2, 64\] as k is, got \[1, 3, 2, 64\]"):
        op.check(q[:, :3], k, v, None)
    with pytest.raises(ValueError, match=r"v must be \[1, 4, 2, 64\], got \[1, 4, 1, 64\]"):
        op.check(q, k, v[:, :, :1], None)
    with pytest.raises(ValueError, match=r"v must be torch.bfloat16 as k is, got torch.float16"):
        op.check(q, k, v.half(), None)
    with pytest.raises(ValueError, match="by the rule 'bound' or 'static'"):
        op.check(q, k, v, Quant("fp8", "row"))
    q8, k8, v8 = in_format("fp8", *heads(1, 4, 2, 64))
    with pytest.raises(ValueError, match="so v must be FP8 Values"):
        op.check(q8, k8, v, None)
    with pytest.raises(ValueError, match="so q must be FP8"):
        op.check(q, k8, v8, None)


def test_refusals_give_the_reason():
    q, k, v = in_format("bf16", *heads(1, 4, 2, 64))
    assert "float32" in op.refuse(q.float(), k.float(), v.float())
    assert "head dim 32" in op.refuse(*(x[..., :32] for x in (q, k, v)))
    assert "contiguous" in op.refuse(q.transpose(2, 3).contiguous().transpose(2, 3), k, v)
    q8, k8, v8 = in_format("fp8", *heads(1, 4, 2, 64))
    assert op.refuse(q8, k8, v8) is None
    assert "one scale for all tokens" in op.refuse(quantize_fp8(dequantize(q8)), k8, v8)


def test_nvfp4_blocks_lie_within_heads():
    """A block of 16 outputs never mixes heads: a silent head stays exactly zero."""
    q, k, v = in_format("bf16", *heads(1, 20, 3, 64))
    v[:, :, 1] = 0
    got = run(op.launch(q, k, v, Quant("nvfp4", "bound"), arch=100, tile=POINTERS))
    assert isinstance(got, Nvfp4)
    assert (values(got)[..., 64:128] == 0).all()
    assert (values(got)[..., :64] != 0).any()
