"""What is not a FLUX.1 transformer is refused by name, in one sentence that says what to use instead."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from fluxkiln.checkpoint import CheckpointError, open_checkpoint, open_clip, open_t5, open_vae
from fluxkiln.config import FluxConfig

TINY = FluxConfig(
    in_channels=16, out_channels=16, hidden_size=32, num_heads=2, depth=1, depth_single_blocks=1,
    context_in_dim=16, vec_in_dim=16, axes_dim=(4, 6, 6),
)  # fmt: skip
MODEL = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in TINY.tensor_shapes().items()}
PROJ = "double_blocks.0.img_attn.proj"


def names(*keys):
    return {key: torch.zeros(2, 2) for key in keys}


LORA = (".lora_A.weight", ".lora_B.weight")
FILES = {
    "lora-kohya": (
        names("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "lora_unet_single_blocks_0_linear1.alpha"),
        "is a LoRA (kohya-ss), not a FLUX.1 transformer; it changes a transformer but is not one",
    ),
    "lora-diffusers": (names(*(f"transformer.single_transformer_blocks.0.proj_out{x}" for x in LORA)), "is a LoRA (d"),
    "lora-peft": (names(*(f"base_model.model.double_blocks.0.img_attn.qkv{x}" for x in LORA)), "is a LoRA (PEFT)"),
    "lora-comfyui": (names(*(f"diffusion_model.double_blocks.0.img_attn.qkv{x}" for x in LORA)), "is a LoRA (ComfyUI)"),
    "lora-xlabs": (names("double_blocks.0.processor.qkv_lora1.down.weight"), "is a LoRA (XLabs)"),
    "lora-control": (
        names("double_blocks.0.img_attn.norm.query_norm.scale", *(f"img_in{x}" for x in (*LORA, ".lora_B.bias"))),
        "is a control LoRA (FLUX.1 Canny or Depth)",
    ),
    "lycoris": (names("lora_unet_double_blocks_0_img_attn_qkv.lokr_w1"), "is a LyCORIS adapter"),
    "ip-adapter": (names("double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight"), "is an IP-Adapter"),
    "controlnet": (
        names("controlnet_blocks.0.weight", "transformer_blocks.0.norm1_context.linear.weight"),
        "is a ControlNet",
    ),
    "redux": (names("redux_up.weight", "redux_down.weight"), "is the FLUX.1 Redux adapter"),
    "flux.2": (
        names("double_stream_modulation_img.lin.weight", "double_blocks.0.img_attn.qkv.weight"),
        "is a FLUX.2 transformer, not a FLUX.1 transformer; use a FLUX.1 [dev], [schnell] or [Kontext] model",
    ),
    "flux.2-diffusers": (names("double_stream_modulation_img.linear.weight"), "is a FLUX.2 transformer"),
    "chroma": (names("distilled_guidance_layer.in_proj.weight", "double_blocks.0.img_attn.qkv.weight"), "is a Chroma"),
    "hunyuan-video": (
        names("double_blocks.0.img_mod.lin.weight", "txt_in.individual_token_refiner.blocks.0.norm1.weight"),
        "is a HunyuanVideo transformer",
    ),
    "sd3": (names("model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight"), "is a Stable Diffusion 3"),
    "sd3-diffusers": (
        names("pos_embed.proj.weight", "transformer_blocks.0.norm1_context.linear.weight"),
        "is a Stable Diffusion 3 transformer",
    ),
    "sdxl": (
        names("model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"),
        "is a Stable Diffusion UNet",
    ),
    "qwen-image": (names("transformer_blocks.0.img_mod.1.weight"), "is a Qwen-Image transformer"),
    "other": (names("double_blocks.0.img_attn.qkv.weight"), "is another transformer"),
    "llm": (names("model.layers.0.mlp.up_proj.weight"), "is a language model"),
    "unknown": (names("a", "b"), "is no model that is known here"),
    "empty": ({}, "is no model that is known here"),
    "vae": (names("decoder.conv_in.weight"), "is an autoencoder (VAE), not a FLUX.1 transformer; pass it as vae, and "),
    "clip": (names("text_model.encoder.layers.0.self_attn.q_proj.weight"), "is a CLIP text encoder"),
    "t5": (names("encoder.block.0.layer.0.SelfAttention.q.weight"), "is a T5 text encoder"),
    "bnb-nf4": (
        MODEL | {f"{PROJ}.weight": torch.zeros(512, 1, dtype=torch.uint8)}
        | {f"{PROJ}.weight.absmax": torch.zeros(16), f"{PROJ}.weight.quant_state.bitsandbytes__nf4": torch.zeros(9)},
        "is a bitsandbytes NF4 model, not a FLUX.1 transformer; use a bf16, fp8 or nvfp4 safetensors file",
    ),
    "bnb-int8": (MODEL | {f"{PROJ}.SCB": torch.zeros(32)}, "is a bitsandbytes LLM.int8 model"),
    "svdquant": (
        names(*(f"transformer_blocks.0.qkv_proj.{x}" for x in ("qweight", "wscales", "lora_down", "smooth"))),
        "is a nunchaku SVDQuant model",
    ),
    "gptq": (MODEL | {f"{PROJ}.qweight": torch.zeros(4), f"{PROJ}.qzeros": torch.zeros(4)}, "is a GPTQ or AWQ model"),
    "modelopt-state": (MODEL | {f"{PROJ}.weight_quantizer._amax": torch.zeros(())}, "is a ModelOpt model with its"),
}  # fmt: skip


@pytest.mark.parametrize(("tensors", "sentence"), FILES.values(), ids=FILES)
def test_refused_by_name(tmp_path, tensors, sentence):
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=f"^{re.escape(f'{path} {sentence}')}") as error:
        open_checkpoint(path)
    assert "\n" not in str(error.value)


def test_svdquant_by_its_metadata(tmp_path):
    save_file(MODEL, tmp_path / "a.safetensors", {"quantization_config": '{"method": "svdquant"}'})
    with pytest.raises(CheckpointError, match="nunchaku SVDQuant"):
        open_checkpoint(tmp_path / "a.safetensors")


def fp8(rows=32, columns=32):
    return torch.zeros(rows, columns).to(torch.float8_e4m3fn)


def declared(format):
    return {f"{PROJ}.comfy_quant": torch.tensor(list(json.dumps({"format": format}).encode()), dtype=torch.uint8)}


QUANTISED = {
    "mxfp8-declared": (declared("mxfp8") | {f"{PROJ}.weight": fp8()}, "is quantised as mxfp8"),
    "int8-declared": (declared("int8_tensorwise"), "is quantised as int8_tensorwise"),
    "mxfp8": (
        {f"{PROJ}.weight": fp8(), f"{PROJ}.weight_scale": torch.zeros(32, 1, dtype=torch.uint8)},
        "is quantised as mxfp8",
    ),
    "block-scales": (
        {f"{PROJ}.weight": fp8(), f"{PROJ}.weight_scale": torch.zeros(2, 2)},
        "is quantised as fp8 with scales [2, 2] for a weight [32, 32]",
    ),
    "int8": ({f"{PROJ}.weight": torch.zeros(32, 32, dtype=torch.int8)}, "is quantised as I8 data"),
    "packed": ({f"{PROJ}.weight": torch.zeros(32, 16, dtype=torch.uint8)}, "is quantised as U8 data"),
    "bf16-with-scale": ({f"{PROJ}.weight_scale": torch.ones(())}, "is quantised as BF16 data with scales"),
    "nvfp4-in-bf16": (declared("nvfp4"), "is quantised as nvfp4 with BF16 data"),
}


@pytest.mark.parametrize(("tensors", "found"), QUANTISED.values(), ids=QUANTISED)
def test_unknown_quantisation_is_refused_by_name(tmp_path, tensors, found):
    save_file(MODEL | tensors, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=re.escape(f"{PROJ}.weight {found}") + ".*; use a bf16, fp8 or nvfp4"):
        open_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize(("rows", "columns"), [(32, 2), (128, 2), (32, 4)])
def test_scales_of_the_other_nvfp4_layout_do_not_fit(tmp_path, rows, columns):
    """ComfyUI pads the scales to whole tiles: unpadded ones can only be linear."""
    tensors = {
        f"{PROJ}.weight": torch.zeros(32, 16, dtype=torch.uint8),
        f"{PROJ}.weight_scale": fp8(rows, columns),
        f"{PROJ}.weight_scale_2": torch.ones(()),
    }
    save_file(MODEL | tensors, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="swizzled block scales needs 512 of them"):
        open_checkpoint(tmp_path / "a.safetensors")


def test_corrupt_quantisation_metadata(tmp_path):
    for metadata in ("{", "[]", '{"layers": {"a": 1}}', '{"layers": {"a": {}}}', '{"layers": 3}'):
        save_file(MODEL, tmp_path / "a.safetensors", {"_quantization_metadata": metadata})
        with pytest.raises(CheckpointError, match="quantisation metadata is not valid"):
            open_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize("method", ["bitsandbytes", "torchao", "quanto", "gguf", "nunchaku_lite"])
def test_quantisation_methods_of_diffusers(tmp_path, method):
    save_file(MODEL, tmp_path / "diffusion_pytorch_model.safetensors")
    config = TINY.to_diffusers() | {"quantization_config": {"quant_method": method}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"quantised with {method}, which is not read"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.pt", b"PK\3\4", "is a pickle file, which can run any code when it is opened; use the model's safetensors"),
        ("a.ckpt", b"\x80\x02", "is a pickle file"),
        ("a.bin", b"anything", "is a pickle file"),
        ("a.pth", b"", "is a pickle file"),
        ("renamed.safetensors", b"PK\3\4", "is a pickle file"),
        ("a.gguf", b"GGUF", "is a GGUF file, whose quantisation is not read; use a bf16, fp8 or nvfp4"),
        ("renamed.safetensors", b"GGUF", "is a GGUF file"),
        ("a.onnx", b"\x08", "is a compiled or exported graph"),
    ],
)
def test_files_of_other_formats(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{re.escape(name)} {sentence}"):
        open_checkpoint(tmp_path / name)
    with pytest.raises(CheckpointError, match=sentence):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("length", [66_176, 84_816])
def test_a_header_as_long_as_a_pickle_begins_is_read(tmp_path, length):
    """Its length stands first: 80 02 or 50 4B, which is PK, and zeros."""
    path = tmp_path / "a.safetensors"
    save_file(MODEL, path, {"note": ""})
    short = int.from_bytes(path.read_bytes()[:8], "little")
    for more in range(length - short - 8, length - short + 8):
        save_file(MODEL, path, {"note": "x" * more})
        if path.read_bytes()[:8] == length.to_bytes(8, "little"):
            break
    assert path.read_bytes()[:2] in (b"\x80\x02", b"PK")
    assert open_checkpoint(path).names


def test_real_pickle_is_refused(tmp_path):
    torch.save({"img_in.weight": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="is a pickle file"):
        open_checkpoint(tmp_path / "a.safetensors")


# --- folders ------------------------------------------------------------------------------------


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not there: expected a FLUX.1 transformer".replace(".", r"\.")):
        open_checkpoint(tmp_path / "flux")


def test_empty_folder_and_folder_without_weights(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no safetensors file \(nothing\); expected a FLUX\.1 transformer"):
        open_checkpoint(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"\(only notes\.txt\)"):
        open_checkpoint(tmp_path)


def test_pipeline_without_the_part(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    with pytest.raises(CheckpointError, match="is a StableDiffusionXLPipeline without the folder transformer/"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("folder", "key", "sentence"),
    [
        ("vae", "decoder.conv_in.weight", "is an autoencoder"),
        ("text_encoder", "encoder.layers.0.self_attn.q_proj.weight", "is a CLIP text encoder"),
        ("text_encoder_2", "encoder.block.0.layer.0.SelfAttention.q.weight", "is a T5 text encoder"),
    ],
)
def test_folder_of_another_part(tmp_path, folder, key, sentence):
    (tmp_path / folder).mkdir()
    save_file(names(key), tmp_path / folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{folder} {sentence}.*, not a FLUX.1 transformer"):
        open_checkpoint(tmp_path / folder)


def test_folder_of_several_models(tmp_path):
    for name in ("flux1-dev.safetensors", "flux1-schnell.safetensors"):
        save_file(MODEL, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"holds 2 files .*flux1-dev\.safetensors.*; name the file"):
        open_checkpoint(tmp_path)


def test_folder_of_svdquant(tmp_path):
    save_file(names("x_embedder.weight"), tmp_path / "unquantized_layers.safetensors")
    save_file(names("transformer_blocks.0.qkv_proj.wscales"), tmp_path / "transformer_blocks.safetensors")
    with pytest.raises(CheckpointError, match="nunchaku SVDQuant"):
        open_checkpoint(tmp_path)


def shards(folder, **index):
    half = len(MODEL) // 2
    for i, part in enumerate((list(MODEL)[:half], list(MODEL)[half:]), start=1):
        save_file({name: MODEL[name] for name in part}, folder / f"model-0000{i}-of-00002.safetensors")
    weight_map = {name: f"model-0000{1 + (i >= half)}-of-00002.safetensors" for i, name in enumerate(MODEL)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map | index}))


def test_missing_shard(tmp_path):
    shards(tmp_path)
    assert open_checkpoint(tmp_path).config == TINY
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"names 2 shards, but 1 are missing \(model-00002-of-00002\.safetensors\)"
    ):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds 1 of 2 shards \(model-00002-of-00002\.safetensors missing\)"):
        open_checkpoint(tmp_path)


def test_single_shard_as_a_model(tmp_path):
    shards(tmp_path)
    with pytest.raises(CheckpointError, match=f"is shard 2 of 2; give the folder {tmp_path} instead"):
        open_checkpoint(tmp_path / "model-00002-of-00002.safetensors")


def test_index_that_names_files_elsewhere_or_is_damaged(tmp_path):
    (tmp_path / "model").mkdir()
    save_file(MODEL, tmp_path / "secret.safetensors")
    shards(tmp_path / "model", extra="../secret.safetensors")
    with pytest.raises(CheckpointError, match=r"names the shard \.\./secret\.safetensors, which is not beside it"):
        open_checkpoint(tmp_path / "model")
    for text in ("{", "[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": []}'):
        (tmp_path / "model" / "model.safetensors.index.json").write_text(text)
        with pytest.raises(CheckpointError, match="is not an index of shards"):
            open_checkpoint(tmp_path / "model")


def test_one_name_in_two_shards(tmp_path):
    shards(tmp_path)
    save_file(MODEL, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="both hold "):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("open_part", [open_vae, open_clip, open_t5])
def test_transformer_as_another_part(tmp_path, open_part):
    save_file(MODEL, tmp_path / "a.safetensors")
    sentence = r"is a FLUX\.1 transformer, not (.*); pass it as transformer, and \1 as "
    with pytest.raises(CheckpointError, match=sentence):
        open_part(tmp_path / "a.safetensors")


def test_readable_parts_of_a_file_whose_transformer_is_not(tmp_path):
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in FILES["bnb-nf4"][0].items()}
    save_file(tensors | {"vae.decoder.conv_in.weight": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="bitsandbytes NF4"):
        open_checkpoint(tmp_path / "a.safetensors")
    assert open_vae(tmp_path / "a.safetensors")["decoder.conv_in.weight"].sum() == 2
