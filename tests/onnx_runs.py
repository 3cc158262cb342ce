"""Who runs exported graphs in tests: onnxruntime, and onnx's own evaluator for what that cannot do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx.reference.ops.op_attention import _compute_attention
from onnx.reference.ops.op_layer_normalization import _layer_normalization

from fluxkiln.export.graph import Traced
from fluxkiln.kernels.layers import Linear


def fill(traced: Traced, values: Iterable[tuple[str, torch.Tensor]]) -> onnx.ModelProto:
    """The graph with its weights inside."""
    model = onnx.ModelProto()
    model.CopyFrom(traced.proto)
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, value in values:
        tensor = initializers[name]
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
        tensor.raw_data = value.reshape(-1).view(torch.uint8).numpy().tobytes()
    return model


def to_numpy(x: torch.Tensor) -> np.ndarray:
    return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()


def run_onnxruntime(model: onnx.ModelProto | Path, x: dict[str, torch.Tensor]) -> torch.Tensor:
    """The first output."""
    return torch.from_numpy(next(iter(outputs_onnxruntime(model, x).values())))


def outputs_onnxruntime(model: onnx.ModelProto | Path, x: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Of a model in memory, or of a file: protobuf has a limit of 2 GB."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    # Above BASIC, it fuses Q/DQ into products that its CPU has no FP8 form of.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    source = model if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, options, ["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {name: to_numpy(value) for name, value in x.items()}), strict=True))


class TRT_FP4DynamicQuantize(OpRun):  # the operator's name is the class's
    """TensorRT's operator, by its documentation: blocks of 16, e4m3 scales in units of the global scale."""

    op_domain = "trt"

    def _run(self, x, unit, axis=None, block_size=None, scale_type=None):
        assert axis == -1
        assert scale_type == onnx.TensorProto.FLOAT8E4M3FN
        x = x if x.dtype == np.float64 else x.astype(np.float32)
        blocks = x.reshape(*x.shape[:-1], -1, block_size)
        scale = (np.abs(blocks).max(-1) / 6 / unit).astype(ml_dtypes.float8_e4m3fn)
        step = (scale.astype(x.dtype) * unit)[..., None]
        codes = np.clip(np.divide(blocks, step, out=np.zeros_like(blocks), where=step != 0), -6, 6)
        return codes.astype(ml_dtypes.float4_e2m1fn).reshape(x.shape), scale


def run_reference(model: onnx.ModelProto, x: dict[str, torch.Tensor]) -> torch.Tensor:
    """The first output."""
    return torch.from_numpy(next(iter(outputs_reference(model, x).values())).astype(np.float32))


def outputs_reference(model: onnx.ModelProto, x: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    evaluator = ReferenceEvaluator(model, new_ops=[TRT_FP4DynamicQuantize, *ROUNDED_ONCE])
    results = evaluator.run(None, {name: to_numpy(value) for name, value in x.items()})
    return dict(zip(evaluator.output_names, map(np.asarray, results), strict=True))


def _operator(name: str, run: Any) -> type[OpRun]:
    return type(name, (OpRun,), {"_run": lambda self, *xs, **options: (run(*xs, **options),)})


def _gelu(x: np.ndarray, approximate: bytes | str) -> np.ndarray:
    assert approximate in ("tanh", b"tanh")
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def _rounded_once(name: str, run: Any) -> type[OpRun]:
    def wide(*xs: np.ndarray, **options: Any) -> np.ndarray:
        return run(*(x.astype(np.float32) for x in xs), **options).astype(xs[0].dtype)

    return _operator(name, wide)


# What kernels compute of bf16 in fp32, and the evaluator's own in bf16, sums too.
ROUNDED_ONCE = [
    _rounded_once("MatMul", np.matmul),
    _rounded_once("Gelu", _gelu),
    _rounded_once("Attention", lambda q, k, v, **_: _compute_attention(q, k, v)[0]),
    _rounded_once(
        "LayerNormalization", lambda x, w, axis, epsilon, **_: _layer_normalization(x, w, None, axis, epsilon)[0]
    ),
]


# --- in float64 ---------------------------------------------------------------------------------
# In fp32 the order of a sum moves its last bits, and with them codes at ties; in float64 there are no such ties. What
# the formats define as fp32 stays that: scales and norms of rows.


def outputs_float64(path: Path, x: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Of a graph in fp32, with everything but its constants, weights, scales and norms in float64."""
    model = onnx.load(path)
    for node in model.graph.node:
        for attribute in node.attribute:
            if (node.op_type, attribute.name, attribute.i) == ("Cast", "to", onnx.TensorProto.FLOAT):
                attribute.i = onnx.TensorProto.DOUBLE
    evaluator = ReferenceEvaluator(model, new_ops=[TRT_FP4DynamicQuantize, *MIXED])
    results = evaluator.run(None, {name: value.double().numpy() for name, value in x.items()})
    return dict(zip(evaluator.output_names, results, strict=True))


def float64(layer: Any) -> Any:
    """A tensor or a layer as eager takes it to compute in float64; codes and their scales stay what they are."""
    if isinstance(layer, Linear):
        return replace(layer, weight=float64(layer.weight), bias=layer.bias.double())
    return layer.double() if isinstance(layer, torch.Tensor) else layer


# Of inputs of two dtypes, which the evaluator's own refuse; a scale is the only thing that Max makes, and a norm of
# rows the only thing that ReduceL2 does.
MIXED = [
    _operator("Add", np.add),
    _operator("Sub", np.subtract),
    _operator("Mul", np.multiply),
    _operator("Div", np.divide),
    _operator("MatMul", lambda a, b: a.astype(np.float64) @ b.astype(np.float64)),
    _operator("Max", lambda *xs: np.maximum(*xs).astype(np.float32)),
    _operator(
        "ReduceL2",
        lambda x, axes, keepdims, **_: np.linalg.norm(x, axis=int(axes[0]), keepdims=bool(keepdims)).astype(np.float32),
    ),
    _operator("Gelu", _gelu),
]
