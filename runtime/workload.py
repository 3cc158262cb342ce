"""The work in one denoise step: every call of the graph with its shapes, FLOPs and bytes, from the configuration.

Benchmarks, engine shapes, memory estimates and launch tables all read the shapes here. Calls are named after the
fields of the graph (`double_blocks.3.mlp_in`, `single_blocks.0.attention`) and listed in its order.

FLOPs count a multiply-add as 2 and leave out what is not a matrix product (norms, GELU, rotations: under 0.1 %).
Bytes are the least a call can move: every operand read once, every result written once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from fluxkiln.config import TIME_EMBED_DIM, TOKEN_PIXELS, FluxConfig

# Bytes per element on the contracted axis, block scales included; row and tensor scales are counted apart.
ELEMENT_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp8": 1.0, "nvfp4": 0.5 + 1 / 16}
SCALE_BYTES = 4  # fp32, one for each row of an fp8 or nvfp4 operand


@dataclass(frozen=True)
class Tokens:
    """Lengths of the joint sequence: `image` are the tokens of the result, `reference` those appended to them."""

    text: int
    image: int
    reference: int = 0
    batch: int = 1

    @property
    def total(self) -> int:
        """Length of the sequence that attention sees."""
        return self.text + self.image + self.reference

    @classmethod
    def of_size(
        cls, width: int, height: int, text: int = 512, references: Iterable[tuple[int, int]] = (), batch: int = 1
    ) -> Tokens:
        """Tokens of a picture of `width` x `height` pixels, with references of the given (width, height)."""

        def count(w: int, h: int) -> int:
            return (w // TOKEN_PIXELS) * (h // TOKEN_PIXELS)

        return cls(text, count(width, height), sum(count(w, h) for w, h in references), batch)


@dataclass(frozen=True)
class Gemm:
    """`[m, k] x [k, n]`: `m` rows of one image in one stream."""

    m: int
    n: int
    k: int

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k


@dataclass(frozen=True)
class Attention:
    """Softmax attention of one image over `length` tokens, without a mask."""

    heads: int
    length: int
    head_dim: int

    @property
    def flops(self) -> int:
        """Of q kᵀ and p v."""
        return 4 * self.heads * self.length**2 * self.head_dim


@dataclass(frozen=True)
class Call:
    """One call of an operation.

    Attributes:
        name: block and field of the graph.
        op: the operation's name in `fluxkiln.kernels`.
        format: number format of its weights and of the inputs of its products.
        result: (rows, width) that it writes for one image.
        result_format: number format of the result: what the next layer reads.
        gemms: its matrix products for one image, one for each stream.
        attention: its attention for one image.
        reads: elements read for one image beside the inputs and weights of `gemms` (residual, q, k, v), unquantised.
        batch: number of images.
    """

    name: str
    op: str
    format: str
    result: tuple[int, int]
    result_format: str
    gemms: tuple[Gemm, ...] = ()
    attention: Attention | None = None
    reads: int = 0
    batch: int = 1

    @property
    def flops(self) -> int:
        """Of all images."""
        return self.batch * (sum(g.flops for g in self.gemms) + (self.attention.flops if self.attention else 0))

    @property
    def weights(self) -> int:
        """Number of weight elements, biases apart."""
        return sum(g.n * g.k for g in self.gemms)

    @property
    def weight_bytes(self) -> int:
        return sum(operand_bytes(g.n, g.k, self.format) for g in self.gemms)

    def bytes(self, dtype: str = "bf16") -> int:
        """Weights once, inputs and results of all images; what is not quantised is in `dtype`."""
        inputs = sum(operand_bytes(g.m, g.k, self.format) for g in self.gemms)
        result = operand_bytes(*self.result, self.result_format)
        return self.weight_bytes + self.batch * (inputs + result + self.reads * int(ELEMENT_BYTES[dtype]))


def operand_bytes(rows: int, k: int, format: str) -> int:
    """Bytes of an operand `[rows, k]`, scales included."""
    scales = rows * SCALE_BYTES if format in ("fp8", "nvfp4") else 0
    return math.ceil(rows * k * ELEMENT_BYTES[format]) + scales


def step(
    config: FluxConfig, tokens: Tokens, dtype: str = "bf16", format_of: Callable[[str], str] | None = None
) -> list[Call]:
    """All calls of one `Transformer.step`, in order.

    Args:
        config: the model.
        tokens: the sequence.
        dtype: the model's dtype, `bf16` or `fp32`.
        format_of: number format of a block's linear by its name; None for `dtype` throughout.
    """
    d, m, length = config.hidden_size, config.mlp_hidden, tokens.total
    image = tokens.image + tokens.reference
    both, one = (tokens.text, image), (length,)
    calls: list[Call] = []

    def linear(op: str, name: str, rows: Sequence[int], n: int, *ks: int, reads: int = 0, result: str = dtype) -> None:
        gemms = tuple(Gemm(r, n, k) for r, k in zip(rows, ks * (len(rows) // len(ks)), strict=True))
        format = format_of(name) if format_of and "blocks." in name else dtype
        calls.append(Call(name, op, format, (sum(rows), n), result, gemms, reads=reads, batch=tokens.batch))

    def norm(name: str, rows: int, result: str) -> None:
        calls.append(Call(name, "norm_modulate", dtype, (rows, d), result, reads=rows * d, batch=tokens.batch))

    def attention(name: str, result: str) -> None:
        shape = Attention(config.num_heads, length, config.head_dim)
        calls.append(
            Call(
                name, "attention", dtype, (length, d), result, attention=shape, reads=3 * length * d, batch=tokens.batch
            )
        )

    def of(name: str) -> str:
        return format_of(name) if format_of else dtype

    linear("linear", "embed", both, d, config.context_in_dim, config.in_channels)
    for i in range(config.depth):
        block = f"double_blocks.{i}"
        norm(f"{block}.norm1", length, of(f"{block}.qkv"))
        linear("qkv_rope", f"{block}.qkv", both, 3 * d, d)
        attention(f"{block}.attention", of(f"{block}.proj"))
        linear("linear_gate_residual", f"{block}.proj", both, d, d, reads=length * d)
        norm(f"{block}.norm2", length, of(f"{block}.mlp_in"))
        linear("linear_gelu", f"{block}.mlp_in", both, m, d, result=of(f"{block}.mlp_out"))
        linear("linear_gate_residual", f"{block}.mlp_out", both, d, m, reads=length * d)
    for i in range(config.depth_single_blocks):
        block = f"single_blocks.{i}"
        norm(f"{block}.norm", length, of(f"{block}.qkv"))
        linear("qkv_rope", f"{block}.qkv", one, 3 * d, d)
        attention(f"{block}.attention", of(f"{block}.out"))
        linear("linear_gelu", f"{block}.mlp_in", one, m, d, result=of(f"{block}.out"))
        linear("linear_gate_residual", f"{block}.out", one, d, d + m, reads=length * d)
    norm("final_norm", image, dtype)
    linear("linear", "final", (image,), config.out_channels, d)
    return calls


def modulate(config: FluxConfig, rows: int, dtype: str = "bf16") -> list[Call]:
    """All calls of one `Transformer.modulate` with `rows` rows (images x steps of the schedule)."""
    d = config.hidden_size

    def linear(name: str, n: int, k: int) -> Call:
        return Call(name, "linear", dtype, (rows, n), dtype, (Gemm(rows, n, k),))

    calls = []
    for name, width in (("time", TIME_EMBED_DIM), ("guidance", TIME_EMBED_DIM), ("vector", config.vec_in_dim)):
        if name != "guidance" or config.guidance_embed:
            calls += [linear(f"{name}_in.in_layer", d, width), linear(f"{name}_in.out_layer", d, d)]
    for i in range(config.depth):
        calls += [linear(f"double_blocks.{i}.{stream}_mod", 6 * d, d) for stream in ("txt", "img")]
    calls += [linear(f"single_blocks.{i}.modulation", 3 * d, d) for i in range(config.depth_single_blocks)]
    return [*calls, linear("final_layer.adaLN_modulation", 2 * d, d)]


def parameters(config: FluxConfig) -> int:
    """Number of parameters of the transformer."""
    return sum(math.prod(shape) for shape in config.tensor_shapes().values())


def weight_bytes(config: FluxConfig, dtype: str = "bf16", format_of: Callable[[str], str] | None = None) -> int:
    """Bytes of all weights, with the block linears in the formats that `format_of` names and the rest in `dtype`."""
    quantised = [call for call in step(config, Tokens(1, 1), dtype, format_of) if call.format != dtype]
    rest = parameters(config) - sum(call.weights for call in quantised)
    return math.ceil(rest * ELEMENT_BYTES[dtype]) + sum(call.weight_bytes for call in quantised)
