"""Checkpoints: one tiny transformer written in every dialect by code independent of the reader, and read back."""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from diffusers.quantizers.bfl.utils import dequantize_fp8r, dequantize_nvfp4, quantize_fp8r, quantize_nvfp4
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from fluxkiln.checkpoint import (
    CheckpointError,
    SafetensorsFile,
    Tensors,
    open_checkpoint,
    open_clip,
    open_t5,
    open_vae,
    save_checkpoint,
)
from fluxkiln.config import FluxConfig
from fluxkiln.kernels import formats
from fluxkiln.kernels.formats import Fp8, Nvfp4
from fluxkiln.names import to_diffusers

# rows that fill no 128-row tile and, with 32 context channels, block scales that fill no tile of 4
CONFIG = FluxConfig(
    in_channels=16,
    out_channels=16,
    hidden_size=64,
    num_heads=2,
    depth=2,
    depth_single_blocks=1,
    context_in_dim=32,
    vec_in_dim=32,
    axes_dim=(4, 14, 14),
)
PREFIX = "model.diffusion_model."
QKV = "double_blocks.1.img_attn.qkv.weight"
LINEAR1 = "single_blocks.0.linear1.weight"
MLP = "double_blocks.0.txt_mlp.2.weight"
QUANTISED = [
    name
    for name, shape in CONFIG.tensor_shapes().items()
    if len(shape) == 2 and "blocks." in name and ".norm" not in name and "mod" not in name
]


@pytest.fixture(scope="module")
def weights():
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator).mul(0.05).to(torch.bfloat16)
        for name, shape in CONFIG.tensor_shapes().items()
    }


@pytest.fixture(scope="module")
def diffusers_weights(weights):
    return as_diffusers(weights)


def as_diffusers(weights, width=64):
    result = {}
    for name, tensor in weights.items():
        parts = to_diffusers(name)
        tensor = torch.cat(tensor.chunk(2)[::-1]) if name.startswith("final_layer.adaLN") else tensor
        rows = {1: [len(tensor)], 3: [width] * 3, 4: [width] * 3 + [4 * width]}[len(parts)]
        result |= {part: value.clone() for part, value in zip(parts, tensor.split(rows), strict=True)}
    return result


def module(name):
    return name.removesuffix(".weight")


def e4m3(tensor):
    """To float8 and back to float64 by ml_dtypes."""
    return tensor.double().numpy().astype(ml_dtypes.float8_e4m3fn)


def fp8_of(array):
    return torch.from_numpy(array.view(np.uint8)).view(torch.float8_e4m3fn)


def comfy_nvfp4(weight):
    """ComfyUI's NVFP4 by its definition: (tensors to store, decoded values)."""
    w = weight.double().numpy()
    rows, columns = w.shape
    global_scale = np.float32(abs(w).max() / (448 * 6))
    blocks = w.reshape(rows, columns // 16, 16)
    scale = (abs(blocks).max(-1) / 6 / global_scale).astype(ml_dtypes.float8_e4m3fn)
    step = scale.astype(np.float64) * global_scale
    code = (blocks / step[..., None]).clip(-6, 6).astype(ml_dtypes.float4_e2m1fn)
    nibbles = code.reshape(rows, columns).view(np.uint8) & 15
    tiles_down, tiles_across = -(-rows // 128), -(-columns // 64)
    tiled = np.zeros(tiles_down * tiles_across * 512, np.uint8)
    for r in range(rows):
        for c in range(columns // 16):
            tile = (r // 128) * tiles_across + c // 4
            tiled[tile * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4] = scale.view(np.uint8)[r, c]
    stored = {
        "weight": torch.from_numpy(nibbles[:, 0::2] << 4 | nibbles[:, 1::2]),
        "weight_scale": fp8_of(tiled.reshape(tiles_down * 128, tiles_across * 4)),
        "weight_scale_2": torch.tensor(global_scale),
        "input_scale": torch.tensor(0.25),
    }
    return stored, torch.from_numpy(code.astype(np.float64) * step[..., None]).reshape(rows, columns)


def beside(name, stored):
    return {f"{module(name)}.{key}": value for key, value in stored.items()}


# --- containers ---------------------------------------------------------------------------------


def bfl_file(folder, weights, theirs):
    save_file(weights, folder / "flux1-dev.safetensors")
    return folder / "flux1-dev.safetensors"


def comfyui_file(folder, weights, theirs):
    save_file({PREFIX + name: tensor for name, tensor in weights.items()}, folder / "a.safetensors")
    return folder / "a.safetensors"


def newer_norm_names(folder, weights, theirs):
    respelled = {name.replace("_norm.scale", "_norm.weight"): tensor for name, tensor in weights.items()}
    save_file(respelled, folder / "a.safetensors")
    return folder / "a.safetensors"


def all_in_one_file(folder, weights, theirs):
    others = {
        "vae.decoder.conv_in.weight": torch.zeros(4, 4, 3, 3),
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight": torch.zeros(4, 4),
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(4, 4),
    }
    save_file({PREFIX + name: tensor for name, tensor in weights.items()} | others, folder / "a.safetensors")
    return folder / "a.safetensors"


def unprefixed_with_others(folder, weights, theirs):
    save_file(weights | {"vae.decoder.conv_in.weight": torch.zeros(4, 4, 3, 3)}, folder / "a.safetensors")
    return folder / "a.safetensors"


def diffusers_file(folder, weights, theirs):
    save_file(theirs, folder / "a.safetensors")
    return folder / "a.safetensors"


def diffusers_folder(folder, weights, theirs):
    model = FluxTransformer2DModel.from_config(CONFIG.to_diffusers()).to(torch.bfloat16)
    model.load_state_dict(theirs)
    model.save_pretrained(folder / "transformer", max_shard_size="100KB")
    assert len(list((folder / "transformer").glob("*-of-*.safetensors"))) > 2
    return folder / "transformer"


def pipeline_folder(folder, weights, theirs):
    diffusers_folder(folder, weights, theirs)
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    return folder


def index_file(folder, weights, theirs):
    return diffusers_folder(folder, weights, theirs) / "diffusion_pytorch_model.safetensors.index.json"


def shards_without_index(folder, weights, theirs):
    index_file(folder, weights, theirs).unlink()
    return folder / "transformer"


def fused_folder(folder, weights, theirs):
    model = FluxTransformer2DModel.from_config(CONFIG.to_diffusers()).to(torch.bfloat16)
    model.load_state_dict(theirs)
    model.fuse_qkv_projections()
    fused = {name: tensor for name, tensor in model.state_dict().items() if ".attn.to_q." not in name}
    save_file(fused, folder / "diffusion_pytorch_model.safetensors")
    return folder


def fused_folder_with_parts(folder, weights, theirs):
    """As diffusers itself saves it; the parts are no longer read there, so they may say anything."""
    model = FluxTransformer2DModel.from_config(CONFIG.to_diffusers()).to(torch.bfloat16)
    model.load_state_dict(theirs)
    model.fuse_qkv_projections()
    model.transformer_blocks[0].attn.to_k.weight.data.zero_()
    model.save_pretrained(folder)
    return folder


def original_release_folder(folder, weights, theirs):
    save_file({"decoder.conv_in.weight": torch.zeros(4, 4, 3, 3)}, folder / "ae.safetensors")
    bfl_file(folder, weights, theirs)
    return folder


CONTAINERS = {
    "bfl": (bfl_file, "bfl"),
    "comfyui": (comfyui_file, "comfyui"),
    "newer-norm-names": (newer_norm_names, "bfl"),
    "all-in-one": (all_in_one_file, "all-in-one"),
    "unprefixed-all-in-one": (unprefixed_with_others, "all-in-one"),
    "diffusers-file": (diffusers_file, "diffusers"),
    "transformer-folder": (diffusers_folder, "diffusers"),
    "pipeline-folder": (pipeline_folder, "diffusers"),
    "index-file": (index_file, "diffusers"),
    "shards-without-index": (shards_without_index, "diffusers"),
    "fused-projections": (fused_folder, "diffusers"),
    "fused-projections-and-parts": (fused_folder_with_parts, "diffusers"),
    "original-release-folder": (original_release_folder, "bfl"),
}


@pytest.mark.parametrize(("write", "kind"), CONTAINERS.values(), ids=CONTAINERS)
def test_every_container_holds_the_same_model(tmp_path, weights, diffusers_weights, write, kind):
    checkpoint = open_checkpoint(write(tmp_path, weights, diffusers_weights))
    assert (checkpoint.kind, checkpoint.variant, checkpoint.config) == (kind, "dev", CONFIG)
    assert list(checkpoint.names) == list(weights)
    for name, tensor in weights.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.format(name) == "bf16"
        assert torch.equal(checkpoint.tensor(name), tensor), name
        wide = checkpoint.dense(name, torch.float64)
        assert wide.dtype == torch.float64
        assert torch.equal(wide, tensor.double()), name


# --- quantised dialects: each returns the path and the values it stands for ---------------------


def plain_cast(folder, weights):
    """Everything in fp8, biases and norms too."""
    cast = {name: e4m3(tensor) for name, tensor in weights.items()}
    save_file({name: fp8_of(array) for name, array in cast.items()}, folder / "a.safetensors")
    return folder / "a.safetensors", {name: torch.from_numpy(array.astype(np.float64)) for name, array in cast.items()}


def e5m2_cast(folder, weights):
    cast = {name: tensor.double().numpy().astype(ml_dtypes.float8_e5m2) for name, tensor in weights.items()}
    stored = {name: torch.from_numpy(array.view(np.uint8)).view(torch.float8_e5m2) for name, array in cast.items()}
    save_file(stored, folder / "a.safetensors")
    return folder / "a.safetensors", {name: torch.from_numpy(array.astype(np.float64)) for name, array in cast.items()}


def scaled(weights, scale_key, prefix="", **more):
    """Per-tensor scales beside the block linears: (tensors to store, decoded values)."""
    stored, values = {prefix + name: tensor for name, tensor in weights.items()}, {}
    for name in QUANTISED:
        scale = weights[name].double().abs().max().item() / 448
        scale = float(np.float32(scale))
        array = e4m3(weights[name].double() / scale)
        stored[prefix + name] = fp8_of(array)
        extra = {scale_key: torch.tensor(scale)} | {key: torch.tensor(value) for key, value in more.items()}
        stored |= {prefix + key: value for key, value in beside(name, extra).items()}
        values[name] = torch.from_numpy(array.astype(np.float64)) * scale
    return stored, {name: tensor.double() for name, tensor in weights.items()} | values


def first_generation(folder, weights):
    stored, values = scaled(weights, "scale_weight", PREFIX, scale_input=0.25)
    del stored[PREFIX + module(MLP) + ".scale_weight"]  # scale 1
    values[MLP] = torch.from_numpy(e4m3(weights[MLP]).astype(np.float64))
    stored[PREFIX + MLP] = fp8_of(e4m3(weights[MLP]))
    stored[PREFIX + "scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
    save_file(stored, folder / "a.safetensors")
    return folder / "a.safetensors", values


def original_release_fp8(folder, weights):
    stored, values = scaled(weights, "weight_scale", input_scale=0.25)
    save_file(stored, folder / "a.safetensors")
    return folder / "a.safetensors", values


def comfyui_metadata(folder, weights):
    """fp8 and nvfp4 in one file, declared in the header."""
    stored, values = scaled(weights, "weight_scale", PREFIX, input_scale=0.25)
    formats = {PREFIX + module(name): {"format": "float8_e4m3fn"} for name in QUANTISED}
    for name in (LINEAR1, MLP):
        packed, values[name] = comfy_nvfp4(weights[name])
        stored |= {PREFIX + key: value for key, value in beside(name, packed).items()}
        formats[PREFIX + module(name)] = {"format": "nvfp4"}
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": formats})}
    save_file(stored, folder / "a.safetensors", metadata)
    return folder / "a.safetensors", values


def comfyui_tensors(folder, weights):
    """The same declared beside each layer, block scales stored as bytes."""
    stored, values = dict(weights), {name: tensor.double() for name, tensor in weights.items()}
    for name in QUANTISED:
        packed, values[name] = comfy_nvfp4(weights[name])
        packed["weight_scale"] = packed["weight_scale"].view(torch.uint8)
        packed["comfy_quant"] = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
        stored |= beside(name, packed)
    save_file(stored, folder / "a.safetensors")
    return folder / "a.safetensors", values


def undeclared_nvfp4(folder, weights):
    """Native names and no word on the layout: as the original release's files, ComfyUI's."""
    stored, values = dict(weights), {name: tensor.double() for name, tensor in weights.items()}
    for name in QUANTISED:
        packed, values[name] = comfy_nvfp4(weights[name])
        stored |= beside(name, packed)
    save_file(stored, folder / "a.safetensors")
    return folder / "a.safetensors", values


def diffusers_fp8r(folder, weights):
    stored, values = dict(weights), {name: tensor.double() for name, tensor in weights.items()}
    for name in QUANTISED:
        data, scale = quantize_fp8r(weights[name])
        stored |= beside(name, {"weight": data, "weight_scale": scale})
        values[name] = data.double() * scale.double()[:, None]
    save_file(stored, folder / "a.safetensors")
    return folder / "a.safetensors", values


def modelopt_fp8(folder, weights):
    """diffusers' names: each part of a fused projection has its own scale."""
    stored, values = as_diffusers(weights), {name: tensor.double() for name, tensor in weights.items()}
    for name in QUANTISED:
        decoded = []
        for i, part in enumerate(to_diffusers(name)):
            scale = float(np.float32(stored[part].double().abs().max().item() / 448))
            array = e4m3(stored[part].double() / scale)
            decoded.append(torch.from_numpy(array.astype(np.float64)) * scale)
            extra = {"weight_scale": torch.tensor(scale), "input_scale": torch.tensor(0.25 - i / 16)}
            stored |= {part: fp8_of(array)} | beside(part, extra)
        values[name] = torch.cat(decoded)
    (folder / "config.json").write_text(
        json.dumps(CONFIG.to_diffusers() | {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}})
    )
    save_file(stored, folder / "diffusion_pytorch_model.safetensors")
    return folder, values


def modelopt_nvfp4(folder, weights):
    stored, values = as_diffusers(weights), {name: tensor.double() for name, tensor in weights.items()}
    for name in QUANTISED:
        decoded = []
        for part in to_diffusers(name):
            data, block_scale, global_scale = quantize_nvfp4(stored[part])
            decoded.append(dequantize_nvfp4(data, block_scale, global_scale.double().reshape(1, 1)))
            extra = {"weight_scale": block_scale, "weight_scale_2": global_scale, "input_scale": torch.tensor(0.25)}
            stored |= {part: data} | beside(part, extra)
        values[name] = torch.cat(decoded)
    save_file(stored, folder / "diffusion_pytorch_model.safetensors")
    return folder, values


def modelopt_nvfp4_native_names(folder, weights):
    stored, values = dict(weights), {name: tensor.double() for name, tensor in weights.items()}
    for name in QUANTISED:
        data, block_scale, global_scale = quantize_nvfp4(weights[name])
        extra = {"weight_scale": block_scale, "weight_scale_2": global_scale, "input_scale": torch.tensor(0.25)}
        stored |= {name: data} | beside(name, extra)
        values[name] = dequantize_nvfp4(data, block_scale, global_scale.double().reshape(1, 1))
    save_file(stored, folder / "model.safetensors")
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    return folder, values


DIALECTS = {
    "plain-cast": (plain_cast, None, Fp8),
    "first-generation": (first_generation, 0.25, Fp8),
    "original-release-fp8": (original_release_fp8, 0.25, Fp8),
    "comfyui-metadata": (comfyui_metadata, 0.25, Nvfp4),
    "comfyui-tensors": (comfyui_tensors, 0.25, Nvfp4),
    "undeclared-nvfp4": (undeclared_nvfp4, 0.25, Nvfp4),
    "diffusers-fp8r": (diffusers_fp8r, None, Fp8),
    "modelopt-fp8": (modelopt_fp8, 0.25, Fp8),
    "modelopt-nvfp4": (modelopt_nvfp4, 0.25, Nvfp4),
    "modelopt-nvfp4-native-names": (modelopt_nvfp4_native_names, 0.25, Nvfp4),
}


@pytest.mark.parametrize(("write", "input_scale", "stored_type"), DIALECTS.values(), ids=DIALECTS)
def test_every_dialect_decodes_to_its_values(tmp_path, weights, write, input_scale, stored_type):
    path, values = write(tmp_path, weights)
    checkpoint = open_checkpoint(path)
    assert checkpoint.config == CONFIG
    assert isinstance(checkpoint.tensor(LINEAR1), stored_type)
    for name, expected in values.items():
        assert checkpoint.shape(name) == tuple(expected.shape)
        torch.testing.assert_close(checkpoint.dense(name, torch.float64), expected, rtol=1e-14, atol=0)
        torch.testing.assert_close(checkpoint.dense(name, torch.float32), expected.float(), rtol=3e-7, atol=0)
        stored = checkpoint.tensor(name)
        torch.testing.assert_close(formats.dequantize(stored, torch.float64), expected, rtol=1e-14, atol=0)
        if isinstance(stored, Fp8):
            assert (stored.data.dtype, stored.row_scale.dtype) == (torch.float8_e4m3fn, torch.float32)
            assert stored.row_scale.shape == expected.shape[:1]
        scale = checkpoint.input_scale(name) if name.endswith(".weight") else None
        assert (scale.item() if scale is not None else None) == (input_scale if name in QUANTISED else None)


def test_declared_layout_counts_more_than_the_folder(tmp_path, weights):
    path, values = comfyui_tensors(tmp_path, weights)
    (tmp_path / "hf_quant_config.json").write_text("{}")
    torch.testing.assert_close(open_checkpoint(path).dense(MLP, torch.float64), values[MLP], rtol=1e-14, atol=0)


def test_rounding_to_bf16_happens_once(tmp_path, weights):
    path, values = comfyui_metadata(tmp_path, weights)
    checkpoint = open_checkpoint(path)
    for name in QUANTISED:
        assert torch.equal(checkpoint.dense(name, torch.bfloat16), values[name].to(torch.bfloat16))


def test_e5m2_is_handed_out_dense(tmp_path, weights):
    path, values = e5m2_cast(tmp_path, weights)
    checkpoint = open_checkpoint(path)
    for name, expected in values.items():
        assert checkpoint.format(name) == "e5m2"
        assert torch.equal(checkpoint.tensor(name), expected.to(torch.bfloat16))
        assert torch.equal(checkpoint.dense(name, torch.float64), expected)


def test_scales_of_parts_become_scales_of_rows(tmp_path, weights):
    path, _ = modelopt_fp8(tmp_path, weights)
    scale = open_checkpoint(path).tensor(LINEAR1).row_scale
    assert len(scale.unique()) == 4
    assert [len(rows.unique()) for rows in scale.split([64, 64, 64, 256])] == [1, 1, 1, 1]


def test_parts_in_different_formats_are_dequantised(tmp_path, weights):
    path, values = modelopt_fp8(tmp_path, weights)
    stored = load_file(path / "diffusion_pytorch_model.safetensors")
    part = to_diffusers(LINEAR1)[1]
    stored[part] = stored[part].to(torch.bfloat16) * stored.pop(f"{module(part)}.weight_scale").bfloat16()
    stored.pop(f"{module(part)}.input_scale")
    save_file(stored, path / "diffusion_pytorch_model.safetensors")
    checkpoint = open_checkpoint(path)
    assert checkpoint.format(LINEAR1) == "mixed"
    assert checkpoint.tensor(LINEAR1).dtype == torch.bfloat16
    assert checkpoint.input_scale(LINEAR1) is None
    torch.testing.assert_close(checkpoint.dense(LINEAR1, torch.float64), values[LINEAR1], rtol=0.01, atol=0)


@pytest.mark.parametrize("shared", [True, False])
def test_pre_quant_scale_is_kept_or_multiplied_in(tmp_path, weights, shared):
    path, values = modelopt_nvfp4(tmp_path, weights)
    stored = load_file(path / "diffusion_pytorch_model.safetensors")
    columns = torch.rand(64, generator=torch.Generator().manual_seed(2)) + 0.5
    for i, part in enumerate(to_diffusers(LINEAR1)):
        stored[f"{module(part)}.pre_quant_scale"] = columns.clone() if shared or i != 2 else columns + 1
    save_file(stored, path / "diffusion_pytorch_model.safetensors")
    checkpoint = open_checkpoint(path)
    weight = checkpoint.dense(LINEAR1, torch.float64)
    torch.testing.assert_close(weight[:128], values[LINEAR1][:128] * columns.double(), rtol=1e-6, atol=0)
    if shared:
        assert torch.equal(checkpoint.pre_quant_scale(LINEAR1), columns)
        undone = formats.dequantize(checkpoint.tensor(LINEAR1), torch.float64) * columns.double()
        torch.testing.assert_close(undone, weight)
    else:
        assert checkpoint.pre_quant_scale(LINEAR1) is None
        assert torch.equal(checkpoint.tensor(LINEAR1), checkpoint.dense(LINEAR1, torch.bfloat16))
        torch.testing.assert_close(
            weight[128:192], values[LINEAR1][128:192] * (columns + 1).double(), rtol=1e-6, atol=0
        )


def test_the_wrong_dialect_is_far_off(tmp_path, weights):
    """Both layouts fit a weight of whole tiles: only the declaration tells, and reading it wrongly ruins the values."""
    weight = torch.randn(128, 64, generator=torch.Generator().manual_seed(1))
    packed, values = comfy_nvfp4(weight)
    data, block_scale, global_scale = quantize_nvfp4(weight)
    linear = {"weight": data, "weight_scale": block_scale, "weight_scale_2": global_scale}

    def error(stored, linear_nvfp4):
        save_file(beside("x.weight", stored), tmp_path / "a.safetensors")
        tensors = Tensors([SafetensorsFile(tmp_path / "a.safetensors")], linear_nvfp4=linear_nvfp4)
        return ((tensors.dense("x.weight", torch.float64) - values).norm() / values.norm()).item()

    assert error(packed, linear_nvfp4=False) < 1e-12
    assert error(linear, linear_nvfp4=True) < 0.01  # another encoder: a few ties fall to the other side
    assert error(packed, linear_nvfp4=True) > 1
    assert error(linear, linear_nvfp4=False) > 1


# --- what does not fit --------------------------------------------------------------------------


def broken(tmp_path, tensors, **changes):
    tensors = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
    save_file(tensors, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def test_all_faults_are_listed_in_one_error(tmp_path, weights):
    changes = {f"single_blocks.0.{name}": None for name in ("linear1.bias", "linear2.bias", "linear2.weight")}
    changes |= {"double_blocks.0.txt_mlp.0.bias": None, "extra.weight": torch.zeros(1), MLP: torch.zeros(64, 255)}
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(broken(tmp_path, weights, **changes))
    assert str(error.value) == (
        f"{tmp_path}/a.safetensors does not fit a FLUX.1 transformer of 2 + 1 blocks: 4 missing "
        "(double_blocks.0.txt_mlp.0.bias, single_blocks.0.linear1.bias, single_blocks.0.linear2.weight, ...); "
        "1 unexpected (extra.weight); "
        "1 misshapen (double_blocks.0.txt_mlp.2.weight [64, 255], expected [64, 256])"
    )


def test_faults_are_told_in_the_names_of_the_file(tmp_path, diffusers_weights):
    changes = {
        "single_transformer_blocks.0.attn.to_k.weight": None,
        "transformer_blocks.0.attn.to_v.weight": torch.zeros(64, 63),
        "transformer_blocks.0.attn.to_w.weight": torch.zeros(1),
    }
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(broken(tmp_path, diffusers_weights, **changes))
    assert "1 missing (single_transformer_blocks.0.attn.to_k.weight)" in str(error.value)
    assert "1 unexpected (transformer_blocks.0.attn.to_w.weight)" in str(error.value)
    assert "transformer_blocks.0.attn.to_v.weight [64, 63], expected [192, 64]" in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"img_in.weight": None},
        {"img_in.weight": torch.zeros(64)},
        {"double_blocks.0.img_attn.norm.key_norm.scale": torch.ones(0)},
        {"double_blocks.0.img_attn.norm.key_norm.scale": torch.ones(7)},
        {"final_layer.linear.weight": torch.zeros(())},
    ],
)
def test_tensors_that_tell_the_sizes_can_be_wrong_too(tmp_path, weights, changes):
    with pytest.raises(CheckpointError, match=r"does not fit a FLUX\.1 transformer"):
        open_checkpoint(broken(tmp_path, weights, **changes))


def test_what_is_missing_is_listed_even_where_the_sizes_are_read(tmp_path, weights):
    gone = [
        "img_in.weight",
        "vector_in.in_layer.weight",
        "double_blocks.0.img_mlp.0.bias",
        "single_blocks.0.linear2.bias",
    ]
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(broken(tmp_path, weights, **dict.fromkeys(gone)))
    assert "2 + 1 blocks: 4 missing (img_in.weight, vector_in.in_layer.weight, " in str(error.value)
    assert "misshapen" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": "2"},
        {"num_attention_heads": 2.0},
        {"in_channels": "64"},
        {"axes_dims_rope": [16, 16]},
        {"quantization_config": "fp8"},
    ],
)
def test_config_that_makes_no_sense(tmp_path, weights, changes):
    path = bfl_file(tmp_path, weights, None)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_diffusers() | changes))
    with pytest.raises(CheckpointError, match=r"does not fit|is corrupt"):
        open_checkpoint(path)


def test_companions_without_their_weight_are_unexpected(tmp_path, weights):
    path = broken(tmp_path, weights, **{"img_out.weight_scale": torch.ones(())})
    with pytest.raises(CheckpointError, match=r"1 unexpected \(img_out.weight_scale\)"):
        open_checkpoint(path)


# --- configuration, variant, identity -----------------------------------------------------------


def test_config_beside_a_file_wins_over_its_shapes(tmp_path, weights):
    path = bfl_file(tmp_path, weights, None)
    config = CONFIG.to_diffusers() | {"axes_dims_rope": [8, 12, 12]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(path).config.axes_dim == (8, 12, 12)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_layers": 3}))
    with pytest.raises(CheckpointError, match=r"3 \+ 1 blocks: 24 missing"):
        open_checkpoint(path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    assert open_checkpoint(path).config == CONFIG
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is corrupt"):
        open_checkpoint(path)


VARIANTS = [
    ("flux1-dev.safetensors", "dev", {}, None),
    ("flux1-dev-kontext_fp8_scaled.safetensors", "kontext", {}, None),
    ("flux1-kontext-dev.safetensors", "kontext", {}, None),
    ("kontext/flux1-dev.safetensors", "dev", {}, None),
    ("kontext/model.safetensors", "kontext", {}, None),
    ("a/model.safetensors", "kontext", {}, {"modelspec.title": "Flux.1 Kontext"}),
    ("models--black-forest-labs--FLUX.1-Kontext-dev/snapshots/0/model.safetensors", "kontext", {}, None),
    ("kontext/a/model.safetensors", "schnell", {"guidance_embed": False}, None),
    ("flux1-fill-dev.safetensors", "fill", {"in_channels": 96}, None),
    ("flux1-canny-dev.safetensors", "canny", {"in_channels": 32}, None),
    ("flux1-depth-dev.safetensors", "depth", {"in_channels": 32}, None),
    ("a/b/model.safetensors", "control", {"in_channels": 32}, None),
]


@pytest.mark.parametrize(("path", "variant", "changes", "metadata"), VARIANTS, ids=[v[0] + v[1] for v in VARIANTS])
def test_variant(tmp_path, path, variant, changes, metadata):
    config = FluxConfig(**(vars(CONFIG) | changes))
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.zeros(shape) for name, shape in config.tensor_shapes().items()}, tmp_path / path, metadata)
    assert open_checkpoint(tmp_path / path).variant == variant


def test_kontext_by_the_class_of_the_pipeline(tmp_path, weights, diffusers_weights):
    pipeline_folder(tmp_path, weights, diffusers_weights)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxKontextPipeline"}')
    assert open_checkpoint(tmp_path).variant == "kontext"
    assert open_checkpoint(tmp_path / "transformer").variant == "kontext"


def test_identity(tmp_path, weights, diffusers_weights):
    folder = diffusers_folder(tmp_path, weights, diffusers_weights)
    checkpoint = open_checkpoint(folder)
    assert open_checkpoint(folder).identity == checkpoint.identity
    assert set(checkpoint.sha256()) == {file.name for file in folder.glob("*.safetensors")}
    (folder / "config.json").write_text(json.dumps(CONFIG.to_diffusers() | {"axes_dims_rope": [8, 12, 12]}))
    assert open_checkpoint(folder).identity != checkpoint.identity
    other = diffusers_folder(tmp_path / "other", weights, diffusers_weights | {
        "proj_out.bias": diffusers_weights["proj_out.bias"] + 1
    })  # fmt: skip
    assert open_checkpoint(other).identity != checkpoint.identity


# --- memory -------------------------------------------------------------------------------------

LOADER = """
import sys, torch
from fluxkiln.checkpoint import open_checkpoint

def resident(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

checkpoint = open_checkpoint(sys.argv[1])
checkpoint.dense(checkpoint.names[0], torch.float32)
before = resident("VmRSS")
model = {name: checkpoint.dense(name, torch.float32) for name in checkpoint.names}
print(resident("VmHWM") - before, sum(tensor.nbytes for tensor in model.values()))
"""


def test_loading_holds_the_model_and_one_tensor(tmp_path):
    config = FluxConfig(hidden_size=512, num_heads=8, depth=2, depth_single_blocks=2, axes_dim=(8, 28, 28))
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in config.tensor_shapes().items()}
    save_file(as_diffusers(tensors, 512), tmp_path / "a.safetensors")
    output = subprocess.check_output([sys.executable, "-c", LOADER, tmp_path / "a.safetensors"], text=True)
    peak, model = map(int, output.split())
    largest = max(tensor.nbytes for tensor in tensors.values())
    # the largest tensor as it is stored, and 8 MB for the allocator; the whole file would be another half of the model
    assert model == 2 * sum(tensor.nbytes for tensor in tensors.values())
    assert peak < model + largest + 8e6 < 1.4 * model


# --- saving -------------------------------------------------------------------------------------


def test_saved_in_diffusers_names_it_loads_there(tmp_path, weights):
    path = bfl_file(tmp_path, weights, None)
    checkpoint = open_checkpoint(path)
    (tmp_path / "saved").mkdir()
    file = tmp_path / "saved" / "diffusion_pytorch_model.safetensors"
    save_checkpoint(file, ((name, checkpoint.tensor(name)) for name in checkpoint.names), naming="diffusers")
    (tmp_path / "saved" / "config.json").write_text(json.dumps(CONFIG.to_diffusers()))
    model = FluxTransformer2DModel.from_pretrained(tmp_path / "saved", torch_dtype=torch.bfloat16)
    expected = as_diffusers(weights)
    assert set(model.state_dict()) == set(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("naming", ["bfl", "diffusers"])
@pytest.mark.parametrize("write", [first_generation, modelopt_fp8, comfyui_metadata, modelopt_nvfp4])
def test_quantised_weights_are_saved_as_they_are(tmp_path, weights, write, naming):
    path, values = write(tmp_path, weights)
    checkpoint = open_checkpoint(path)

    def tensors():
        for name in checkpoint.names:
            yield name, checkpoint.tensor(name)
            if name.endswith(".weight") and (scale := checkpoint.input_scale(name)) is not None:
                yield f"{module(name)}.input_scale", scale

    (tmp_path / "saved").mkdir()
    save_checkpoint(tmp_path / "saved/a.safetensors", tensors(), {"title": "mine"}, naming)
    saved = open_checkpoint(tmp_path / "saved/a.safetensors")
    assert saved.files[0].metadata["title"] == "mine"
    for name, expected in values.items():
        assert type(saved.tensor(name)) is type(checkpoint.tensor(name))
        torch.testing.assert_close(saved.dense(name, torch.float64), expected, rtol=1e-14, atol=0)
        if name in QUANTISED:
            assert saved.input_scale(name) == 0.25


def test_diffusers_reads_saved_fp8(tmp_path, weights):
    """diffusers' fp8r is read with its own quantiser's arithmetic."""
    path, values = diffusers_fp8r(tmp_path, weights)
    checkpoint = open_checkpoint(path)
    save_checkpoint(tmp_path / "b.safetensors", ((name, checkpoint.tensor(name)) for name in checkpoint.names))
    stored = load_file(tmp_path / "b.safetensors")
    for name in QUANTISED:
        decoded = dequantize_fp8r(stored[name], stored[f"{module(name)}.weight_scale"])
        torch.testing.assert_close(decoded.double(), values[name], rtol=1e-6, atol=0)


def with_branches(path, names, *halves):
    """The file at `path` with a low-rank branch, or half of one, beside each of these weights; and their products."""
    stored, generator, products = load_file(path), torch.Generator().manual_seed(1), {}
    for name in names:
        rows, columns = stored[name].shape
        branch = {
            "low_rank_down": torch.randn(2, columns, generator=generator),
            "low_rank_up": torch.randn(rows, 2, generator=generator),
        }
        products[name] = branch["low_rank_up"].double() @ branch["low_rank_down"].double()
        stored |= beside(name, {half: branch[half] for half in halves or branch})
    save_file(stored, path)
    return products


def test_branches_of_the_parts_of_a_weight_are_added_in(tmp_path, weights):
    folder, values = modelopt_fp8(tmp_path, weights)
    products = with_branches(folder / "diffusion_pytorch_model.safetensors", to_diffusers(QKV))
    checkpoint = open_checkpoint(folder)
    want = values[QKV] + torch.cat(list(products.values()))
    torch.testing.assert_close(checkpoint.dense(QKV, torch.float64), want, rtol=1e-12, atol=1e-12)
    assert torch.equal(checkpoint.tensor(QKV), checkpoint.dense(QKV, torch.bfloat16))  # no stack of FP8 without them
    assert checkpoint.low_rank(QKV) is None


def test_branches_that_would_be_lost_are_refused(tmp_path, weights):
    for half in ("low_rank_down", "low_rank_up"):
        path, _ = diffusers_fp8r(tmp_path, weights)
        with_branches(path, [MLP], half)
        with pytest.raises(CheckpointError, match=f"txt_mlp.2.{half} is half of a low-rank branch"):
            open_checkpoint(path)
    path = bfl_file(tmp_path, weights, None)
    with_branches(path, [MLP])
    with pytest.raises(CheckpointError, match=r"txt_mlp.2.weight is quantised as BF16 data with a low-rank branch"):
        open_checkpoint(path)
    branch = [(f"{module(MLP)}.low_rank_down", torch.zeros(2, 4))]
    with pytest.raises(ValueError, match="diffusers has no low-rank branches; save with naming='bfl'"):
        save_checkpoint(tmp_path / "b.safetensors", branch, naming="diffusers")
    assert not (tmp_path / "b.safetensors").exists()


def test_unknown_name_is_not_saved(tmp_path):
    with pytest.raises(KeyError):
        save_checkpoint(tmp_path / "a.safetensors", [("img_out.weight", torch.zeros(1))], naming="diffusers")
    assert not list(tmp_path.iterdir())


# --- the other parts ----------------------------------------------------------------------------


def clip_model():
    config = CLIPTextConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    return CLIPTextModel(config)


def t5_model():
    config = T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config)


def vae_model():
    return AutoencoderKL(block_out_channels=(4, 4), down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, norm_num_groups=2, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


PARTS = {
    "clip": (clip_model, open_clip, "text_encoder", "text_encoders.clip_l.transformer.text_model."),
    "t5": (t5_model, open_t5, "text_encoder_2", "text_encoders.t5xxl.transformer."),
    "vae": (vae_model, open_vae, "vae", "vae."),
}


@pytest.mark.parametrize(("build", "open_part", "folder", "prefix"), PARTS.values(), ids=PARTS)
def test_part_from_pipeline_folder_file_and_all_in_one(tmp_path, weights, build, open_part, folder, prefix):
    torch.manual_seed(0)
    model = build()
    model.save_pretrained(tmp_path / folder)
    opened = open_part(tmp_path)
    expected = {name.removeprefix("text_model."): tensor for name, tensor in load_part(tmp_path / folder).items()}
    assert opened.config == json.loads((tmp_path / folder / "config.json").read_text())
    others = {PREFIX + name: tensor for name, tensor in weights.items()}
    save_file({prefix + name: tensor for name, tensor in expected.items()} | others, tmp_path / "all.safetensors")
    save_file(expected, tmp_path / "one.safetensors")
    for path in (tmp_path, tmp_path / folder, tmp_path / "all.safetensors", tmp_path / "one.safetensors"):
        opened = open_part(path)
        assert set(opened) == set(expected)
        assert all(torch.equal(opened[name], expected[name]) for name in expected)
        assert all(tensor.dtype == torch.float64 for tensor in open_part(path, torch.float64).values())


def load_part(folder):
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def test_clip_with_the_prefix_of_earlier_releases(tmp_path):
    model = clip_model().state_dict()
    bare = {name.removeprefix("text_model."): tensor for name, tensor in model.items()}
    save_file({f"text_model.{name}": tensor for name, tensor in bare.items()} | {"logit_scale": torch.ones(())},
              tmp_path / "clip_l.safetensors")  # fmt: skip
    assert set(open_clip(tmp_path / "clip_l.safetensors")) == set(bare)


@pytest.mark.parametrize("scale_key", ["scale_weight", "weight_scale", None])
def test_quantised_text_encoder(tmp_path, scale_key):
    torch.manual_seed(0)
    stored, values = {}, {}
    for name, tensor in t5_model().state_dict().items():
        if tensor.ndim == 2 and "embed" not in name:
            scale = 0.5 if scale_key else 1.0
            array = e4m3(tensor / scale)
            stored[name], values[name] = fp8_of(array), torch.from_numpy(array.astype(np.float64)) * scale
            stored |= beside(name, {scale_key: torch.tensor(scale)}) if scale_key else {}
        else:
            stored[name] = tensor.to(torch.float16).clone()
            values[name] = stored[name].double()
    stored["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    save_file(stored, tmp_path / "t5xxl_fp8_e4m3fn_scaled.safetensors")
    t5 = open_t5(tmp_path / "t5xxl_fp8_e4m3fn_scaled.safetensors", torch.float32)
    assert set(t5) == set(values)
    assert all(torch.equal(t5[name], values[name].float()) for name in values)
