"""Who runs exported graphs in tests: onnxruntime, and onnx's own evaluator for what that cannot do."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from fluxkiln.export.graph import Traced


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
        blocks = x.astype(np.float32).reshape(*x.shape[:-1], -1, block_size)
        scale = (np.abs(blocks).max(-1) / 6 / unit).astype(ml_dtypes.float8_e4m3fn)
        step = (scale.astype(np.float32) * unit)[..., None]
        codes = np.clip(np.divide(blocks, step, out=np.zeros_like(blocks), where=step != 0), -6, 6)
        return codes.astype(ml_dtypes.float4_e2m1fn).reshape(x.shape), scale


def run_reference(model: onnx.ModelProto, x: dict[str, torch.Tensor]) -> torch.Tensor:
    """The first output."""
    return torch.from_numpy(next(iter(outputs_reference(model, x).values())).astype(np.float32))


def outputs_reference(model: onnx.ModelProto, x: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    evaluator = ReferenceEvaluator(model, new_ops=[TRT_FP4DynamicQuantize])
    results = evaluator.run(None, {name: to_numpy(value) for name, value in x.items()})
    return dict(zip(evaluator.output_names, map(np.asarray, results), strict=True))
