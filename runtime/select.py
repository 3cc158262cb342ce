"""Which backend runs a model, and why each of the others does not."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fluxkiln.config import FluxConfig
from fluxkiln.kernels import Ops, eager_ops
from fluxkiln.kernels.recipe import Recipe

BACKENDS = ("auto", "eager", "triton")


class RefusedError(RuntimeError):
    """A backend that was asked for cannot run this; the message says why."""


@dataclass(frozen=True)
class Choice:
    """A backend and its operations.

    Attributes:
        backend: its name; ops: what the graph is given.
        reasons: every other backend -> why it was not picked.
        emulated: quantised formats are computed in wider arithmetic than the hardware would use.
        fallback: it is not the one that was asked for.
    """

    backend: str
    ops: Ops
    reasons: dict[str, str]
    emulated: bool = False
    fallback: bool = False


def choose(
    backend: str,
    config: FluxConfig,
    recipe: Recipe,
    device: torch.device,
    dtype: torch.dtype,
    fallback: bool = False,
) -> Choice:
    """The backend for a model: the one asked for, or with `auto` the fastest that can run it on `device`.

    Raises:
        ValueError: no such backend.
        RefusedError: it cannot run this, and `fallback` is not set; or no backend can.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    reasons: dict[str, str] = {}
    for name in ("triton", "eager") if backend == "auto" else (backend, "eager") if fallback else (backend,):
        unwise = _unwise(name, recipe, device) if backend == "auto" else None
        reason = unwise or _refuse(name, config, recipe, device, dtype)
        if reason is None:
            emulated = name == "eager" and any(rule.format != "dense" for _, rule in recipe.rules)
            return Choice(name, _ops(name, recipe, device), reasons, emulated, fallback=backend not in ("auto", name))
        reasons[name] = reason
    raise RefusedError("; ".join(f"backend {name}: {reason}" for name, reason in reasons.items()))


def _refuse(backend: str, config: FluxConfig, recipe: Recipe, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend cannot run a model."""
    if backend == "eager":
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
