"""Schedule, noise, tokens and Euler's steps: equal to diffusers' bit for bit where diffusers has them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.utils.torch_utils import randn_tensor

from fluxkiln import sampling
from fluxkiln.sampling import Cancelled, Scheduler, schedule

DEV = {"shift": 3.0, "use_dynamic_shifting": True}
SCHNELL = {"shift": 1.0, "use_dynamic_shifting": False}


def diffusers_scheduler(
    config: dict[str, Any], steps: int, tokens: int, sigmas: Sequence[float] | None = None
) -> FlowMatchEulerDiscreteScheduler:
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    c = scheduler.config
    mu = calculate_shift(tokens, c.base_image_seq_len, c.max_image_seq_len, c.base_shift, c.max_shift)
    given = np.linspace(1.0, 1 / steps, steps) if sigmas is None else sigmas
    scheduler.set_timesteps(sigmas=given, mu=mu)
    return scheduler


# --- schedule -----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 4, 28, 50, 1000])
@pytest.mark.parametrize("tokens", [1, 16, 256, 1024, 4080, 4096, 9216, 65536])
@pytest.mark.parametrize("shift", [True, False])
def test_schedule_is_diffusers_bit_for_bit(steps: int, tokens: int, shift: bool) -> None:
    want = diffusers_scheduler(DEV if shift else SCHNELL, steps, tokens).sigmas
    got = schedule(steps, tokens, shift=shift)
    assert torch.equal(torch.tensor(got), want)
    assert got[0] == 1
    assert got[-1] == 0
    assert all(a >= b for a, b in itertools.pairwise(got))  # fp32 cannot tell 1000 sigmas apart at a large shift


@pytest.mark.parametrize(
    "config",
    [
        {"shift": 3.0, "use_dynamic_shifting": False},
        {"use_dynamic_shifting": True, "base_shift": 0.3, "max_shift": 2.0, "max_image_seq_len": 1000},
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
        {},
    ],
)
def test_scheduler_config_is_honoured(config: dict[str, Any]) -> None:
    full = dict(FlowMatchEulerDiscreteScheduler(**config).config)
    got = Scheduler.from_diffusers(full).sigmas(9, 777)
    assert torch.equal(torch.tensor(got), diffusers_scheduler(config, 9, 777).sigmas)
    assert Scheduler.from_diffusers(config).sigmas(9, 777) == got


def test_custom_sigmas_are_shifted_as_diffusers_does() -> None:
    sigmas = [0.98, 0.5, 0.25, 0.01]
    for config, shift in ((DEV, True), (SCHNELL, False)):
        want = diffusers_scheduler(config, 4, 1024, sigmas).sigmas
        assert torch.equal(torch.tensor(schedule(99, 1024, shift, sigmas)), want)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: schedule(0, 1024), "at least 1 step is needed, got 0"),
        (lambda: schedule(4, 1024, sigmas=[]), "sigmas must fall"),
        (lambda: schedule(4, 1024, sigmas=[1.0, 0.5, 0.5]), "sigmas must fall"),
        (lambda: schedule(4, 1024, sigmas=[1.0, 0.0]), "stay above 0"),
        (lambda: schedule(4, 1024, sigmas=[1.5, 0.5]), "at most 1"),
        (lambda: schedule(4, 1024, sigmas=[1.0, math.nan]), "sigmas must fall"),
        (lambda: Scheduler.from_diffusers({"_class_name": "DDIMScheduler"}), "got DDIMScheduler"),
        (lambda: Scheduler.from_diffusers({"use_karras_sigmas": True}), "use_karras_sigmas"),
        (lambda: sampling.first_step(28, 1.01), "strength must be between 0 and 1, got 1.01"),
        (lambda: sampling.first_step(28, math.nan), "strength must be between 0 and 1"),
        (lambda: sampling.first_step(4, 0.0), "leaves none of the 4 steps"),
        (lambda: sampling.guidance_values([1.0, 2.0], [1.0, 0.5, 0.2, 0.0]), "2 values, but 3 steps run"),
        (lambda: sampling.guidance_values(math.inf, [1.0, 0.0]), "must be finite"),
    ],
)
def test_bad_schedules_are_refused(call: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()


@pytest.mark.parametrize(
    ("steps", "strength", "first"),
    [(28, 0.6, 11), (28, 0.95, 1), (50, 0.75, 12), (4, 0.95, 0), (28, 0.02, 27), (28, 1.0, 0), (1, 0.3, 0)],
)
def test_strength_leaves_out_the_steps_that_diffusers_leaves_out(steps: int, strength: float, first: int) -> None:
    assert sampling.first_step(steps, strength) == first


def test_timesteps_round_as_diffusers_in_bf16() -> None:
    sigmas = schedule(28, 4096)
    t = diffusers_scheduler(DEV, 28, 4096).timesteps
    got = sampling.timesteps(sigmas, torch.bfloat16)
    assert torch.equal(got, t.to(torch.bfloat16) / 1000)
    assert (got != torch.tensor(sigmas[:-1]).bfloat16()).any()  # the shorter way is another number
    assert torch.equal(sampling.timesteps(sigmas, torch.float32), t / 1000)


def test_guidance_is_known_before_the_first_step() -> None:
    sigmas = [1.0, 0.75, 0.5, 0.0]
    assert sampling.guidance_values(3.5, sigmas) == (3.5, 3.5, 3.5)
    assert sampling.guidance_values([1, 2, 3], sigmas) == (1.0, 2.0, 3.0)
    assert sampling.guidance_values(lambda step, sigma: 10 * step + sigma, sigmas) == (1.0, 10.75, 20.5)


# --- noise --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_noise_is_diffusers_of_the_same_seeds(dtype: torch.dtype) -> None:
    seeds = (0, 7, sampling.MAX_SEED)
    got = sampling.draw(sampling.generators(seeds), (16, 6, 10), dtype)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    assert torch.equal(got, randn_tensor((3, 16, 6, 10), generator=generators, dtype=dtype))


def test_noise_has_the_published_values() -> None:
    got = sampling.draw(sampling.generators([0]), (16, 128, 128), torch.bfloat16).flatten()[:8].tolist()
    assert got == [-1.125, -1.15625, -0.25, -0.43359375, 0.84765625, 0.69140625, -0.31640625, -2.109375]


def test_seeds_count_up_and_are_drawn_when_none_is_given() -> None:
    assert sampling.seeds_of(5, 3) == (5, 6, 7)
    assert sampling.seeds_of([9, 2], 2) == (9, 2)
    assert sampling.seeds_of(np.int64(4), 1) == (4,)
    assert type(sampling.seeds_of(np.int64(4), 1)[0]) is int
    first, second = sampling.seeds_of(None, 2), sampling.seeds_of(None, 2)
    assert first[1] == first[0] + 1
    assert first != second


@pytest.mark.parametrize(
    ("seed", "count", "sentence"),
    [
        (-1, 1, "between 0 and 2\\^63 - 1 = 9223372036854775807, got -1"),
        (2**63, 1, "got 9223372036854775808"),
        (2**63 - 1, 2, "got 9223372036854775808"),
        ([1, 2], 3, "2 seeds for 3 images"),
        (1.5, 1, "must be an integer, got 1.5"),
        ("7", 1, "must be an integer, got '7'|1 seeds"),
        ([1, None], 2, "must be an integer, got None"),
    ],
)
def test_bad_seeds_are_refused(seed: Any, count: int, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        sampling.seeds_of(seed, count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_noise_is_scale_noise(dtype: torch.dtype) -> None:
    scheduler = diffusers_scheduler(DEV, 28, 1024)
    scheduler.set_begin_index(11)
    z, noise = torch.randn(2, 12, 64).to(dtype), torch.randn(2, 12, 64).to(dtype)
    want = scheduler.scale_noise(z, scheduler.timesteps[11:12], noise)
    assert torch.equal(sampling.add_noise(z, noise, schedule(28, 1024)[11]), want)
    assert torch.equal(sampling.add_noise(z, noise, 0.0), z)


# --- tokens -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(2, 2), (6, 10), (12, 2)])
def test_pack_is_diffusers_and_unpack_undoes_it(height: int, width: int) -> None:
    z = torch.randn(3, 16, height, width)
    tokens = sampling.pack(z)
    assert torch.equal(tokens, FluxPipeline._pack_latents(z, 3, 16, height, width))
    assert torch.equal(sampling.unpack(tokens, height, width), z)
    c, row, column = 5, height - 1, width - 2
    channel = 4 * c + 2 * (row % 2) + column % 2
    assert tokens[1, (row // 2) * (width // 2) + column // 2, channel] == z[1, c, row, column]


def test_positions_are_diffusers_and_stay_exact() -> None:
    want = FluxPipeline._prepare_latent_image_ids(1, 5, 300, "cpu", torch.float32)
    got = sampling.positions(5, 300)
    assert torch.equal(got, want)
    assert got.dtype == torch.float32
    assert got[:, 2].unique().numel() == 300


def test_references_are_laid_out_as_comfyui_offsets_them() -> None:
    """Worked by hand from ComfyUI's rule: to the right if putting it below would make the whole taller than wide."""
    grids = [(4, 6), (4, 6), (8, 2), (3, 3)]
    corners = [(0, 0), (4, 0), (0, 6), (8, 0)]
    ids = sampling.reference_positions(grids)
    parts = ids.split([h * w for h, w in grids])
    for part, (h, w), (row, column) in zip(parts, grids, corners, strict=True):
        assert torch.equal(part, sampling.positions(h, w, 1, row, column))
    cells = {tuple(position) for position in ids.tolist()}
    assert len(cells) == len(ids)


def test_one_reference_is_kontexts() -> None:
    want = FluxPipeline._prepare_latent_image_ids(1, 3, 7, "cpu", torch.float32)
    want[:, 0] = 1
    assert torch.equal(sampling.reference_positions([(3, 7)]), want)


# --- steps --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_euler_steps_are_diffusers_bit_for_bit(dtype: torch.dtype) -> None:
    scheduler = diffusers_scheduler(DEV, 7, 1024)
    x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    velocities = [torch.randn_like(x) for _ in range(7)]
    got = sampling.denoise(lambda i, _: velocities[i], x, schedule(7, 1024))
    want = x
    for v, t in zip(velocities, scheduler.timesteps, strict=True):
        want = scheduler.step(v, t, want, return_dict=False)[0]
    assert torch.equal(got, want)
    assert got.dtype == dtype


def test_euler_reaches_the_image_along_a_straight_line() -> None:
    noise, image = torch.randn(1, 4, 8).double(), torch.randn(1, 4, 8).double()
    got = sampling.denoise(lambda i, x: noise - image, noise, schedule(13, 16))
    assert (got - image).abs().max() < 1e-6


def test_callback_sees_every_step_and_can_cancel() -> None:
    sigmas, seen = schedule(4, 16), []
    x = torch.ones(1, 2, 4)
    sampling.denoise(lambda i, x: x, x, sigmas, callback=lambda i, sigma, x: seen.append((i, sigma)))
    assert seen == list(enumerate(sigmas[:-1]))
    ran = []
    with pytest.raises(Cancelled, match="cancelled after step 2 of 4"):
        sampling.denoise(lambda i, x: ran.append(i) or x, x, sigmas, callback=lambda i, sigma, x: i == 1)
    assert ran == [0, 1]
