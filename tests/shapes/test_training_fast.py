"""The transformer as training runs it is the one that pipelines run."""

from __future__ import annotations

import shutil

import pytest
import torch
from shapes import fast, model, portions
from shapes.denoiser import compile_together
from torch import Tensor, distributed
from torch._dynamo.testing import CompileCounter

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


def test_its_gelu_is_the_definitions() -> None:
    x = torch.cat((torch.linspace(-40, 40, 801), torch.tensor([0.0, -1e3, 1e4]))).double()[None, :, None]
    x.requires_grad_()
    layer = Streams([Linear(torch.ones(1, 1).double(), torch.zeros(1).double())])
    found = [gelu(x, layer, 0) for gelu in (fast._linear_gelu, EAGER.linear_gelu)]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y in found), rtol=1e-12, atol=1e-12)


@torch._dynamo.config.patch(recompile_limit=8)  # a monkeypatch of it would leave none
def test_what_is_compiled_is_what_training_meets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each other shape would be compiled in the middle of a run. The workers share it, and nothing is done twice."""
    denoiser, _ = model.load_pipeline(resolve("shapes"))
    met = set()
    for kind in portions.SHARES:
        targets = kind.size[0] * kind.size[1] // 256
        met |= {(kind.samples, targets * (1 + kind.edit), targets, length) for length in (kind.text, 32)}

    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    first = {}
    for rank in range(2):
        turns: list[set | None] = [set()]

        def predict(img: Tensor, txt: Tensor, *rest: Tensor, turns: list = turns) -> Tensor:
            shape = (*img.shape[:2], int((rest[-1][:, 0] == 0).sum()), txt.shape[1])
            assert all(shape not in turn for turn in turns)
            turns[-1].add(shape)
            return img * txt.mean()  # has a gradient

        monkeypatch.setattr(distributed, "barrier", lambda turns=turns: turns.append(set()))
        compile_together(rank, denoiser, predict)
        assert all(p.grad is None for p in denoiser.parameters())
        first[rank], second, after = turns
        assert first[rank] | second == met
        assert not after
        assert torch._dynamo.config.recompile_limit >= len(met)
    assert not first[0] & first[1]
    assert abs(len(first[0]) - len(first[1])) <= 1


def test_each_shape_is_compiled_once() -> None:
    """Each kind of block for each shape, and none of them again in the next step."""
    counter = CompileCounter()

    class Counted(fast._Picture):
        double_block = torch.compile(fast._Picture.double_block, backend=counter, dynamic=False)
        whole_block = torch.compile(fast._Picture.whole_block, backend=counter, dynamic=False)
        last_block = torch.compile(fast._Picture.last_block, backend=counter, dynamic=False)

    denoiser, _ = model.load_pipeline(resolve("shapes"))
    predict = fast.Fast(denoiser)
    predict.transformer = Counted
    text = torch.randn(2, 9, 128), torch.randn(2, 128)
    torch._dynamo.reset()
    for _ in range(3):
        # As many tokens in all, of which another share is to be made: the last block alone is another one.
        for targets, references in ((16, None), (8, 8)):
            img = torch.randn(2, targets, 64)
            size = (16 * targets, 16)
            reference = None if references is None else torch.randn(2, references, 64)
            model.velocity(predict, img, reference, size, *text, torch.rand(2), torch.ones(2)).mean().backward()
        assert counter.frame_count == 3 + 1
    torch._dynamo.reset()


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
