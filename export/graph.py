"""The transformer's `step` as an ONNX graph: the same code as eager, run with operations that write nodes.

    traced = trace(config, tensors)     # tensors: as for `Transformer`; they may live on the meta device
    traced.proto                        # ONNX, opset 23; large weights are named, not held
    traced.parameters                   # name -> where its bytes come from

It has three forms: `step`, which is given the modulation; `compatible`, which computes it and has the names of the
ONNX releases of NVIDIA and Black Forest Labs; `lora`, a step whose block linears take a LoRA's matrices as inputs.

A joint stream stays apart as text and image until the single blocks. Quantised layers are written in unit scale:
activations are divided by their row's scale before a Q/DQ pair of scale 1, weights are codes under a DQ of scale 1,
and both scales multiply the product afterwards. So every scale rule of `fluxkiln.kernels.formats` can be followed by
an engine builder that takes constant scales only, and FP8 and NVFP4 products stay FP8 and NVFP4 products.

FP8 attention is the one place where TensorRT cannot follow eager: it fuses a plain softmax only, and one scale for all
tokens. So v has a scale for each head of an image instead of one for every 128 tokens, and the weights of softmax are
rounded to multiples of 1/448 of 1 instead of 1/448 of the row's largest (`FP8_ATTENTION`). q and k are eager's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Literal

import numpy as np
import onnx
import torch
from onnx import TensorProto
from onnx import helper as make
from torch import Tensor

from fluxkiln.config import TIME_EMBED_DIM, FluxConfig
from fluxkiln.kernels import Ops
from fluxkiln.kernels.formats import BLOCK, FP8_MAX, NVFP4_MAX, TINY, Fp8, Quant
from fluxkiln.kernels.layers import EPS, Linear, QKNorm, Streams, rows
from fluxkiln.transformer import Transformer

OPSET = 23  # the first with Attention and FLOAT4E2M1
FP4_DOMAIN = "trt"  # of TRT_FP4DynamicQuantize: ONNX has no dynamic quantisation to blocks
FP8_ATTENTION = (
    "FP8 attention: one scale of v for each head of an image, softmax's weights in steps of one scale, 1/448"
)

Form = Literal["step", "compatible", "lora"]

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
ELEMENT = {
    torch.float32: TensorProto.FLOAT,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float8_e4m3fn: TensorProto.FLOAT8E4M3FN,
    torch.int64: TensorProto.INT64,
}


@dataclass(frozen=True)
class Parameter:
    """An initializer that the graph names and does not hold.

    Attributes:
        layer: native name of the layer (or of the block's norm) it belongs to.
        role: which of its tensors: `weight`, `block_scale`, `scale` (of rows), `bias`, `gain` and `offset` (of its
            output bound), `down`, `up`, `query`, `key`.
        outputs: which of the layer's outputs, [first, after the last); None: the layer is not cut.
        inputs: which of its inputs, where a weight is multiplied in two parts; None: all.
        element: ONNX element type; shape: its dimensions.
    """

    layer: str
    role: str
    outputs: tuple[int, int] | None
    inputs: tuple[int, int] | None
    element: int
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{part_name(self.layer, self.outputs, self.inputs)}.{self.role}"


def part_name(layer: str, outputs: tuple[int, int] | None, inputs: tuple[int, int] | None) -> str:
    return layer + (f".outputs{outputs[0]}" if outputs else "") + (f".inputs{inputs[0]}" if inputs else "")


@dataclass(frozen=True)
class Value:
    """A tensor of the graph."""

    graph: Graph
    name: str

    @property
    def shape(self) -> tuple[Any, Any]:
        """Only the length (axis 1) is ever asked for: as a tensor of one int64."""
        return (None, self.graph.op("Shape", self, start=1, end=2))


@dataclass(frozen=True)
class Quantised:
    """An activation for a quantised product: unit-scale codes, behind Q/DQ, and what they are multiplied with."""

    codes: Value  # [B, L, K], for attention [B, L, H, d]
    scale: Value  # fp32, broadcasts to the codes
    norm: Value  # fp32 [B, L, 1], the rows' L2 norms; written when something reads it
    dense: Value  # before quantisation


@dataclass(frozen=True)
class Pending:
    """An activation that is quantised once it is cut into streams: a cut between a Q/DQ pair and its product hides
    from TensorRT that the product is FP4's."""

    value: Value
    quant: Quant
    bound: Value | None


@dataclass(frozen=True)
class Joint:
    """A joint sequence, kept apart as (text, image) as long as nothing needs it whole."""

    parts: tuple[Any, ...]

    @property
    def whole(self) -> Any:
        return self.parts[0] if len(self.parts) == 1 else self.parts[0].graph.concat(self.parts, axis=1)

    def __getitem__(self, index: tuple[slice, slice]) -> Joint:
        """`[:, split:]`: the image rows."""
        return Joint((self.streams(2, index[1].start)[1],))

    def streams(self, count: int, split: Value) -> tuple[Any, ...]:
        """The sequence as one part, or as text and image."""
        if count == 1:
            return (self.whole,)
        if len(self.parts) == 2:
            return self.parts
        (x,) = self.parts
        return (cut(x, None, split), cut(x, split, None))


def cut(x: Value, start: Value | None, end: Value | None) -> Value:
    """`x[:, start:end]`."""
    graph = x.graph
    start, end = start or graph.integers([0]), end or graph.integers([np.iinfo(np.int64).max])
    return graph.op("Slice", x, start, end, graph.integers([1]))


@dataclass(frozen=True)
class Rows:
    """Rows of the modulation tensor `[B, M, D]`, indexed as a tensor of torch would be."""

    source: Value
    index: np.ndarray

    def __getitem__(self, key: tuple[Any, ...]) -> Rows:
        return Rows(self.source, self.index[key[1:]])

    def unflatten(self, dim: int, sizes: tuple[int, ...]) -> Rows:
        return Rows(self.source, self.index.reshape(*self.index.shape[: dim - 1], *sizes, *self.index.shape[dim:]))

    def unbind(self, dim: int) -> tuple[Rows, ...]:
        return tuple(Rows(self.source, rows) for rows in np.moveaxis(self.index, dim - 1, 0))

    def streams(self) -> list[Value]:
        """One `[B, 1, D]` for each stream."""
        graph = self.source.graph
        bounds = [(graph.integers([row]), graph.integers([row + 1])) for row in self.index]
        return [graph.op("Slice", self.source, start, end, graph.integers([1])) for start, end in bounds]


@dataclass
class Graph:
    """ONNX nodes in the order they were written, and the constants and parameters they read."""

    high: torch.dtype  # of everything that is not quantised
    inputs: dict[str, onnx.ValueInfoProto] = field(default_factory=dict)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[bytes, onnx.TensorProto] = field(default_factory=dict)  # by content
    parameters: dict[str, Parameter] = field(default_factory=dict)
    products: dict[str, str] = field(default_factory=dict)  # node of a layer's product -> number format

    def op(
        self, kind: str, *inputs: Value | None, domain: str = "", count: int = 1, name: str = "", **attributes: Any
    ) -> Any:
        """Write a node; its output, or a tuple of `count` outputs."""
        name = name or f"{kind}_{len(self.nodes)}"
        # TensorRT's kernels are called after the outputs, not after the nodes.
        outputs = [name] if count == 1 else [f"{name}_{i}" for i in range(count)]
        read = [value.name if value else "" for value in inputs]
        self.nodes.append(make.make_node(kind, read, outputs, name, domain=domain, **attributes))
        values = tuple(Value(self, name) for name in outputs)
        return values if count > 1 else values[0]

    def input(self, name: str, dtype: torch.dtype, shape: Sequence[int | str]) -> Value:
        """An input; its dynamic dimensions have names."""
        self.inputs.setdefault(name, make.make_tensor_value_info(name, ELEMENT[dtype], shape))
        return Value(self, name)

    def constant(self, value: Any, dtype: torch.dtype | None = None) -> Value:
        tensor = torch.as_tensor(value, dtype=dtype or self.high)
        return self._constant(make_tensor(tensor))

    def integers(self, values: int | Sequence[int] | np.ndarray) -> Value:
        return self._constant(onnx.numpy_helper.from_array(np.asarray(values, np.int64)))

    def parameter(self, parameter: Parameter) -> Value:
        assert self.parameters.setdefault(parameter.name, parameter) == parameter, parameter.name
        return Value(self, parameter.name)

    def tensor(self, name: str, shape: Sequence[int]) -> Value:
        """A tensor of the model as a parameter of that name, in the graph's dtype."""
        layer, _, role = name.rpartition(".")
        return self.parameter(Parameter(layer, role, None, None, ELEMENT[self.high], tuple(shape)))

    def cast(self, x: Value, dtype: torch.dtype) -> Value:
        return self.op("Cast", x, to=ELEMENT[dtype])

    def concat(self, xs: Sequence[Value], axis: int) -> Value:
        return self.op("Concat", *xs, axis=axis)

    def reshape(self, x: Value, shape: Sequence[int]) -> Value:
        """0 keeps a dimension, -1 takes what remains."""
        return self.op("Reshape", x, self.integers(shape))

    def silu(self, x: Value) -> Value:
        """Rounded once, as torch's own."""
        wide = self.cast(x, torch.float32)
        return self.cast(self.op("Mul", wide, self.op("Sigmoid", wide)), self.high)

    def model(self, name: str, outputs: Mapping[str, tuple[Value, Sequence[int | str]]]) -> onnx.ModelProto:
        """The whole as ONNX: name of an output -> value of the graph's dtype and its shape."""
        for output, (value, _) in outputs.items():
            self.nodes.append(make.make_node("Identity", [value.name], [output], output))
        domains = {"": OPSET} | ({FP4_DOMAIN: 1} if any(node.domain == FP4_DOMAIN for node in self.nodes) else {})
        return make.make_model(
            make.make_graph(
                self.nodes,
                name,
                list(self.inputs.values()),
                [make.make_tensor_value_info(output, ELEMENT[self.high], s) for output, (_, s) in outputs.items()],
                [*self.constants.values(), *(elsewhere(p) for p in self.parameters.values())],
            ),
            opset_imports=[make.make_opsetid(domain, version) for domain, version in domains.items()],
            producer_name="fluxkiln",
            ir_version=11,  # the first that knows FLOAT4E2M1 and opset 23
        )

    def _constant(self, tensor: onnx.TensorProto) -> Value:
        content = tensor.SerializeToString()
        if content not in self.constants:
            tensor.name = f"constant_{len(self.constants)}"
            self.constants[content] = tensor
        return Value(self, self.constants[content].name)


def make_tensor(tensor: Tensor, name: str = "") -> onnx.TensorProto:
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return make.make_tensor(name, ELEMENT[tensor.dtype], tuple(tensor.shape), data, raw=True)


@dataclass(frozen=True)
class Layer:
    """A packed layer: for each stream the linears that are written, q, k and v each on its own.

    One projection to q, k and v that is cut in three afterwards is silently built in bf16 by TensorRT.
    """

    streams: tuple[tuple[Linear, ...], ...]

    @property
    def input(self) -> Quant | None:
        return self.streams[0][0].input


class OnnxOps:
    """`fluxkiln.kernels.Ops` that write what they are asked to compute.

    Args:
        attention: what q, k, v and the weights of softmax are multiplied in; `bf16` is the graph's dtype.
        lora: whether the blocks' linears have inputs for the matrices of a LoRA.
    """

    def __init__(
        self, graph: Graph, config: FluxConfig, attention: Literal["bf16", "fp8"] = "bf16", lora: bool = False
    ) -> None:
        self.graph, self.config, self.high = graph, config, graph.high
        self.fp8_attention, self.lora = attention == "fp8", lora
        self._narrow: dict[tuple[str, str], Value] = {}  # (x, layer) -> x downᵀ of its LoRA

    def ops(self) -> Ops:
        return Ops(
            pack=lambda streams: Layer(tuple((linear,) for linear in streams)),
            pack_qkv=self.pack_qkv,
            norm_modulate=self.norm_modulate,
            qkv_rope=self.qkv_rope,
            attention=self.attention,
            linear_gelu=self.linear_gelu,
            linear_gate_residual=self.linear_gate_residual,
            linear=self.linear,
        )

    def pack_qkv(self, streams: Streams, norms: tuple[QKNorm, ...]) -> Layer:
        def thirds(linear: Linear) -> tuple[Linear, ...]:
            width = linear.weight.shape[0] // 3
            return tuple(rows(linear, slice(i * width, (i + 1) * width)) for i in range(3))

        return Layer(tuple(thirds(linear) for linear in streams))

    # --- operations ---------------------------------------------------------------------------

    def norm_modulate(self, x: Joint, shift: Rows, scale: Rows, split: Any, out: Quant | None = None) -> Joint:
        graph, ys = self.graph, []
        shifts, scales = shift.streams(), scale.streams()
        for x_s, shift_s, scale_s in zip(x.streams(len(shifts), split), shifts, scales, strict=True):
            weight = graph.constant(torch.ones(self.config.hidden_size))
            norm = graph.op("LayerNormalization", x_s, weight, axis=-1, epsilon=EPS)
            y = graph.op("Mul", norm, graph.op("Add", scale_s, graph.constant(1.0)))
            ys.append(self.emit(graph.op("Add", y, shift_s), out))
        return Joint(tuple(ys))

    def qkv_rope(self, x: Joint, layer: Layer, rope: Rope, split: Any) -> tuple[Value, Value, Value]:
        graph, streams = self.graph, []
        for x_s, linears in zip(x.streams(len(layer.streams), split), layer.streams, strict=True):
            q, k, v = (
                graph.reshape(self.product((x_s,), linear), (0, 0, -1, self.config.head_dim)) for linear in linears
            )
            name = linears[0].name
            streams.append((self.rms_norm(q, name, "query"), self.rms_norm(k, name, "key"), v))
        q, k, v = (Joint(parts).whole for parts in zip(*streams, strict=True))
        q, k = self.rotate(q, rope), self.rotate(k, rope)
        if not self.fp8_attention:
            return q, k, v
        each_head = graph.op("ReduceMax", graph.op("Abs", v), graph.integers([1, 3]), keepdims=1)
        bounds = self.norm_bound(layer, "query"), self.norm_bound(layer, "key"), graph.cast(each_head, torch.float32)
        return tuple(self.emit(x, Quant("fp8", "bound"), b) for x, b in zip((q, k, v), bounds, strict=True))

    def norm_bound(self, layer: Layer, role: str) -> Value:
        """What RMSNorm bounds all q or all k by, fp32 scalar: rotation keeps the length of a pair."""
        graph = self.graph
        weights = [self.norm_weight(linears[0].name, role) for linears in layer.streams]
        largest = [graph.op("ReduceMax", graph.op("Abs", weight), keepdims=0) for weight in weights]
        largest = reduce(lambda a, b: graph.op("Max", a, b), largest)
        return graph.op("Mul", largest, graph.constant(math.sqrt(self.config.head_dim), torch.float32))

    def attention(
        self, q: Value | Quantised, k: Value | Quantised, v: Value | Quantised, out: Quant | None = None
    ) -> Joint:
        graph = self.graph
        if isinstance(v, Quantised):
            o, values = self.attend(q, k, v), v.dense
        else:
            heads = [graph.op("Transpose", x, perm=[0, 2, 1, 3]) for x in (q, k, v)]
            o, values = graph.op("Transpose", graph.op("Attention", *heads), perm=[0, 2, 1, 3]), v
        bound = None
        if out is not None and out.rule == "bound":
            bound = graph.op("ReduceMax", graph.op("Abs", values), graph.integers([1, 2, 3]), keepdims=0)
            bound = graph.reshape(graph.cast(bound, torch.float32), (-1, 1, 1))
        o = graph.reshape(o, (0, 0, -1))
        return Joint((o if out is None else Pending(o, out, bound),))

    def attend(self, q: Quantised, k: Quantised, v: Quantised) -> Value:
        """Attention `[B, L, H, d]` in FP8, taken apart: before an Attention node, TensorRT ignores Q/DQ."""
        graph, wide = self.graph, torch.float32
        q_t, k_t, v_t = (
            graph.op("Transpose", x.codes, perm=perm)
            for x, perm in ((q, (0, 2, 1, 3)), (k, (0, 2, 3, 1)), (v, (0, 2, 1, 3)))
        )
        root = graph.constant(self.config.head_dim**-0.5, wide)
        scale = graph.op("Mul", graph.op("Mul", q.scale, k.scale), root)
        scores = graph.op("Mul", graph.cast(graph.op("MatMul", q_t, k_t), wide), scale)
        weights = graph.op("Softmax", graph.cast(scores, self.high), axis=-1)
        step, zero = graph.constant(1 / FP8_MAX, wide), graph.constant(0.0, torch.float8_e4m3fn)
        weights = graph.op("QuantizeLinear", weights, step, zero)
        weights = graph.op("DequantizeLinear", weights, step, zero, **self.to_high)
        o = graph.op("Transpose", graph.op("MatMul", weights, v_t), perm=[0, 2, 1, 3])
        return graph.cast(graph.op("Mul", graph.cast(o, wide), v.scale), self.high)

    def linear_gelu(self, x: Joint, layer: Layer, split: Any, out: Quant | None = None) -> Joint:
        ys = []
        for x_s, (linear,) in zip(self.streams(x, layer, split), layer.streams, strict=True):
            y = self.graph.op("Gelu", self.product((x_s,), linear), approximate="tanh")
            ys.append(self.emit(y, out, self.bound(x_s, linear) if out and out.rule == "bound" else None))
        return Joint(tuple(ys))

    def linear_gate_residual(self, xs: Sequence[Joint], layer: Layer, gate: Rows, residual: Joint, split: Any) -> Joint:
        graph, ys = self.graph, []
        inputs = zip(*(self.streams(x, layer, split) for x in xs), strict=True)
        rest = residual.streams(len(layer.streams), split)
        for x_s, residual_s, gate_s, (linear,) in zip(inputs, rest, gate.streams(), layer.streams, strict=True):
            ys.append(graph.op("Add", residual_s, graph.op("Mul", gate_s, self.product(x_s, linear))))
        return Joint(tuple(ys))

    def linear(self, xs: Sequence[Value | Joint], layer: Layer) -> Joint:
        values = [x.whole if isinstance(x, Joint) else x for x in xs]
        return Joint(tuple(self.product((x,), linear) for x, (linear,) in zip(values, layer.streams, strict=True)))

    # --- their parts --------------------------------------------------------------------------

    def streams(self, x: Joint, layer: Layer, split: Any) -> tuple[Any, ...]:
        """`Joint.streams`, and what was pending is quantised."""
        (first, *_) = x.parts
        if not isinstance(first, Pending):
            return x.streams(len(layer.streams), split)
        parts = Joint((first.value,)).streams(len(layer.streams), split)
        return tuple(self.emit(part, first.quant, first.bound) for part in parts)

    def emit(self, y: Value, quant: Quant | None, bound: Value | None = None) -> Value | Quantised:
        """`y [B, L, K]` as its reader wants it: the rules of `formats.quantize`, in unit scale."""
        if quant is None:
            return y
        graph = self.graph
        wide = graph.cast(y, torch.float32)
        largest = quant.peak if quant.format == "fp8" else NVFP4_MAX
        if quant.rule == "static":
            assert quant.scale is not None, "a static quantisation has a scale"
            scale = graph.constant(quant.scale.reshape(1, 1, 1), torch.float32)
        else:
            if bound is None:
                bound = graph.op("ReduceMax", graph.op("Abs", wide), graph.integers([-1]), keepdims=1)
            scale = graph.op("Div", bound, graph.constant(largest, torch.float32))
            scale = graph.op("Max", scale, graph.constant(TINY, torch.float32))
        unit = graph.cast(graph.op("Div", wide, scale), self.high)
        norm = graph.op("ReduceL2", wide, graph.integers([-1]), keepdims=1) if quant.rule == "row" else scale
        return Quantised(self.round_trip(unit, quant.format), scale, norm, y)

    def round_trip(self, x: Value, format: str) -> Value:
        """Q/DQ in unit scale: what tells the engine builder that the product behind it is FP8's or NVFP4's."""
        graph, one = self.graph, self.graph.constant(1.0, torch.float32)
        if format == "fp8":
            zero = graph.constant(0.0, torch.float8_e4m3fn)
            return graph.op("DequantizeLinear", graph.op("QuantizeLinear", x, one, zero), one, zero, **self.to_high)
        options = {"axis": -1, "block_size": BLOCK, "scale_type": TensorProto.FLOAT8E4M3FN}
        data, scale = graph.op("TRT_FP4DynamicQuantize", x, one, domain=FP4_DOMAIN, count=2, **options)
        return self.dequantise_blocks(data, scale)

    def dequantise_blocks(self, data: Value, block_scale: Value) -> Value:
        graph = self.graph
        scale = graph.op("DequantizeLinear", block_scale, graph.constant(1.0, torch.float32), **self.to_high)
        return graph.op("DequantizeLinear", data, scale, axis=-1, block_size=BLOCK)

    @property
    def to_high(self) -> dict[str, int]:
        return {} if self.high == torch.float32 else {"output_dtype": ELEMENT[self.high]}

    def product(self, xs: Sequence[Value | Quantised], linear: Linear) -> Value:
        """`cat(xs) Wᵀ + b`, in the graph's dtype."""
        graph = self.graph
        bias = self.parameter(linear, "bias", linear.bias)
        side = self.side(xs, linear)
        if isinstance(linear.weight, Tensor):
            x = xs[0] if len(xs) == 1 else graph.concat(xs, axis=-1)
            y = graph.op("Add", self.multiply(x, self.weight(linear), self.main(linear, NAMES[self.high])), bias)
            return reduce(lambda a, b: graph.op("Add", a, b), side, y)
        total, format = None, "fp8" if isinstance(linear.weight, Fp8) else "nvfp4"
        for x, inputs in zip(xs, self.columns(linear, len(xs)), strict=True):
            y = self.multiply(x.codes, self.weight(linear, inputs), self.main(linear, format, inputs))
            y = graph.op("Mul", graph.cast(y, torch.float32), x.scale)
            total = y if total is None else graph.op("Add", total, y)
        scale = self.parameter(linear, "scale", torch.empty(linear.weight.shape[0], device="meta"))
        y = graph.op("Add", graph.op("Mul", total, scale), graph.cast(bias, torch.float32))
        return graph.cast(reduce(lambda a, b: graph.op("Add", a, graph.cast(b, torch.float32)), side, y), self.high)

    def side(self, xs: Sequence[Value | Quantised], linear: Linear) -> list[Value]:
        """What is added to a layer's product: its low-rank branch, and that of a LoRA."""
        lora = self.lora and "_blocks." in linear.name
        if linear.low_rank is None and not lora:
            return []
        dense = [x.dense if isinstance(x, Quantised) else x for x in xs]
        x = dense[0] if len(dense) == 1 else self.graph.concat(dense, axis=-1)
        side = []
        if linear.low_rank is not None:
            narrow = self.multiply(x, self.parameter(linear, "down", linear.low_rank.down))
            side.append(self.multiply(narrow, self.parameter(linear, "up", linear.low_rank.up)))
        if lora:
            # Keyed by what x is made of: q, k, v and a single block's MLP share one product.
            key = ("+".join(value.name for value in dense), linear.name)
            outputs, inputs = self.config.tensor_shapes()[f"{linear.name}.weight"]
            if key not in self._narrow:
                down = self.graph.input(f"{linear.name}.lora_down", self.high, ("rank", inputs))
                self._narrow[key] = self.multiply(x, down)
            up = self.graph.input(f"{linear.name}.lora_up", self.high, (outputs, "rank"))
            first, last = linear.start, linear.start + linear.bias.shape[0]
            if (first, last) != (0, outputs):
                bounds = (self.graph.integers([n]) for n in (first, last, 0))
                up = self.graph.op("Slice", up, *bounds)
            side.append(self.multiply(self._narrow[key], up))
        return side

    def bound(self, x: Quantised, linear: Linear) -> Value:
        """An upper bound of the magnitudes in each row of the product, fp32 `[B, L, 1]`: `Linear.bound`."""
        scalar = torch.empty((), device="meta")
        offset = self.parameter(linear, "offset", scalar)
        if self.lora:  # of the weight that the LoRA makes
            gain = self.graph.input(f"{part_name(linear.name, (linear.start, 0), None)}.gain", torch.float32, (1,))
        else:
            gain = self.parameter(linear, "gain", scalar)
        return self.graph.op("Add", self.graph.op("Mul", x.norm, gain), offset)

    def columns(self, linear: Linear, count: int) -> tuple[tuple[int, int] | None, ...]:
        """Which inputs of a layer each of its activations is: attention's width comes first, then the MLP's."""
        width = self.config.hidden_size
        return (None,) if count == 1 else ((0, width), (width, linear.weight.shape[1]))

    def multiply(self, x: Value, weight: Value, name: str = "") -> Value:
        """`x Wᵀ` of a weight in its native layout `[N, K]`, so that its bytes are the checkpoint's."""
        return self.graph.op("MatMul", x, self.graph.op("Transpose", weight, perm=[1, 0]), name=name)

    def main(self, linear: Linear, format: str, inputs: tuple[int, int] | None = None) -> str:
        """Name of a layer's product, entered into the list that an engine is held to."""
        name = part_name(linear.name, (linear.start, 0), inputs)
        self.graph.products[name] = format
        return name

    def weight(self, linear: Linear, inputs: tuple[int, int] | None = None) -> Value:
        """The weight, or the codes of a quantised weight behind a DQ of scale 1, `[N, K]`."""
        graph, weight = self.graph, linear.weight
        if isinstance(weight, Tensor):
            return self.parameter(linear, "weight", weight)
        outputs, width = weight.shape[0], weight.shape[1] if inputs is None else inputs[1] - inputs[0]
        if isinstance(weight, Fp8):
            data = self.named(linear, "weight", TensorProto.FLOAT8E4M3FN, (outputs, width), inputs)
            one, zero = graph.constant(1.0, torch.float32), graph.constant(0.0, torch.float8_e4m3fn)
            return graph.op("DequantizeLinear", data, one, zero, **self.to_high)
        data = self.named(linear, "weight", TensorProto.FLOAT4E2M1, (outputs, width), inputs)
        scale = self.named(linear, "block_scale", TensorProto.FLOAT8E4M3FN, (outputs, width // BLOCK), inputs)
        return self.dequantise_blocks(data, scale)

    def parameter(self, linear: Linear, role: str, like: Tensor) -> Value:
        return self.named(linear, role, ELEMENT[like.dtype], tuple(like.shape))

    def named(
        self, linear: Linear, role: str, element: int, shape: tuple[int, ...], inputs: tuple[int, int] | None = None
    ) -> Value:
        outputs = (linear.start, linear.start + linear.bias.shape[0])
        return self.graph.parameter(Parameter(linear.name, role, outputs, inputs, element, shape))

    def rms_norm(self, x: Value, layer: str, role: str) -> Value:
        """fp32 `[B, L, H, d]`; the weight is multiplied before anything is rounded, as torch's own does."""
        graph = self.graph
        wide = graph.cast(x, torch.float32)
        square = graph.op("ReduceMean", graph.op("Mul", wide, wide), graph.integers([-1]), keepdims=1)
        root = graph.op("Sqrt", graph.op("Add", square, graph.constant(EPS, torch.float32)))
        return graph.op("Mul", graph.op("Div", wide, root), self.norm_weight(layer, role))

    def norm_weight(self, layer: str, role: str) -> Value:
        """RMSNorm's weight of `query` or `key`, fp32 `[d]`."""
        shape = (self.config.head_dim,)
        weight = self.graph.parameter(Parameter(layer, role, (0, *shape), None, ELEMENT[self.high], shape))
        return self.graph.cast(weight, torch.float32)

    def rotate(self, x: Value, rope: Rope) -> Value:
        """`[B, L, H, d]` of the graph's dtype: channel pairs (2i, 2i+1) rotated in fp32."""
        graph = self.graph
        pairs = graph.reshape(x, (0, 0, 0, -1, 2))
        a, b = graph.op("Split", pairs, axis=-1, count=2, num_outputs=2)
        even = graph.op("Sub", graph.op("Mul", rope.cos, a), graph.op("Mul", rope.sin, b))
        odd = graph.op("Add", graph.op("Mul", rope.sin, a), graph.op("Mul", rope.cos, b))
        return graph.cast(graph.reshape(graph.concat((even, odd), axis=-1), (0, 0, 0, -1)), self.high)


@dataclass(frozen=True)
class Rope:
    """fp32 `[1, L, 1, d/2, 1]` each."""

    cos: Value
    sin: Value


def rope_of(graph: Graph, config: FluxConfig, txt_ids: Value, img_ids: Value) -> Rope:
    """Angles of the positions `[L_txt, 3]` and `[L_img, 3]`, fp32."""
    ids = graph.concat((txt_ids, img_ids), axis=0)
    angles = []
    for axis, dim in enumerate(config.axes_dim):
        omega = config.theta ** (-torch.arange(0, dim, 2).double() / dim)
        position = graph.op("Gather", ids, graph.integers([axis]), axis=1)  # [L, 1]
        # A product for each axis, not one matrix product over the three: that one may run in TF32.
        angles.append(graph.op("Mul", position, graph.constant(omega[None], torch.float32)))
    angle = graph.reshape(graph.concat(angles, axis=1), (1, -1, 1, config.head_dim // 2, 1))
    return Rope(graph.op("Cos", angle), graph.op("Sin", angle))


def modulation_of(
    graph: Graph, ops: OnnxOps, model: Transformer, pooled: Value, timestep: Value, guidance: Value | None
) -> Value:
    """All modulation vectors `[B, M, D]`, as `Transformer.modulate` has them."""

    def linear(x: Value, layer: Linear) -> Value:  # no product that a recipe could quantise
        y = ops.multiply(x, ops.parameter(layer, "weight", layer.weight))
        return graph.op("Add", y, ops.parameter(layer, "bias", layer.bias))

    def embed(name: str, x: Value) -> Value:
        inner, outer = model.embedders[name]
        return linear(graph.silu(linear(x, inner)), outer)

    def sinusoidal(t: Value) -> Value:
        half = TIME_EMBED_DIM // 2
        frequency = torch.exp(-math.log(10_000) * torch.arange(half) / half)
        scaled = graph.op("Mul", graph.cast(t, graph.high), graph.constant(1000.0))
        angle = graph.op(
            "Mul",
            graph.reshape(graph.cast(scaled, torch.float32), (-1, 1, 1)),
            graph.constant(frequency, torch.float32),
        )
        return graph.cast(graph.concat((graph.op("Cos", angle), graph.op("Sin", angle)), axis=-1), graph.high)

    vec = embed("time", sinusoidal(timestep))
    if guidance is not None:
        vec = graph.op("Add", vec, embed("guidance", sinusoidal(guidance)))
    pooled = graph.op("Unsqueeze", pooled, graph.integers([1]))
    vec = graph.silu(graph.op("Add", vec, embed("vector", pooled)))
    rows = graph.concat([linear(vec, layer) for layer in model.modulations], axis=-1)
    return graph.reshape(rows, (0, -1, model.config.hidden_size))


# --- the graph --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traced:
    """The graph, in which every parameter is an initializer whose data is elsewhere.

    Attributes:
        proto: ONNX.
        parameters: what each of them is.
        products: node of each layer's product -> the number format in which an engine must run it.
        attentions: number of attentions, each of which an engine must run as one kernel; None: it need not.
        attention: the number format in which it must run them.
    """

    proto: onnx.ModelProto
    parameters: dict[str, Parameter]
    products: dict[str, str] = field(default_factory=dict)
    attentions: int | None = None
    attention: str = "bf16"

    @property
    def inputs(self) -> dict[str, tuple[int | str, ...]]:
        """Name -> shape; dynamic dimensions have the names of the sizes of `build.Profile`."""
        return {
            value.name: tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)
            for value in self.proto.graph.input
        }


def trace(
    config: FluxConfig,
    tensors: Mapping[str, Any],
    high: torch.dtype = torch.bfloat16,
    *,
    attention: Literal["bf16", "fp8"] = "bf16",
    form: Form = "step",
) -> Traced:
    """The transformer's `step` in ONNX; batch, image tokens and text tokens are dynamic.

        hidden_states [B, img, C_in], encoder_hidden_states [B, txt, D_ctx], modulation [B, M, D],
        img_ids fp32 [img, 3], txt_ids fp32 [txt, 3]  ->  latent [B, img, C_out]

    The form `compatible` has, in place of the modulation, what it is computed from: pooled_projections [B, D_vec],
    timestep [B] in 0..1, and guidance fp32 [B] where the model has its embedding.

    The form `lora` has two more inputs for every linear of a block, `LAYER.lora_down [rank, K]` and
    `LAYER.lora_up [N, rank]` of one dynamic rank: `y += (x downᵀ) upᵀ`. Where a layer's output is quantised by a bound,
    it also has that layer's gain, fp32 [1]: `Linear.gain` of the layer with the LoRA as its `low_rank`.

    Args:
        config: the sizes.
        tensors: as for `Transformer`; only shapes, dtypes and formats are looked at, so the meta device will do.
        high: fp32 or bf16, of everything that is not quantised.
        attention: of the recipe.
        form: see above.
    """
    graph = Graph(high)
    ops = OnnxOps(graph, config, attention, lora=form == "lora")
    model = Transformer(config, tensors, ops.ops())
    img = graph.input("hidden_states", high, ("batch", "img", config.in_channels))
    txt = graph.input("encoder_hidden_states", high, ("batch", "txt", config.context_in_dim))
    vectors = sum(linear.bias.shape[0] for linear in model.modulations) // config.hidden_size
    if form == "compatible":
        pooled = graph.input("pooled_projections", high, ("batch", config.vec_in_dim))
        timestep = graph.input("timestep", high, ("batch",))
    else:
        modulation = graph.input("modulation", high, ("batch", vectors, config.hidden_size))
    img_ids, txt_ids = (graph.input(f"{name}_ids", torch.float32, (name, 3)) for name in ("img", "txt"))
    if form == "compatible":
        guidance = graph.input("guidance", torch.float32, ("batch",)) if config.guidance_embed else None
        modulation = modulation_of(graph, ops, model, pooled, timestep, guidance)
    rows = Rows(modulation, np.arange(vectors))
    latent = model.step(img, txt, rows, rope_of(graph, config, txt_ids, img_ids)).whole
    proto = graph.model("flux_step", {"latent": (latent, ("batch", "img", config.out_channels))})
    count = config.depth + config.depth_single_blocks
    return Traced(proto, graph.parameters, graph.products, count, "fp8" if attention == "fp8" else NAMES[high])


def elsewhere(parameter: Parameter) -> onnx.TensorProto:
    tensor = TensorProto(name=parameter.name, data_type=parameter.element, dims=parameter.shape)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights")
    return tensor
