"""The calls of a denoise step as arguments that operations take: FLUX.1's shapes, random numbers of the usual size."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fluxkiln import workload
from fluxkiln.config import FluxConfig
from fluxkiln.kernels import formats, recipe
from fluxkiln.kernels.attention import Query, Values, blocks, quantize_values
from fluxkiln.kernels.formats import FP8_MAX, Activation, Quant
from fluxkiln.kernels.layers import Linear, QKNorm, Streams
from fluxkiln.kernels.qkv_rope import Projection
from fluxkiln.workload import Call, Tokens

SIZES = {
    "1024x1024": Tokens.of_size(1024, 1024),
    "kontext 1024x1024": Tokens.of_size(1024, 1024, references=[(1024, 1024)]),
    "512x512": Tokens.of_size(512, 512),
}


@dataclass(frozen=True)
class Case:
    """One kind of call.

    Attributes:
        name: its place in the graph, without the number of the block.
        call: the first of its kind in the step.
        count: how many there are.
        config, tokens: the model and the sequence.
        size: name of the picture's size.
        attention: what q, k and v are written and multiplied in.
    """

    name: str
    call: Call
    count: int
    config: FluxConfig
    tokens: Tokens
    size: str
    attention: str

    @property
    def op(self) -> str:
        return self.call.op

    @property
    def format(self) -> str:
        """What is multiplied; of what multiplies nothing, what is written."""
        if self.op == "attention":
            return self.attention
        return self.call.format if self.call.gemms else self.call.result_format

    @property
    def result(self) -> str:
        """What is written."""
        return self.attention if self.op == "qkv_rope" else self.call.result_format

    @property
    def shape(self) -> str:
        """Rows x outputs x contraction, rows x width, or the sizes of attention."""
        if self.call.attention:
            a = self.call.attention
            return f"H={a.heads} L={a.length} D={a.head_dim}"
        return "x".join(map(str, (*self.call.result, *sorted({gemm.k for gemm in self.call.gemms}))))

    @property
    def key(self) -> str:
        """Names the case among all."""
        return f"{self.size} / {self.name} / {self.format} -> {self.result}"


def cases(config: FluxConfig, tokens: Tokens, size: str, precision: str, attention: str = "bf16") -> list[Case]:
    """Every kind of call in a step whose block linears are in `precision`, in the order of the graph."""

    def format_of(name: str) -> str:
        return precision if "blocks." in name else "bf16"

    kinds: dict[Call, list[Call]] = {}
    for call in workload.step(config, tokens, "bf16", format_of):
        kinds.setdefault(dataclasses.replace(call, name=_place(call)), []).append(call)
    return [Case(kind.name, same[0], len(same), config, tokens, size, attention) for kind, same in kinds.items()]


def everything(config: FluxConfig, sizes: Mapping[str, Tokens], precisions: Sequence[str]) -> list[Case]:
    """Every kind of call of every size and precision, once; in FP8 with FP8 attention too; and quantisation alone,
    which a step does inside other operations."""
    found: dict[str, Case] = {}
    for size, tokens in sizes.items():
        for precision in precisions:
            for attention in ("bf16", "fp8") if precision == "fp8" else ("bf16",):
                for case in cases(config, tokens, size, precision, attention):
                    found.setdefault(case.key, case)
            if precision != "bf16":
                rows, width = tokens.total, config.hidden_size
                call = Call(
                    "quantize", "quantize", "bf16", (rows, width), precision, reads=rows * width, batch=tokens.batch
                )
                alone = Case("quantize", call, 0, config, tokens, size, "bf16")
                found[alone.key] = alone
    return list(found.values())


def _place(call: Call) -> str:
    if call.op == "attention":
        return "attention"  # the same in every block
    parts = [part for part in call.name.split(".") if not part.isdecimal()]
    return ".".join(parts).removesuffix("1").removesuffix("2")  # norm1, norm2


def arguments(case: Case, device: torch.device) -> tuple[Any, ...]:
    """What the operation's `reference` takes, in bf16 on `device`; the same numbers for the same case."""
    return _BUILDERS[case.op](_Draw(case, device))


def raw_query(case: Case, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The same call where attention does the norm and rotation of q; None for an operation that does not see q."""
    if case.op == "qkv_rope":
        return (args[0], dataclasses.replace(args[1], query="raw"), *args[2:])
    if case.op != "attention":
        return None
    q, *rest = args
    data, scale = (formats.dequantize(q).bfloat16(), q.row_scale[0, 0, :1]) if isinstance(q, formats.Fp8) else (q, None)
    d = data.shape[-1]
    angle = torch.linspace(0, 100, data.shape[1] * d // 2, device=data.device).view(1, -1, d // 2)
    rope = torch.stack((angle.cos(), angle.sin()), dim=-1)
    return (Query(data, data.new_ones(1, d), rope, 0, scale), *rest)


class _Draw:
    """Random tensors of a case."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.call, self.device = case, case.call, device
        self.generator = torch.Generator(device).manual_seed(0)
        self.batch, (self.rows, self.width) = case.tokens.batch, case.call.result
        self.streams = 2 if case.call.name.startswith("double_blocks") else 1
        self.split = case.tokens.text if self.streams == 2 else 0

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        x = torch.empty(shape, dtype=torch.bfloat16, device=self.device)
        return x.normal_(generator=self.generator).mul_(scale)

    def activation(self, k: int, rows: int | None = None) -> Activation:
        x = self.normal(self.batch, self.rows if rows is None else rows, k)
        quant = None if self.call.format == "bf16" else Quant(self.call.format, "row")
        return formats.quantize(x, quant, x.dtype)

    def layer(self) -> Streams:
        def linear(n: int, k: int) -> Linear:
            dense = Linear(self.normal(n, k, scale=k**-0.5), self.normal(n), name=self.call.name)
            rule = recipe.Rule("dense" if self.call.format == "bf16" else self.call.format)
            return recipe.quantize(dense, rule)

        return Streams(linear(gemm.n, gemm.k) for gemm in self.call.gemms)

    def modulation(self, count: int) -> tuple[Tensor, ...]:
        return self.normal(self.batch, self.streams, count, self.case.config.hidden_size, scale=0.3).unbind(2)

    def out(self, rule: str) -> Quant | None:
        format = self.call.result_format
        return None if format == "bf16" else Quant(format, rule)


def _norm_modulate(draw: _Draw) -> tuple[Any, ...]:
    x = draw.normal(draw.batch, draw.rows, draw.width)
    return (x, *draw.modulation(2), draw.split, draw.out("row"))


def _qkv_rope(draw: _Draw) -> tuple[Any, ...]:
    d = draw.case.config.head_dim
    angle = 100 * torch.rand(1, draw.rows, d // 2, generator=draw.generator, device=draw.device)
    norms = tuple(QKNorm(1 + draw.normal(d, scale=0.1), 1 + draw.normal(d, scale=0.1)) for _ in range(draw.streams))
    projection = Projection(draw.layer(), norms, attention=draw.case.attention)
    x = draw.activation(draw.call.gemms[0].k)
    return x, projection, torch.stack((angle.cos(), angle.sin()), dim=-1), draw.split


def _attention(draw: _Draw) -> tuple[Any, ...]:
    a, split = draw.call.attention, draw.case.tokens.text
    assert a is not None
    q, k, v = (draw.normal(draw.batch, a.length, a.heads, a.head_dim) for _ in range(3))
    out = draw.out("bound")
    if draw.case.attention == "fp8":
        one = torch.full((1,), math.sqrt(a.head_dim) / FP8_MAX, device=draw.device)
        return (*(formats.quantize_fp8(x, one) for x in (q, k)), quantize_values(v, split, v.dtype), out)
    scale = (v.abs().amax((1, 3)).float() / FP8_MAX)[..., None].expand(-1, -1, blocks(split, a.length))
    return q, k, Values(v, scale.contiguous(), split, v.dtype), out


def _linear_gelu(draw: _Draw) -> tuple[Any, ...]:
    return draw.activation(draw.call.gemms[0].k), draw.layer(), draw.split, draw.out("bound")


def _linear_gate_residual(draw: _Draw) -> tuple[Any, ...]:
    hidden, k = draw.case.config.hidden_size, draw.call.gemms[0].k
    parts = (k,) if draw.streams == 2 else (hidden, k - hidden)  # a single block's attention, then its MLP
    xs = tuple(draw.activation(part) for part in parts)
    return xs, draw.layer(), draw.modulation(1)[0], draw.normal(draw.batch, draw.rows, draw.width), draw.split


def _quantize(draw: _Draw) -> tuple[Any, ...]:
    return draw.normal(draw.batch, draw.rows, draw.width), draw.out("row")


def _linear(draw: _Draw) -> tuple[Any, ...]:
    return tuple(draw.activation(gemm.k, gemm.m) for gemm in draw.call.gemms), draw.layer()


_BUILDERS: dict[str, Callable[[_Draw], tuple[Any, ...]]] = {
    "norm_modulate": _norm_modulate,
    "qkv_rope": _qkv_rope,
    "attention": _attention,
    "linear_gelu": _linear_gelu,
    "linear_gate_residual": _linear_gate_residual,
    "linear": _linear,
    "quantize": _quantize,
}
