"""Projection, RMSNorm and rotation in Triton, against torch's norm and diffusers' rotation in float64."""

import dataclasses

import pytest
import torch
from accuracy import SQNR, Canaries, assert_as_good_as_eager, run, sqnr, values
from diffusers.models.embeddings import apply_rotary_emb
from products import AWKWARD, KINDS, activation, awkward, joint, layer, noise, small
from torch import Tensor

from fluxkiln.kernels import attention
from fluxkiln.kernels import qkv_rope as op
from fluxkiln.kernels.attention import Query, Values
from fluxkiln.kernels.formats import Activation, Fp8
from fluxkiln.kernels.layers import Projection, QKNorm
from fluxkiln.kernels.qkv_rope import half_layout
from fluxkiln.kernels.tiles import Tile

LENGTH, SPLIT = 150, 37


def tile(format: str, n: int = 128, pieces: int = 1) -> Tile:
    """As small as heads and blocks of v allow."""
    return small(format, m=128, n=n, pieces=pieces)


def projection(
    format: str,
    k: int = 160,
    heads: int = 1,
    head_dim: int = 128,
    streams: int = 2,
    accumulate: str = "f32",
    rank: int = 0,
    **fields: str,
) -> Projection:
    norms = tuple(QKNorm(*(1 + 0.3 * noise(2, head_dim, seed=50 + s).bfloat16()).unbind()) for s in range(streams))
    return Projection(layer(format, 3 * heads * head_dim, k, streams, accumulate, rank), norms, **fields)


def rotation(length: int, head_dim: int, batch: int = 1) -> Tensor:
    angle = 10 * noise(batch, length, head_dim // 2, seed=60)
    return torch.stack((angle.cos(), angle.sin()), dim=-1)


def truth(x: Activation, layer: Projection, rope: Tensor, split: int) -> tuple[Tensor, Tensor, Tensor]:
    """torch's RMSNorm and diffusers' rotation in float64."""
    head_dim = rope.shape[2] * 2
    q, k, v = joint(x, layer.streams, split).unflatten(-1, (3, -1, head_dim)).unbind(2)
    first = torch.arange(x.shape[1])[:, None, None] < split
    cos, sin = (part.double().repeat_interleave(2, dim=-1) for part in rope.unbind(-1))

    def turned(y: Tensor, part: str) -> Tensor:
        weights = [getattr(norm, part).double() for norm in layer.norms]
        y = torch.nn.functional.rms_norm(y, (head_dim,), eps=1e-6) * torch.where(first, weights[0], weights[-1])
        images = []
        for b in range(len(y)):  # diffusers' tables are those of one image
            table = cos[b % len(cos)], sin[b % len(sin)]
            images.append(apply_rotary_emb(y[b : b + 1].transpose(1, 2), table).transpose(1, 2))
        return torch.cat(images)

    return turned(q, "query"), turned(k, "key"), v


def natural(y: Tensor | Fp8) -> Tensor:
    """Channels in their own order again, in float64."""
    y = values(y)
    return y[..., half_layout(y.shape[-1]).argsort()]


def plain(q: Tensor | Fp8 | Query, k: Tensor | Fp8, v: Values) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernel wrote, as tensors `[B, L, H, D]` in float64; a raw q is normed and rotated here."""
    q = attention.normed(q) if isinstance(q, Query) else q
    length = (k if isinstance(k, Tensor) else k.data).shape[1]
    return natural(q), natural(k), attention.dequantize_values(v, length, torch.float64)


def launched(x: Activation, layer: Projection, rope: Tensor, split: int, arch: int, tile: Tile | None = None) -> tuple:
    packed = op.pack(layer)
    op.check(x, packed, rope, split)
    assert op.refuse(x, packed, rope, split, arch=arch) is None
    canaries = Canaries()
    return run(op.launch(x, packed, rope, split, arch=arch, tile=tile, empty=canaries), canaries)


def check(x: Activation, layer: Projection, rope: Tensor, split: int, arch: int, tile: Tile | None = None) -> None:
    got = launched(x, layer, rope, split, arch, tile)
    eager = op.reference(x, layer, rope, split)
    v = eager[2]
    eager_v = attention.dequantize_values(v, x.shape[1], torch.float64) if isinstance(v, Values) else values(v)
    for mine, eagers, want in zip(
        plain(*got), (values(eager[0]), values(eager[1]), eager_v), truth(x, layer, rope, split), strict=True
    ):
        assert_as_good_as_eager(mine, eagers, want)


@pytest.mark.parametrize("heads_and_tile", [(3, 128, 1, 128), (3, 128, 2, 256), (5, 64, 1, 128), (3, 64, 2, 256)])
@pytest.mark.parametrize("target", ["bf16", "fp8"])
def test_heads_of_every_size(target: str, heads_and_tile: tuple[int, int, int, int]):
    """Odd numbers of heads: the last tile of each part is not full, and none reaches into the next part."""
    heads, head_dim, pieces, n = heads_and_tile
    pj = projection("bf16", 64, heads, head_dim, attention=target)
    x, rope = noise(1, LENGTH, 64).bfloat16(), rotation(LENGTH, head_dim)
    check(x, pj, rope, SPLIT, 90, tile("bf16", n, pieces))


@pytest.mark.parametrize("target", ["bf16", "fp8"])
@pytest.mark.parametrize(("arch", "format", "accumulate"), KINDS)
def test_every_format(arch: int, format: str, accumulate: str, target: str):
    pj = projection(format, accumulate=accumulate, attention=target)
    x = activation(noise(1, LENGTH, 160), format, accumulate)
    check(x, pj, rotation(LENGTH, 128), SPLIT, arch)  # with the shipped tile


@pytest.mark.parametrize("tile", [t for number, tiles in op.TILES.items() if number[0] == 90 for t in tiles], ids=str)
def test_the_other_shipped_tiles(tile: Tile):
    format = "fp8" if tile.k == 128 else "bf16"
    check(activation(noise(1, 130, 160), format), projection(format, streams=1), rotation(130, 128), 0, 90, tile)


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("target", ["bf16", "fp8"])
def test_raw_query(target: str, streams: int):
    """Norm and rotation of q left to attention, which does them: rounded once more, and held to eager's error."""
    x, rope, split = noise(2, 140, 64).bfloat16(), rotation(140, 64), SPLIT * (streams - 1)
    pj = projection("bf16", 64, 2, 64, streams, attention=target, query="raw")
    check(x, pj, rope, split, 90, tile("bf16"))
    q, k, v = launched(x, pj, rope, split, 90, tile("bf16"))
    attention.check(q, k, v, None)
    assert attention.refuse(q, k, v) is None
    normed = attention.normed(dataclasses.replace(q, data=q.data.double(), scale=None))
    heads = (normed, values(k), attention.dequantize_values(v, 140, torch.float64))
    want = torch.nn.functional.scaled_dot_product_attention(*(y.transpose(1, 2) for y in heads)).transpose(1, 2)
    assert_as_good_as_eager(run(attention.launch(q, k, v, arch=90)), attention.reference(q, k, v), want.flatten(2))


@pytest.mark.parametrize("kind", AWKWARD)
@pytest.mark.parametrize(("format", "arch"), [("bf16", 89), ("fp8", 90), ("nvfp4", 120)])
def test_awkward_inputs(format: str, arch: int, kind: str):
    pj = projection(format, 768, 1, 64, 1, attention="fp8")
    pj = dataclasses.replace(pj, attention="bf16" if format == "bf16" else "fp8")
    check(activation(awkward(kind, 1, 30, 768), format), pj, rotation(30, 64), 0, arch, tile(format))


def test_positions_of_each_image():
    x, rope = noise(2, 40, 64).bfloat16(), rotation(40, 64, batch=2)
    check(x, projection("bf16", 64, 1, 64, 1), rope, 0, 90, tile("bf16"))


def test_low_rank():
    pj = projection("nvfp4", 256, 1, 128, 2, rank=32, attention="fp8")
    check(activation(noise(1, LENGTH, 256), "nvfp4", keep=True), pj, rotation(LENGTH, 128), SPLIT, 120, tile("nvfp4"))


@pytest.mark.parametrize("split", [0, 1, 37, 128, 150])
def test_what_attention_reads(split: int):
    """Scales that are constants of the layer, and v in blocks that never straddle streams, as attention defines it."""
    pj = projection("bf16", 64, 2, 64, 2 if split else 1, attention="fp8")
    x = noise(2, LENGTH, 64).bfloat16() * torch.logspace(-2, 2, LENGTH)[:, None].bfloat16()
    rope = rotation(LENGTH, 64)
    q, k, v = launched(x, pj, rope, split, 90, tile("bf16"))
    for y, part in ((q, "query"), (k, "key")):
        assert y.row_scale.shape == (2, LENGTH, 2)
        assert y.row_scale.stride() == (0, 0, 0)
        assert (y.row_scale == pj.scale(part)).all()
        assert y.data.is_contiguous()
        assert y.data.float().abs().max() <= 448
    want = attention.quantize_values(truth(x, pj, rope, split)[2], split, torch.bfloat16)
    assert v.split == split
    torch.testing.assert_close(v.scale, want.scale)
    differ = v.data.view(torch.uint8) != want.data.view(torch.uint8)
    assert differ.double().mean() < 1e-3  # fp32 sums may round the other way, the padding may not differ
    padding = torch.ones(v.data.shape[-1], dtype=torch.bool)
    padding[attention.slots(split, LENGTH, padding.device)] = False
    assert (v.data[..., padding].float() == 0).all()
    assert sqnr(attention.dequantize_values(v, LENGTH, torch.float64), truth(x, pj, rope, split)[2]) > SQNR["fp8"]


def test_v_in_bf16_brings_its_bound():
    pj = projection("bf16", 64, 2, 64, 2)
    _, _, v = launched(noise(2, LENGTH, 64).bfloat16(), pj, rotation(LENGTH, 64), SPLIT, 90, tile("bf16"))
    blocks = [v.data[:, :SPLIT], v.data[:, SPLIT:]]  # 37 and 113 rows: a block each
    largest = torch.stack([block.float().abs().amax((1, 3)) for block in blocks], dim=-1)
    torch.testing.assert_close(v.scale * 448, largest, rtol=2**-8, atol=0)


def test_scores_do_not_notice_the_order_of_channels():
    pj = projection("bf16", 64, 1, 64, 1)
    x, rope = noise(1, 40, 64).bfloat16(), rotation(40, 64)
    q, k, _ = launched(x, pj, rope, 0, 90, tile("bf16"))
    want_q, want_k, _ = truth(x, pj, rope, 0)
    scores, want = q[0, :, 0].double() @ k[0, :, 0].double().T, want_q[0, :, 0] @ want_k[0, :, 0].T
    torch.testing.assert_close(scores, want, rtol=0, atol=0.02 * want.abs().max().item())


@pytest.mark.parametrize("target", ["bf16", "fp8"])
def test_an_image_of_a_batch_is_what_it_is_alone(target: str):
    pj = projection("bf16", 64, 1, 64, 2, attention=target)
    x, rope = noise(3, LENGTH, 64).bfloat16(), rotation(LENGTH, 64)
    together = launched(x, pj, rope, SPLIT, 90, tile("bf16"))
    alone = launched(x[1:2], pj, rope, SPLIT, 90, tile("bf16"))
    for a, b in zip(alone, together, strict=True):
        a, b = (y if isinstance(y, Tensor) else y.data for y in (a, b))
        assert torch.equal(a[0].contiguous().view(torch.uint8), b[1].contiguous().view(torch.uint8))


def test_a_layer_keeps_its_weights():
    """Packing permutes q and k by heads, v not at all, and keeps what belongs to a row with it."""
    pj = projection("fp8", 64, 2, 64, 2, rank=16)
    packed = op.pack(pj)
    rows = torch.arange(3 * 128).unflatten(0, (3, 2, 64))
    rows[:2] = rows[:2][..., half_layout(64)]
    for s, each in enumerate(pj.streams):
        part = slice(s * 384, (s + 1) * 384)
        order = rows.flatten()
        assert torch.equal(packed.layer.weight[part].view(torch.uint8), each.weight.data[order].view(torch.uint8))
        assert torch.equal(packed.layer.scale[part], each.weight.row_scale[order])
        assert torch.equal(packed.layer.bias[part], each.bias[order].float())
        assert torch.equal(packed.layer.up[part], each.low_rank.up[order])
        assert torch.equal(packed.norm[s, 0], pj.norms[s].query[half_layout(64)].float())
    assert packed.input == pj.input


def test_bad_calls_and_refusals():
    pj, x = projection("bf16", 64, 1, 64), noise(1, 8, 64).bfloat16()
    rope = rotation(8, 64)
    with pytest.raises(ValueError, match=r"rope must be \[1 or 1, 8, 32, 2\], got \[1, 9, 32, 2\]"):
        op.check(x, pj, rotation(9, 64), 3)
    packed = op.pack(pj)
    op.check(x, packed, rope, 3)
    assert "rope must be fp32" in op.refuse(x, packed, rope.double(), 3, arch=90)
    small_heads = op.pack(projection("bf16", 64, 3, 32))
    assert "head dim 32 is not one of 64, 128" in op.refuse(x, small_heads, rotation(8, 32), 3, arch=90)


def test_cost_counts_each_operand_once():
    pj, x, rope = projection("bf16", 64, 1, 64, 2), noise(2, 8, 64).bfloat16(), rotation(8, 64)
    q, k, v = launched(x, pj, rope, 3, 90, tile("bf16"))
    flops, moved = op.cost(x, op.pack(pj), rope, q, k, v)
    assert flops == 2 * 2 * 8 * 192 * 64
    assert moved == 2 * 8 * 64 * 2 + 2 * 192 * (64 * 2 + 4) + rope.nbytes + 3 * 2 * 8 * 64 * 2 + 2 * 1 * 2 * 4
