"""Training: the whole command from nothing to a folder, and what goes on where it was stopped."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from random import Random
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from shapes import autoencoder as ae
from shapes import data, denoiser, model, plot, portions, reading, rollouts, train, workers
from shapes.fast import Fast

from fluxkiln import Pipeline
from fluxkiln.autoencoder import Autoencoder
from fluxkiln.hub import resolve

TOOLS = Path(train.__file__).parents[1]
CPU = torch.device("cpu")


def test_the_rate_falls_to_zero() -> None:
    def rate(step: int, first: int = 0, steps: int = 1500) -> float:
        args = Namespace(steps=steps, own_from=1000)
        return denoiser.learning_rate(step, first, args) / denoiser.LEARNING_RATE

    assert [rate(step) for step in (0, 49, 99, 999)] == pytest.approx([0.01, 0.5, 1, 1])
    assert [rate(step) for step in (1000, 1250, 1499)] == pytest.approx([1, 0.5, 0.002])
    assert [rate(step, first=1000) for step in (1000, 1250, 1499)] == pytest.approx([0.005, 0.25, 0.001])
    assert rate(400, steps=500) == pytest.approx(1)  # a run that is to go on later


def test_curves_fall_and_rise_where_the_numbers_do(tmp_path: Path) -> None:
    # At 60 the run was stopped, and went on from 1.
    losses = [{"stage": "reading", "step": step, "loss": 100.0 / step} for step in (1, 30, 30, 60, 100)]
    losses.insert(2, {"stage": "reading", "step": 60, "loss": 90.0})
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in losses))
    judged = [
        {"snapshot": f"average-{step:06}", "each": 9, "single": share} for step, share in ((200, 1.0), (100, 0.0))
    ]
    (tmp_path / "accuracy.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in judged))
    plot.curves(tmp_path)
    picture = np.asarray(Image.open(tmp_path / "loss.png").convert("RGB"))
    assert picture.shape == (2 * plot.HEIGHT, plot.WIDTH, 3)
    for panel, falls in zip(np.split(picture, 2), (True, False), strict=True):
        line = (panel == plot.COLORS[0]).all(-1)
        heights = [np.flatnonzero(line[:, x]).mean() for x in range(plot.LEFT + 5, plot.WIDTH - plot.RIGHT - 5, 50)]
        assert heights == sorted(heights, reverse=not falls)
        assert max(heights) - min(heights) > 0.8 * (plot.HEIGHT - plot.TOP - plot.BOTTOM)


def test_no_run_is_mistaken_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"step": 50}, tmp_path / "denoiser.pt")

    def refused(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["train", "--run", str(tmp_path), "--out", str(tmp_path / "out"), *options])
        with pytest.raises(SystemExit):
            train.main()
        return capsys.readouterr().err

    assert f"--steps is 49, but the run in {tmp_path} has come to step 50 already" in refused("--steps", "49")
    for option, value, wanted in (
        ("--start", str(tmp_path), "must be the folder of a pipeline that this command wrote"),
        ("--start", "no/pipeline", "must be the folder of a pipeline that this command wrote"),
        ("--device", "gpu", "must be cpu, or cuda where there is a GPU, got 'gpu'"),
        *((option, "0", "must be at least 1") for option in ("--workers", "--steps", "--polish-steps")),
    ):
        assert wanted in refused(option, value)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "which", lambda name: None)
        assert "--compile takes a C++ compiler" in refused("--compile")
    assert "--own-from must not come before --edits-from" in refused("--edits-from", "5", "--own-from", "4")
    assert "goes on at step 2000, so --steps must be more, got 9" in refused("--start", "shapes", "--steps", "9")
    (tmp_path / "autoencoder-raw.pt").touch()
    assert f"another run has begun in {tmp_path}" in refused("--start", "shapes")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["autoencoder-raw.pt", "denoiser.pt"]


@pytest.mark.parametrize("stage", [reading, ae])
def test_a_stage_that_was_stopped_goes_on_where_it_was(
    stage: ModuleType, tokenizers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, save = [], workers.save
    monkeypatch.setattr(workers, "SAVE_EVERY", 2)
    monkeypatch.setattr(reading, "BATCH", 4)
    monkeypatch.setattr(stage, "average_gradients", steps.append)  # one for each step; there are no other workers

    def run(folder: str) -> Path:
        out = tmp_path / folder / "made.pt"
        out.parent.mkdir(exist_ok=True)
        where = (tokenizers.parent, out) if stage is reading else (out,)
        stage.train(0, *where, 4, 0, CPU, lambda **entry: None)
        return out

    def save_and_stop(state: object, path: Path) -> None:
        save(state, path)
        raise KeyboardInterrupt

    whole = torch.load(run("whole"))
    with monkeypatch.context() as patch:
        patch.setattr(workers, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run("stopped")
    assert [path.name for path in (tmp_path / "stopped").iterdir()] == ["made.partial"]
    out = run("stopped")
    assert [path.name for path in out.parent.iterdir()] == ["made.pt"]
    assert len(steps) == 4 + 2 + 2
    resumed = torch.load(out)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_the_denoiser_goes_on_where_it_was_on_its_own_paths_too(
    tokenizers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "SAVE_EVERY", 2)
    monkeypatch.setattr(data, "CHUNK", 8)
    monkeypatch.setattr(denoiser, "FIRST_CHUNKS", 1)
    monkeypatch.setattr(rollouts, "SAMPLES", 8)
    rolled: list[torch.Tensor] = []
    roll = rollouts.Rollouts.roll

    def watched(self: rollouts.Rollouts, averaged: model.Denoiser, predict: Fast, rng: Random) -> None:
        rolled.append(averaged.t5.shared.weight.clone())
        assert predict.model is averaged
        roll(self, averaged, predict, rng)

    monkeypatch.setattr(rollouts.Rollouts, "roll", watched)
    monkeypatch.setattr(rollouts, "STEPS", (2, 3))
    monkeypatch.setattr(denoiser, "average_gradients", lambda parameters: None)
    monkeypatch.setattr(portions, "TOKENS", 250)
    own = [portions.Portion(kinds, 0.4, own=True) for kinds in (portions.PROMPTS, portions.SHORT_EDITS)]
    monkeypatch.setattr(denoiser, "portions_of", lambda step, rank, args: own)
    torch.manual_seed(0)
    encoder, t5 = Autoencoder(model.AUTOENCODER).state_dict(), model.Denoiser(tokenizers).t5.state_dict()

    def run(name: str, steps: int) -> dict:
        folder = tmp_path / name
        if not folder.exists():
            shutil.copytree(tokenizers, folder / "tokenizers")
            torch.save(encoder, folder / "autoencoder.pt")
            torch.save(t5, folder / "t5.pt")
        # Until `own_from`, the rate does not depend on how many steps there will be.
        args = Namespace(run=folder, steps=steps, seed=0, device=CPU, compile=False, edits_from=0, own_from=99)
        denoiser.train(0, args, lambda **entry: None)
        return torch.load(folder / "denoiser.pt")

    whole = run("whole", 4)
    assert run("stopped", 2)["step"] == 2
    resumed = run("stopped", 4)
    assert whole["step"] == resumed["step"] == 4
    assert all(torch.equal(tensor, resumed["model"][name]) for name, tensor in whole["model"].items())
    assert all(map(torch.equal, whole["average"], resumed["average"]))
    assert len(rolled) == 3 * 2 * 2  # for prompts, short and long edits, at steps 0 and 2 of each run
    assert torch.equal(rolled[3], rolled[9])
    assert not torch.equal(rolled[0], rolled[3])  # by the averaged weights as they are then


def test_a_run_that_begins_from_a_pipeline_has_its_weights(tmp_path: Path) -> None:
    """Those of the bundled model, to the bit, and they can be written again."""
    bundled, run = resolve("shapes"), tmp_path / "run"
    run.mkdir()
    train.begin_from(bundled, run, step=10)
    state = torch.load(run / "denoiser.pt")
    assert (state["step"], state["first"]) == (10, 10)
    torch.save(state["average"], tmp_path / "average.pt")
    shutil.copytree(run / "tokenizers", tmp_path / "again")
    autoencoder = ae.load(run / "autoencoder-whitened.pt")
    model.save_pipeline(tmp_path / "again", denoiser.load(run, tmp_path / "average.pt"), autoencoder)
    files = [path.relative_to(bundled) for path in bundled.rglob("*.safetensors")]
    assert len(files) == 4
    for file in files:
        shipped, written = load_file(bundled / file), load_file(tmp_path / "again" / file)
        assert shipped.keys() == written.keys()
        assert all(torch.equal(tensor, written[name]) for name, tensor in shipped.items())


@pytest.mark.long  # makes tokenizers, an autoencoder and thousands of latents from nothing
def test_one_command_trains_resumes_and_writes_a_pipeline(tmp_path: Path) -> None:
    def command(run: str, out: str, steps: int, *more: str) -> None:
        few = ("--reading-steps", "50", "--autoencoder-steps", "2", "--polish-steps", "2")
        late = ("--steps", str(steps), "--edits-from", "1", "--own-from", "2")
        folders = ("--run", str(tmp_path / run), "--out", str(tmp_path / out))
        subprocess.run([sys.executable, "-m", "shapes.train", *folders, *few, *late, *more], cwd=TOOLS, check=True)

    def logged(run: str) -> list[dict]:
        return [json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()]

    command("run", "out", 3)
    first = torch.load(tmp_path / "run" / "denoiser.pt")
    command("run", "out", 4)
    assert [entry["step"] for entry in logged("run") if entry["stage"] == "denoiser"] == [3, 4]
    assert [entry["of"] for entry in logged("run") if entry["stage"] == "denoiser"] == [3, 4]
    assert sum(entry["stage"] == "reading" for entry in logged("run")) == 1  # not done again
    assert (tmp_path / "run" / "loss.png").is_file()
    command("again", "better", 3, "--start", str(tmp_path / "out"))
    assert [(entry["stage"], entry["step"]) for entry in logged("again")] == [("denoiser", 3)]
    encoders = [model.load_pipeline(tmp_path / out)[1].encoder.state_dict() for out in ("out", "better")]
    assert all(torch.equal(tensor, encoders[1][name]) for name, tensor in encoders[0].items())
    last = torch.load(tmp_path / "run" / "denoiser.pt")
    assert (first["step"], last["step"]) == (3, 4)
    size = (model.PICTURE, model.PICTURE)
    snapshots = ("--run", str(tmp_path / "run"), "--each", "1", "--steps", "1")
    subprocess.run([sys.executable, "-m", "shapes.evaluate", *snapshots], cwd=TOOLS, check=True)
    judged = [json.loads(line) for line in (tmp_path / "run" / "accuracy.jsonl").read_text().splitlines()]
    assert [entry["snapshot"] for entry in judged] == ["average-000003", "average-000004"]
    assert Pipeline.from_pretrained(tmp_path / "out")("a red star", num_inference_steps=2).images[0].size == size
