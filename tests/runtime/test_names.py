"""The name map, on the full FLUX.1 models, against diffusers' own model and its own converter."""

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

from fluxkiln.config import DEV, SCHNELL, FluxConfig
from fluxkiln.names import to_diffusers, to_native

FULL = {"dev": (DEV, 780, 1160), "schnell": (SCHNELL, 776, 1156)}


def part_rows(config: FluxConfig, name: str, shape: tuple[int, ...]) -> list[int]:
    """Rows of each of the diffusers tensors that make up a native one."""
    d = config.hidden_size
    return {1: [shape[0]], 3: [d, d, d], 4: [d, d, d, config.mlp_hidden]}[len(to_diffusers(name))]


@pytest.mark.parametrize(("config", "native_count", "diffusers_count"), FULL.values(), ids=FULL)
def test_full_model_has_the_tensors_of_diffusers(config, native_count, diffusers_count):
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(config.to_diffusers())
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    ours = config.tensor_shapes()
    assert (len(ours), len(theirs)) == (native_count, diffusers_count)

    forth = {
        part: (rows, *shape[1:])
        for name, shape in ours.items()
        for part, rows in zip(to_diffusers(name), part_rows(config, name, shape), strict=True)
    }
    assert forth == theirs

    back: dict[str, dict[int, tuple[int, ...]]] = {}
    for name, shape in theirs.items():
        native, index, covered = to_native(name)
        assert covered == 1
        assert back.setdefault(native, {}).setdefault(index, shape) is shape
    assert {name: (sum(shape[0] for shape in parts.values()), *parts[0][1:]) for name, parts in back.items()} == ours
    assert FluxConfig.from_diffusers(model.config) == config
    assert FluxConfig.from_shapes(ours) == config


@pytest.mark.parametrize(("config", "native_count", "diffusers_count"), FULL.values(), ids=FULL)
def test_official_converter_agrees_on_the_full_model(config, native_count, diffusers_count):
    """Names and the order of rows, each of which holds its number in one column."""
    narrow = {
        name: torch.arange(shape[0], dtype=torch.float32).reshape(-1, *[1] * (len(shape) - 1))
        for name, shape in config.tensor_shapes().items()
    }
    theirs = convert_flux_transformer_checkpoint_to_diffusers(dict(narrow))
    assert len(theirs) == diffusers_count
    for name, tensor in narrow.items():
        if name.startswith("final_layer.adaLN_modulation.1."):
            tensor = torch.cat(tensor.chunk(2)[::-1])
        rows = part_rows(config, name, config.tensor_shapes()[name])
        for part, values in zip(to_diffusers(name), tensor.split(rows), strict=True):
            assert torch.equal(theirs.pop(part), values), part
    assert not theirs


def test_fused_projections_cover_their_parts():
    model = FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    model.fuse_qkv_projections()
    fused = {name: to_native(name) for name in model.state_dict() if "qkv" in name}
    assert fused == {
        "transformer_blocks.0.attn.to_qkv.weight": ("double_blocks.0.img_attn.qkv.weight", 0, 3),
        "transformer_blocks.0.attn.to_qkv.bias": ("double_blocks.0.img_attn.qkv.bias", 0, 3),
        "transformer_blocks.0.attn.to_added_qkv.weight": ("double_blocks.0.txt_attn.qkv.weight", 0, 3),
        "transformer_blocks.0.attn.to_added_qkv.bias": ("double_blocks.0.txt_attn.qkv.bias", 0, 3),
        "single_transformer_blocks.0.attn.to_qkv.weight": ("single_blocks.0.linear1.weight", 0, 3),
        "single_transformer_blocks.0.attn.to_qkv.bias": ("single_blocks.0.linear1.bias", 0, 3),
    }


@pytest.mark.parametrize(
    "name",
    [
        "double_blocks.0.img_attn.qkv",
        "double_blocks.0.img_attn.norm.query_norm.weight",
        "double_blocks.x.img_attn.qkv.weight",
        "triple_blocks.0.img_attn.qkv.weight",
        "double_blocks.0.img_mod.1.weight",
        "img_in.scale",
        "",
    ],
)
def test_unknown_native_name(name):
    with pytest.raises(KeyError):
        to_diffusers(name)


@pytest.mark.parametrize(
    "name", ["x_embedder", "transformer_blocks.0.attn.to_v2.weight", "pos_embed.proj.weight", "proj.weight", ""]
)
def test_unknown_diffusers_name(name):
    with pytest.raises(KeyError):
        to_native(name)
