"""The whole graph on the Triton kernels, interpreted, against diffusers' own model and against eager's error."""

import contextlib
import dataclasses
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
import triton

from fluxkiln import load_transformer
from fluxkiln.checkpoint import open_checkpoint, save_checkpoint
from fluxkiln.config import FluxConfig, scaled_axes
from fluxkiln.kernels import eager_ops
from fluxkiln.kernels.backend import Arena, CapturedStep, Triton, compile_step, native_arch, triton_ops
from fluxkiln.kernels.compile import no_gpu
from fluxkiln.kernels.language import Launch, jit, tl
from fluxkiln.kernels.layers import Linear, Streams
from fluxkiln.kernels.recipe import RECIPES, Recipe
from fluxkiln.quantize import Layers
from fluxkiln.transformer import Transformer

from parity import diffusers_model, diffusers_velocity, random_tensors, relative

TEXT, GRID = 5, (3, 4)


def config_of(head_dim: int, heads: int, double: int = 1, single: int = 1, **sizes: int) -> FluxConfig:
    return FluxConfig(
        in_channels=16, out_channels=16, hidden_size=heads * head_dim, num_heads=heads, depth=double,
        depth_single_blocks=single, axes_dim=scaled_axes(head_dim), **{"context_in_dim": 48, "vec_in_dim": 24} | sizes,
    )  # fmt: skip


def saved(folder, config: FluxConfig, seed: int = 0):
    """A checkpoint of random weights whose attention is not one-hot, so that bf16 does not decide which token wins."""
    tensors = random_tensors(config, seed)
    path = folder / f"{config.head_dim}-{config.hidden_size}.safetensors"
    save_checkpoint(path, ((n, (t / 3 if n.endswith(".scale") else t).bfloat16()) for n, t in tensors.items()))
    return path


SIZES = [pytest.param((64, 2), id="head dim 64"), pytest.param((128, 1), id="head dim 128")]


@pytest.fixture(scope="module", params=SIZES)
def path(request, tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model"), config_of(*request.param))


def step_inputs(model: Transformer, batch: int = 2, text: int = TEXT, grid: tuple[int, int] = GRID) -> tuple:
    """img, txt, mods, rope of a step, in fp32: modulation without bf16's rounding of the timestep."""
    g = torch.Generator().manual_seed(5)
    c = model.config
    ids = torch.tensor([(0, y, x) for y in range(grid[0]) for x in range(grid[1])])
    img = torch.randn(batch, len(ids), c.in_channels, generator=g)
    txt = torch.randn(batch, text, c.context_in_dim, generator=g)
    pooled = torch.randn(batch, c.vec_in_dim, generator=g)
    mods = model.modulate(pooled, torch.linspace(0.8, 0.4, batch), torch.full((batch,), 3.5))
    return img, txt, mods, model.rope(torch.zeros(text, 3), ids)


def in_dtype(inputs: tuple, dtype: torch.dtype) -> tuple:
    *rest, rope = inputs
    return *(x.to(dtype) for x in rest), rope


def models(path, recipe: Recipe, arch: int) -> tuple[Transformer, Transformer, Transformer]:
    """(truth in fp32, eager in bf16, Triton in bf16), the last two by the recipe."""
    checkpoint = open_checkpoint(path)
    truth = Transformer(checkpoint.config, Layers(checkpoint, RECIPES["fp32"], "cpu", torch.float32))
    layers = Layers(checkpoint, recipe, "cpu", torch.bfloat16)
    eager = Transformer(checkpoint.config, layers, eager_ops(recipe.attention))
    return truth, eager, Transformer(checkpoint.config, layers, triton_ops("cpu", recipe.attention, arch))


FP8_ATTENTION = dataclasses.replace(RECIPES["fp8"], name="fp8 with attention", attention="fp8")
RANKED = Recipe(
    "nvfp4 ranked", tuple((p, dataclasses.replace(r, rank=16)) for p, r in RECIPES["nvfp4"].rules)
)  # a low-rank branch beside every layer
CASES = [
    *((RECIPES["bf16"], arch) for arch in (89, 90)),
    *((RECIPES["fp8"], arch) for arch in (89, 90, 100, 120)),
    (FP8_ATTENTION, 90),
    *((RECIPES["nvfp4"], arch) for arch in (100, 120)),
    (RANKED, 120),
]


STEPS = [  # the kernels of sm_100 and sm_120 at head dim 64, and at 128 once
    pytest.param(*size.values, recipe, arch, id=f"{size.id} {recipe.name} sm_{arch}")
    for size in SIZES
    for recipe, arch in CASES
    if size is SIZES[0] or arch in (89, 90) or recipe is RANKED
]


@pytest.mark.parametrize(("path", "recipe", "arch"), STEPS, indirect=["path"])
def test_a_step_is_as_near_the_truth_as_eagers(path, recipe, arch):
    truth, eager, triton = models(path, recipe, arch)
    inputs = step_inputs(truth)
    want = truth.step(*inputs)
    eager_error = relative(eager.step(*in_dtype(inputs, torch.bfloat16)).float(), want)
    assert relative(triton.step(*in_dtype(inputs, torch.bfloat16)).float(), want) < 1.5 * eager_error + 1e-3


@pytest.mark.parametrize("path", SIZES[:1], indirect=True)
def test_the_callers_tensors_may_lie_anywhere(path):
    model = load_transformer(path, precision="bf16", backend="triton", device="cpu")
    img, txt, mods, rope = in_dtype(step_inputs(models(path, RECIPES["fp32"], 120)[0], batch=1), torch.bfloat16)
    columns = img.transpose(1, 2).contiguous().transpose(1, 2)
    between = torch.zeros(1, TEXT, txt.shape[-1] + 3, dtype=txt.dtype)[..., 1:-2].copy_(txt)
    assert torch.equal(model.step(columns, between, mods, rope), model.step(img, txt, mods, rope))


def test_the_public_call_equals_diffusers(path):
    """`load_transformer(..., backend="triton")` beside diffusers in bf16, both against diffusers in fp32."""
    model = load_transformer(path, precision="bf16", backend="triton", device="cpu")
    tensors = {name: open_checkpoint(path).tensor(name) for name in open_checkpoint(path).names}
    g = torch.Generator().manual_seed(6)
    ids = torch.tensor([(0, y, x) for y in range(3) for x in range(4)])
    x = {
        "img": torch.randn(1, 12, 16, generator=g).bfloat16(),
        "txt": torch.randn(1, 5, 48, generator=g).bfloat16(),
        "pooled": torch.randn(1, 24, generator=g).bfloat16(),
        "timestep": torch.tensor([0.5]),  # 500 and 4000: bf16 holds both exactly
        "guidance": torch.tensor([4.0]),
        "img_ids": ids.float(),
        "txt_ids": torch.zeros(5, 3),
    }
    wide = {n: t.float() if n in ("img", "txt", "pooled") else t for n, t in x.items()}
    want = diffusers_velocity(
        diffusers_model(model.config, {n: t.float() for n, t in tensors.items()}, torch.float32), wide
    )
    narrow = {n: t.bfloat16() if n in ("timestep", "guidance") else t for n, t in x.items()}
    theirs = diffusers_velocity(diffusers_model(model.config, tensors, torch.bfloat16), narrow)
    ours = model(**x)
    assert ours.dtype == torch.bfloat16
    assert relative(ours.float(), want) < 1.5 * relative(theirs.float(), want)


@pytest.mark.parametrize("precision", ["bf16", "fp8", "nvfp4"])
def test_an_image_of_a_batch_is_what_it_is_alone(path, precision):
    truth, _, triton = models(path, RECIPES[precision], 120)
    img, txt, mods, rope = in_dtype(step_inputs(truth, batch=2), torch.bfloat16)
    together = triton.step(img, txt, mods, rope)
    for i in range(2):
        assert torch.equal(triton.step(img[i : i + 1], txt[i : i + 1], mods[i : i + 1], rope)[0], together[i])


def test_sizes_may_change_from_step_to_step_and_velocities_are_kept(path):
    truth, _, triton = models(path, RECIPES["bf16"], 90)
    sizes = [{"grid": (2, 3), "text": 5}, {"grid": (4, 5), "text": 9}, {"grid": (2, 3), "text": 5}, {"batch": 1}]
    inputs = [in_dtype(step_inputs(truth, **size), torch.bfloat16) for size in sizes]
    first = [triton.step(*each) for each in inputs]
    again = [triton.step(*each) for each in reversed(inputs)]
    for one, two in zip(first, reversed(again), strict=True):
        assert torch.equal(one, two)


def test_a_step_allocates_nothing_once_a_shape_is_known(path):
    truth, _, model = models(path, RECIPES["fp8"], 90)
    inputs = in_dtype(step_inputs(truth), torch.bfloat16)
    model.step(*inputs)
    arena = model.ops.pack.__self__.arena
    before = {key: buffer.data_ptr() for key, buffer in arena.buffers.items()}
    model.step(*inputs)
    assert {key: buffer.data_ptr() for key, buffer in arena.buffers.items()} == before


def test_the_arena_grows_and_serves_the_smaller_from_the_larger():
    arena = Arena()
    empty = arena.of("op", torch.device("cpu"))
    small = empty("y", (2, 3), torch.float32)
    large = empty("y", (8, 3), torch.float32)
    again = empty("y", (2, 3), torch.float32)
    assert again.data_ptr() == large.data_ptr() != small.data_ptr()
    assert empty("y", (2, 3), torch.float32) is again
    assert empty("z", (2, 3), torch.float32).data_ptr() != again.data_ptr()
    assert arena.of("other", torch.device("cpu"))("y", (2, 3), torch.float32).data_ptr() != again.data_ptr()


def _tensors(x):
    if isinstance(x, torch.Tensor):
        return [x]
    parts = x if isinstance(x, tuple | list) else vars(x).values() if dataclasses.is_dataclass(x) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


@pytest.mark.parametrize("precision", ["bf16", "fp8", "nvfp4"])
def test_packed_layers_keep_nothing_else_alive(path, precision):
    _, _, model = models(path, RECIPES[precision], 120)
    held = _tensors((model.embed, model.double_blocks, model.single_blocks, model.final))
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
    assert sum(storages.values()) == sum(tensor.nbytes for tensor in held)


def test_a_whole_weight_is_packed_in_place():
    weight = torch.zeros(32, 64, dtype=torch.bfloat16)
    layer = Triton("cpu", arch=90).pack(Streams((Linear(weight, torch.zeros(32).bfloat16()),)))
    assert layer.weight.data_ptr() == weight.data_ptr()


def test_sizes_that_no_kernel_takes_go_to_the_library(tmp_path):
    path = saved(tmp_path, config_of(64, 1, context_in_dim=40))  # 40 is no multiple of 16
    truth, eager, triton = models(path, RECIPES["bf16"], 90)
    assert triton.ops.describe("linear", triton.embed).implementation == "torch"
    assert triton.ops.describe("linear", triton.final).implementation == "triton"
    inputs = step_inputs(truth)
    want = truth.step(*inputs)
    inputs = in_dtype(inputs, torch.bfloat16)
    assert relative(triton.step(*inputs).float(), want) < 1.5 * relative(eager.step(*inputs).float(), want)


def test_layers_tell_what_they_are_bound_to(path):
    _, eager, triton = models(path, RECIPES["nvfp4"], 120)
    for model, who in ((eager, "eager"), (triton, "triton")):
        double, single = model.double_blocks[0], model.single_blocks[0]
        described = {
            "qkv": model.ops.describe("qkv_rope", double.qkv),
            "proj": model.ops.describe("linear_gate_residual", double.proj),
            "mlp_in": model.ops.describe("linear_gelu", single.mlp_in),
        }
        assert {name: binding.format for name, binding in described.items()} == {
            "qkv": "fp8",
            "proj": "bf16",
            "mlp_in": "nvfp4",
        }
        assert {binding.implementation for binding in described.values()} == {who}
        assert described["mlp_in"].weights == 4 * 128 * 128
        assert described["qkv"].weights == 2 * 3 * 128 * 128
        assert described["mlp_in"].emulated == (who == "eager")


@pytest.mark.long  # compiles nine kernels or so
@pytest.mark.compiled
def test_all_that_a_step_will_launch_is_compiled_before():
    config, told = config_of(128, 1), []
    shapes = config.tensor_shapes().items()
    tensors = {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in shapes}
    model = Transformer(config, tensors, triton_ops("meta", arch=90))
    with no_gpu(90):
        count = compile_step(model, 1, TEXT, 12, lambda done, total: told.append((done, total)))
        assert count > 6
        assert told == [(i + 1, count) for i in range(count)]
        assert compile_step(model, 2, TEXT, 12) == 0  # the number of images is no reason to compile again


def test_each_size_is_compiled_once_and_only_for_a_gpu(monkeypatch):
    told = []
    monkeypatch.setattr("fluxkiln.kernels.backend.compile_step", lambda *size: told.append(size))
    for device in ("cpu", "cuda"):
        prepare = triton_ops(device, arch=90).prepare
        for image in (12, 20, 12):
            prepare("model", 1, TEXT, image)
    assert told == [("model", 1, TEXT, 12), ("model", 1, TEXT, 20)]


@jit
def _not_a_kernel(x_ptr, WHICH: tl.constexpr):
    tl.static_assert(False, "nothing compiles this")


def test_a_kernel_that_does_not_compile_leaves_the_others_compilable(monkeypatch):
    config = config_of(64, 2)
    shapes = config.tensor_shapes().items()
    tensors = {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in shapes}
    model = Transformer(config, tensors, triton_ops("meta", arch=90))
    with no_gpu(90):
        for which in range(2):  # the second time Triton would say that it is compiling already
            launch = Launch(_not_a_kernel, (1,), (torch.empty(16, device="meta"),), {"WHICH": which})
            monkeypatch.setattr(model, "step", lambda *_, it=launch: model.ops.pack.__self__._collected.append(it))
            with pytest.raises(triton.CompilationError, match="nothing compiles this"):
                compile_step(model, 1, TEXT, 12)


def test_the_architecture_is_the_devices_or_its_nearest_relatives(monkeypatch):
    assert native_arch(torch.device("cpu")) == 120
    for capability, arch in {
        (8, 0): 89,
        (8, 6): 89,
        (8, 9): 89,
        (9, 0): 90,
        (10, 0): 100,
        (10, 3): 100,
        (12, 1): 120,
    }.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert native_arch(torch.device("cuda")) == arch


def test_a_call_that_no_kernel_takes_says_why():
    ops = Triton("cpu", arch=90)
    layer = ops.pack(Streams((Linear(torch.zeros(32, 64), torch.zeros(32)),)))
    with pytest.raises(ValueError, match="linear_gelu: the kernels compute in bf16 or fp16, the model's dtype is"):
        ops.linear_gelu(torch.zeros(1, 4, 64), layer, 0)
    with pytest.raises(ValueError, match="takes K = 64, got 48"):
        ops.linear_gelu(torch.zeros(1, 4, 48), layer, 0)


def test_a_captured_step_keeps_its_model(path, monkeypatch):
    """Its graph reads the weights, whatever else becomes of the model."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name in ("Stream", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, lambda *device: stream)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *given, **options: contextlib.nullcontext())
    truth, _, model = models(path, RECIPES["bf16"], 90)
    captured, kept = CapturedStep(model, *in_dtype(step_inputs(truth), torch.bfloat16)), weakref.ref(model)
    del model
    gc.collect()
    assert kept() is not None
    del captured
    gc.collect()
    assert kept() is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_captured_step_replays_to_equal_bytes(path, precision):
    model = load_transformer(path, precision=precision, backend="triton", device="cuda")
    inputs = [x.cuda() for x in in_dtype(step_inputs(models(path, RECIPES["fp32"], 90)[0]), torch.bfloat16)]
    want = model.step(*inputs)
    captured = CapturedStep(model, *inputs)
    assert torch.equal(captured(*inputs), want)
    other = [inputs[0].flip(0), *inputs[1:]]
    assert torch.equal(captured(*other), model.step(*other))
    with pytest.raises(ValueError, match="the captured step takes img"):
        captured(inputs[0][:1], *inputs[1:])


@pytest.mark.long
@pytest.mark.parametrize("precision", ["bf16", "fp8", "nvfp4"])
def test_full_width_once(tmp_path, precision):
    """One double and one single block of FLUX.1's own width."""
    path = saved(tmp_path, config_of(128, 24, context_in_dim=4096, vec_in_dim=768))
    truth, eager, triton = models(path, RECIPES[precision], 120)
    inputs = step_inputs(truth, batch=1, text=5, grid=(3, 4))
    want = truth.step(*inputs)
    inputs = in_dtype(inputs, torch.bfloat16)
    assert relative(triton.step(*inputs).float(), want) < 1.5 * relative(eager.step(*inputs).float(), want)
