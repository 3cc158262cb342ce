"""The autoencoder against diffusers' `AutoencoderKL`, its files, and its tiles against the whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fluxkiln.autoencoder
import fluxkiln.tiled
from fluxkiln.autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    diffusers_tensors,
    group_norm,
    load_autoencoder,
    native_tensors,
    tensor_shapes,
)
from fluxkiln.tiled import Cut

BUNDLED = Path(fluxkiln.autoencoder.__file__).parent / "models" / "shapes" / "vae"
SMALL = AutoencoderConfig((8, 16, 24, 32), 1, 4, 8, 1.5, 0.06)
CONFIGS = {
    "small": SMALL,
    "one block, one group": AutoencoderConfig((4, 4, 4, 4), 1, 4, 1, 1.5035, 0.0609),
    "two blocks, 16 channels": AutoencoderConfig((32, 64, 64, 64), 2, 16),
    "two levels": AutoencoderConfig((16, 32), 2, 8, 16, 0.5, -0.3),
    "widening late": AutoencoderConfig((16, 16, 48), 3, 3, 16, 2.0, 0.0),
}


def reference(config: AutoencoderConfig, seed: int = 0) -> AutoencoderKL:
    """diffusers' model with weights for which no part is idle: norms that are not the identity, peaked attention."""
    torch.manual_seed(seed)
    model = AutoencoderKL.from_config(config.to_diffusers()).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if "norm" in name:
            p.add_(torch.randn_like(p), alpha=0.3)
        if "to_q.weight" in name or "to_k.weight" in name:
            p.mul_(3)
    return model


def ours(model: AutoencoderKL, config: AutoencoderConfig) -> Autoencoder:
    result = Autoencoder(config)
    result.load_state_dict(native_tensors(model.state_dict(), config))
    return result.requires_grad_(False)


def picture(height: int, width: int, batch: int = 1) -> Tensor:
    """Smooth on the left, stripes, noise on the lower right: tiles that have little in common."""
    generator = torch.Generator().manual_seed(3)
    g = torch.linspace(-1, 1, width)[None, :] * torch.linspace(-1, 1, height)[:, None]
    noise = torch.randn(batch, height, width, generator=generator)
    return torch.stack((g.expand(batch, -1, -1), (g * 30).sin().expand(batch, -1, -1) * 0.5, noise * 0.3 * (g > 0)), 1)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize(("height", "width", "batch"), [(64, 64, 1), (40, 56, 2), (37, 83, 1), (8, 24, 1)])
def test_agrees_with_diffusers(config: AutoencoderConfig, height: int, width: int, batch: int) -> None:
    theirs = reference(config)
    model = ours(theirs, config)
    pixels = picture(height, width, batch)
    truth = theirs.encode(pixels).latent_dist
    mean, logvar = model.encode_moments(pixels)
    assert relative(mean, truth.mode()) < 1e-5
    assert relative(logvar, truth.logvar) < 1e-5
    latents = (truth.mode() - config.shift_factor) * config.scaling_factor
    assert relative(model.encode(pixels), latents) < 1e-5
    shape = (batch, config.latent_channels, max(height // 8, 1), width // 8)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    raw = latents / config.scaling_factor + config.shift_factor
    assert relative(model.decode(latents), theirs.decode(raw).sample) < 1e-5


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels last"])
def test_bf16_is_as_close_to_the_truth_as_diffusers(layout: torch.memory_format) -> None:
    config = CONFIGS["two blocks, 16 channels"]
    theirs = reference(config)
    pixels = picture(48, 40)
    latents = torch.randn(1, 16, 6, 5, generator=torch.Generator().manual_seed(1))
    truth = theirs.double()
    mean = truth.encode(pixels.double()).latent_dist.mode()
    image = truth.decode(latents.double() / config.scaling_factor + config.shift_factor).sample
    theirs = theirs.bfloat16()
    model = ours(reference(config), config).to(torch.bfloat16, memory_format=layout)
    encoded, _ = model.encode_moments(pixels)
    decoded = model.decode(latents)
    assert encoded.dtype == decoded.dtype == torch.bfloat16
    raw = latents.bfloat16() / config.scaling_factor + config.shift_factor
    assert relative(encoded, mean) < 1.2 * relative(theirs.encode(pixels.bfloat16()).latent_dist.mode(), mean)
    assert relative(decoded, image) < 1.2 * relative(theirs.decode(raw).sample, image)


@pytest.mark.parametrize("offset", [0.0, 20.0])
def test_channels_last_group_norm_rounds_once_and_keeps_its_layout(offset: float) -> None:
    norm = torch.nn.GroupNorm(4, 16, 1e-6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    norm.requires_grad_(False)
    x = (torch.randn(2, 16, 9, 7) + offset).to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
    result = group_norm(norm.bfloat16(), x)
    truth = norm.double()(x.double())
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert (result.double() - truth).abs().max() <= 2**-8 * truth.abs().max()
    assert not group_norm(norm, torch.zeros_like(x)).isnan().any()


def test_gradients_agree_with_diffusers() -> None:
    theirs = reference(SMALL).requires_grad_(True)
    model = ours(theirs, SMALL).requires_grad_(True)
    pixels = picture(24, 32, 2)
    theirs.decode(theirs.encode(pixels).latent_dist.mode()).sample.square().sum().backward()
    model.decode(model.encode(pixels)).square().sum().backward()
    grads = native_tensors({name: p.grad for name, p in theirs.named_parameters()}, SMALL)
    norm = torch.stack([g.norm() for g in grads.values()]).norm()
    for name, p in model.named_parameters():
        assert (p.grad - grads[name]).norm() < 1e-5 * norm, name


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels last"])
def test_attention_never_holds_all_scores(layout: torch.memory_format) -> None:
    """Allowed nothing but the fused kernel, PyTorch raises where its conditions are not met."""
    model = ours(reference(SMALL), SMALL).to(memory_format=layout)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        model.decode(model.encode(picture(40, 56)))


def test_names_and_shapes_of_the_real_one_match_diffusers_both_ways() -> None:
    config = AutoencoderConfig()
    with torch.device("meta"):
        theirs = AutoencoderKL.from_config(config.to_diffusers()).state_dict()
        state = Autoencoder(config).state_dict()
    renamed = diffusers_tensors(state, config.levels)
    assert len(state) == 244
    assert {name: t.shape for name, t in renamed.items()} == {name: t.shape for name, t in theirs.items()}
    assert {n: tuple(t.shape) for n, t in native_tensors(theirs, config).items()} == tensor_shapes(config)
    assert state["decoder.up.3.block.2.conv1.weight"].shape == (512, 512, 3, 3)
    assert state["encoder.mid.attn_1.q.weight"].shape == (512, 512, 1, 1)
    assert AutoencoderConfig.from_shapes(tensor_shapes(config)) == config
    assert AutoencoderConfig.from_shapes({name: t.shape for name, t in theirs.items()}) == config
    assert AutoencoderConfig.from_diffusers(config.to_diffusers()) == config


def test_a_batch_does_not_change_a_row() -> None:
    model = ours(reference(SMALL), SMALL)
    pixels = picture(40, 64, 3)
    latents = model.encode(pixels)
    image = model.decode(latents)
    for i in range(3):
        assert torch.equal(latents[i : i + 1], model.encode(pixels[i : i + 1]))
        assert torch.equal(image[i : i + 1], model.decode(latents[i : i + 1]))


# Loading


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One autoencoder with FLUX.1's groups and factors in every layout that is read."""
    folder = tmp_path_factory.mktemp("autoencoder")
    config = AutoencoderConfig((32, 64, 64, 64), 1, 4)
    theirs = reference(config)
    theirs.save_pretrained(folder / "pipeline" / "vae")
    state = ours(theirs, config).state_dict()
    save_file(state, folder / "ae.safetensors")
    save_file(theirs.state_dict(), folder / "diffusers.safetensors")
    other = {f"model.diffusion_model.{name}": torch.zeros(1) for name in ("img_in.weight", "final_layer.linear.bias")}
    save_file({f"vae.{name}": t for name, t in state.items()} | other, folder / "all-in-one.safetensors")
    parts = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, t in theirs.state_dict().items():
        for new, part in parts.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{part}.")
        old[name] = t
    assert sum("query" in name for name in old) == 4
    save_file(old, folder / "old.safetensors")
    return {
        "pipeline": folder / "pipeline",
        "folder": folder / "pipeline" / "vae",
        **{stem: folder / f"{stem}.safetensors" for stem in ("ae", "diffusers", "all-in-one", "old")},
    }


@pytest.mark.parametrize("layout", ["pipeline", "folder", "ae", "diffusers", "all-in-one", "old"])
def test_opens_every_layout(saved: dict[str, Path], layout: str) -> None:
    model = load_autoencoder(saved[layout])
    theirs = AutoencoderKL.from_pretrained(saved["folder"])
    latents = torch.randn(1, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert relative(model.decode(latents), theirs.decode(latents / 0.3611 + 0.1159).sample) < 1e-5
    assert not any(p.requires_grad for p in model.parameters())
    assert load_autoencoder(saved[layout], dtype=torch.bfloat16).dtype == torch.bfloat16


def test_the_file_may_go_after_loading(saved: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "ae.safetensors"
    copy.write_bytes(saved["ae"].read_bytes())
    model = load_autoencoder(copy)
    copy.write_bytes(b"\0" * copy.stat().st_size)
    assert torch.equal(model.decoder.conv_in.weight, load_file(saved["ae"])["decoder.conv_in.weight"])


def test_a_configuration_beside_a_file_wins(tmp_path: Path) -> None:
    save_file(ours(reference(SMALL), SMALL).state_dict(), tmp_path / "ae.safetensors")
    with pytest.raises(ValueError, match=r"channels \(8, 16, 24, 32\) are no multiples of 32: put its config.json"):
        load_autoencoder(tmp_path / "ae.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(SMALL.to_diffusers()))
    assert load_autoencoder(tmp_path / "ae.safetensors").config == SMALL


def test_says_in_one_sentence_what_does_not_fit(saved: dict[str, Path], tmp_path: Path) -> None:
    state = load_file(saved["ae"])
    del state["encoder.conv_out.bias"], state["decoder.mid.attn_1.q.weight"]
    state["quant_conv.weight"] = torch.zeros(8, 8, 1, 1)
    state["decoder.conv_out.bias"] = torch.zeros(4)
    save_file(state, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError) as error:
        load_autoencoder(tmp_path / "bad.safetensors")
    for part in (
        "2 missing (encoder.conv_out.bias, decoder.mid.attn_1.q.weight)",
        "1 unexpected (quant_conv.weight)",
        "1 misshapen (decoder.conv_out.bias [4], expected [3])",
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"use_quant_conv": True}, "use_quant_conv is True, expected False"),
        ({"act_fn": "relu"}, "act_fn is 'relu', expected 'silu'"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention is False"),
        ({"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]}, "AttnDownEncoderBlock2D"),
        ({"block_out_channels": [8, 17]}, "must be multiples of norm_num_groups 8"),
    ],
)
def test_refuses_configurations_of_other_models(change: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        AutoencoderConfig.from_diffusers(SMALL.to_diffusers() | change)


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 4, 16, 16), (1, 3, 7, 16), (0, 3, 16, 16)])
def test_refuses_other_pixels(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"pixels must be \[B, 3, H, W\] with H, W >= 8, got"):
        Autoencoder(SMALL).encode(torch.zeros(shape))


def test_refuses_other_latents_and_tiny_tiles() -> None:
    with pytest.raises(ValueError, match=r"latents must be \[B, 4, h, w\], got \[1, 16, 2, 2\]"):
        Autoencoder(SMALL).decode(torch.zeros(1, 16, 2, 2))
    with pytest.raises(ValueError, match=r"tile must be 0 \(never tile\) or at least 128 pixels, got 8"):
        Autoencoder(SMALL).decode(torch.zeros(1, 4, 2, 2), tile=8)


# Tiles


TILED = {
    "small": (SMALL, 136, 312),
    "two blocks": (AutoencoderConfig((8, 8, 16, 16), 2, 4, 4), 179, 133),
    "two levels": (CONFIGS["two levels"], 151, 157),
}


@pytest.mark.parametrize(("config", "height", "width"), TILED.values(), ids=TILED.keys())
def test_with_exact_statistics_tiles_are_the_whole(
    config: AutoencoderConfig, height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Margins, cuts and crops are right: as many rounds as there are norms make the statistics exact."""
    monkeypatch.setattr(fluxkiln.tiled, "TOLERANCE", 1e-6)
    model = ours(reference(config), config)
    pixels = picture(height, width)
    latents = model.encode(pixels, tile=0)
    assert relative(model.encode(pixels, tile=128), latents) < 1e-5
    assert relative(model.decode(latents, tile=128), model.decode(latents, tile=0)) < 1e-5


def test_tiles_differ_little_and_show_no_seam() -> None:
    """Random weights, tiles that have little in common: at most 2/255 off, not rougher across a cut."""
    model = ours(reference(SMALL), SMALL)
    pixels = picture(264, 392)
    latents = model.encode(pixels, tile=0)
    assert (model.encode(pixels, tile=128) - latents).abs().max() < 0.02 * latents.std()
    difference = model.decode(latents, tile=128) - model.decode(latents, tile=0)
    assert difference.abs().max() < 2 / 127.5
    rough = difference.diff(dim=3).abs().mean((0, 1, 2))
    cuts = [tile.columns.start - 1 for tile in Cut((264, 392), 128, 0, 8).tiles() if tile.columns.start > 0]
    assert rough[cuts].max() < 2 * rough.mean()


def test_tiles_of_the_bundled_model_are_invisible() -> None:
    """Trained weights: at most half of one step of 255."""
    model = load_autoencoder(BUNDLED)
    pixels = torch.full((1, 3, 264, 392), 0.9)
    pixels[:, 1:, 40:180, 100:330] = -0.7  # a red box across the cuts
    latents = model.encode(pixels, tile=0)
    assert (model.encode(pixels, tile=128) - latents).abs().max() < 0.02 * latents.std()
    assert (model.decode(latents, tile=128) - model.decode(latents, tile=0)).abs().max() < 0.5 / 127.5


def test_tiles_bound_memory_by_their_size() -> None:
    """The largest activation above latent resolution is that of one tile with its margins, whatever the image."""
    model = ours(reference(SMALL), SMALL)
    largest = 0

    def watch(module: torch.nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal largest
        largest = max(largest, output.numel())

    for module in (*model.encoder.down[:-1].modules(), *model.decoder.up[:-1].modules()):
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(watch)
    pixels = picture(136, 520)
    model.decode(model.encode(pixels, tile=128), tile=128)
    assert largest <= SMALL.block_out_channels[1] * (128 + 2 * model.decoder.margin) ** 2
    largest = 0
    model.decode(model.encode(pixels, tile=0), tile=0)
    assert largest > SMALL.block_out_channels[0] * 136 * 512


def test_large_images_are_tiled_without_being_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fluxkiln.autoencoder, "TILED_ABOVE", 144 * 136)
    monkeypatch.setattr(fluxkiln.autoencoder, "TILE", 128)
    model = ours(reference(SMALL), SMALL)
    pixels = picture(144, 152)
    latents = model.encode(pixels)
    assert torch.equal(latents, model.encode(pixels, tile=128))
    assert not torch.equal(latents, model.encode(pixels, tile=0))
    assert torch.equal(model.decode(latents), model.decode(latents, tile=128))
    assert torch.equal(model.encode(pixels[..., :136]), model.encode(pixels[..., :136], tile=0))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_tiles_of_one_colour(value: float) -> None:
    model = ours(reference(SMALL), SMALL)
    pixels = torch.full((1, 3, 136, 264), value)
    latents = model.encode(pixels, tile=0)
    assert relative(model.encode(pixels, tile=128), latents) < 1e-2
    assert relative(model.decode(latents, tile=128), model.decode(latents, tile=0)) < 1e-2
