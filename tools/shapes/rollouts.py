"""Places on the model's own paths from noise to picture.

Flow matching shows a model the straight lines between noise and pictures. When it draws, what it is given also holds
the errors of its own earlier steps, and it takes them for the picture. Where a prompt leaves nothing open, as edits and
complete captions do, the picture is known, so from any place on such a path the model can be told the way to it.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from .data import Batch, Pool
from .model import Denoiser, path, velocity

SAMPLES, STEPS = 32, (8, 16)  # of a roll: paths, and the least and most steps of one
KEPT = 4  # rolls that are drawn from
# Steps of training from one to the next: places of prompts are drawn about once, of edits three times.
EVERY = 50


class Roll(NamedTuple):
    """Paths of the samples of `batch`: `times [N]`, none of them 1, and latents `[N, B, L, 64]` there."""

    batch: Batch
    times: Tensor
    latents: Tensor


class Rollouts:
    """Places on the last paths to the pictures of a pool."""

    def __init__(self, pool: Pool) -> None:
        self.pool, self.rolls = pool, list[Roll]()

    def batch(self, n: int, rng: Random) -> tuple[Batch, Tensor, Tensor]:
        """`n` samples, the latents `[n, L, 64]` that the model came to on its way to them, and the times `[n]`."""
        parts, latents, times = [], [], []
        for _ in range(n):
            roll = rng.choice(self.rolls)
            i, step = rng.randrange(SAMPLES), rng.randrange(len(roll.times))
            parts.append(roll.batch[i : i + 1])
            latents.append(roll.latents[step, i])
            times.append(roll.times[step])
        return Batch.joined(parts), torch.stack(latents), torch.stack(times)

    @torch.no_grad()
    def roll(self, model: Denoiser, predict: Callable[..., Tensor], rng: Random) -> None:
        """Let `predict`, `model` itself or faster, draw anew."""
        batch, steps = self.pool.batch(SAMPLES, rng, certain=True), rng.randint(*STEPS)
        device = next(model.parameters()).device
        noise = torch.Generator().manual_seed(rng.getrandbits(62))
        x = torch.randn(batch.target.shape, generator=noise).to(device)
        reference = None if batch.reference is None else batch.reference.to(device)
        guidance = batch.guidance.to(device)
        with torch.autocast(device.type, torch.bfloat16):
            text = model.encode(batch.captions)
            of = lambda x, t: velocity(predict, x, reference, batch.size, *text, t, guidance)  # noqa: E731
            _, *places, _ = path(of, x, steps)  # at 1 there is noise alone, as in any batch, and at 0 nowhere to go
        times, latents = zip(*places, strict=True)
        roll = Roll(batch, torch.stack(times), torch.stack(latents).cpu())
        self.rolls = [*self.rolls, roll][-KEPT:]
