"""Between noise and image: the schedule, the noise, the tokens and their positions, and Euler's steps.

    schedule    N + 1 sigmas from 1 (noise) to 0 (image), bent towards noise the more tokens the image has
    draw        noise, one CPU generator for each image, so that a seed means the same on every machine
    pack        latents [B, C, h, w] -> tokens [B, h/2 * w/2, 4C], 2x2 latent pixels each
    positions   (index, row, column) of every token: index 0 for the image, 1 for references
    denoise     x <- x + (sigma_next - sigma) * velocity

Schedule and noise equal diffusers' bit for bit, and so do the roundings of timestep and step in bf16: the velocity
is multiplied by the step *rounded to the model's dtype*, the sum is made in fp32, and x is kept in the model's dtype.
"""

from __future__ import annotations

import math
import operator
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from fluxkiln.config import PATCH

MAX_SEED = 2**63 - 1
_UNSUPPORTED = (
    *("invert_sigmas", "shift_terminal", "stochastic_sampling"),
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas"),
)

Guidance = float | Sequence[float] | Callable[[int, float], float]
Callback = Callable[[int, float, Tensor], object]


class Cancelled(Exception):
    """The callback asked to stop between two steps."""


# --- schedule -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scheduler:
    """How evenly spaced sigmas are bent. Names and meanings are those of diffusers' `scheduler_config.json`.

    Attributes:
        use_dynamic_shifting: shift by `mu`, which grows linearly with the number of image tokens, from `base_shift`
            at `base_image_seq_len` to `max_shift` at `max_image_seq_len` and on; otherwise by the constant `shift`.
    """

    use_dynamic_shifting: bool = True
    shift: float = 1.0
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    time_shift_type: Literal["exponential", "linear"] = "exponential"

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> Scheduler:
        """Read a `scheduler_config.json`; absent keys have diffusers' defaults.

        Raises:
            ValueError: it asks for another scheduler, or for a variation that FLUX.1 does not use.
        """
        name = config.get("_class_name", "FlowMatchEulerDiscreteScheduler")
        if name != "FlowMatchEulerDiscreteScheduler":
            raise ValueError(f"the scheduler must be FlowMatchEulerDiscreteScheduler, got {name}")
        if used := [key for key in _UNSUPPORTED if config.get(key)]:
            raise ValueError(f"scheduler_config.json sets {', '.join(used)}, which FLUX.1 does not use")
        known = {field.name for field in fields(cls)}
        return cls(
            **{"use_dynamic_shifting": False} | {k: v for k, v in config.items() if k in known and v is not None}
        )

    def sigmas(self, num_steps: int, image_tokens: int, sigmas: Sequence[float] | None = None) -> list[float]:
        """See `schedule`."""
        if sigmas is None:
            if num_steps < 1:
                raise ValueError(f"at least 1 step is needed, got {num_steps}")
            sigmas = np.linspace(1.0, 1 / num_steps, num_steps).tolist()
        elif not len(sigmas) or not all(1 >= a > b for a, b in zip(sigmas, [*sigmas[1:], 0.0], strict=True)):
            raise ValueError(f"sigmas must fall from at most 1 and stay above 0 (the 0 is added), got {list(sigmas)}")
        s: np.ndarray = np.asarray(sigmas, dtype=np.float32)
        if not self.use_dynamic_shifting:
            s = self.shift * s / (1 + (self.shift - 1) * s)
        else:
            slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
            mu = image_tokens * slope + (self.base_shift - slope * self.base_image_seq_len)
            bend = math.exp(mu) if self.time_shift_type == "exponential" else mu
            s = bend / (bend + (1 / s - 1))
        return [*s.tolist(), 0.0]


UNSHIFTED = Scheduler(use_dynamic_shifting=False)  # FLUX.1 schnell
SHIFTED = Scheduler()  # the rest of the family


def schedule(
    num_steps: int, image_tokens: int, shift: bool = True, sigmas: Sequence[float] | None = None
) -> list[float]:
    """Sigmas of a denoise, as fp32 values: `num_steps + 1` of them, falling from 1 to 0.

    Args:
        num_steps: steps of the model.
        image_tokens: tokens of the result; those of text and references do not count.
        shift: bend by the number of tokens, as all of the family but schnell want it.
        sigmas: use these, without the 0 at the end, instead of evenly spaced ones; they are shifted all the same.

    Raises:
        ValueError: no steps, or `sigmas` that do not fall.
    """
    return (SHIFTED if shift else UNSHIFTED).sigmas(num_steps, image_tokens, sigmas)


def first_step(num_steps: int, strength: float) -> int:
    """The step at which image-to-image begins: the schedule stays that of `num_steps`, its beginning is left out.

    Raises:
        ValueError: strength outside 0..1, or so low that no step remains.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be between 0 and 1, got {strength}")
    first = int(max(num_steps - min(num_steps * strength, num_steps), 0))
    if first == num_steps:
        raise ValueError(f"strength {strength} leaves none of the {num_steps} steps: raise one of them")
    return first


def timesteps(sigmas: Sequence[float], dtype: torch.dtype) -> Tensor:
    """What the model is told at each step, `[N]` in `dtype`.

    bf16 has 8 bits: rounding 1000 * sigma and dividing again is not the rounding of sigma, and the model sees it.
    """
    return (torch.tensor(sigmas[:-1], dtype=torch.float32) * 1000).to(dtype) / 1000


def guidance_values(guidance: Guidance, sigmas: Sequence[float]) -> tuple[float, ...]:
    """Distilled guidance of each step that runs, known before the first of them.

    Args:
        guidance: one number, one for each step, or a function of (step, sigma).
        sigmas: of the steps that run, 0 included.

    Raises:
        ValueError: another number of steps, or not a finite number.
    """
    steps = len(sigmas) - 1
    if callable(guidance):
        values = [float(guidance(i, sigmas[i])) for i in range(steps)]
    elif isinstance(guidance, Sequence):
        values = [float(g) for g in guidance]
        if len(values) != steps:
            raise ValueError(f"guidance_scale has {len(values)} values, but {steps} steps run")
    else:
        values = [float(guidance)] * steps
    if bad := [g for g in values if not math.isfinite(g)]:
        raise ValueError(f"guidance_scale must be finite, got {bad[0]}")
    return tuple(values)


# --- noise --------------------------------------------------------------------------------------


def seeds_of(seed: SupportsIndex | Sequence[SupportsIndex] | None, count: int) -> tuple[int, ...]:
    """One seed for each of `count` images: as given, counted up from one, or counted up from a random one.

    Raises:
        ValueError: another number of seeds, or one outside 0..2^63 - 1.
    """
    if seed is None:
        seed = secrets.randbelow(2**32)
    if isinstance(seed, Sequence):
        if len(seed) != count:
            raise ValueError(f"{len(seed)} seeds for {count} images: give one seed for each, or one for all")
        seeds = tuple(map(_integer, seed))
    else:
        first = _integer(seed)
        seeds = tuple(range(first, first + count))
    if bad := [s for s in seeds if not 0 <= s <= MAX_SEED]:
        raise ValueError(f"a seed must be between 0 and 2^63 - 1 = {MAX_SEED}, got {bad[0]}")
    return seeds


def _integer(seed: object) -> int:
    try:
        return operator.index(seed)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"a seed must be an integer, got {seed!r}") from None


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator for each image, so that an image of a batch is the image of its seed alone."""
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def draw(sources: Sequence[torch.Generator], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Normal noise `[len(sources), *shape]` on the CPU, each row from its own generator.

    Args:
        shape: of unpacked latents, `[C, h, w]`: the order of the numbers is part of what a seed means.
        dtype: the model's; on a CPU, bf16 noise is fp32 noise rounded.
    """
    return torch.cat([torch.randn((1, *shape), generator=source, dtype=dtype) for source in sources])


def add_noise(latents: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
    """Latents as they are at `sigma`: `sigma * noise + (1 - sigma) * latents`, sigma rounded to their dtype."""
    s = torch.as_tensor(sigma, dtype=torch.float32).to(latents)
    return s * noise + (1.0 - s) * latents


# --- tokens -------------------------------------------------------------------------------------


def pack(latents: Tensor) -> Tensor:
    """Latents `[B, C, h, w]`, h and w even, to tokens `[B, h/2 * w/2, 4C]`; channel = 4c + 2 (row % 2) + column % 2."""
    b, c, h, w = latents.shape
    tokens = latents.reshape(b, c, h // PATCH, PATCH, w // PATCH, PATCH).permute(0, 2, 4, 1, 3, 5)
    return tokens.reshape(b, (h // PATCH) * (w // PATCH), c * PATCH**2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens `[B, L, 4C]` to latents `[B, C, height, width]`; sizes in latent pixels."""
    b, _, c = tokens.shape
    latents = tokens.reshape(b, height // PATCH, width // PATCH, c // PATCH**2, PATCH, PATCH)
    return latents.permute(0, 3, 1, 4, 2, 5).reshape(b, c // PATCH**2, height, width)


def positions(height: int, width: int, index: int = 0, row: int = 0, column: int = 0) -> Tensor:
    """Positions `[height * width, 3]` of a grid of tokens that begins at (row, column).

    fp32 whatever the model's dtype: bf16 cannot tell row 257 from 256.
    """
    ids = torch.full((height, width, 3), float(index))
    ids[..., 1] = torch.arange(row, row + height)[:, None]
    ids[..., 2] = torch.arange(column, column + width)
    return ids.reshape(-1, 3)


def reference_positions(grids: Sequence[tuple[int, int]]) -> Tensor:
    """Positions `[sum of h * w, 3]` of reference images of `(h, w)` tokens each, all of index 1.

    The first begins at (0, 0). Each further one is put to the right of or below all before it, wherever the whole
    stays closer to a square: the "offset" method, ComfyUI's default for Kontext.
    """
    ids, bottom, right = [], 0, 0
    for height, width in grids:
        beside = height + bottom > width + right
        row, column = (0, right) if beside else (bottom, 0)
        ids.append(positions(height, width, 1, row, column))
        bottom, right = max(bottom, row + height), max(right, column + width)
    return torch.cat(ids)


# --- steps --------------------------------------------------------------------------------------


def denoise(
    velocity: Callable[[int, Tensor], Tensor],
    x: Tensor,
    sigmas: Sequence[float],
    after_step: Callable[[int, Tensor], Tensor] | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Follow the velocity from `sigmas[0]` to 0 by Euler's method.

    Args:
        velocity: of (step, tokens).
        x: tokens `[B, L, C]` at `sigmas[0]`.
        sigmas: N + 1 falling values; N steps are made.
        after_step: what becomes of the tokens after each step (masked edits put the known part back).
        callback: told (step, sigma at which it began, tokens after it); if it returns True, no further step is made.

    Raises:
        Cancelled: the callback asked for it.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    steps = torch.tensor(sigmas, dtype=torch.float32).diff().to(x.device, x.dtype)
    for i in range(len(steps)):
        x = (x.to(wide) + steps[i] * velocity(i, x)).to(x.dtype)
        if after_step is not None:
            x = after_step(i, x)
        if callback is not None and callback(i, sigmas[i], x) is True:
            raise Cancelled(f"cancelled after step {i + 1} of {len(steps)}")
    return x
