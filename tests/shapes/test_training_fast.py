"""The transformer as training runs it is the one that pipelines run."""

from __future__ import annotations

import shutil
from argparse import Namespace
from random import Random

import pytest
import torch
from shapes import fast, model, train
from shapes.data import Batch
from torch import Tensor, distributed

from fluxkiln.hub import resolve
from fluxkiln.kernels import EAGER
from fluxkiln.kernels.layers import Linear, Projection, QKNorm, Streams

HEADS, HEAD_DIM = 3, 64
WIDTH = HEADS * HEAD_DIM


def _projection(streams: int) -> Projection:
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    linears = [Linear(random(3 * WIDTH, WIDTH), random(3 * WIDTH)) for _ in range(streams)]
    return Projection(Streams(linears), tuple(QKNorm(random(HEAD_DIM), random(HEAD_DIM)) for _ in range(streams)))


@pytest.mark.parametrize("streams", [1, 2])
def test_its_operations_are_those_of_the_definition(streams: int) -> None:
    """In float64, with gradients: what is left are sums in another order."""
    torch.manual_seed(streams)
    projection, split = _projection(streams), 5 if streams == 2 else 0
    x = (torch.randn(2, 24, 2 * WIDTH, dtype=torch.float64) + 30)[:, 1:, ::2]  # a mean, an odd length, strides
    x[0, 3, 7] = 1e3
    x[1, 4] = 0
    angle = torch.rand(1, 23, HEAD_DIM // 2, dtype=torch.float64) * 100
    rope = torch.stack((angle.cos(), angle.sin()), -1)
    inputs = [x.requires_grad_(), *(p for linear in projection.streams for p in (linear.weight, linear.bias))]
    inputs += [p for norm in projection.norms for p in (norm.query, norm.key)]
    found = []
    for qkv_rope, attention in ((fast._qkv_rope, fast._attention), (EAGER.qkv_rope, EAGER.attention)):
        o = attention(*qkv_rope(x, projection, rope, split))
        found.append((o, *torch.autograd.grad(o.square().sum(), inputs)))
    for ours, definition in zip(*found, strict=True):
        torch.testing.assert_close(ours, definition, rtol=1e-9, atol=1e-9 * definition.abs().max().item())


def test_what_is_compiled_is_what_training_meets(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 64 px; each other shape would be compiled in the middle of a run. One worker after the other does it."""

    class Shapes:
        def __init__(self, edit: bool) -> None:
            self.edit = edit

        def batch(self, n: int, rng: Random) -> Batch:
            latents = torch.zeros(n, 16, 64)
            return Batch((64, 64), ["a star"] * n, latents, latents if self.edit else None, torch.full((n,), 3.5))

    denoiser, _ = model.load_pipeline(resolve("shapes"))
    compiled, turns = set(), []

    def predict(img: Tensor, txt: Tensor, *rest: Tensor) -> Tensor:
        compiled.add((*img.shape[:2], txt.shape[1]))
        turns.append("compiles")
        return img * txt.mean()  # has a gradient

    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "barrier", lambda: turns.append("waits"))
    train.compile_in_turn(1, denoiser, predict, {edit: Shapes(edit) for edit in (False, True)})
    assert turns == ["waits", *["compiles"] * 4, "waits"]
    assert all(p.grad is None for p in denoiser.parameters())
    met = set()
    for step in range(4):
        for portion in train.portions(step, Namespace(edits_from=1, sizes_from=2, own_from=3)):
            _, n = train.size_and_count(Random(0), portion._replace(sizes=train.SQUARE))
            if train.USUAL in portion.sizes:
                met |= {(n, 16 * (1 + portion.edit), length) for length in (train.SHORT, 32)}
    assert compiled == met


compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile takes a C++ compiler")


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=[pytest.mark.long, compiler])])
@pytest.mark.parametrize(("size", "n", "edit"), [((64, 64), 3, False), ((48, 80), 2, True)])
def test_it_is_as_near_to_the_truth_as_a_pipeline_in_bf16(
    size: tuple[int, int], n: int, edit: bool, compiled: bool
) -> None:
    """Of the bundled model in float64: its velocity, and the gradient of every parameter."""
    denoiser, _ = model.load_pipeline(resolve("shapes"))
    exact = model.load_pipeline(resolve("shapes"))[0].double()
    torch.manual_seed(n)
    tokens = size[0] * size[1] // 256
    img, t, guidance = torch.randn(n, tokens, 64) * 3, torch.rand(n), torch.rand(n) * 6
    reference = torch.randn(n, tokens, 64) if edit else None
    text = torch.randn(n, 24, 128), torch.randn(n, 128)

    def run(predict: object, of: model.Denoiser, dtype: torch.dtype) -> dict[str, Tensor]:
        of.zero_grad()
        given = [None if x is None else x.to(dtype) for x in (img, reference)]
        found = model.velocity(predict, *given, size, *(x.to(dtype) for x in (*text, t, guidance)))
        found.double().square().mean().backward()
        return {"velocity": found, **{name: p.grad for name, p in of.tensors.items()}}

    truth = run(exact, exact, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        usual = run(denoiser, denoiser, torch.float32)
        ours = run(fast.Fast(denoiser, compiled), denoiser, torch.float32)
    for name, right in truth.items():
        error, accepted = ((x[name].double() - right).norm().item() for x in (ours, usual))
        assert error < 1.7 * accepted, name
