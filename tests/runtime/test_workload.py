"""The shape lists against torch's own FLOP counter, the tensors of the model, and published totals."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fluxkiln import workload
from fluxkiln.config import CONTROL, DEV, FILL, SCHNELL, FluxConfig, scaled_axes
from fluxkiln.transformer import Transformer
from fluxkiln.workload import Tokens

SMALL = FluxConfig(16, 16, 128, 2, 2, 3, 4.0, 40, 24, True, scaled_axes(64))


@pytest.mark.parametrize("tokens", [Tokens(7, 20), Tokens(7, 20, 6, batch=3), Tokens(0, 9)], ids=str)
@pytest.mark.parametrize("guidance", [True, False])
def test_flops_are_those_that_torch_counts(tokens: Tokens, guidance: bool) -> None:
    config = FluxConfig(16, 16, 128, 2, 2, 3, 4.0, 40, 24, guidance, scaled_axes(64))
    tensors = {name: torch.empty(shape) for name, shape in config.tensor_shapes().items()}
    model, b, image = Transformer(config, tensors), tokens.batch, tokens.image + tokens.reference
    # torch counts no FLOPs for fused attention on a CPU, so let it take the one made of products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        mods = model.modulate(torch.zeros(b, 24), torch.ones(b), torch.ones(b) if guidance else None)
        modulation = counter.get_total_flops()
        rope = model.rope(torch.zeros(tokens.text, 3), torch.zeros(image, 3))
        model.step(torch.zeros(b, image, 16), torch.zeros(b, tokens.text, 40), mods, rope)
    assert modulation == sum(call.flops for call in workload.modulate(config, b))
    assert counter.get_total_flops() - modulation == sum(call.flops for call in workload.step(config, tokens))


@pytest.mark.parametrize(
    ("size", "text", "references", "length", "tflop", "attention"),
    [
        ((512, 512), 512, [], 1536, 21.5, 8),
        ((1024, 1024), 256, [], 4352, 69.5, 19),
        ((1360, 768), 512, [], 4592, 74.1, 20),
        ((1024, 1024), 512, [(1024, 1024)], 8704, 165.5, 32),
        ((2048, 2048), 512, [], 16896, 418.1, 48),
    ],
)
def test_full_size_totals(
    size: tuple[int, int], text: int, references: list, length: int, tflop: float, attention: int
) -> None:
    tokens = Tokens.of_size(*size, text, references)
    calls = [*workload.step(DEV, tokens), *workload.modulate(DEV, 1)]
    total = sum(call.flops for call in calls)
    assert tokens.total == length
    assert round(total / 1e12, 1) == tflop
    assert round(100 * sum(call.flops for call in calls if call.attention) / total) == attention


@pytest.mark.parametrize("config", [DEV, SCHNELL, FILL, CONTROL, SMALL], ids=lambda c: c.variant)
def test_every_weight_matrix_is_in_exactly_one_call(config: FluxConfig) -> None:
    matrices = sum(shape[0] * shape[1] for shape in config.tensor_shapes().values() if len(shape) == 2)
    calls = [*workload.step(config, Tokens(1, 1)), *workload.modulate(config, 1)]
    assert sum(call.weights for call in calls) == matrices


def test_known_sizes() -> None:
    assert workload.parameters(DEV) == 11_901_408_320
    assert workload.parameters(SCHNELL) == 11_891_178_560
    assert workload.weight_bytes(DEV) == 2 * 11_901_408_320
    blocks = 8_606_711_808
    fp8 = workload.weight_bytes(DEV, "bf16", lambda name: "fp8")
    rows = 19 * 2 * (3 + 1 + 4 + 1) * 3072 + 38 * (3 + 4 + 1) * 3072
    assert fp8 == 2 * 11_901_408_320 - blocks + 4 * rows


def test_formats_reach_weights_inputs_and_what_producers_write() -> None:
    def recipe(name: str) -> str:
        return "nvfp4" if "mlp" in name else "fp8"

    calls = {call.name: call for call in workload.step(SMALL, Tokens(4, 6, batch=2), "bf16", recipe)}
    assert calls["embed"].format == calls["final"].format == "bf16"
    assert calls["double_blocks.1.norm1"].result_format == calls["double_blocks.1.attention"].result_format == "fp8"
    assert calls["double_blocks.1.norm2"].result_format == calls["double_blocks.1.mlp_in"].result_format == "nvfp4"
    assert calls["single_blocks.0.mlp_in"].result_format == "fp8"
    # qkv of a double block: per stream 384x128 codes and row scales; per image 10 rows of fp8 in, 10x384 bf16 out.
    assert calls["double_blocks.0.qkv"].bytes() == 2 * (384 * 128 + 384 * 4) + 2 * (10 * (128 + 4) + 10 * 384 * 2)
    # norm: bf16 in, fp8 and a scale per row out.
    assert calls["double_blocks.0.norm1"].bytes() == 2 * (10 * 128 * 2 + 10 * (128 + 4))


def test_sizes_are_rounded_down_to_whole_tokens() -> None:
    assert Tokens.of_size(47, 33, 5, [(16, 31)]) == Tokens(5, 4, 1)
