"""Every operation on every backend that runs on this machine, and a small denoise, held to float64.

The truth is the operation's reference in float64 on the same operands; a backend may be at most twice as wrong as
eager is in the same format, and as this GPU's tensor cores are in FP8 sums of that length. On a GPU the shapes are
FLUX.1's with fewer tokens; on a CPU they are small, and the Triton kernels are interpreted.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor

from fluxkiln import sampling
from fluxkiln.config import FluxConfig, scaled_axes
from fluxkiln.kernels import Ops, RefusedError, eager_ops, formats, qkv_rope, recipe, registry
from fluxkiln.kernels.attention import Query, Values, dequantize_values
from fluxkiln.kernels.formats import Activation, Quant, dequantize
from fluxkiln.kernels.layers import Linear, QKNorm, Streams
from fluxkiln.kernels.recipe import RECIPES, Recipe
from fluxkiln.load import default_device
from fluxkiln.select import choose
from fluxkiln.transformer import Transformer

SLACK = 2.0  # times eager's own error
NOISE = 1e-6  # relative: sums in another order, where eager happens to be exact
STEPS = 2


@dataclass(frozen=True)
class Verdict:
    """One row of the table.

    Attributes:
        op: operation as `named`, or `denoise` for a whole one.
        format: of what is multiplied or written.
        backend: who ran it.
        error: root mean square error against float64, relative to the truth's; None if it did not run.
        eager_error: eager's own.
        sums: what the tensor cores of this GPU lose in FP8 sums of that length, see `lost_in_sums`.
        refused: why it did not run.
        failed: what went wrong when it ran.
        seconds: it took, compilation included.
    """

    op: str
    format: str
    backend: str
    error: float | None = None
    eager_error: float | None = None
    sums: float = 0.0
    refused: str | None = None
    failed: str | None = None
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        if self.failed is not None:
            return False
        if self.error is None or self.eager_error is None:
            return True
        return self.error <= allowed(self.eager_error, self.sums)


@dataclass(frozen=True)
class Sizes:
    """Of the problem that operations are verified on."""

    hidden: int
    head_dim: int
    mlp: int
    text: int
    image: int
    batch: int = 2


SMALL = Sizes(hidden=128, head_dim=64, mlp=256, text=19, image=40)
FLUX = Sizes(hidden=3072, head_dim=128, mlp=12288, text=77, image=1024)


def verify(
    device: torch.device | str | None = None,
    backends: Sequence[str] = ("eager", "triton"),
    progress: Callable[[Verdict], None] = lambda verdict: None,
) -> list[Verdict]:
    """Run everything.

    Args:
        device: where; None is the GPU if there is one.
        backends: which; `eager` shows what rounding to bf16 costs by itself.
        progress: told every verdict as it comes.

    Raises:
        ValueError: a GPU that torch does not see.
    """
    place = default_device(device)
    sizes = FLUX if place.type == "cuda" else SMALL
    verdicts = []
    for verdict in chain(operations(sizes, place, backends), denoises(place, backends)):
        verdicts.append(verdict)
        progress(verdict)
    return verdicts


# --- operations -------------------------------------------------------------------------------


def operations(sizes: Sizes, device: torch.device, backends: Sequence[str]) -> Iterator[Verdict]:
    for op, format, args in cases(sizes, device):
        if op == "quantize":
            truth = values(args[0].double())
        else:  # unquantised, so that eager's own quantisation counts as its error
            truth = values(registry.OPS[op].reference(*(None if isinstance(x, Quant) else exact(x) for x in args)))
        eager = registry.run(op, *args, backend="eager")
        eager_error = error(values(eager), truth)
        for backend in backends:
            start = time.perf_counter()
            try:
                got = eager if backend == "eager" else registry.run(op, *args, backend=backend)
                found = values(got, half_layout=backend == "triton" and op == "qkv_rope")
                mine, sums = error(found, truth), 0.0 if backend == "eager" else sums_of(args)
            except RefusedError as refusal:
                yield Verdict(named(op, args), format, backend, refused=str(refusal))
            except Exception as failure:  # a compiler's or a driver's: a verdict too, beside the others'
                yield Verdict(named(op, args), format, backend, failed=_said(failure))
            else:
                seconds = time.perf_counter() - start
                yield Verdict(named(op, args), format, backend, mine, eager_error, sums, seconds=seconds)


def named(op: str, args: Sequence[Any]) -> str:
    """An operation's name, with the variant that the arguments of a case ask for."""
    return f"{op}, raw q" if isinstance(args[0], Query) else op


def cases(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """(operation, format, arguments) for every operation and format, in bf16 on `device`.

    `linear` has a low-rank branch where it is quantised, and in FP8 sums of 128 products.
    """
    g = torch.Generator().manual_seed(0)
    s, B, L = sizes, sizes.batch, sizes.text + sizes.image
    heads = s.hidden // s.head_dim

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=g)).bfloat16().to(device)

    def linear(n: int, k: int, format: str, **options: Any) -> Linear:
        dense = Linear(normal(n, k, scale=k**-0.5), normal(n), name=f"{format} {n} {k}")
        return dense if format == "bf16" else recipe.quantize(dense, recipe.Rule(format, **options))  # type: ignore[arg-type]

    def layer(n: int, k: int, format: str) -> Streams:
        return Streams((linear(n, k, format), linear(n, k, format)))

    def activation(k: int, quant: Quant | None) -> Activation:
        x = normal(B, L, k)
        x[:, 3] += 30  # a row far from zero, and an outlier
        x[:, 5, k // 3] = 100
        return formats.quantize(x, quant, torch.bfloat16)

    angles = torch.rand(1, L, s.head_dim // 2, generator=g) * 6.28
    rope = torch.stack((angles.cos(), angles.sin()), dim=-1).to(device)
    norms = tuple(QKNorm(normal(s.head_dim), normal(s.head_dim)) for _ in range(2))
    for format in registry.FORMATS:
        row = None if format == "bf16" else Quant(format, "row")  # type: ignore[arg-type]
        bound = None if format == "bf16" else Quant(format, "bound")  # type: ignore[arg-type]
        mods = normal(B, 2, 3, s.hidden)
        yield "norm_modulate", format, (activation(s.hidden, None), mods[:, :, 0], mods[:, :, 1], s.text, row)
        x = activation(s.hidden, row)
        projection = qkv_rope.Projection(layer(3 * s.hidden, s.hidden, format), norms)
        yield "qkv_rope", format, (x, projection, rope, s.text)
        if format != "nvfp4":
            written = replace(projection, attention=format)  # type: ignore[arg-type]
            q, k, v = qkv_rope.reference(x, written, rope, s.text)
            yield "attention", format, (q, k, v, bound)
            norm, scale = torch.stack([each.query for each in norms]), projection.scale("query")
            raw = Query(normal(B, L, heads, s.head_dim), norm, rope, s.text, None if row is None else scale)
            yield "attention", format, (raw, k, v, bound)
        yield "linear_gelu", format, (x, layer(s.mlp, s.hidden, format), s.text, bound)
        gate, residual = normal(B, 1, s.hidden), normal(B, L, s.hidden)
        o, h = activation(s.hidden, row), activation(s.mlp, row)
        down = Streams((linear(s.hidden, s.hidden + s.mlp, format),))
        yield "linear_gate_residual", format, ((o, h), down, gate, residual, 0)
        options = {"rank": 32, "accumulate": "promote128" if format == "fp8" else "f32"}
        x = activation(s.hidden, row and replace(row, keep=True))
        yield "linear", format, ((x,), Streams((linear(s.hidden, s.hidden, format, **options),)))
        if row is not None:
            yield "quantize", format, (normal(B, L, heads * s.head_dim), row)


def exact(x: Any) -> Any:
    """The same arguments in float64; codes and their scales stay what they are."""
    if isinstance(x, Tensor):
        return x.double() if x.dtype == torch.bfloat16 else x
    if isinstance(x, Streams):
        return Streams(map(exact, x))
    if isinstance(x, tuple):
        return tuple(map(exact, x))
    if isinstance(x, Values):
        return replace(x, data=exact(x.data), dtype=torch.float64)
    if is_dataclass(x) and not isinstance(x, Quant):
        return replace(x, **{f.name: exact(getattr(x, f.name)) for f in fields(x)})  # type: ignore[type-var]
    return x


def allowed(eager_error: float, sums: float = 0.0) -> float:
    """The largest error that passes."""
    return SLACK * (eager_error + sums) + NOISE


def sums_of(args: Sequence[Any]) -> float:
    """`lost_in_sums` of the FP8 products of a call with such arguments; 0 for a call without."""
    layers = [arg.streams if isinstance(arg, qkv_rope.Projection) else arg for arg in args]
    linears = [linear for layer in layers if isinstance(layer, Streams) for linear in layer]
    lost = [0.0]
    for linear in linears:
        if isinstance(linear.weight, formats.Fp8):
            k = linear.weight.shape[-1]
            lost.append(lost_in_sums(k if linear.accumulate == "f32" else min(k, 128), linear.bias.device))
    return max(lost)


@functools.cache
def lost_in_sums(k: int, device: torch.device) -> float:
    """What this GPU's tensor cores lose in FP8 sums of `k` products, before anything else is rounded.

    Hopper's and Ada's sums have fewer bits than fp32. Their measure is the library's product with fast accumulation,
    against float64: the relative error in the mean square. On a CPU the sums are made in fp32.
    """
    # So large that the library fills the GPU with whole sums: those of a small product it would split over K.
    return library_error(4096, k, device) if device.type == "cuda" else 0.0


def library_error(n: int, k: int, device: torch.device) -> float:
    """Of the library's FP8 product of two random `[n, k]`, with fast accumulation, against float64."""
    g = torch.Generator(device).manual_seed(0)
    x, w = (formats.to_e4m3(100 * torch.randn(n, k, generator=g, device=device)) for _ in range(2))
    one = torch.ones((), device=device)
    y = torch._scaled_mm(x, w.T, scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=True)
    part = slice(512)  # of the outputs is enough to know
    return error([y[part, part].double()], [x[part].double() @ w[part].double().T])


def error(got: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The worst part's root mean square error, relative to the truth's."""
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(got, truth, strict=True))


def values(y: Any, half_layout: bool = False) -> list[Tensor]:
    """What an output stands for, in float64: a tensor for each of its parts."""
    if not isinstance(y, tuple):
        return [y.double() if isinstance(y, Tensor) else dequantize(y, torch.float64)]
    q, k, v = y
    heads = [x.double() if isinstance(x, Tensor) else dequantize(x, torch.float64) for x in (q, k)]
    if half_layout:
        native = qkv_rope.half_layout(heads[0].shape[-1]).argsort().to(heads[0].device)
        heads = [x[..., native] for x in heads]
    return [*heads, v.double() if isinstance(v, Tensor) else dequantize_values(v, heads[0].shape[1], torch.float64)]


# --- a denoise --------------------------------------------------------------------------------

TINY = FluxConfig(
    in_channels=64, out_channels=64, hidden_size=256, num_heads=2, depth=1, depth_single_blocks=1,
    context_in_dim=64, vec_in_dim=32, axes_dim=scaled_axes(128),
)  # fmt: skip


def denoises(device: torch.device, backends: Sequence[str]) -> Iterator[Verdict]:
    for precision in registry.FORMATS:
        chosen = RECIPES[precision]
        layers = {name: to(layer, device) for name, layer in tiny_model(chosen).items()}
        wide = {name: exact(layer) for name, layer in layers.items()}
        reference = Transformer(TINY, wide, eager_ops(chosen.attention))
        truth = [_denoise(reference, reference)]
        eager = [_denoise(Transformer(TINY, layers, eager_ops(chosen.attention)), reference)]
        eager_error = error(eager, truth)
        for backend in backends:
            start = time.perf_counter()
            choice = select(backend, chosen, device)
            if isinstance(choice, str):
                yield Verdict("denoise", precision, backend, refused=choice)
                continue
            try:
                got = eager if backend == "eager" else [_denoise(Transformer(TINY, layers, choice), reference)]
                mine = error(got, truth)
            except Exception as failure:
                yield Verdict("denoise", precision, backend, failed=_said(failure))
            else:
                seconds = time.perf_counter() - start
                yield Verdict("denoise", precision, backend, mine, eager_error, seconds=seconds)


def _said(failure: Exception) -> str:
    """The first line of an exception."""
    return f"{type(failure).__name__}: {failure}".splitlines()[0]


def select(backend: str, chosen: Recipe, device: torch.device) -> Ops | str:
    """A backend's operations for the small model, or why there are none."""
    try:
        ops = choose(backend, TINY, chosen, device, torch.bfloat16).ops
    except RefusedError as refusal:
        return str(refusal)
    assert ops is not None, "engines are verified by `verify_engines`"
    return ops


def tiny_model(chosen: Recipe) -> dict[str, Any]:
    """Random layers of `TINY` by a recipe, as `Transformer` takes them, in bf16."""
    g = torch.Generator().manual_seed(0)
    layers: dict[str, Any] = {}
    for name, shape in TINY.tensor_shapes().items():
        x = torch.randn(shape, generator=g)
        layers[name] = (1 + 0.1 * x if name.endswith(".scale") else x / shape[-1] ** 0.5).bfloat16()
    for name in [name.removesuffix(".weight") for name in layers if name.endswith(".weight")]:
        rule = chosen.rule(name)
        if rule.format != "dense":
            layers[name] = recipe.quantize(Linear(layers[f"{name}.weight"], layers[f"{name}.bias"], name=name), rule)
    return layers


def _denoise(transformer: Transformer, reference: Transformer) -> Tensor:
    """Latents `[2, 24, 64]` after `STEPS` steps from noise, in float64.

    Modulation and rotation are the reference's: eager computes them for every backend, and a timestep rounded to
    bf16 would drown what the kernels do.
    """
    g = torch.Generator().manual_seed(1)
    image, text, batch, device = 24, 9, 2, transformer.device

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).bfloat16().to(device)

    x, txt, pooled = normal(batch, image, 64).double(), normal(batch, text, 64), normal(batch, 32)
    guidance = torch.full((batch,), 3.5, device=device)
    rope = reference.rope(torch.zeros(text, 3), sampling.positions(4, 6))
    rope = rope.to(torch.promote_types(transformer.dtype, torch.float32))
    with torch.inference_mode():
        for now, then in pairwise(sampling.schedule(STEPS, image)):
            mods = reference.modulate(pooled, torch.full((batch,), now, device=device), guidance)
            step = (x.to(transformer.dtype), txt.to(transformer.dtype), mods.to(transformer.dtype), rope)
            x = x + (then - now) * transformer.step(*step).double()
    return x


def to(x: Any, device: torch.device) -> Any:
    """A tensor, or a layer with all its tensors, on a device."""
    if isinstance(x, Tensor):
        return x.to(device)
    if is_dataclass(x):
        return replace(x, **{f.name: to(getattr(x, f.name), device) for f in fields(x)})  # type: ignore[type-var]
    return x
