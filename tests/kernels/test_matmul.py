"""The product under the linear operations, in every format and form, against float64; and its launch tables."""

import dataclasses
import json

import pytest
import torch
from accuracy import Canaries, assert_as_good_as_eager, run
from products import AWKWARD, KINDS, activation, awkward, joint, layer, noise, small
from torch import Tensor

from fluxkiln.kernels import linear as linear_op
from fluxkiln.kernels import linear_gate_residual, linear_gelu, matmul, qkv_rope, tiles
from fluxkiln.kernels.formats import Activation, quantize_fp8
from fluxkiln.kernels.layers import Linear, Streams, by_stream
from fluxkiln.kernels.packed import check as check_call
from fluxkiln.kernels.packed import pack, refuse
from fluxkiln.kernels.tiles import Problem, Tile


def multiply(x: Activation, streams: Streams, split: int, arch: int, tile: Tile) -> Tensor:
    """The bare product, with the plainest epilogue."""
    packed = pack(streams)
    assert refuse((x,), packed, arch) is None
    canaries = Canaries()
    y = canaries("y", (*x.shape[:-1], packed.n), torch.bfloat16)
    side, launches = matmul.side_input((x,), packed, split, arch=arch, empty=canaries)
    tensors = (y, y.stride(0))
    launches.append(matmul.plan(matmul.linear, tile, (x,), packed, split, tensors, side=side, arch=arch))
    return run((y, launches), canaries)


def eager(x: Activation, streams: Streams, split: int) -> Tensor:
    return by_stream(lambda x, linear: linear(x), x, split, streams).bfloat16()


def check(x: Activation, streams: Streams, split: int, arch: int, tile: Tile) -> None:
    got = multiply(x, streams, split, arch, tile)
    assert_as_good_as_eager(got, eager(x, streams, split), joint(x, streams, split))


@pytest.mark.parametrize("rank", [0, 32])
@pytest.mark.parametrize(("arch", "format", "accumulate"), KINDS)
def test_two_streams_of_ragged_rows_and_columns(arch: int, format: str, accumulate: str, rank: int):
    streams = layer(format, 80, 416, 2, accumulate, rank)
    x = activation(noise(2, 75, 416), format, accumulate, keep=bool(rank))
    check(x, streams, 21, arch, small(format))


@pytest.mark.parametrize("k", [3072, 12288, 15360])
@pytest.mark.parametrize(("arch", "format", "accumulate"), [kind for kind in KINDS if kind[0] in (89, 120)])
def test_sums_of_one_sign_over_the_whole_of_k(arch: int, format: str, accumulate: str, k: int):
    """Nothing cancels: the sum grows to K times a product, where a narrow accumulator would lose the small ones."""
    streams = layer(format, 48, k, 1, accumulate, weight=noise(48, k, seed=1).abs() / k)
    check(activation(awkward("one sign", 1, 20, k), format, accumulate), streams, 0, arch, small(format))


@pytest.mark.parametrize("kind", AWKWARD)
@pytest.mark.parametrize(
    ("arch", "format", "accumulate"), [(90, "bf16", "f32"), (89, "fp8", "f16"), (120, "nvfp4", "f32")]
)
def test_awkward_inputs(arch: int, format: str, accumulate: str, kind: str):
    streams = layer(format, 32, 3072, 1, accumulate)
    check(activation(awkward(kind, 1, 32, 3072), format, accumulate), streams, 0, arch, small(format))


@pytest.mark.parametrize("arch", [89, 90])
@pytest.mark.parametrize(("length", "split"), [(1, 0), (1, 1), (2, 1), (64, 32), (65, 64), (97, 33), (33, 33)])
def test_any_split(length: int, split: int, arch: int):
    check(noise(1, length, 64).bfloat16(), layer("bf16", 48, 64, 2), split, arch, small("bf16"))


@pytest.mark.parametrize("tile", [small("bf16", group=1), small("bf16", group=3, pieces=4), small("bf16", pieces=1)])
def test_every_order_of_tiles_covers_all_of_them(tile: Tile):
    check(noise(2, 130, 64).bfloat16(), layer("bf16", 80, 64, 2), 40, 90, tile)


@pytest.mark.parametrize("programs", [1, 3, 5, 100])
def test_persistent_programs_share_the_tiles(programs: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(matmul.MULTIPROCESSORS, 90, programs)
    check(noise(2, 75, 64).bfloat16(), layer("bf16", 80, 64, 2), 21, 90, small("bf16", persistent=True))


@pytest.mark.parametrize("arch", [89, 90])
def test_strided_rows(arch: int):
    wide = noise(2, 90, 128).bfloat16()
    for x in (wide[:, 17:], wide[:, ::2], wide[:, :, 64:]):
        check(x, layer("bf16", 48, x.shape[-1], 1), 0, arch, small("bf16"))


@pytest.mark.parametrize(("arch", "format"), [(89, "fp8"), (90, "bf16"), (120, "nvfp4")])
def test_an_image_of_a_batch_is_what_it_is_alone(arch: int, format: str):
    x, streams = activation(noise(3, 50, 256), format), layer(format, 48, 256, 2)
    together = multiply(x, streams, 13, arch, small(format))
    for i in range(3):
        assert torch.equal(multiply(x[i : i + 1], streams, 13, arch, small(format)), together[i : i + 1])


@pytest.mark.parametrize("arch", [89, 90])
def test_what_lies_beside_a_stream_stays_out_of_it(arch: int):
    """A tile at the end of a stream multiplies rows that are not its own: they must not reach its outputs."""
    streams, tile = layer("bf16", 48, 64, 2), small("bf16")
    x = noise(2, 75, 64).bfloat16()
    clean = multiply(x, streams, 21, arch, tile)
    for dirt in (slice(0, 21), slice(21, 75)):
        dirty = x.clone()
        dirty[:, dirt] = torch.nan
        kept = torch.ones(75, dtype=torch.bool)
        kept[dirt] = False
        packed = pack(streams)
        y = torch.empty_like(clean)
        matmul.plan(matmul.linear, tile, (dirty,), packed, 21, (y, y.stride(0)), arch=arch)()
        assert torch.equal(y[:, kept], clean[:, kept])
        assert y[:, ~kept].isnan().all()


def test_fp16_sums_stay_finite_at_the_peak():
    """Every code at its largest, of one sign: 128 products of 22 * 22 are the most that an fp16 sum sees."""
    x, weight = torch.ones(1, 4, 256), torch.ones(32, 256)
    streams = layer("fp8", 32, 256, 1, "f16", weight=weight)
    check(activation(x, "fp8", "f16"), streams, 0, 89, small("fp8"))


def test_ranks_of_any_size():
    """Padded to what a tile can be; a stream without a branch gets one of zeros."""
    text, image = layer("bf16", 48, 64, 1, rank=48)[0], layer("bf16", 48, 64, 1)[0]
    packed = pack(Streams((text, image)))
    assert packed.up.shape == (96, 64)
    check(noise(1, 40, 64).bfloat16(), Streams((text, image)), 15, 90, small("bf16"))


def test_scales_that_belong_to_all_rows():
    """A scalar global scale, of a weight and of an activation, as a calibrated NVFP4 checkpoint has."""
    x, streams = activation(noise(1, 32, 256), "nvfp4"), layer("nvfp4", 32, 256)
    x = dataclasses.replace(x, global_scale=torch.tensor(0.01))
    weight = dataclasses.replace(streams[0].weight, global_scale=torch.tensor(0.003))
    check(x, Streams((dataclasses.replace(streams[0], weight=weight),)), 0, 120, small("nvfp4"))


def test_the_bound_holds_and_is_met():
    """The input most alike to the longest row of the weight reaches its bound, but for the bias."""
    streams = layer("fp8", 48, 128, 2)
    bound = pack(streams).bound
    for s, each in enumerate(streams):
        weight = each.weight.data.double() * each.weight.row_scale[:, None]
        longest = weight[weight.norm(dim=-1).argmax()]
        torch.testing.assert_close(bound[s, 0].double(), (weight @ (longest / longest.norm())).abs().max())
        assert bound[s, 1] == each.bias.abs().max()


# --- contract


def test_refusals_give_the_reason():
    x, streams = noise(1, 8, 64).bfloat16(), layer("bf16", 32, 64)
    wide = dataclasses.replace(streams[0], weight=streams[0].weight.float(), bias=streams[0].bias.float())
    fp8 = layer("fp8", 32, 64, accumulate="f16")
    odd = Linear(noise(24, 64).bfloat16(), noise(24).bfloat16())
    every_other = activation(noise(1, 16, 64), "nvfp4")[:, ::2]
    torn = dataclasses.replace(every_other, block_scale=every_other.block_scale.contiguous())
    for inputs, linears, arch, reason in (
        ((x,), Streams((wide,)), 90, "bf16 or fp16"),
        ((x,), layer("nvfp4", 32, 64), 90, "NVFP4 needs the block-scaled tensor cores of sm_100 or sm_120"),
        ((activation(x, "fp8"),), fp8, 90, "fp16 sums are for sm_89"),
        ((x,), Streams((dataclasses.replace(streams[0], accumulate="promote128"),)), 90, "is for FP8"),
        ((x,), Streams((odd,)), 90, "N = 24 is not a multiple of 16"),
        ((x,), layer("fp8", 32, 64), 90, "the weight is fp8, the input bf16"),
        ((noise(1, 8, 24).bfloat16(),), layer("bf16", 32, 24), 90, "K = 24 is not a multiple of 16"),
        ((activation(noise(1, 8, 48), "nvfp4"),), layer("nvfp4", 32, 48), 120, "K = 48 is not a multiple of 32"),
        ((torn,), layer("nvfp4", 32, 64), 120, "block scales must lie as the codes do"),
        ((noise(1, 64, 8).bfloat16().mT,), streams, 90, "rows must be contiguous"),
        ((noise(1, 8, 65).bfloat16()[..., 1:],), streams, 90, "16 bytes aligned, got strides"),
        ((noise(1, 8, 72).bfloat16()[..., 4:68],), streams, 90, "starts between two multiples"),
    ):
        assert reason in (refuse(inputs, pack(linears), arch) or "accepted"), reason
    assert refuse((activation(x, "fp8", "f16"),), pack(fp8), 89) is None
    assert refuse((every_other,), pack(layer("nvfp4", 32, 64)), 120) is None


def test_bad_calls_say_what_was_expected():
    streams = layer("bf16", 32, 64, 2)
    for xs, split, message in (
        ((noise(8, 64),), 0, r"inputs must be \[B, L, K\]"),
        ((noise(1, 8, 48),), 0, "takes K = 64, got 48"),
        ((noise(1, 8, 32), noise(1, 9, 32)), 0, "the same B and L"),
        ((noise(1, 8, 64),), 9, "cannot split them at 9"),
        ((noise(1, 8, 64),), 3, r"the layer's dtype is torch.bfloat16, got an input in torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            check_call("linear_gelu", xs, streams, split)
    with pytest.raises(ValueError, match="one format, got Fp8 and Tensor"):
        pack(Streams((streams[0], dataclasses.replace(streams[0], weight=quantize_fp8(noise(32, 64))))))


# --- launch tables

OPS = (linear_op, linear_gelu, linear_gate_residual, qkv_rope)
FLUX = [  # rows of each stream: 512 and 1024 pixels square, Kontext at 1024, a single block
    (512, 1024),
    (512, 4096),
    (512, 8192),
    (4608,),
]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.OP)
def test_every_table_has_a_tile_for_every_problem(op):
    for kind in KINDS:
        assert op.TILES[kind], kind
    for arch, format, accumulate in op.TILES:
        assert (arch, format, accumulate) in KINDS
        for rows in (*FLUX, (1,), (0, 7), (3, 0)):
            problem = Problem(op.OP, arch, format, rows, 3072, 3072, 1, accumulate)
            assert op.pick(problem) in op.TILES[arch, format, accumulate]
            assert op.pick(problem) in set(op.candidates(problem))


def test_a_tile_that_fills_the_gpu_is_preferred():
    wide, square = Tile(128, 256, 64, 8, 4), Tile(128, 128, 64, 8, 4)
    table = {(90, "bf16", "f32"): (wide, square)}
    full = Problem("", 90, "bf16", (128 * 11,), 256 * 12, 3072)  # 132 wide tiles on 132 multiprocessors
    assert tiles.fullness(wide, full) == 1
    assert tiles.pick(full, table) == wide
    ragged = dataclasses.replace(full, rows=(128 * 12,))  # 12 wide tiles more: a second wave for them
    assert tiles.fullness(wide, ragged) == pytest.approx(144 / 264)
    assert tiles.pick(ragged, table) == square


def test_what_was_measured_is_preferred(tmp_path, monkeypatch: pytest.MonkeyPatch):
    fast, faster = Tile(128, 64, 64, 4, 3), Tile(64, 64, 64, 4, 3)
    problem = Problem("linear_gelu", 90, "bf16", (512, 4096), 12288, 3072)
    less = dataclasses.replace(problem, rows=(512, 1024))
    rows = [
        {"problem": dataclasses.asdict(p), "tile": dataclasses.asdict(tile)}
        for p, tile in ((problem, fast), (less, faster))
    ]
    (tmp_path / "tiles.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(tiles, "MEASURED", tmp_path / "tiles.json")
    tiles.measured.cache_clear()
    assert linear_gelu.pick(problem) == fast
    assert linear_gelu.pick(dataclasses.replace(problem, rows=(500, 3900))) == fast
    assert linear_gelu.pick(dataclasses.replace(problem, rows=(512, 900))) == faster
    assert linear_gelu.pick(dataclasses.replace(problem, rows=(4608,))) in linear_gelu.TILES[90, "bf16", "f32"]
    monkeypatch.undo()
    tiles.measured.cache_clear()
