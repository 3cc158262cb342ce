"""The whole protocol on the bundled model, with very few steps and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from fluxkiln.bench import image, peers, suite
from fluxkiln.bench.fidelity import read
from fluxkiln.checkpoint import open_checkpoint
from fluxkiln.cli import main
from fluxkiln.hub import resolve

BENCH = ["bench", "image"]
RUN = ["--steps", "2", "--limit", "1", "--device", "cpu"]
FEW = [*RUN, "--category", "single", "move"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eager in bf16."""
    out = tmp_path_factory.mktemp("runs") / "bf16"
    assert main([*BENCH, *FEW, "--backend", "eager", "--gpu-hour-price", "3.6", "--out", str(out)]) == 0
    return out


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_a_run_says_how_it_can_be_repeated(reference: Path) -> None:
    found = results(reference)
    record, rows = found["record"], found["items"]
    assert record["backend"] == "eager"
    assert {"torch", "fluxkiln"} <= record["versions"].keys()
    assert all(len(part["identity"]) == 64 for part in record["parts"])
    made = [json.loads(line) for line in (reference / "made.jsonl").read_text().splitlines()]
    assert [entry["key"] for entry in made] == [row["key"] for row in rows]
    prompt, edit = (entry["record"]["request"] for entry in made)
    assert prompt["seeds"] == [suite.load("shapes")[0].number]
    assert len(prompt["schedule"]) == 3
    assert len(edit["pictures"][0]["sha256"]) == 64
    for entry in made:
        timings = entry["record"]["timings"]
        parts = [*(timings[name] for name in ("text", "encode", "modulate", "decode")), *timings["steps"]]
        assert sum(parts) <= timings["total"]
    assert list(found["latency"]) == ["prompts", "edits"]
    for latency in found["latency"].values():  # of one picture each
        assert latency["cost_per_image"] == pytest.approx(latency["total"] * 0.001)


def test_fidelity_comes_with_its_noise_floor_and_step_errors(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    floor, out = tmp_path / "diffusers", tmp_path / "fp8"
    assert main([*BENCH, *FEW, "--peer", "diffusers", "--out", str(floor)]) == 0
    capsys.readouterr()
    options = ["--reference", str(reference), "--floor", str(floor), "--step-errors", "2", "--out", str(out)]
    assert main([*BENCH, *FEW, "--precision", "fp8", "--backend", "eager", *options]) == 0
    found = results(out)
    assert found["fidelity"]["n"] == found["noise_floor"]["n"] == 2
    # The same noise, sizes and schedule: only roundings differ.
    assert found["noise_floor"]["psnr"] > 40
    assert found["fidelity"]["psnr"] < found["noise_floor"]["psnr"]
    assert 1e-3 < found["step_errors"]["1 steps"] < 0.2
    printed = capsys.readouterr().out
    assert "noise_floor: n 2" in printed
    assert image.SHAPES_NOTE in printed


@pytest.mark.parametrize(("guided", "length"), [(True, 512), (False, 256)])
def test_a_peer_reads_as_many_tokens_as_we_do(guided: bool, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding is not masked, so another length is another picture; only schnell has no guidance."""
    parts = {
        "transformer": SimpleNamespace(config=SimpleNamespace(guidance_embeds=guided)),
        "tokenizer_2": SimpleNamespace(model_max_length=512),
        "vae": SimpleNamespace(config=SimpleNamespace(sample_size=1024)),
    }
    theirs = SimpleNamespace(**parts, set_progress_bar_config=lambda disable: None)
    theirs.to = lambda device: theirs
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda folder, dtype: theirs)
    pipe = peers.DiffusersPipeline("shapes", device="cpu")
    assert pipe.length == length
    assert json.loads(pipe("a", dry_run=True).record.to_json())["request"]["num_inference_steps"] == (
        28 if guided else 4
    )


def test_a_peer_run_resumes(reference: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert main([*BENCH, *RUN, "--category", "single", "--peer", "diffusers", "--out", str(tmp_path)]) == 0
    made = [json.loads(line)["record"] for line in (tmp_path / "made.jsonl").read_text().splitlines()]
    assert len(made) == 1
    assert made[0]["parts"] == results(reference)["record"]["parts"][:4]  # the same weights
    options = ["--peer", "diffusers", "--precision", "fp32", "--out", str(tmp_path)]
    assert main([*BENCH, *RUN, "--category", "single", *options]) == 0
    assert len((tmp_path / "made.jsonl").read_text().splitlines()) == 2  # in another precision: made again


def test_other_sizes_and_turns(tmp_path: Path) -> None:
    options = ["--suite", "shapes-turns", "--category", "turn 1", "turn 2", "--size", "96x64", "--backend", "eager"]
    assert main([*BENCH, *RUN, *options, "--step-errors", "2", "--out", str(tmp_path)]) == 0
    assert results(tmp_path)["step_errors"] == {"1 steps": 0, "4 steps": 0}  # from eager in bf16, which this is
    assert {read(path).shape for path in (tmp_path / "images").glob("*.png")} == {(64, 96, 3)}
    first, second = ((json.loads(line)) for line in (tmp_path / "made.jsonl").read_text().splitlines())
    assert first["record"]["request"]["pictures"] != second["record"]["request"]["pictures"]


def test_single_files_make_the_pictures_of_the_whole_model(reference: Path, tmp_path: Path) -> None:
    """As ComfyUI has them, for runs and ablations."""
    whole, single = resolve("shapes"), tmp_path / "flux1-shapes.safetensors"
    checkpoint = open_checkpoint(whole)
    save_file({f"model.diffusion_model.{name}": checkpoint.tensor(name) for name in checkpoint.names}, single)
    files = ["--transformer", str(single), "--variant", "kontext"]
    files += [f"--{part}={whole}" for part in ("vae", "clip", "t5", "tokenizers")]
    out = tmp_path / "run"
    assert main([*BENCH, *FEW, *files, "--backend", "eager", "--reference", str(reference), "--out", str(out)]) == 0
    found = results(out)
    assert found["fidelity"]["equal"] == found["fidelity"]["n"] == 2
    assert found["model"] == str(single)
    assert "note" not in found
    options = [*RUN, "--category", "single", "--format", "fp8", "--backend", "eager", "--out", str(out / "a.json")]
    assert main([*BENCH, "ablate", *files, *options]) == 0
    assert json.loads((out / "a.json").read_text())["rows"][0]["record"]["parts"] == found["record"]["parts"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vae", "ae.safetensors"], "single files need --transformer FILE"),
        (["--transformer", "a", "--model", "shapes"], "give either --model or single files, not both (--transformer)"),
        (["--transformer", "a", "--peer", "diffusers"], "--peer opens a --model in diffusers' layout, not single"),
        (["--variant", "kontext", "--peer", "diffusers"], "and --variant are of our own backends, not of a --peer"),
    ],
)
def test_single_files_are_whole_and_instead_of_a_model(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*BENCH, *RUN, *options, "--out", str(tmp_path / "run")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_ablation_is_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "ablation.json"
    options = [*RUN, "--category", "single", "--format", "nvfp4", "--device", "cpu", "--backend", "eager"]
    assert main([*BENCH, "ablate", *options, "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == image.SHAPES_NOTE
    rows = json.loads(out.read_text())["rows"]
    assert [line[:24].strip() for line in lines[1:-1]] == [row["layers"] for row in rows]
    assert [row["layers"] for row in rows] == [
        "unquantised",
        *("nvfp4 double qkv", "nvfp4 double proj", "nvfp4 double mlp in", "nvfp4 double mlp out"),
        *("nvfp4 single linear1", "nvfp4 single linear2", "nvfp4 all"),
    ]
    assert {"parts", "backend", "plan", "device", "versions"} <= rows[0]["record"].keys()
    errors = [row["one_step_error"] for row in rows[1:]]
    assert min(errors) > 1e-3  # every row quantises something
    assert errors[-1] > 0.9 * max(errors)
    assert all(row["of"] == 1 for row in rows)
