"""The command line, called as a user does, on a tiny random model."""

from __future__ import annotations

import dataclasses
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

import fluxkiln.pipeline
from fluxkiln import cli, metadata
from fluxkiln.autoencoder import Autoencoder, AutoencoderConfig, diffusers_tensors
from fluxkiln.bench.peers import diffusers_state
from fluxkiln.cli import main
from fluxkiln.config import FluxConfig, scaled_axes
from fluxkiln.kernels.recipe import RECIPES
from fluxkiln.pipeline import Pipeline
from fluxkiln.record import Part

from parity import random_tensors

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Kontext model in diffusers' layout with tiny random parts, and tokenizers whose vocabulary is the alphabet."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = FluxConfig(16, 16, 128, 2, 1, 1, 4.0, 32, 24, True, scaled_axes(64))
    sizes = AutoencoderConfig((8, 8, 8, 8), 1, latent_channels=4, norm_num_groups=2)
    weights = {
        "transformer": (config.to_diffusers(), diffusers_state(random_tensors(config))),
        "vae": (sizes.to_diffusers() | {"sample_size": 64}, diffusers_tensors(Autoencoder(sizes).state_dict())),
    }
    for name, (described, tensors) in weights.items():
        (path / name).mkdir(parents=True)
        (path / name / "config.json").write_text(json.dumps(described))
        whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(whole, path / name / "diffusion_pytorch_model.safetensors")
    (path / "model_index.json").write_text('{"_class_name": "FluxKontextPipeline"}')

    pieces = [*LETTERS, *(c + "</w>" for c in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    letters = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((c, -2.0) for c in LETTERS)]
    clip = CLIPTextConfig(
        vocab_size=len(pieces), hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
        bos_token_id=len(pieces) - 2, eos_token_id=len(pieces) - 1, pad_token_id=1,
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=len(letters), d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu"
    )
    clip_tokenizer = CLIPTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=[], model_max_length=77)
    CLIPTextModel(clip).save_pretrained(path / "text_encoder")
    T5EncoderModel(t5).save_pretrained(path / "text_encoder_2")
    clip_tokenizer.save_pretrained(path / "tokenizer")
    T5Tokenizer(vocab=letters, extra_ids=0, model_max_length=512).save_pretrained(path / "tokenizer_2")
    return path


@pytest.fixture(scope="module")
def tiny(folder: Path) -> Pipeline:
    pipe = Pipeline.from_pretrained(folder, precision="fp32", device="cpu")
    pipe.parts = tuple(dataclasses.replace(part, source="somebody/tiny") for part in pipe.parts)
    return pipe


@pytest.fixture
def opened(tiny: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """Work in a folder of the test, where the tiny pipeline is whatever model is asked for; returns what was opened."""
    calls: list[tuple[Any, dict[str, Any]]] = []

    def from_pretrained(name: str, **options: Any) -> Pipeline:
        calls.append((name, options))
        return tiny

    def from_files(**options: Any) -> Pipeline:
        calls.append((None, options))
        return tiny

    monkeypatch.setattr(fluxkiln.pipeline.Pipeline, "from_pretrained", staticmethod(from_pretrained))
    monkeypatch.setattr(fluxkiln.pipeline.Pipeline, "from_files", staticmethod(from_files))
    monkeypatch.chdir(tmp_path)
    return calls


def pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def photo(path: str, seed: int = 0, side: int = 64) -> str:
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(path)
    return path


FAST = ["--steps", "2", "--width", "32", "--height", "32"]


# --- help and errors ----------------------------------------------------------------------------


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from fluxkiln.cli import main; "
        "codes = [main(['--help']), main(['generate', '--help']), main(['edit', '--help']), main(['info', '--help'])]; "
        "heavy = {'torch', 'numpy', 'PIL', 'transformers', 'safetensors', 'triton', 'tqdm'} & sys.modules.keys(); "
        "sys.exit(f'{codes} {heavy}' if heavy or any(codes) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for command in cli.COMMANDS:
        assert f"\n    {command} " in done.stdout


def test_a_process_is_spared_its_garbage_collector(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And ends with the command's status; `main` leaves the collector of its caller alone."""
    before = gc.get_threshold()
    monkeypatch.setattr(sys, "argv", ["fluxkiln", "info", str(tmp_path / "nothing")])
    assert main() == 1
    assert (gc.get_threshold(), gc.get_freeze_count()) == (before, 0)
    try:
        with pytest.raises(SystemExit) as stop:
            cli.process()
        assert stop.value.code == 1
        assert gc.get_threshold()[0] > 10 * before[0]
        assert gc.get_freeze_count()
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def commands_of(table: cli.Table, *names: str) -> list[list[str]]:
    """Every command, as the words that name it."""
    found = []
    for name, (target, _) in table.items():
        found += [[*names, name]] if isinstance(target, str) else commands_of(target, *names, name)
    return found


@pytest.mark.parametrize("command", commands_of(cli.COMMANDS), ids=" ".join)
def test_every_command_explains_itself(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: fluxkiln {' '.join(command)} [-h]")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "fluxkiln: the following arguments are required: COMMAND"),
        (["genrate"], 2, "invalid choice: 'genrate'"),
        (["generate", "a", "--steps", "few"], 2, "fluxkiln generate: argument --steps: invalid int value: 'few'"),
        (["generate", "a", "--guidance", "3,x"], 2, "must be numbers with commas between, got '3,x'"),
        (["generate", "a", "--cache-size", "big"], 2, "a size is like 500MB or 2GB"),
        (["generate", "a\udcff"], 2, "is not text"),
        (["generate"], 1, "give either a prompt or --prompts FILE"),
        (["generate", "a", "--prompts", "p.txt"], 1, "not both"),
        (["generate", "a", "-n", "0"], 1, "-n must be at least 1, got 0"),
        (["generate", "a", "-o", "a.gif"], 1, "'a.gif' must end in .png"),
        (["generate", "a", "-o", "{user}.png"], 1, "no field {user}"),
        (["generate", "--prompts", "absent.txt"], 1, "absent.txt: No such file or directory"),
        (["generate", "a", "--model", "x", "--transformer", "y"], 1, "give either --model or single files"),
        (["generate", "a", "--vae", "y"], 1, "single files need --transformer FILE"),
        (["generate", "a", "blue", "fox"], 2, "arguments: blue fox: put a prompt of several words in quotes"),
        (["generate", "a", "-o", f"{__file__}/a.png"], 1, "test_cli.py is a file, not a folder"),
        (["generate", "a", "--width", "8", "-o", "out/a.png"], 1, "width must be at least 16 pixels, got 8"),
        (["generate", "a", "--height", "65536", "--width", "65536"], 1, "at most"),
        (["generate", "a", "--seed", "-1"], 1, "a seed must be between 0 and 2^63 - 1"),
        (["generate", "a", "--seed", f"{2**63 - 1}", "-n", "2"], 1, "a seed must be between 0 and 2^63 - 1"),
        (["generate", "a", "--steps", "0"], 1, "at least 1 step is needed, got 0"),
        (["generate", "a", "--sigmas", "0.5,1"], 1, "sigmas must fall"),
        (["generate", "a", "--image", __file__, "--strength", "2"], 1, "strength must be between 0 and 1, got 2.0"),
        (["generate", "a", "--true-cfg-scale", "nan", "--negative-prompt", "b"], 1, "true_cfg_scale must be finite"),
        (["bench", "tune", "--tiny", "--budget=-1"], 2, "argument --budget: must be a number above 0, got '-1'"),
        (["bench", "tune", "--tiny", "--minutes", "long"], 2, "argument --minutes: invalid float value: 'long'"),
        (["bench", "image", "--gpu-hour-price", "inf"], 2, "--gpu-hour-price: must be a number above 0, got 'inf'"),
        (["generate", "a", "--cache-size", "inf"], 2, "a size is like 500MB or 2GB, got 'inf'"),
        (["generate", "a", "--cache-size=-1GB"], 2, "a size is like 500MB or 2GB, got '-1GB'"),
        (["generate", "a", "--cache", __file__], 1, "test_cli.py is no folder"),
        (["generate", "--from", "absent.png"], 1, "absent.png: No such file or directory"),
        (["edit", "absent.png", "a"], 1, "absent.png is not a file"),
        (["generate", "a", "--image", __file__, "--mask", "/"], 1, "/ is not a file"),
        (["info", "absent.png"], 1, "absent.png: No such file or directory"),
        (["info", "absent.safetensors"], 1, "absent.safetensors"),
    ],
)
def test_errors_are_one_sentence(
    opened: Any, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    assert main(arguments) == code
    said = capsys.readouterr()
    # Where the model had to be opened first, what was chosen is said before.
    choice, *lines = said.err.splitlines()[:-1] or [""]
    assert choice in ("", "somebody/tiny (kontext): eager, fp32 on cpu")
    assert all(line.startswith(("chosen: ", "not trt: ", "not triton: ")) for line in lines)
    sentence = said.err.splitlines()[-1]
    assert message in sentence
    assert sentence.startswith("fluxkiln")
    assert said.out == ""
    assert list(Path().iterdir()) == []
    # What the model does not decide is said before it is opened.
    early = ("is not a file", "pixels", "seed", "step", "sigmas", "strength")
    assert not (opened and any(word in sentence for word in early))


def test_debug_shows_where(opened: Any) -> None:
    with pytest.raises(ValueError, match="must end in"):
        main(["generate", "a", "-o", "a.gif", "--debug"])


def test_a_model_that_is_not_there_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "a", "--model", "black-forest-labs/FLUX.1-dev"]) == 1
    said = capsys.readouterr().err
    assert [line.split(".")[0].strip() for line in said.splitlines()[1:]] == ["1", "2", "3"]
    assert "hf auth login" in said


# --- generate -----------------------------------------------------------------------------------


def test_generate(opened: list, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a fox", "-o", "out/fox.png", "--seed", "7", "--precision", "bf16", *FAST]) == 0
    assert opened == [("shapes", {"precision": "bf16"})]
    record = metadata.read("out/fox.png")
    assert (record.prompt, record.seed, len(record.request.schedule)) == ("a fox", 7, 3)
    assert pixels("out/fox.png").shape == (32, 32, 3)
    said = capsys.readouterr()
    assert said.out.startswith("out/fox.png  32x32, seed 7, eager ")


def test_the_same_command_writes_the_same_file(opened: Any) -> None:
    for name in ("a.png", "b.png"):
        assert main(["generate", "a fox", "-o", name, "--seed", "7", *FAST]) == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_every_option_reaches_the_pipeline(opened: Any) -> None:
    options = ["--guidance", "4,3", "--negative-prompt", "dull", "--true-cfg-scale", "2", "--prompt-2", "b"]
    assert main(["generate", "a", "-o", "a.png", "--max-sequence-length", "3", "--sigmas", "1,0.5", *options]) == 0
    request = metadata.read("a.png").request
    assert request.guidance == (4.0, 3.0)
    assert (request.negative_prompts, request.true_cfg_scale) == (("dull",), 2.0)
    assert (request.prompts_2, request.max_sequence_length, request.sigmas) == (("b",), 3, (1.0, 0.5))


def test_single_files(opened: list) -> None:
    files = ["--transformer", "t.safetensors", "--vae", "v.safetensors", "--clip", "c", "--t5", "x"]
    assert main(["generate", "a", "-o", "a.png", *files, "--device", "cpu", *FAST]) == 0
    names = {"transformer": "t.safetensors", "vae": "v.safetensors", "clip": "c", "t5": "x"}
    assert opened == [(None, {**names, "device": "cpu"})]


def test_several_images_have_seeds_and_names_of_their_own(opened: Any) -> None:
    assert main(["generate", "a", "-n", "3", "--seed", "5", "-o", "{seed}_{index:02}.png", *FAST]) == 0
    assert sorted(p.name for p in Path().iterdir()) == ["5_00.png", "6_01.png", "7_02.png"]
    assert main(["generate", "a", "--seed", "6", "-o", "alone.png", *FAST]) == 0
    assert np.array_equal(pixels("alone.png"), pixels("6_01.png"))
    assert main(["generate", "a", "-n", "2", "-o", "random.png", *FAST]) == 0
    seeds = [metadata.read(name).seed for name in ("random.png", "random-1.png")]
    assert seeds[0] != seeds[1]


def test_files_are_kept_unless_overwrite_is_asked_for(opened: Any) -> None:
    for seed in ("1", "2"):
        assert main(["generate", "a", "-o", "a.png", "--seed", seed, *FAST]) == 0
    assert [metadata.read(name).seed for name in ("a.png", "a-1.png")] == [1, 2]
    assert main(["generate", "a", "-o", "a.png", "--seed", "3", "--overwrite", *FAST]) == 0
    assert metadata.read("a.png").seed == 3
    assert main(["generate", "a", "-o", "a.png", "--seed", "4", "-n", "3", "--overwrite", *FAST]) == 0
    assert [metadata.read(name).seed for name in ("a.png", "a-1.png", "a-2.png", "a-3.png")] == [4, 2, 5, 6]


def test_overwrite_spares_what_a_batch_made_before_it_was_stopped(opened: Any) -> None:
    def run(prompts: str) -> dict[str, str]:
        Path("p.txt").write_text(prompts)
        assert main(["generate", "--prompts", "p.txt", "-o", "x.png", "--seed", "1", "--overwrite", *FAST]) == 0
        return {path.name: metadata.read(path).prompt for path in Path().glob("x*.png")}

    both = {"x.png": "a", "x-1.png": "b"}
    assert run("a\nb\n") == both
    Path("x-1.png").unlink()
    assert run("a\nb\n") == both
    assert run("c\n") == {"x.png": "c", "x-1.png": "b"}  # what another batch made is replaced


def test_a_folder_as_output(opened: Any) -> None:
    assert main(["generate", "a fox!", "-o", "new/", "--seed", "1", *FAST]) == 0
    assert Path("new/a-fox-1.png").is_file()


def test_no_metadata(opened: Any) -> None:
    assert main(["generate", "a secret", "-o", "a.png", "--no-metadata", *FAST]) == 0
    assert b"secret" not in Path("a.png").read_bytes()


def test_json(opened: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "ein Füchslein", "-n", "2", "--seed", "1", "-o", "a.png", "--json", *FAST]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [image["path"] for image in result["images"]] == ["a.png", "a-1.png"]
    assert result["images"][1]["record"]["request"]["seeds"] == [2]
    assert result["images"][0]["record"]["timings"]["total"] > 0


def test_dry_run_runs_nothing(opened: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a fox", "--seed", "7", "--dry-run", "--width", "70", "--height", "32"]) == 0
    said = capsys.readouterr().out
    assert "a fox" in said
    assert "64x32" in said
    assert "28 steps" in said
    assert "a-fox-7.png" in said
    assert list(Path().iterdir()) == []
    assert main(["generate", "a fox", "--seed", "7", "--dry-run", "-o", "new/a.png"]) == 0
    assert list(Path().iterdir()) == []
    capsys.readouterr()
    assert main(["generate", "a fox", "--seed", "7", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"][0]["record"]["timings"] is None


def test_cache(opened: Any, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "a", "--seed", "1", "--cache", "cache", "--cache-size", "1MB", *FAST]
    assert main([*command, "-o", "a.png"]) == 0
    assert "from the cache" not in capsys.readouterr().out
    assert main([*command, "-o", "b.png"]) == 0
    assert "from the cache" in capsys.readouterr().out
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    assert main(["generate", "a", "--cache", "other", "-o", "c.png", *FAST]) == 0
    assert not Path("other").exists()


def test_a_folder_from_disk(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--model", str(folder), "--device", "cpu"]
    assert main(["generate", "a fox", "-o", "a.png", *options, "--precision", "fp32", *FAST]) == 0
    record = metadata.read("a.png")
    assert {part.source for part in record.parts} == {"tiny"}
    assert record.variant == "kontext"
    assert str(folder.parent) not in record.to_json()
    assert main(["generate", "--from", "a.png", "-o", "b.png", *options]) == 0
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    files = ["--transformer", str(folder / "transformer"), "--vae", str(folder / "vae"), "--tokenizers", str(folder)]
    files += ["--clip", str(folder / "text_encoder"), "--t5", str(folder / "text_encoder_2"), "--variant", "kontext"]
    options = ["--precision", "fp32", "--seed", str(record.seed), "--device", "cpu"]
    assert main(["generate", "a fox", "-o", "c.png", *files, *options, *FAST]) == 0
    assert np.array_equal(pixels("a.png"), pixels("c.png"))


# --- batches ------------------------------------------------------------------------------------


def test_batch_resumes(opened: Any, capsys: pytest.CaptureFixture[str]) -> None:
    Path("p.txt").write_text("a\nb\na\n")
    command = ["generate", "--prompts", "p.txt", "-o", "out/{prompt}.png", "--seed", "1", *FAST]
    assert main(command) == 0
    assert sorted(p.name for p in Path("out").iterdir()) == ["a-1.png", "a.png", "b.png", "results.jsonl"]
    Path("out/b.png").unlink()
    before = Path("out/a.png").stat().st_mtime_ns
    capsys.readouterr()
    assert main(command) == 0
    said = capsys.readouterr()
    assert "2 of 3 images are in out/results.jsonl already" in said.err
    assert said.out.startswith("out/b.png")
    assert said.out.count("\n") == 1
    assert Path("out/a.png").stat().st_mtime_ns == before
    opened.clear()  # now nothing is left to do, and no model is opened for it
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"images": [], "failed": 0}
    assert not opened
    assert len(list(Path("out").iterdir())) == 4


def test_batch_from_jsonl_goes_on_after_a_failure(opened: Any, capsys: pytest.CaptureFixture[str]) -> None:
    requests = [
        {"id": "good", "prompt": "a", "seed": 1},
        {"id": "bad", "prompt": "b", "image": "absent.png"},
        {"id": "other", "prompt": "c", "width": 48, "seed": 3},
    ]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, requests)))
    assert main(["generate", "--prompts", "p.jsonl", "-o", "{seed}.png", *FAST]) == 1
    said = capsys.readouterr().err
    assert "bad: image: no file absent.png" in said
    assert "1 of 3 images failed" in said
    assert pixels("3.png").shape == (32, 48, 3)
    results = [json.loads(line) for line in Path("results.jsonl").read_text().splitlines()]
    assert [(r["name"], "error" in r) for r in results] == [("good", False), ("bad", True), ("other", False)]


# --- edit ---------------------------------------------------------------------------------------


def test_edit(opened: Any) -> None:
    photo("photo.png")
    assert main(["edit", "photo.png", "make it winter", "-o", "a.png", "--seed", "1", "--steps", "2"]) == 0
    record = metadata.read("a.png")
    assert record.request.mode == "edit"
    assert [p.name for p in record.request.pictures] == ["photo.png"]
    assert b"compositeWithTrainedAlgorithmicMedia" in Path("a.png").read_bytes()


def test_the_prompt_may_stand_after_options(opened: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["edit", photo("photo.png"), "--steps", "2", "a fox", "-o", "a.png"]) == 0
    assert main(["generate", "--steps", "2", "a fox", "-o", "b.png"]) == 0
    assert metadata.read("a.png").prompt == metadata.read("b.png").prompt == "a fox"
    assert main(["edit", "photo.png", "--steps", "2", "a", "fox"]) == 2
    assert "unrecognized arguments: a fox" in capsys.readouterr().err
    assert main(["edit", "photo.png", "a fox", "--step"]) == 2


def test_edit_inside_a_mask_keeps_the_rest(opened: Any) -> None:
    photo("photo.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[16:32, 16:32] = 255
    Image.fromarray(mask).save("mask.png")
    command = ["edit", "photo.png", "a fern", "--mask", "mask.png", "--crop", "8", "-o", "a.png", "--steps", "2"]
    assert main([*command, "--width", "32", "--height", "32"]) == 0
    changed = (pixels("a.png") != pixels("photo.png")).any(axis=2)
    assert changed[20:28, 20:28].any()
    assert not changed[48:].any()
    assert metadata.read("a.png").request.options["padding_mask_crop"] == 8


# --- repeat -------------------------------------------------------------------------------------


def test_from_repeats_an_image(opened: list, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--guidance", "4,2", "--negative-prompt", "dull", "--true-cfg-scale", "2"]
    assert main(["generate", "a fox", "-o", "a.webp", *options, *FAST]) == 0
    assert main(["generate", "--from", "a.webp", "-o", "b.png"]) == 0
    assert np.array_equal(pixels("a.webp"), pixels("b.png"))
    assert "b.png has the same pixels as a.webp" in capsys.readouterr().out
    assert metadata.read("b.png") == metadata.read("a.webp")
    same = {"precision": "fp32", "backend": "eager", "device": "cpu", "dtype": torch.float32, "variant": "kontext"}
    assert opened[1] == ("somebody/tiny", same | {"recipe": RECIPES["fp32"]})
    assert main(["generate", "--from", "a.webp", "-o", "c.png", "--precision", "bf16"]) == 0
    assert opened[2] == ("somebody/tiny", same | {"precision": "bf16"})


def test_from_finds_the_pictures_and_checks_them(opened: Any, capsys: pytest.CaptureFixture[str]) -> None:
    Path("sub").mkdir()
    photo("sub/photo.png")
    photo("sub/other.png", seed=1)
    edit = ["edit", "sub/photo.png", "a", "--reference", "sub/other.png", "-o", "sub/a.png", "--steps", "2"]
    assert main(edit) == 0
    assert main(["generate", "--from", "sub/a.png", "-o", "b.png"]) == 0
    assert np.array_equal(pixels("sub/a.png"), pixels("b.png"))

    Path("sub/other.png").rename("moved.png")
    capsys.readouterr()
    assert main(["generate", "--from", "sub/a.png"]) == 1
    assert "sub/a.png needs its reference picture (other.png): name it with --image" in capsys.readouterr().err
    assert main(["generate", "--from", "sub/a.png", "--image", "sub/photo.png", "--image", "moved.png"]) == 0
    assert np.array_equal(pixels("sub/a.png"), pixels("a-repeated.png"))
    assert main(["generate", "--from", "sub/a.png", "--image", "moved.png"]) == 1
    assert "moved.png is not the reference picture" in capsys.readouterr().err
    named = ["generate", "--from", "sub/a.png", "--image", "sub/photo.png", "--image"]
    Path("cut.png").write_bytes(Path("moved.png").read_bytes()[:200])
    assert main([*named, "cut.png"]) == 1
    assert "reference: cut.png is damaged or cut short" in capsys.readouterr().err
    assert main([*named, "moved.png", "--image", "cut.png"]) == 1
    assert "sub/a.png was not made from cut.png: leave it out" in capsys.readouterr().err


def test_from_finds_image_and_reference_of_a_masked_edit(opened: Any) -> None:
    pictures = [photo("photo.png"), "--mask", photo("mask.png", seed=2), "--reference", photo("other.png", seed=1)]
    assert main(["edit", *pictures, "a", "-o", "a.png", "--steps", "2"]) == 0
    named = ["--image", "photo.png", "--image", "other.png", "--mask", "mask.png"]
    assert main(["generate", "--from", "a.png", *named, "-o", "b.png"]) == 0
    assert np.array_equal(pixels("a.png"), pixels("b.png"))


def test_from_says_what_is_not_as_recorded(opened: Any, tiny: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a", "-o", "a.png", "--seed", "1", *FAST]) == 0
    before = tiny.parts
    tiny.parts = (Part("transformer", "other", "bfl", "cd" * 32), *before[1:])
    try:
        assert main(["generate", "--from", "a.png"]) == 0
        assert main(["generate", "a", "-o", "local.png", "--seed", "1", *FAST]) == 0
    finally:
        tiny.parts = before
    said = capsys.readouterr()
    was = before[0].identity[:12]
    assert f"not as recorded: transformer: recorded somebody/tiny ({was}), here other (cdcdcdcdcdcd)" in said.err
    assert "has the same pixels" in said.out
    assert main(["generate", "--from", "local.png"]) == 1
    said = capsys.readouterr()
    assert "local.png was made with transformer other, vae somebody/tiny" in said.err
    assert "say where that is with --model" in said.err
    assert main(["generate", "--from", "local.png", "--model", "folder"]) == 0


def test_from_owns_up_to_other_pixels(opened: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a", "-o", "a.png", "--seed", "1", *FAST]) == 0
    record = metadata.read("a.png")
    data = pixels("a.png").copy()
    data[0, 0, 0] ^= 1
    metadata.save(Image.fromarray(data), "forged.png", record)
    assert main(["generate", "--from", "forged.png"]) == 1
    assert "forged-repeated.png does not have the pixels of forged.png: nothing" in capsys.readouterr().err


@pytest.mark.parametrize("more", [["a prompt"], ["--seed", "1"], ["-n", "2"], ["--width", "64"], ["--crop"]])
def test_from_takes_no_other_request(opened: Any, capsys: pytest.CaptureFixture[str], more: list[str]) -> None:
    assert main(["generate", *more, "--from", "a.png"]) == 1
    assert "--from repeats" in capsys.readouterr().err


# --- info ---------------------------------------------------------------------------------------


def test_info_of_an_image(opened: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a fox", "-o", "a.jpg", "--seed", "7", *FAST]) == 0
    capsys.readouterr()
    assert main(["info", "a.jpg"]) == 0
    assert "'a fox', seed 7" in capsys.readouterr().out
    assert main(["info", "a.jpg", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["request"]["prompts"] == ["a fox"]
