"""`describe`: what a file is, from its header; on a sparse file of full FLUX.1 size, in a process of its own."""

import json
import math
import struct
import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from safetensors.torch import save_file

from fluxkiln.checkpoint import CheckpointError
from fluxkiln.cli import main
from fluxkiln.config import DEV, SCHNELL, FluxConfig
from fluxkiln.info import describe, to_json, to_text
from fluxkiln.kernels.formats import quantize_fp8, quantize_nvfp4

TINY = FluxConfig(
    in_channels=16, out_channels=16, hidden_size=64, num_heads=2, depth=1, depth_single_blocks=1,
    context_in_dim=32, vec_in_dim=32, axes_dim=(4, 14, 14),
)  # fmt: skip
BLOCK_LINEARS = [
    name
    for name, shape in TINY.tensor_shapes().items()
    if len(shape) == 2 and name.startswith(("double", "single")) and "mod" not in name
]


def model():
    return {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in TINY.tensor_shapes().items()}


def sparse_file(path, config, dtype="BF16", size=2):
    """A file of which only the header is written."""
    header, offset = {}, 0
    for name, shape in config.tensor_shapes().items():
        end = offset + size * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    return path


MEASURED = """
import sys
from fluxkiln.info import describe, to_json
print(to_json(describe(sys.argv[1])))
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(peak, "torch" in sys.modules, file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("config", "name", "parameters"),
    [(DEV, "flux1-dev", 11_901_408_320), (SCHNELL, "flux1-schnell", 11_891_178_560)],
    ids=["dev", "schnell"],
)
def test_full_size_file_takes_the_memory_of_its_header(tmp_path, config, name, parameters):
    path = sparse_file(tmp_path / f"{name}.safetensors", config)
    assert path.stat().st_size > 23.7e9
    done = subprocess.run([sys.executable, "-c", MEASURED, path], check=True, capture_output=True, text=True)
    peak, torch_imported = done.stderr.split()
    assert int(peak) < 100_000  # kB: Python itself and a header of 90 kB
    assert torch_imported == "False"
    said = json.loads(done.stdout)
    assert (said["kind"], said["problem"], said["bytes"]) == ("bfl", "", path.stat().st_size)
    (part,) = said["parts"]
    assert (part["part"], part["variant"]) == ("transformer", name.removeprefix("flux1-"))
    assert part["parameters"] == parameters
    assert part["formats"] == {"bf16": parameters}
    assert part["quantised"] == {}
    assert part["stored_bytes"] == 2 * parameters
    assert part["memory"]["bf16"] == 2 * parameters
    assert 1.0 * parameters < part["memory"]["fp8"] < 1.4 * parameters
    assert part["memory"]["nvfp4"] < part["memory"]["fp8"]


def test_memory_is_that_of_the_quantised_tensors(tmp_path):
    tensors = {name: torch.randn(shape) for name, shape in TINY.tensor_shapes().items()}
    save_file(model(), tmp_path / "a.safetensors")
    memory = describe(tmp_path / "a.safetensors").parts[0].memory
    rest = sum(2 * tensor.numel() for name, tensor in tensors.items() if name not in BLOCK_LINEARS)
    fp8 = [quantize_fp8(tensors[name]) for name in BLOCK_LINEARS]
    nvfp4 = [quantize_nvfp4(tensors[name]) for name in BLOCK_LINEARS]
    assert memory["fp8"] == rest + sum(w.data.nbytes + w.row_scale.numel() * 4 for w in fp8)
    assert memory["nvfp4"] == rest + sum(
        w.data.nbytes + w.block_scale.nbytes + w.global_scale.numel() * 4 for w in nvfp4
    )


def test_quantised_file(tmp_path):
    tensors = model()
    linear, other = "double_blocks.0.img_mlp.0", "single_blocks.0.linear2"
    tensors[f"{linear}.weight"] = torch.zeros(256, 64).to(torch.float8_e4m3fn)
    tensors[f"{linear}.weight_scale"] = torch.ones(())
    tensors |= {
        f"{other}.weight": torch.zeros(64, 160, dtype=torch.uint8),
        f"{other}.weight_scale": torch.zeros(128, 20).to(torch.float8_e4m3fn),
        f"{other}.weight_scale_2": torch.ones(()),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    (part,) = describe(tmp_path / "a.safetensors").parts
    assert part.parameters == sum(math.prod(shape) for shape in TINY.tensor_shapes().values())
    assert part.quantised == {"fp8": 1, "nvfp4": 1}
    assert (part.formats["fp8"], part.formats["nvfp4"]) == (256 * 64, 64 * 320)
    assert part.stored_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert "1 layers fp8, 1 layers nvfp4" in to_text(describe(tmp_path / "a.safetensors"))


def test_pipeline_folder(tmp_path):
    FluxTransformer2DModel.from_config(TINY.to_diffusers()).save_pretrained(tmp_path / "transformer")
    AutoencoderKL(norm_num_groups=1, block_out_channels=(4,)).save_pretrained(tmp_path / "vae")
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxKontextPipeline"}')
    description = describe(tmp_path)
    assert (description.kind, description.what) == ("pipeline", "a diffusers FluxKontextPipeline")
    transformer, vae = description.parts
    assert (transformer.part, transformer.kind, transformer.variant) == ("transformer", "diffusers", "kontext")
    assert (vae.part, vae.formats.keys()) == ("vae", {"f32"})
    assert transformer.config["hidden_size"] == 64
    assert describe(tmp_path / "transformer").parts == (transformer,)
    assert describe(tmp_path / "vae").parts == (vae,)
    assert json.loads(to_json(description))["parts"][0]["variant"] == "kontext"
    assert "variant kontext (diffusers)" in to_text(description)


def test_fused_projections_are_counted_once(tmp_path):
    transformer = FluxTransformer2DModel.from_config(TINY.to_diffusers())
    parameters = transformer.num_parameters()
    transformer.fuse_qkv_projections()
    transformer.save_pretrained(tmp_path)
    assert describe(tmp_path).parts[0].parameters == parameters


def test_file_with_a_fault_is_described_with_it(tmp_path):
    tensors = model()
    del tensors["img_in.bias"]
    save_file(tensors, tmp_path / "a.safetensors")
    (part,) = describe(tmp_path / "a.safetensors").parts
    assert "1 missing (img_in.bias)" in part.problem
    assert "cannot be loaded: " in to_text(describe(tmp_path / "a.safetensors"))


def test_unreadable_quantisation_is_described(tmp_path):
    tensors = model() | {"single_blocks.0.linear2.weight": torch.zeros(64, 320, dtype=torch.int8)}
    save_file(tensors, tmp_path / "a.safetensors")
    (part,) = describe(tmp_path / "a.safetensors").parts
    assert (part.formats["i8"], part.memory) == (64 * 320, {})
    assert "quantised as I8" in part.problem


def test_what_is_no_model_of_ours_is_named(tmp_path):
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1)}, tmp_path / "a.safetensors")
    description = describe(tmp_path / "a.safetensors")
    assert (description.kind, description.parts) == ("lora-kohya", ())
    assert "it changes a transformer but is not one" in description.problem
    assert description.problem in to_text(description)


def test_no_safetensors_file(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="GGUF"):
        describe(tmp_path / "a.gguf")
    with pytest.raises(FileNotFoundError):
        describe(tmp_path / "b.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no safetensors file"):
        describe(tmp_path / "empty")


def test_a_bundled_model_goes_by_its_name(capsys):
    assert main(["info", "shapes"]) == 0
    assert "variant kontext (diffusers)" in capsys.readouterr().out
