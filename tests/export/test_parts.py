"""The autoencoder and the text encoders, exported, compute what they compute in torch; and they become engines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx_runs import fill, run_onnxruntime

import fluxkiln
from fluxkiln.autoencoder import Autoencoder, AutoencoderConfig
from fluxkiln.cli import main
from fluxkiln.engines.store import Store
from fluxkiln.export.autoencoder import trace_decoder, trace_encoder
from fluxkiln.export.parts import Exported, export
from fluxkiln.export.text import bucket, trace_clip, trace_t5
from fluxkiln.export.weights import tensors_of
from fluxkiln.hub import resolve
from fluxkiln.text import TextEncoders

from parity import relative


def run(exported: Exported, name: str, value: torch.Tensor) -> torch.Tensor:
    model = fill(exported.traced, exported.values())
    onnx.checker.check_model(model, full_check=True)
    assert list(exported.traced.inputs) == [name]
    return run_onnxruntime(model, {name: value})


@pytest.mark.parametrize(("height", "width"), [(8, 8), (5, 12)])
@torch.no_grad()
def test_autoencoder_decodes(height: int, width: int) -> None:
    vae = fluxkiln.load_autoencoder(resolve("shapes"))
    latents = torch.randn(2, 16, height, width, generator=torch.Generator().manual_seed(0))
    images = run(export("shapes", "vae_decoder", "fp32"), "latent", latents)
    assert relative(images, vae.decode(latents, tile=0)) < 5e-6


@pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 101)])
@torch.no_grad()
def test_autoencoder_encodes(height: int, width: int) -> None:
    vae = fluxkiln.load_autoencoder(resolve("shapes"))
    pixels = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = run(export("shapes", "vae_encoder", "fp32"), "images", pixels)
    assert relative(latents, vae.encode(pixels, tile=0)) < 5e-6


@torch.no_grad()
def test_autoencoder_of_another_depth() -> None:
    """Random weights, two blocks a level, three levels, norms that are not idle."""
    config = AutoencoderConfig(
        (32, 32, 64), layers_per_block=2, latent_channels=4, norm_num_groups=16, shift_factor=0.7
    )
    torch.manual_seed(0)
    vae = Autoencoder(config).eval()
    for name, tensor in vae.named_parameters():
        if "norm" in name:
            tensor.add_(0.3 * torch.randn_like(tensor))
    pixels = torch.rand(1, 3, 20, 28) * 2 - 1
    latents = vae.encode(pixels)
    for trace, x, want in ((trace_encoder, pixels, latents), (trace_decoder, latents, vae.decode(latents))):
        traced = trace(config, torch.float32)
        model = fill(traced, tensors_of(traced.parameters, vae.state_dict()))
        assert relative(run_onnxruntime(model, {next(iter(traced.inputs)): x}), want) < 5e-6


@torch.no_grad()
def test_text_encoders_of_the_bundled_model() -> None:
    encoders = TextEncoders.from_pretrained(resolve("shapes"), dtype=torch.float32)
    for prompt, length in (("a red circle above a blue square", None), ("", 7)):
        sequence, pooled = encoders.encode(prompt, max_sequence_length=length)
        clip, t5 = encoders._clip, encoders._t5
        ids = clip.tokens(prompt, clip.tokenizer.model_max_length)
        assert relative(run(export("shapes", "clip", "fp32"), "input_ids", ids), pooled) < 5e-6
        ids = t5.tokens(prompt, length or encoders.length)
        assert relative(run(export("shapes", "t5", "fp32"), "input_ids", ids), sequence) < 5e-6


@pytest.mark.parametrize("end", [2, 95])
@torch.no_grad()
def test_clip_equals_transformers(end: int) -> None:
    """Both ways to find the end of a prompt: the largest id, or the first of a given one."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=99, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=3,
        max_position_embeddings=20, eos_token_id=end,
    )  # fmt: skip
    torch.manual_seed(0)
    model = CLIPTextModel(config).eval()
    for tensor in model.parameters():  # no weight or bias that could be left out unnoticed
        tensor.add_(torch.randn_like(tensor) * (0.3 if tensor.ndim == 1 else 0.1))
    ids = torch.randint(3, 95, (3, 20), generator=torch.Generator().manual_seed(1))
    ids[0, 5], ids[1, 19], ids[2, 2], ids[2, 9] = 95, 95, 95, 95
    if end == 2:
        ids[0, 7] = 97
    traced = trace_clip(config, torch.float32)
    state = {name.removeprefix("text_model."): tensor for name, tensor in model.state_dict().items()}
    got = run_onnxruntime(fill(traced, tensors_of(traced.parameters, state)), {"input_ids": ids})
    assert relative(got, model(ids).pooler_output) < 5e-6


@pytest.mark.parametrize("length", [1, 9, 300])
@torch.no_grad()
def test_t5_equals_transformers(length: int) -> None:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=99, d_model=48, d_kv=16, d_ff=80, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu"
    )
    torch.manual_seed(0)
    model = T5EncoderModel(config).eval()
    for tensor in model.parameters():
        tensor.add_(torch.randn_like(tensor) * 0.2)
    traced = trace_t5(config, high=torch.float32)
    ids = torch.randint(0, 99, (2, length), generator=torch.Generator().manual_seed(1))
    got = run_onnxruntime(fill(traced, tensors_of(traced.parameters, model.state_dict())), {"input_ids": ids})
    assert relative(got, model(ids).last_hidden_state) < 5e-6


def test_every_distance_has_its_bucket() -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = np.arange(-511, 512)
    for buckets, most in ((32, 128), (16, 40)):
        want = T5Attention._relative_position_bucket(torch.from_numpy(distances), True, buckets, most)
        assert bucket(distances, buckets, most).tolist() == want.tolist()


def test_released_sizes_are_traced_without_weights() -> None:
    """Every tensor of CLIP-L, T5-XXL and the autoencoder is a parameter exactly once, in its shape."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12)
    t5 = T5Config(
        vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
    )
    with torch.device("meta"):
        clip_state, t5_state = CLIPTextModel(clip).state_dict(), T5EncoderModel(t5).state_dict()
        vae_state = Autoencoder().state_dict()
    clip_state = {name.removeprefix("text_model."): t for name, t in clip_state.items() if "position_ids" not in name}
    del t5_state["encoder.embed_tokens.weight"]  # the same tensor as `shared.weight`
    halves = (trace_decoder(AutoencoderConfig()), trace_encoder(AutoencoderConfig()))
    for traced, state in (
        ({**halves[0].parameters, **halves[1].parameters}, vae_state),
        (trace_clip(clip).parameters, clip_state),
        (trace_t5(t5).parameters, t5_state),
    ):
        assert {name: p.shape for name, p in traced.items()} == {name: tuple(t.shape) for name, t in state.items()}
    assert not halves[0].parameters.keys() & halves[1].parameters.keys()


def test_other_kinds_are_refused() -> None:
    from transformers import CLIPTextConfig, T5Config

    with pytest.raises(ValueError, match="quick_gelu, got 'gelu'"):
        trace_clip(CLIPTextConfig(hidden_act="gelu"))
    with pytest.raises(ValueError, match="gated-gelu, got 'relu'"):
        trace_t5(T5Config(feed_forward_proj="relu"))
    with pytest.raises(ValueError, match="the clip is exported in fp32 or bf16"):
        export("shapes", "clip", "fp8")
    with pytest.raises(ValueError, match="the transformer's"):
        export("shapes", "t5", "bf16", form="lora")


@pytest.mark.parametrize(
    ("part", "weights"),
    [(part, "inside") for part in ("vae_decoder", "vae_encoder", "clip", "t5")] + [("clip", "refit"), ("t5", "refit")],
)
def test_parts_become_engines(part: str, weights: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="builds engines: pip install 'fluxkiln[trt]'")
    command = ["build", "--model", "shapes", "--part", part, "--weights", weights, "--max-size", "512x512"]
    assert main([*command, "--arch", "sm_89", "--store", str(tmp_path), "--json"]) == 0
    (stored,) = Store(tmp_path)
    assert stored.refusal is None
    assert stored.manifest is not None
    assert (stored.manifest.subject.part, stored.manifest.subject.precision) == (part, "bf16")
    assert bool(stored.manifest.parameters) == (weights == "refit")


def test_an_autoencoder_without_weights_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="builds engines: pip install 'fluxkiln[trt]'")
    command = ["build", "--model", "shapes", "--part", "vae_decoder", "--weights", "refit", "--store", str(tmp_path)]
    assert main(command) == 1
    assert "the vae_decoder has its weights inside" in capsys.readouterr().err
