"""Muon for matrices and convolutions, AdamW for everything else, as one optimizer.

Muon replaces a matrix's momentum by the nearest orthogonal matrix, so that every direction of it learns at the same
pace. Its update is scaled to the root mean square that AdamW's typically has, so that one learning rate serves both.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, distributed, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration that sends all singular values to about 1
_UPDATE_RMS = 0.2
# What is left to AdamW: embeddings, the first and the last layer.
_EDGES = (
    "embedding.weight",
    "shared.weight",
    "relative_attention_bias.weight",
    "img_in/weight",
    "final_layer/linear/weight",
)


def matrices(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices inside `model`, which Muon is for, and everything else."""
    hidden, other = [], []
    for name, p in model.named_parameters():
        (hidden if p.ndim == 2 and not name.endswith(_EDGES) else other).append(p)
    return hidden, other


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """The orthogonal factor of `matrix [m, n]`, singular values within 0.7 to 1.2, in bf16's precision."""
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.mT if tall else matrix).bfloat16().contiguous()
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """One optimizer for all parameters of a network.

    Args:
        hidden: matrices `[m, n]` and convolutions `[m, n, h, w]` inside it, for Muon.
        other: the rest, for AdamW.
        lr: one learning rate for both.
    """

    def __init__(self, hidden: Iterable[nn.Parameter], other: Iterable[nn.Parameter], lr: float = 1e-3) -> None:
        groups: list[dict[str, Any]] = [{"params": list(hidden), "muon": True}, {"params": list(other), "muon": False}]
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; workers share the work of making matrices orthogonal."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["muon"]:
                for p, update in zip(parameters, self._updates(parameters), strict=True):
                    p.mul_(1 - 0.01 * group["lr"]).add_(update, alpha=-group["lr"])
            else:
                for p in parameters:
                    self._adamw(p, p.grad, group["lr"])

    def _updates(self, parameters: list[Tensor]) -> list[Tensor]:
        alone = not distributed.is_initialized()
        rank, workers = (0, 1) if alone else (distributed.get_rank(), distributed.get_world_size())
        order = sorted(range(len(parameters)), key=lambda i: -parameters[i].numel())  # deals out equal work
        updates = [torch.zeros_like(p, dtype=torch.bfloat16) for p in parameters]
        for turn, i in enumerate(order):
            p = parameters[i]
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
            momentum.lerp_(p.grad, 0.05)
            if turn % workers == rank:
                matrix = torch.lerp(p.grad, momentum, 0.95).reshape(len(p), -1)
                updates[i] = orthogonalize(matrix).mul_(_UPDATE_RMS * max(matrix.shape) ** 0.5).view_as(p).bfloat16()
        if workers > 1:
            flat = torch.cat([update.flatten() for update in updates])
            distributed.all_reduce(flat)  # each is zero in all workers but one
            updates = [
                part.view_as(p) for part, p in zip(flat.split([p.numel() for p in parameters]), parameters, strict=True)
            ]
        return updates

    def _adamw(self, p: Tensor, grad: Tensor, lr: float) -> None:
        state = self.state[p]
        mean = state.setdefault("mean", torch.zeros_like(p))
        square = state.setdefault("square", torch.zeros_like(p))
        state["step"] = state.get("step", 0) + 1
        mean.lerp_(grad, 0.1)
        square.lerp_(grad.square(), 0.01)
        fixed = (square / (1 - 0.99 ** state["step"])).sqrt_().add_(1e-8)
        p.addcdiv_(mean, fixed, value=-lr / (1 - 0.9 ** state["step"]))
