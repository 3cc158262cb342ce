"""Eager beside an exported graph, operation by operation.

Each of eager's operations is given what the graph's own operation got, and only its own error is left: end to end, one
code at a tie that falls the other way moves codes of every layer behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from fluxkiln.export import graph
from fluxkiln.export.graph import Joint, OnnxOps, Pending, Quantised, Traced, Value
from fluxkiln.kernels import EAGER, Ops
from fluxkiln.kernels.formats import Activation, Fp8, Nvfp4, dequantize, pack_e2m1

from parity import relative

OPERATIONS = ("norm_modulate", "qkv_rope", "attention", "linear_gelu", "linear_gate_residual", "linear")


@dataclass
class Tapped:
    """A traced graph whose operations' results are outputs too.

    Attributes:
        results: (operation, what it returned) in the order of `step`.
        late: an attention's output, by its name -> what it is once it was cut into streams and quantised.
    """

    traced: Traced
    results: list[tuple[str, Any]]
    late: dict[str, tuple[Quantised, ...]]

    def parts(self, result: Any) -> tuple[Any, ...]:
        """The values of a result, one for each stream."""
        (first, *_) = parts = result.parts if isinstance(result, Joint) else (result,)
        return self.late[first.value.name] if isinstance(first, Pending) else parts


def tap(monkeypatch: pytest.MonkeyPatch, *args: Any, **options: Any) -> Tapped:
    """`trace`, with every operation's results as outputs of the graph."""
    results: list[tuple[str, Any]] = []
    late: dict[str, tuple[Quantised, ...]] = {}

    class Listening(OnnxOps):
        def ops(self) -> Ops:
            def listen(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
                def call(*args: Any, **options: Any) -> Any:
                    results.append((name, run(*args, **options)))
                    return results[-1][1]

                return call

            ops = super().ops()
            return replace(ops, **{name: listen(name, getattr(ops, name)) for name in OPERATIONS})

        def streams(self, x: Joint, *args: Any) -> tuple[Any, ...]:
            parts = super().streams(x, *args)
            if isinstance(x.parts[0], Pending):
                late[x.parts[0].value.name] = parts
            return parts

    with monkeypatch.context() as patch:
        patch.setattr(graph, "OnnxOps", Listening)
        traced = graph.trace(*args, **options)
    tapped = Tapped(traced, results, late)
    names = {
        name: None
        for _, result in results
        for each in (result if isinstance(result, tuple) else (result,))
        for part in tapped.parts(each)
        for name in _names(part, traced.proto)
    }
    traced.proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return tapped


def _names(part: Value | Quantised, proto: onnx.ModelProto) -> Iterator[str]:
    if isinstance(part, Value):
        yield part.name
        return
    yield from (part.codes.name, part.scale.name, part.norm.name)
    yield from _blocks(part, proto) or ()


def _blocks(part: Quantised, proto: onnx.ModelProto) -> tuple[str, str] | None:
    """Names of NVFP4's codes and block scales; None for FP8."""
    written = {output: node for node in proto.graph.node for output in node.output}
    node = written[written[part.codes.name].input[0]]
    return (node.output[0], node.output[1]) if node.op_type == "TRT_FP4DynamicQuantize" else None


@dataclass
class Errors:
    """The largest error of each operation, relative, by what was compared.

    Attributes:
        values: of tensors; scales: of rows' scales and norms; quantised: of dequantised activations.
    """

    values: dict[str, float] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    quantised: dict[str, float] = field(default_factory=dict)

    def note(self, op: str, got: Any, want: Any) -> None:
        def largest(errors: dict[str, float], a: torch.Tensor, b: torch.Tensor) -> None:
            errors[op] = max(errors.get(op, 0.0), relative(a, b))

        assert type(got) is type(want), op
        if isinstance(want, tuple):
            for a, b in zip(got, want, strict=True):
                self.note(op, a, b)
        elif isinstance(want, torch.Tensor):
            assert got.shape == want.shape, op
            largest(self.values, got, want)
        else:
            largest(self.quantised, dequantize(got), dequantize(want))
            for scale in (each.name for each in fields(want) if each.name in ("row_scale", "global_scale", "row_norm")):
                if getattr(want, scale) is not None:
                    largest(self.scales, getattr(got, scale), getattr(want, scale).expand(want.shape[:-1]))


def forced(tapped: Tapped, outputs: Mapping[str, np.ndarray]) -> tuple[Ops, Errors]:
    """Eager's operations, each of which is compared with the graph's and then returns the graph's result."""
    results, errors = iter(tapped.results), Errors()

    def joined(parts: tuple[Value, ...]) -> torch.Tensor:
        return torch.cat([torch.from_numpy(outputs[part.name].astype(np.float32)) for part in parts], dim=1)

    def quantised(parts: tuple[Quantised, ...], like: Fp8 | Nvfp4) -> Activation:
        rows = like.shape[:-1]
        codes = joined(tuple(part.codes for part in parts))
        scale = torch.cat(
            [
                torch.from_numpy(outputs[part.scale.name]).squeeze(-1).expand(outputs[part.codes.name].shape[:-1])
                for part in parts
            ],
            dim=1,
        )
        norm = joined(tuple(part.norm for part in parts)).squeeze(-1) if like.row_norm is not None else None
        assert scale.shape == rows
        if isinstance(like, Fp8):
            return Fp8(codes.to(torch.float8_e4m3fn), scale, norm)
        blocks = [_blocks(part, tapped.traced.proto) for part in parts]
        data, steps = (
            torch.cat([torch.from_numpy(outputs[name].astype(np.float32)) for name in names], dim=1)
            for names in zip(*blocks, strict=True)
        )
        return Nvfp4(pack_e2m1(data), steps.to(torch.float8_e4m3fn), scale, norm)

    def own(result: Any, like: Any) -> Any:
        if isinstance(like, tuple):
            return tuple(own(each, one) for each, one in zip(result, like, strict=True))
        parts = tapped.parts(result)
        return joined(parts) if isinstance(like, torch.Tensor) else quantised(parts, like)

    def force(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            want = run(*args, **options)
            op, result = next(results)
            assert op == name
            got = own(result, want)
            errors.note(name, got, want)
            return got

        return call

    return replace(EAGER, **{name: force(name, getattr(EAGER, name)) for name in OPERATIONS}), errors
