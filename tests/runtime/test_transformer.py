"""The transformer against diffusers' own, with q/k norms near 3 and every gate open, so that each part matters."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from fluxkiln.config import FluxConfig, scaled_axes
from fluxkiln.transformer import Transformer

from parity import diffusers_model, diffusers_velocity, random_tensors, relative


@dataclass(frozen=True)
class Case:
    name: str
    head_dim: int
    heads: int
    batch: int
    text: int
    grid: tuple[int, int]
    references: tuple[tuple[int, int], ...] = ()
    guidance: bool = True
    double: int = 2
    single: int = 2
    in_channels: int = 16


CASES = [
    Case("dev", 128, 2, 1, 12, (4, 6)),
    Case("head dim 64", 64, 3, 2, 7, (5, 7)),
    Case("schnell", 64, 2, 3, 13, (3, 5), guidance=False),
    Case("one reference", 128, 1, 1, 5, (5, 3), references=((3, 7),)),
    Case("three references", 64, 2, 2, 11, (3, 3), references=((2, 3), (5, 1), (1, 1))),
    Case("one token", 64, 1, 1, 1, (1, 1)),
    Case("no text", 64, 1, 1, 0, (3, 3)),
    Case("fill", 64, 2, 1, 5, (3, 4), in_channels=96),
    Case("double blocks only", 64, 1, 1, 3, (2, 3), single=0),
]


def config_of(case: Case) -> FluxConfig:
    return FluxConfig(
        in_channels=case.in_channels,
        out_channels=16,
        hidden_size=case.heads * case.head_dim,
        num_heads=case.heads,
        depth=case.double,
        depth_single_blocks=case.single,
        context_in_dim=40,
        vec_in_dim=24,
        guidance_embed=case.guidance,
        axes_dim=scaled_axes(case.head_dim),
    )


def inputs_of(case: Case, config: FluxConfig) -> dict[str, torch.Tensor | None]:
    g = torch.Generator().manual_seed(1)
    grids = [(0, *case.grid), *((1 + i, *grid) for i, grid in enumerate(case.references))]
    ids = [
        torch.cartesian_prod(torch.tensor([float(i)]), torch.arange(float(h)), torch.arange(float(w)))
        for i, h, w in grids
    ]
    img_ids = torch.cat([part.reshape(-1, 3) for part in ids])
    return {
        "img": torch.randn(case.batch, len(img_ids), config.in_channels, generator=g),
        "txt": torch.randn(case.batch, case.text, config.context_in_dim, generator=g),
        "pooled": torch.randn(case.batch, config.vec_in_dim, generator=g),
        "timestep": torch.linspace(0.9045, 0.13, case.batch),
        "guidance": torch.linspace(3.5, 1.8, case.batch) if case.guidance else None,
        "img_ids": img_ids,
        "txt_ids": torch.zeros(case.text, 3),
    }


def cast(
    x: dict[str, torch.Tensor | None], dtype: torch.dtype, names: tuple[str, ...]
) -> dict[str, torch.Tensor | None]:
    return {k: v.to(dtype) if v is not None and k in names else v for k, v in x.items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@torch.no_grad()
def test_fp32_equals_diffusers(case: Case) -> None:
    config = config_of(case)
    tensors, x = random_tensors(config), inputs_of(case, config)
    ours = Transformer(config, tensors)(**x)
    assert relative(ours, diffusers_velocity(diffusers_model(config, tensors, torch.float32), x)) < 2e-6


@pytest.mark.parametrize("case", CASES[:5], ids=lambda case: case.name)
@torch.no_grad()
def test_bf16_errs_no_more_than_diffusers(case: Case) -> None:
    """Both against one float64 truth that sees the bf16-rounded weights, inputs, timestep and guidance.

    fp32 hides where bf16 rounds: a timestep rounded once less is a different image.
    """
    config = config_of(case)
    tensors = {k: v.bfloat16() for k, v in random_tensors(config).items()}
    x = cast(inputs_of(case, config), torch.bfloat16, ("img", "txt", "pooled", "timestep", "guidance"))
    ours = Transformer(config, tensors)(**x)
    theirs = diffusers_velocity(diffusers_model(config, tensors, torch.bfloat16), x)

    exact = Transformer(config, {k: v.double() for k, v in tensors.items()})
    for name in ("timestep", "guidance"):  # what the network really sees after bf16's product with 1000
        x[name] = None if x[name] is None else (x[name] * 1000).double() / 1000
    truth = exact(**cast(x, torch.float64, ("img", "txt", "pooled")))
    noise = relative(theirs, truth)
    assert relative(ours, truth) < 1.1 * noise
    assert relative(ours, theirs) < 1.5 * noise


@torch.no_grad()
def test_modulate_sees_the_timestep_as_diffusers_does_in_bf16() -> None:
    config = config_of(CASES[0])
    tensors = {k: v.bfloat16() for k, v in random_tensors(config).items()}
    theirs = diffusers_model(config, tensors, torch.bfloat16).time_text_embed
    pooled = torch.randn(28, config.vec_in_dim).bfloat16()
    timestep, guidance = torch.linspace(1, 0.03, 28).bfloat16(), torch.full((28,), 3.5).bfloat16()
    temb = theirs(timestep * 1000, guidance * 1000, pooled)
    want = torch.cat(
        [linear(torch.nn.functional.silu(temb)) for linear in Transformer(config, tensors).modulations], -1
    )
    got = Transformer(config, tensors).modulate(pooled, timestep, guidance)
    assert torch.equal(got.flatten(1), want)


@torch.no_grad()
def test_rows_of_a_batch_do_not_see_each_other() -> None:
    case = Case("batch", 64, 2, 3, 9, (4, 5))
    config = config_of(case)
    model, x = Transformer(config, random_tensors(config)), inputs_of(case, config)
    whole = model(**x)
    for i in range(case.batch):
        alone = model(**{k: v if k.endswith("ids") or v is None else v[i : i + 1] for k, v in x.items()})
        assert relative(alone, whole[i : i + 1]) < 1e-6


@torch.no_grad()
def test_ids_may_differ_between_images() -> None:
    case = Case("ids", 64, 2, 2, 3, (2, 6))
    config = config_of(case)
    model, x = Transformer(config, random_tensors(config)), inputs_of(case, config)
    wide, tall = x["img_ids"], inputs_of(Case("tall", 64, 2, 2, 3, (6, 2)), config)["img_ids"]
    both = model(**{**x, "img_ids": torch.stack((wide, tall))})
    assert relative(both[:1], model(**x)[:1]) < 1e-6
    assert relative(both[1:], model(**{**x, "img_ids": tall})[1:]) < 1e-6
    assert relative(both[1:], model(**x)[1:]) > 1e-2


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"img": torch.zeros(1, 24, 15)}, r"img must be \[1, L_img, 16\], got \[1, 24, 15\]"),
        ({"pooled": torch.zeros(2, 24)}, r"pooled must be \[1, 24\], got \[2, 24\]"),
        ({"timestep": torch.tensor(0.5)}, r"timestep must be \[1\], got \[\]"),
        ({"img_ids": torch.zeros(23, 3)}, r"img_ids must be \[24, 3\] or \[1, 24, 3\], got \[23, 3\]"),
        ({"guidance": None}, r"guidance must be \[B\]"),
        ({"txt": torch.zeros(12, 40)}, r"txt must be \[1, L_txt, 40\], got \[12, 40\]"),
    ],
)
def test_wrong_shapes_are_said(change: dict, sentence: str) -> None:
    config = config_of(CASES[0])
    model = Transformer(config, random_tensors(config))
    with pytest.raises(ValueError, match=sentence):
        model(**{**inputs_of(CASES[0], config), **change})


@torch.no_grad()
def test_full_width_runs_and_equals_diffusers() -> None:
    config = FluxConfig(depth=1, depth_single_blocks=1)
    tensors = random_tensors(config)
    case = Case("full width", 128, 24, 1, 16, (4, 4), in_channels=64)
    x = inputs_of(case, config)
    ours = Transformer(config, tensors)(**x)
    assert relative(ours, diffusers_velocity(diffusers_model(config, tensors, torch.float32), x)) < 2e-6
