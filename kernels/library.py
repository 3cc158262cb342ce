"""Operations that a library can run instead: where it has been measured to be faster, and nowhere else.

    linear      torch.addmm in BF16, torch._scaled_mm by rows in FP8
    attention   torch.nn.functional.scaled_dot_product_attention in BF16; an output in FP8 or NVFP4 is quantised after

The table is the section `library` of `tiles.json`, in which `fluxkiln bench tune` writes our time and the library's. A
kind of call goes to the library on an architecture if all that was timed of it there, at every length and in every
format of the output, says so; so a layer is bound once, when it is loaded. What was not timed runs on our kernel.

The library gets one image at a time: a row of a batch comes out as it does alone. Precision is as in the operation's
own kernel, but for the library's order of sums; `promote128` is its slow accumulation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fluxkiln.kernels import quantize
from fluxkiln.kernels.attention import Values, bounded
from fluxkiln.kernels.formats import FP8_MAX, Activation, Fp8, Quant
from fluxkiln.kernels.packed import Packed
from fluxkiln.kernels.quantize import Empty, fresh, largest, outputs
from fluxkiln.kernels.tiles import section

MARGIN = 0.97  # of our time: less is not worth a second implementation, and hardly told apart

Kind = dict[str, Any]  # what the choice depends on; rows of the table have it among their `problem`

# --- choice -----------------------------------------------------------------------------------


def attention_kind(arch: int, head_dim: int) -> Kind:
    """A kind of attention; in BF16, the only one that torch has."""
    return {"op": "attention", "arch": arch, "format": "bf16", "head_dim": head_dim}


def linear_kind(arch: int, layer: Sequence[Packed]) -> Kind:
    """A kind of plain product, each stream's `[n, k]`."""
    first = layer[0]
    shapes = [[part.n, part.k] for part in layer]
    return {"op": "linear", "arch": arch, "format": first.format, "accumulate": first.accumulate, "shapes": shapes}


def kind(op: str, args: Sequence[Any], arch: int) -> Kind | str:
    """The kind of a call, given as `launch` takes it, or why no library can run it."""
    if op == "attention":
        q = args[0]
        if not isinstance(q, Tensor):
            return "torch's attention is in bf16, with q as it is multiplied"
        return attention_kind(arch, q.shape[-1])
    if op == "linear":
        layer = args[1]
        if any(part.format == "nvfp4" for part in layer):
            return "torch's product by blocks of 16 is not one that fluxkiln calls"
        if any(part.up is not None or part.accumulate == "f16" for part in layer):
            return "torch's product has no low-rank side input and no fp16 sums"
        return linear_kind(arch, layer)
    return f"{op} is more than a library's call"


def faster(kind: Mapping[str, Any]) -> bool:
    """Whether the library was faster in all that was timed of a kind, and something was."""
    timed = [row for row in section("library") if kind.items() <= row["problem"].items()]
    return bool(timed) and all(row["us_library"] < MARGIN * row["us"] for row in timed)


def launcher(op: str, args: Sequence[Any], arch: int) -> Callable[..., Any] | None:
    """What to call in the place of an operation's `launch`, or None for that itself."""
    found = kind(op, args, arch)
    return None if isinstance(found, str) or not faster(found) else LAUNCH[op]


# --- calls ------------------------------------------------------------------------------------


def linear(
    xs: Sequence[Activation], layer: Sequence[Packed], *, arch: int, empty: Empty | None = None
) -> tuple[Tensor, list[Callable[[], Any]]]:
    """As `linear.launch`."""
    B, N, dtype = xs[0].shape[0], layer[0].n, layer[0].dtype
    y = (empty or fresh(layer[0].weight.device))("y", (B, sum(x.shape[1] for x in xs), N), dtype)
    calls: list[Callable[[], Any]] = []
    start = 0
    for x, part in zip(xs, layer, strict=True):
        stop = start + x.shape[1]
        calls += [partial(_product, x, i, part, y[i, start:stop]) for i in range(B)]
        start = stop
    return y, calls


def _product(x: Activation, i: int, layer: Packed, y: Tensor) -> None:
    bias = layer.bias.to(layer.dtype)  # what it was before it was packed
    if isinstance(x, Tensor):
        torch.addmm(bias, x[i], layer.weight.T, out=y)
        return
    assert isinstance(x, Fp8)
    torch._scaled_mm(
        x.data[i],
        layer.weight.T,
        scale_a=x.row_scale[i].expand(x.shape[1])[:, None].contiguous(),
        scale_b=layer.scale[None, :],
        bias=bias,
        out_dtype=layer.dtype,
        use_fast_accum=layer.accumulate == "f32",
        out=y,
    )


def attention(
    q: Tensor, k: Tensor, v: Tensor | Values, out: Quant | None = None, *, arch: int, empty: Empty | None = None
) -> tuple[Activation, list[Callable[[], Any]]]:
    """As `attention.launch`."""
    B, L, H, D = q.shape
    empty = empty or fresh(q.device)
    values = bounded(v) if out and out.rule == "bound" else v
    data = values.data if isinstance(values, Values) else values
    o = empty("data" if out is None else "unquantised", (B, L, H * D), v.dtype)
    calls: list[Callable[[], Any]] = [
        partial(_attend, q[i : i + 1], k[i : i + 1], data[i : i + 1], o[i : i + 1]) for i in range(B)
    ]
    if out is None:
        return o, calls
    y = outputs(out, (B, L, H * D), v.dtype, empty)
    for i in range(B):
        scale = out.scale if out.rule == "static" else values.scale[i].amax() * (FP8_MAX / largest(out))
        constant = replace(out, rule="static", scale=scale)
        calls += quantize.launch(o[i : i + 1], constant, arch=arch, empty=partial(_image, y, i))[1]
    return y, calls


def _image(y: Any, i: int, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The part of an activation's buffer that image i fills."""
    return getattr(y, name)[i : i + 1]


def _attend(q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> None:
    heads = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    o.copy_(heads.transpose(1, 2).flatten(2))


LAUNCH: dict[str, Callable[..., Any]] = {"linear": linear, "attention": attention}
