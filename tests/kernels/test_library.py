"""What runs on a library: chosen by a measured table alone, as right as eager, one image at a time, and in the plan."""

import json

import pytest
import torch
from accuracy import Canaries, assert_as_good_as_eager, run
from products import activation, layer, noise, product

from fluxkiln.bench import tune
from fluxkiln.kernels import attention, library, tiles
from fluxkiln.kernels import linear as linear_op
from fluxkiln.kernels.attention import Values
from fluxkiln.kernels.backend import INTERPRETED, Triton
from fluxkiln.kernels.formats import FP8_MAX, Quant
from fluxkiln.kernels.language import Launch
from fluxkiln.kernels.layers import QKNorm, Streams


@pytest.fixture
def timed(tmp_path, monkeypatch):
    """Writes a row of a table that is the only one there is."""
    table = tmp_path / "tiles.json"
    monkeypatch.setattr(tiles, "MEASURED", table)
    tiles.section.cache_clear()

    def write(kind: dict, us: float, us_library: float, **size: object) -> None:
        tune.merge(table, "library", {"problem": kind | size, "us": us, "us_library": us_library})
        tiles.section.cache_clear()

    yield write
    monkeypatch.undo()
    tiles.section.cache_clear()


# --- choice -----------------------------------------------------------------------------------


def test_our_kernel_runs_what_was_not_timed(timed):
    assert not library.faster(library.attention_kind(90, 128))
    timed(library.attention_kind(90, 128), 100.0, 80.0, size="a")
    assert library.faster(library.attention_kind(90, 128))
    assert not library.faster(library.attention_kind(90, 64))
    assert not library.faster(library.attention_kind(100, 128))


def test_the_library_has_to_win_everywhere(timed):
    kind = library.attention_kind(90, 128)
    timed(kind, 100.0, 80.0, size="a")
    timed(kind, 100.0, 98.0, size="b")  # within what can be told apart
    assert not library.faster(kind)
    timed(kind, 100.0, 90.0, size="b")  # timed again
    assert library.faster(kind)


def test_a_product_is_told_by_its_shape_format_and_sums(timed):
    embed = linear_op.pack(Streams((layer("bf16", 48, 64)[0], layer("bf16", 48, 32)[0])))
    kind = library.linear_kind(90, embed)
    timed(json.loads(json.dumps(kind)), 2.0, 1.0)
    assert library.faster(kind)
    assert not library.faster(library.linear_kind(90, embed[:1]))
    fast, slow = (linear_op.pack(layer("fp8", 48, 64, 1, sums)) for sums in ("f32", "promote128"))
    timed(library.linear_kind(90, fast), 2.0, 1.0)
    assert not library.faster(library.linear_kind(90, slow))


def test_what_no_library_takes_says_why(timed):
    x = noise(1, 8, 64).bfloat16()
    q = attention.Query(x, x, x, 0)
    assert "with q as it is multiplied" in library.kind("attention", (q, x, x), 90)
    assert "blocks of 16" in library.kind("linear", ((x,), linear_op.pack(layer("nvfp4", 48, 64))), 100)
    assert "low-rank" in library.kind("linear", ((x,), linear_op.pack(layer("fp8", 48, 64, 1, rank=16))), 90)
    assert "fp16 sums" in library.kind("linear", ((x,), linear_op.pack(layer("fp8", 48, 64, 1, "f16"))), 89)
    assert "more than a library's call" in library.kind("linear_gelu", (), 90)


# --- parity -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "accumulate"), [("bf16", "f32"), ("fp8", "f32"), ("fp8", "promote128")], ids=lambda x: x
)
def test_linear(format: str, accumulate: str):
    streams = Streams(layer(format, 48, k, 1, accumulate)[0] for k in (160, 64))
    xs = [activation(noise(2, n, k), format, accumulate) for n, k in ((21, 160), (13, 64))]
    canaries = Canaries()
    got = run(library.linear(xs, linear_op.pack(streams), arch=90, empty=canaries), canaries)
    want = torch.cat([product(x, linear) for x, linear in zip(xs, streams, strict=True)], dim=1)
    assert_as_good_as_eager(got, linear_op.reference(xs, streams), want)
    alone = run(library.linear([x[1:] for x in xs], linear_op.pack(streams), arch=90))
    assert torch.equal(alone[0], got[1])


def qkv(B: int = 2, L: int = 77, H: int = 2, d: int = 64) -> tuple[torch.Tensor, ...]:
    return tuple(noise(B, L, H, d, seed=seed).bfloat16() for seed in range(3))


@pytest.mark.parametrize(
    "out",
    [None, Quant("fp8", "bound"), Quant("nvfp4", "bound", keep=True), Quant("fp8", "static", torch.tensor(0.01))],
    ids=["bf16", "fp8", "nvfp4", "static"],
)
def test_attention(out: Quant | None):
    q, k, v = qkv()
    v[0] *= 7  # each image has a bound of its own
    heads = (x.double().transpose(1, 2) for x in (q, k, v))
    want = torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    canaries = Canaries()
    got = run(library.attention(q, k, v, out, arch=100, empty=canaries), canaries)
    eager = attention.reference(q, k, v, out)
    assert_as_good_as_eager(got, eager, want)
    if out is not None:
        scale = "row_scale" if out.format == "fp8" else "global_scale"
        assert torch.allclose(getattr(got, scale), getattr(eager, scale), rtol=1e-6)
        assert (got.dense is not None) == out.keep
    alone = run(library.attention(q[1:], k[1:], v[1:], out, arch=100))
    for name in ("data", "row_scale", "block_scale", "global_scale", "dense"):
        part, whole = (getattr(y, name, None) for y in (alone, got))
        if isinstance(part, torch.Tensor):
            assert torch.equal(part[0].view(torch.uint8), whole[1].view(torch.uint8))


def test_attention_takes_a_bound_that_is_known():
    q, k, v = qkv()
    known = Values(v, torch.full((2, 2, 3), 9.0 / FP8_MAX), 0)
    got = run(library.attention(q, k, known, Quant("fp8", "bound"), arch=90))
    assert torch.allclose(got.row_scale, torch.full((2, 77), 9.0 / FP8_MAX))


# --- the backend ------------------------------------------------------------------------------


def test_the_backend_runs_it_and_the_plan_says_so(timed):
    q, k, v = qkv(d=64)
    norms = (QKNorm(torch.ones(64), torch.ones(64)),)
    x, final = noise(2, 8, 64).bfloat16(), layer("bf16", 48, 64)

    def bound() -> tuple[Triton, list[str]]:
        backend = Triton("cpu")
        backend.pack_qkv(layer("bf16", 3 * 128, 128), norms)
        packed = backend.pack(final)
        return backend, [
            backend.describe(op, on).implementation for op, on in (("attention", None), ("linear", packed))
        ]

    backend, plan = bound()
    assert plan == ["triton", "triton"]
    with backend.collected() as launches:
        backend.attention(q, k, v)
    assert all(isinstance(launch, Launch) for launch in launches)

    timed(library.attention_kind(INTERPRETED, 64), 2.0, 1.0)
    timed(library.linear_kind(INTERPRETED, linear_op.pack(final)), 2.0, 1.0)
    backend, plan = bound()
    assert plan == ["torch", "torch"]
    with backend.collected() as launches:
        backend.attention(q, k, v)
        backend.linear((x,), backend.pack(final))
    assert not any(isinstance(launch, Launch) for launch in launches)
    assert torch.equal(backend.attention(q, k, v), run(library.attention(q, k, v, arch=INTERPRETED)))
    assert torch.equal(
        backend.linear((x,), backend.pack(final)), run(library.linear((x,), linear_op.pack(final), arch=INTERPRETED))
    )
