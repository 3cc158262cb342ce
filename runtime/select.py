"""Which backend runs a model, and why each of the others does not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from fluxkiln import measurements
from fluxkiln.config import FluxConfig
from fluxkiln.kernels import Ops, RefusedError, eager_ops
from fluxkiln.kernels.recipe import Recipe
from fluxkiln.record import versions

if TYPE_CHECKING:
    from fluxkiln.engines.store import Stored

ORDER = ("trt", "triton", "eager")  # of `auto`, where no measurement decides
BACKENDS = ("auto", *ORDER)


@dataclass(frozen=True)
class Choice:
    """A backend and what it runs with: operations, or an engine.

    Attributes:
        backend: its name.
        ops: what the graph is given; None for an engine.
        engine: what `trt` runs; None for the others.
        reasons: every other backend -> why it was not picked.
        why: this one was.
        measured: other backends that were timed beside it -> their step's time, as a multiple of its.
        notices: what the user has to be told.
    """

    backend: str
    ops: Ops | None = None
    engine: Stored | None = None
    reasons: dict[str, str] = field(default_factory=dict)
    why: str = "asked for"
    measured: dict[str, float] = field(default_factory=dict)
    notices: tuple[str, ...] = ()


def choose(
    backend: str,
    config: FluxConfig,
    recipe: Recipe,
    device: torch.device,
    dtype: torch.dtype,
    fallback: bool = False,
    find: Callable[[], Stored | str] = lambda: "there is no checkpoint to find an engine for",
    insist: bool = False,
    known: Iterable[measurements.Measurement] | None = None,
) -> Choice:
    """The backend for a model: the one asked for, or with `auto` the fastest that can run it on `device`.

    Args:
        find: looks for an engine for the model: one, or why there is none.
        insist: run an engine that was timed slower than Triton here, if `trt` was asked for; otherwise that is refused.
        known: measurements to compare by; None reads those of the release and of this user.

    Raises:
        ValueError: no such backend.
        RefusedError: it cannot run this, or is a slower engine, and `fallback` is not set; or no backend can.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    reasons: dict[str, str] = {}
    engine: Stored | None = None
    able = []
    for name in ORDER if backend == "auto" else (backend, "eager") if fallback else (backend,):
        reason = _unwise(name, recipe, device) if backend == "auto" else None
        if reason is None and name == "trt":
            found = find()
            reason, engine = (found, None) if isinstance(found, str) else (None, found)
        if reason is None:
            reason = _refuse(name, config, recipe, device, dtype)
        if reason is None:
            able.append(name)
        else:
            reasons[name] = reason
    if not able:
        raise RefusedError("; ".join(f"backend {name}: {reason}" for name, reason in reasons.items()))

    def compare(names: list[str]) -> measurements.Pick:
        sizes = (config, recipe.name, _DTYPES.get(dtype, str(dtype)))
        where = measurements.device_name(versions(device))
        return measurements.choose(names, *sizes, where, measurements.read() if known is None else known)

    if backend == "auto":
        pick = compare(able)
        name, why, measured = pick.backend, pick.why, pick.measured
        reasons |= pick.reasons
        notices = []
    else:
        name, why, measured = able[0], "asked for", {}
        notices = [f"backend {other} cannot run this: {reason}" for other, reason in reasons.items()]
        alone = _refuse("triton", config, recipe, device, dtype) is not None
        if engine and not alone and (pick := compare(["trt", "triton"])).backend == "triton":
            slower = f"backend trt is slower than triton: {pick.reasons['trt']}"
            notices.append(slower)
            if insist:
                measured = {"triton": 1 / pick.measured["trt"]}
            elif fallback:
                name, measured, reasons = "triton", pick.measured, pick.reasons
            else:
                again = f"time both again with `fluxkiln bench step`, or name the engine (--engine {engine.key})"
                raise RefusedError(f"{slower}: take backend triton, {again} to run it all the same")
    return Choice(
        backend=name,
        ops=None if name == "trt" else _ops(name, recipe, device),
        engine=engine if name == "trt" else None,
        reasons={other: reasons[other] for other in ORDER if other in reasons},
        why=why,
        measured=measured,
        notices=tuple(notices),
    )


_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def _refuse(backend: str, config: FluxConfig, recipe: Recipe, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend cannot run a model."""
    if backend != "triton":
        return None
    from fluxkiln.kernels.registry import refuse_model

    return refuse_model(config.head_dim, config.hidden_size, recipe, device, dtype)


def _unwise(backend: str, recipe: Recipe, device: torch.device) -> str | None:
    """Why `auto` does not pick a backend that could run a model."""
    if backend == "triton" and device.type != "cuda":
        return f"on {device.type} its kernels are interpreted, which proves numbers and takes minutes an image"
    if backend == "eager" and device.type == "cuda" and any(rule.format != "dense" for _, rule in recipe.rules):
        return f"it would emulate {recipe.name} in wider arithmetic, slower than bf16"
    return None


def _ops(backend: str, recipe: Recipe, device: torch.device) -> Ops:
    if backend == "eager":
        return eager_ops(recipe.attention)
    from fluxkiln.kernels.backend import triton_ops

    return triton_ops(device, recipe.attention)
