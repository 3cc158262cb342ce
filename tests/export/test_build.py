"""Engines are really built, for every target and precision, and held to what was asked for."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from fluxkiln.checkpoint import save_checkpoint
from fluxkiln.cli import main
from fluxkiln.engines.flavour import Flavour, flavour
from fluxkiln.engines.header import decode
from fluxkiln.engines.store import Store, refit_name
from fluxkiln.export import cmd_build
from fluxkiln.export.build import BuildError, Profile, build, memory_needed, refuse
from fluxkiln.export.graph import Joint, Layer, OnnxOps, Quantised, Rope, Value, cut, trace
from fluxkiln.export.structure import Kernel, StructureError, check, read_listing
from fluxkiln.export.weights import values
from fluxkiln.kernels.formats import Quant
from fluxkiln.kernels.layers import Linear, QKNorm, Streams
from fluxkiln.kernels.recipe import RECIPES, Recipe, Rule

from parity import SMALL, layers_of, random_tensors

pytest.importorskip("tensorrt_rtx", reason="builds engines: pip install 'fluxkiln[trt]'")

TARGETS = [("bf16", "sm_89"), ("bf16", "sm_120"), ("fp8", "sm_89"), ("fp8", "sm_120"), ("nvfp4", "sm_120")]
BLOCK_PRODUCTS = (
    18  # of one double block (2 x (q, k, v, proj, mlp in, mlp out)) and one single block (q, k, v, mlp, 2 x linear2)
)
PROFILE = Profile(image=(16, 64, 128), text=(1, 16, 32))
USUAL = Profile(image=(256, 4096, 8192))  # where FP8 attention is not taken apart


def products(precision: str) -> dict[str, int]:
    """Of SMALL's engine; in bf16, linear2 of the single block is one product."""
    return {
        "bf16": {"bf16": 3 + BLOCK_PRODUCTS - 1},
        "fp8": {"bf16": 3, "fp8": BLOCK_PRODUCTS},
        "nvfp4": {"bf16": 5, "fp8": 6, "nvfp4": 10},
    }[precision]


@pytest.mark.parametrize(("precision", "arch"), TARGETS)
@pytest.mark.parametrize("weights", ["inside", pytest.param("refit", marks=pytest.mark.long)])
def test_engines_run_what_was_asked_for(precision: str, arch: str, weights: str) -> None:
    layers = layers_of(SMALL, RECIPES[precision], torch.bfloat16)
    traced = trace(SMALL, layers)
    built = build(traced, arch, PROFILE, values(traced.parameters, layers) if weights == "inside" else None)
    header = decode(bytes(built.plan[:64]))
    assert header.archs == (arch,)
    assert header.version == flavour().version
    assert header.nbytes == len(built.plan)
    assert built.structure.products == products(precision)
    assert built.structure.attentions == {"bf16": 2}
    assert not built.structure.fallen


@pytest.mark.parametrize("arch", ["sm_89", "sm_120"])
@pytest.mark.parametrize("weights", ["inside", pytest.param("refit", marks=pytest.mark.long)])
def test_fp8_attention_is_one_kernel_in_fp8(arch: str, weights: str) -> None:
    layers = layers_of(SMALL, RECIPES["fp8"], torch.bfloat16)
    traced = trace(SMALL, layers, attention="fp8")
    built = build(traced, arch, USUAL, values(traced.parameters, layers) if weights == "inside" else None)
    assert built.structure.attentions == {"fp8": 2}
    assert built.structure.products == {"bf16": 3, "fp8": BLOCK_PRODUCTS}


def test_fp8_attention_that_was_taken_apart_is_caught() -> None:
    """With small sizes TensorRT makes two products and a softmax of it."""
    layers = layers_of(SMALL, RECIPES["fp8"], torch.bfloat16)
    traced = trace(SMALL, layers, attention="fp8")
    with pytest.raises(StructureError, match="attention must be 2 fused kernels, the engine has 0: TensorRT takes FP8"):
        build(traced, "sm_89", PROFILE, values(traced.parameters, layers))


def test_attention_that_fell_back_is_caught() -> None:
    kernels = [
        Kernel("_gemm_mha_v2_0", "kgen", ("bf16",), frozenset()),
        Kernel("_gemm_mha_v2_1", "kgen", ("fp8",), frozenset()),
    ]
    assert check(kernels, {}, 2, "fp8").fallen == {"attention": ("fp8", "bf16")}
    assert not check(kernels[1:], {}, 1, "fp8").fallen


@pytest.mark.parametrize("weights", ["inside", pytest.param("refit", marks=pytest.mark.long)])
def test_compatible_form_is_built(weights: str) -> None:
    layers = layers_of(SMALL, RECIPES["bf16"], torch.bfloat16)
    traced = trace(SMALL, layers, form="compatible")
    built = build(traced, "sm_89", PROFILE, values(traced.parameters, layers) if weights == "inside" else None)
    assert built.structure.products == {"bf16": 3 + BLOCK_PRODUCTS - 1}


@pytest.mark.parametrize(("precision", "arch"), [("fp8", "sm_89"), ("bf16", "sm_120"), ("nvfp4", "sm_120")])
def test_products_stay_what_they_are_beside_a_lora(precision: str, arch: str) -> None:
    layers = layers_of(SMALL, RECIPES[precision], torch.bfloat16)
    traced = trace(SMALL, layers, form="lora")
    assert len([name for name in traced.inputs if name.endswith(".lora_down")]) == 8 + 2
    built = build(traced, arch, PROFILE, values(traced.parameters, layers))
    assert built.structure.products == products(precision)
    assert not built.structure.fallen


class Joined(OnnxOps):
    """Two savings that cost an engine its FP4: text and image are quantised as one and cut behind that, and one product
    makes q, k and v. The graph's numbers are the same."""

    def norm_modulate(self, x: Joint, *args: Any, out: Quant | None = None) -> Joint:
        plain = super().norm_modulate(x, *args)
        if out is None or len(plain.parts) == 1:
            return Joint(tuple(self.emit(part, out) for part in plain.parts))
        whole, split = self.emit(plain.whole, out), args[-1]
        values = [getattr(whole, field.name) for field in fields(whole)]
        return Joint(tuple(Quantised(*(cut(x, *ends) for x in values)) for ends in ((None, split), (split, None))))

    def pack_qkv(self, streams: Streams, norms: tuple[QKNorm, ...]) -> Layer:
        return Layer(tuple((linear,) for linear in streams))

    def qkv_rope(self, x: Joint, layer: Layer, rope: Rope, split: Any) -> tuple[Any, Any, Any]:
        self.thirds: list[Value] = []
        return super().qkv_rope(x, Layer(tuple(linears * 3 for linears in layer.streams)), rope, split)

    def product(self, xs: Any, linear: Linear) -> Value:
        if linear.weight.shape[0] != 3 * self.config.hidden_size:
            return super().product(xs, linear)
        if not self.thirds:
            whole = super().product(xs, linear)
            self.thirds = list(self.graph.op("Split", whole, axis=-1, count=3, num_outputs=3))
        return self.thirds.pop(0)


def test_a_fused_qkv_that_fell_back_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT says nothing and builds it in bf16."""
    monkeypatch.setattr("fluxkiln.export.graph.OnnxOps", Joined)
    recipe = Recipe("qkv in nvfp4", (("double_blocks.*_attn.qkv", Rule("nvfp4")),))
    layers = layers_of(SMALL, recipe, torch.bfloat16)
    traced = trace(SMALL, layers)
    asked = {name for name, format in traced.products.items() if format == "nvfp4"}
    assert asked == {f"double_blocks.0.{stream}_attn.qkv.outputs0" for stream in ("txt", "img")}
    with pytest.raises(
        StructureError, match=r"2 products .* fell back: \S+qkv\S+ was asked for in nvfp4 and was built"
    ):
        build(traced, "sm_120", PROFILE, values(traced.parameters, layers))
    built = build(traced, "sm_120", PROFILE, values(traced.parameters, layers), fallback=True)
    assert built.structure.fallen == dict.fromkeys(asked, ("nvfp4", "bf16"))


def test_weights_are_really_outside_of_a_refit_engine() -> None:
    layers = layers_of(SMALL, RECIPES["bf16"], torch.bfloat16)
    traced = trace(SMALL, layers)
    steps: list[tuple[str, int, int]] = []

    def plan(weights: Any) -> bytes:
        return bytes(build(traced, "sm_89", PROFILE, weights, progress=lambda *step: steps.append(step)).plan)

    plans = [plan(values(traced.parameters, layers)), plan(None)]
    assert len([step for _, step, count in steps if 0 < step < count]) > 20
    assert all(0 <= step <= count for _, step, count in steps)
    weight = layers["single_blocks.0.linear2.weight"].T.contiguous().view(torch.uint8).numpy().tobytes()[:256]
    assert (
        weight in plans[0]
        or layers["single_blocks.0.linear2.weight"].view(torch.uint8).numpy().tobytes()[:256] in plans[0]
    )
    assert weight not in plans[1]
    for name in traced.parameters:  # by which they are supplied
        assert [refit_name(name).encode() in plan for plan in plans] == [False, True]


@pytest.fixture
def sigint() -> Iterator[None]:
    """Python's own answer to Ctrl-C: a process started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("sigint")
def test_an_interrupted_build_stops() -> None:
    layers = layers_of(SMALL, RECIPES["bf16"], torch.bfloat16)
    traced = trace(SMALL, layers)
    steps: list[int] = []

    def press(phase: str, step: int, count: int) -> None:
        steps.append(step)
        if len(steps) == 1:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        build(traced, "sm_89", PROFILE, values(traced.parameters, layers), progress=press)
    assert len(steps) < 20  # a whole build has more, see above
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_product_that_fell_back_is_caught() -> None:
    """A Q/DQ scale that is an input of the network quietly builds in bf16."""
    layers = layers_of(SMALL, RECIPES["fp8"], torch.bfloat16)
    traced = trace(SMALL, layers)
    graph = traced.proto.graph
    first = next(node for node in graph.node if node.op_type == "QuantizeLinear")
    later = next(node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] == first.output[0])
    first.input[1] = later.input[1] = "scale"
    graph.input.append(onnx.helper.make_tensor_value_info("scale", onnx.TensorProto.FLOAT, ()))
    with pytest.raises(StructureError, match=r"fell back: .* was asked for in fp8 and was built in bf16"):
        build(traced, "sm_89", PROFILE, values(traced.parameters, layers))


def test_a_missing_global_scale_is_refused() -> None:
    layers = layers_of(SMALL, RECIPES["nvfp4"], torch.bfloat16)
    traced = trace(SMALL, layers)
    node = next(node for node in traced.proto.graph.node if node.op_type == "TRT_FP4DynamicQuantize")
    node.input.pop()
    with pytest.raises(BuildError):
        build(traced, "sm_120", PROFILE)


def test_memory_is_that_of_weights_which_are_laid_out() -> None:
    layers = layers_of(SMALL, RECIPES["nvfp4"], torch.bfloat16)
    traced, compatible = trace(SMALL, layers), trace(SMALL, layers, form="compatible")
    held = sum(tensor.nbytes for _, tensor in values(traced.parameters, layers))
    least = memory_needed(traced, "refit")
    assert memory_needed(traced, "inside") == least + 2 * held
    modulation = [2 * math.prod(shape) for name, shape in SMALL.tensor_shapes().items() if "mod" in name]
    assert memory_needed(compatible, "refit") == least + sum(modulation)


def test_the_command_says_what_memory_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the build, which a machine with less does not begin, and held to it afterwards."""
    save_checkpoint(tmp_path / "m.safetensors", ((n, t.bfloat16()) for n, t in random_tensors(SMALL).items()))
    command = ["build", "--model", str(tmp_path / "m.safetensors"), "--store", str(tmp_path / "store")]
    command += ["--max-size", "256x256", "--references", "0"]
    with monkeypatch.context() as patch:
        patch.setattr(cmd_build, "available_memory", lambda: 2**30)
        assert main(command) == 1
    assert capsys.readouterr().err == "fluxkiln: the build needs up to 2.5 GiB of memory and 1.0 GiB are free\n"
    assert list(Store(tmp_path / "store")) == []

    monkeypatch.setattr(cmd_build, "peak_memory", lambda: 3 * 2**30)
    assert main([*command, "--fallback"]) == 0
    said = capsys.readouterr().out
    assert "the build needs up to 2.5 GiB" in said
    assert "the build took 3.0 GiB of memory, more than the 2.5 GiB it was to need" in said
    (stored,) = Store(tmp_path / "store")
    assert stored.manifest is not None
    assert stored.manifest.peak_bytes == 3 * 2**30
    assert any("it was to need" in note for note in stored.manifest.notes)
    assert main([*command, "--fallback"]) == 0
    assert "in the store already" in capsys.readouterr().out

    def begun(*args: Any, **options: Any) -> None:
        raise BuildError("it was begun")

    whole = stored.plan.read_bytes()
    stored.plan.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # its length and header tell nothing
    with monkeypatch.context() as patch:
        patch.setattr("fluxkiln.export.build.build", begun)
        assert main([*command, "--fallback"]) == 1
    assert "was changed after it was built: it is built again" in capsys.readouterr().out
    stored.plan.write_bytes(whole)
    assert main(command) == 0  # an engine that was allowed to fall back is not one that was not
    assert "in the store already" not in capsys.readouterr().out
    assert len(list(Store(tmp_path / "store"))) == 2


@pytest.mark.parametrize(
    ("precision", "arch", "sentence"),
    [
        ("nvfp4", "sm_89", "NVFP4 needs Blackwell"),
        ("fp8", "sm_86", "FP8 needs Ada"),
        ("bf16", "sm_90", "TensorRT-RTX builds for"),
        ("fp8", "sm_120", None),
        ("nvfp4", "sm_120", None),
    ],
)
def test_targets_are_refused_at_the_door(precision: str, arch: str, sentence: str | None) -> None:
    reason = refuse(precision, arch, flavour())
    assert reason is None if sentence is None else sentence in (reason or "")
    elsewhere = Flavour("tensorrt", None, "11.4")  # builds for the GPU at hand, whatever that is
    assert "got 'ada'" in (refuse(precision, "ada", elsewhere) or "")
    assert refuse(precision, "sm_100", elsewhere) is None


def test_default_profile_fits_what_people_use() -> None:
    profile = Profile.of((2048, 2048), references=2)
    shapes = profile.shapes({"hidden_states": ("batch", "img", 64), "txt_ids": ("txt", 3)})
    least, _, most = shapes["hidden_states"]
    for tokens in (256, 32 * 32, 64 * 48, 128 * 128, 64 * 64 + 2 * 42 * 98, 128 * 128 + 2 * 42 * 98):
        assert least[1] <= tokens <= most[1]
    assert shapes["txt_ids"] == [(1, 3), (512, 3), (512, 3)]
    for nothing in ({"largest": (0, 64)}, {"references": -1}, {"batch": 0}, {"text": 0}):
        with pytest.raises(ValueError, match="an engine takes images of at least 16 x 16 pixels, one or more"):
            Profile.of(**nothing)


def test_listing_without_a_product_says_so() -> None:
    kernels = [Kernel("a_gemm", "gemm", ("fp8", "fp8"), frozenset({"x"}))]
    with pytest.raises(StructureError, match="covers 1 of 2 products"):
        check(kernels, {"x": "fp8", "y": "fp8"}, 0)
    with pytest.raises(StructureError, match="attention must be 3 fused kernels, the engine has 0"):
        check(kernels, {"x": "fp8"}, 3)
    assert read_listing("Layers:\nno kernel here") == []
