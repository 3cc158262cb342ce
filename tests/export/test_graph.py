"""The exported graph computes what eager computes, in every precision: onnxruntime and onnx's own evaluator say so."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from fluxkiln.config import FluxConfig
from fluxkiln.export.graph import Traced, trace
from fluxkiln.export.weights import values
from fluxkiln.kernels.recipe import BY_NORM, BY_TILE, RECIPES, Recipe, Rule
from fluxkiln.transformer import Transformer

from parity import SMALL, layers_of, random_tensors, relative

ALL_NVFP4 = Recipe(
    "all nvfp4",
    tuple((p, Rule("nvfp4", "row")) for p in BY_NORM) + tuple((p, Rule("nvfp4", "bound")) for p in BY_TILE),
)  # fmt: skip
LOW_RANK = Recipe("fp8 with a branch", tuple((p, Rule(r.format, r.scale, rank=16)) for p, r in RECIPES["fp8"].rules))


def filled(traced: Traced, layers: dict[str, Any]) -> onnx.ModelProto:
    """The graph with its weights inside."""
    model = onnx.ModelProto()
    model.CopyFrom(traced.proto)
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, value in values(traced.parameters, layers):
        tensor = initializers[name]
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
        tensor.raw_data = value.reshape(-1).view(torch.uint8).numpy().tobytes()
    return model


def inputs(
    dtype: torch.dtype, batch: int = 2, text: int = 7, grid: tuple[int, int] = (3, 5)
) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    model = Transformer(SMALL, layers_of(SMALL, RECIPES["fp32"], dtype))
    image = grid[0] * grid[1]
    return {
        "hidden_states": torch.randn(batch, image, SMALL.in_channels, generator=g).to(dtype),
        "encoder_hidden_states": torch.randn(batch, text, SMALL.context_in_dim, generator=g).to(dtype),
        "modulation": model.modulate(
            torch.randn(batch, SMALL.vec_in_dim, generator=g),
            torch.linspace(0.9, 0.3, batch),
            torch.full((batch,), 3.5),
        ),
        "img_ids": torch.cartesian_prod(
            torch.tensor([1.0]), torch.arange(float(grid[0])), torch.arange(float(grid[1]))
        ),
        "txt_ids": torch.zeros(text, 3),
    }


def eager(layers: dict[str, Any], x: dict[str, torch.Tensor]) -> torch.Tensor:
    model = Transformer(SMALL, layers)
    rope = model.rope(x["txt_ids"], x["img_ids"])
    return model.step(x["hidden_states"], x["encoder_hidden_states"], x["modulation"], rope)


def to_numpy(x: torch.Tensor) -> np.ndarray:
    return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()


def run_onnxruntime(model: onnx.ModelProto, x: dict[str, torch.Tensor]) -> torch.Tensor:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    # Above BASIC, it fuses Q/DQ into products that its CPU has no FP8 form of.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: to_numpy(value) for name, value in x.items()})[0])


class TRT_FP4DynamicQuantize(OpRun):  # the operator's name is the class's
    """TensorRT's operator, by its documentation: blocks of 16, e4m3 scales in units of the global scale."""

    op_domain = "trt"

    def _run(self, x, unit, axis=None, block_size=None, scale_type=None):
        assert axis == -1
        assert scale_type == onnx.TensorProto.FLOAT8E4M3FN
        blocks = x.astype(np.float32).reshape(*x.shape[:-1], -1, block_size)
        scale = (np.abs(blocks).max(-1) / 6 / unit).astype(ml_dtypes.float8_e4m3fn)
        step = (scale.astype(np.float32) * unit)[..., None]
        codes = np.clip(np.divide(blocks, step, out=np.zeros_like(blocks), where=step != 0), -6, 6)
        return codes.astype(ml_dtypes.float4_e2m1fn).reshape(x.shape), scale


def run_reference(model: onnx.ModelProto, x: dict[str, torch.Tensor]) -> torch.Tensor:
    evaluator = ReferenceEvaluator(model, new_ops=[TRT_FP4DynamicQuantize])
    (latent,) = evaluator.run(None, {name: to_numpy(value) for name, value in x.items()})
    return torch.from_numpy(np.asarray(latent).astype(np.float32))


def tolerance(recipe: Recipe) -> float:
    """fp32 sums in another order; where codes are made from them, one at a tie may fall to the other side."""
    return 5e-6 if recipe.name == "fp32" else 5e-4


@pytest.mark.parametrize("recipe", [RECIPES["fp32"], RECIPES["fp8"], LOW_RANK], ids=lambda recipe: recipe.name)
@torch.no_grad()
def test_onnxruntime_equals_eager_in_the_same_precision(recipe: Recipe) -> None:
    layers = layers_of(SMALL, recipe, torch.float32)
    model = filled(trace(SMALL, layers, torch.float32), layers)
    onnx.checker.check_model(model, full_check=True)
    x = inputs(torch.float32)
    assert relative(run_onnxruntime(model, x), eager(layers, x)) < tolerance(recipe)


@pytest.mark.parametrize("recipe", [RECIPES["nvfp4"], ALL_NVFP4], ids=lambda recipe: recipe.name)
@torch.no_grad()
def test_nvfp4_equals_eager_in_the_same_precision(recipe: Recipe) -> None:
    layers = layers_of(SMALL, recipe, torch.float32)
    traced = trace(SMALL, layers, torch.float32)
    x = inputs(torch.float32)
    assert relative(run_reference(filled(traced, layers), x), eager(layers, x)) < 5e-4


@pytest.mark.parametrize("precision", ["bf16", "fp8", "nvfp4"])
@torch.no_grad()
def test_bf16_rest_errs_no_more_than_the_format(precision: str) -> None:
    """Against fp32 truth; onnx's evaluator sums bf16 products in bf16, so it errs more than eager does."""
    layers = layers_of(SMALL, RECIPES[precision], torch.bfloat16)
    x = inputs(torch.bfloat16)
    truth = eager(
        {name: t.bfloat16().float() for name, t in random_tensors(SMALL).items()}, {k: v.float() for k, v in x.items()}
    )
    ours = relative(eager(layers, x), truth)
    assert relative(run_reference(filled(trace(SMALL, layers), layers), x), truth) < 1.3 * ours + 0.02


@torch.no_grad()
def test_sizes_are_dynamic() -> None:
    layers = layers_of(SMALL, RECIPES["fp8"], torch.float32)
    model = filled(trace(SMALL, layers, torch.float32), layers)
    for batch, text, grid in ((1, 1, (1, 1)), (3, 13, (7, 2))):
        x = inputs(torch.float32, batch, text, grid)
        assert relative(run_onnxruntime(model, x), eager(layers, x)) < 5e-4


def test_full_size_is_traced_without_weights() -> None:
    """All 57 blocks on the meta device; every tensor of a block and of both ends is a parameter exactly once."""
    config = FluxConfig()
    tensors = {
        name: torch.empty(shape, device="meta", dtype=torch.bfloat16) for name, shape in config.tensor_shapes().items()
    }
    traced = trace(config, tensors)
    assert traced.proto.ByteSize() < 2**21
    count = sum(int(np.prod(p.shape)) for p in traced.parameters.values())
    outside = sum(
        int(np.prod(shape))
        for name, shape in config.tensor_shapes().items()
        if "mod" in name or name.startswith(("time_in", "guidance_in", "vector_in"))
    )
    assert count == 11_901_408_320 - outside
    assert traced.attentions == 57
