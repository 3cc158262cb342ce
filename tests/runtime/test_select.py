"""Which backend is chosen, by what runs here and by recorded measurements, and what is said about the others."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import fluxkiln
from fluxkiln import cli_model, cmd_generate, load, select
from fluxkiln.bench import step
from fluxkiln.cli import main
from fluxkiln.config import DEV
from fluxkiln.engines.store import Stored
from fluxkiln.kernels import EAGER, RefusedError, registry
from fluxkiln.kernels.recipe import RECIPES, Recipe
from fluxkiln.load import default_device
from fluxkiln.measurements import keep, local_folder
from fluxkiln.plan import plan_of
from fluxkiln.record import Part, Record
from fluxkiln.select import Choice, choose
from fluxkiln.workload import Tokens

CPU, GPU = torch.device("cpu"), torch.device("cuda")
CARD = "NVIDIA GeForce RTX 4090 (sm_89)"
USUAL = Tokens(512, 4096)
ENGINE = Stored(Path("store/0123"), None, None)


def test_there_is_one_refusal() -> None:
    assert select.RefusedError is registry.RefusedError is RefusedError


def test_auto_takes_eager_on_a_cpu_and_says_why_not_the_others() -> None:
    choice = choose("auto", DEV, RECIPES["bf16"], CPU, torch.bfloat16, find=lambda: "no GPU")
    assert (choice.backend, choice.why) == ("eager", "the only one that can run this here")
    assert choice.ops is not None
    assert choice.reasons["trt"] == "no GPU"
    assert choice.reasons["triton"].startswith("on cpu its kernels are interpreted")
    assert choice.notices == ()


# --- a GPU's measurements, without the GPU ------------------------------------------------------


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine on which Triton could run, as far as the choice is concerned; its user's cache is empty."""
    monkeypatch.setattr(select, "versions", lambda device: {"gpu": CARD})
    monkeypatch.setattr(registry, "refuse_model", lambda *args: None)
    monkeypatch.setattr(select, "_ops", lambda name, recipe, device: EAGER)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def measured(backend: str, seconds: float, tokens: Tokens = USUAL) -> None:
    """What `fluxkiln bench step` writes to this user's folder."""
    result: dict[str, Any] = {
        "benchmark": "step",
        "config": asdict(DEV),
        "tokens": asdict(tokens),
        "dtype": "bf16",
        "precision": "fp8",
        "backend": backend,
        "versions": {"gpu": CARD},
        "contestants": {"fluxkiln": {"seconds": 9.0}, "fluxkiln step": {"seconds": seconds}},
    }
    keep(result, local_folder())


def chosen(
    backend: str = "auto", recipe: Recipe = RECIPES["fp8"], found: Stored | str = ENGINE, **options: bool
) -> Choice:
    return choose(backend, DEV, recipe, GPU, torch.bfloat16, find=lambda: found, **options)


@pytest.mark.usefixtures("card")
def test_an_engine_is_first_where_nothing_was_timed() -> None:
    choice = chosen()
    assert (choice.backend, choice.engine, choice.ops) == ("trt", ENGINE, None)
    assert choice.why.startswith("first in the fixed order")
    assert choice.reasons == {
        "triton": f"it was not timed beside trt on {CARD}",
        "eager": "it would emulate fp8 in wider arithmetic, slower than bf16",
    }
    assert chosen(found="the store is empty").backend == "triton"


@pytest.mark.usefixtures("card")
def test_an_engine_timed_slower_than_triton_is_refused() -> None:
    measured("trt", 0.25)
    measured("triton", 0.2)
    choice = chosen()
    assert (choice.backend, choice.engine) == ("triton", None)
    assert choice.ops is not None
    assert choice.measured == {"trt": 1.25}
    slower = f"its step takes 1.25 times as long as triton's on {CARD} (0.25 s against 0.2 s)"
    assert choice.reasons["trt"] == slower
    with pytest.raises(RefusedError) as refusal:
        chosen("trt")
    assert str(refusal.value) == (
        f"backend trt is slower than triton: {slower}: take backend triton, time both again with "
        "`fluxkiln bench step`, or name the engine (--engine 0123) to run it all the same"
    )
    instead = chosen("trt", fallback=True)
    assert (instead.backend, instead.engine, instead.measured) == ("triton", None, {"trt": 1.25})
    assert instead.reasons == {"trt": slower}
    named = chosen("trt", insist=True)
    assert (named.backend, named.engine, named.measured) == ("trt", ENGINE, {"triton": 0.8})
    for each in (instead, named):
        assert each.notices == (f"backend trt is slower than triton: {slower}",)
    measured("triton", 0.24)  # measured again: now within 5 %
    assert chosen().backend == "trt"
    assert chosen("trt").notices == ()


@pytest.mark.usefixtures("card")
def test_who_names_an_engine_or_measures_it_runs_it_slower_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it can be timed again, and an image repeated."""
    measured("trt", 0.25)
    measured("triton", 0.2)
    monkeypatch.setattr("fluxkiln.engine.find", lambda *args: ENGINE)
    assert step._choose("trt", DEV, "fp8", GPU, "bf16").backend == "trt"
    told: list[tuple[str, bool]] = []
    monkeypatch.setattr(
        load, "choose", lambda name, *args, insist: told.append((name, insist)) or chosen("trt", insist=insist)
    )
    monkeypatch.setattr(load, "default_device", lambda device: GPU)
    monkeypatch.setattr("fluxkiln.engine.supply", lambda *args: pytest.fail("far enough"))
    with pytest.raises(RefusedError, match="is slower than triton"):
        fluxkiln.load_transformer("shapes", backend="trt")
    for backend in ("trt", "auto"):
        with pytest.raises(pytest.fail.Exception, match="far enough"):
            fluxkiln.load_transformer("shapes", backend=backend, engine="0123")
    assert told == [("trt", False), ("trt", True), ("trt", True)]


@pytest.mark.usefixtures("card")
def test_an_engine_is_not_compared_with_what_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    measured("trt", 0.25)
    measured("triton", 0.2)
    monkeypatch.setattr(registry, "refuse_model", lambda *args: "Triton is not installed")
    assert chosen("trt").notices == ()


@pytest.mark.usefixtures("card")
def test_measurements_of_other_models_and_sizes_do_not_decide() -> None:
    measured("trt", 0.25)
    measured("triton", 0.05, Tokens(512, 1024))
    assert chosen().backend == "trt"
    measured("triton", 0.05)
    assert chosen(recipe=RECIPES["bf16"]).backend == "trt"
    assert chosen(recipe=RECIPES["fp8"]).backend == "triton"


@pytest.mark.usefixtures("card")
def test_what_was_asked_for_and_cannot_run_is_refused_or_falls_back_loudly() -> None:
    with pytest.raises(RefusedError, match=r"^backend trt: the store is empty$"):
        chosen("trt", found="the store is empty")
    choice = chosen("trt", found="the store is empty", fallback=True)
    assert choice.backend == "eager"
    assert choice.notices == ("backend trt cannot run this: the store is empty",)


# --- the whole way, on a CPU --------------------------------------------------------------------


def test_trt_refuses_in_one_sentence_without_a_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = ["-o", str(tmp_path / "a.png"), "--device", "cpu"]
    assert main(["generate", "a red circle", "--backend", "trt", *output]) == 1
    assert capsys.readouterr().err == (
        "fluxkiln: backend trt: an engine runs on an NVIDIA GPU, the model is to run on cpu\n"
    )
    with pytest.raises(ValueError, match="engine is for backend trt, got backend 'eager'"):
        fluxkiln.load_transformer("shapes", backend="eager", engine="0123", device="cpu")


def test_a_fallback_is_in_the_record(tmp_path: Path) -> None:
    pipe = fluxkiln.Pipeline.from_pretrained("shapes", backend="trt", fallback=True, device="cpu")
    record = pipe("a red circle", seed=1, dry_run=True).record
    assert record.backend == "eager"
    assert record.reasons == {"trt": "an engine runs on an NVIDIA GPU, the model is to run on cpu"}
    assert record.notices == (f"backend trt cannot run this: {record.reasons['trt']}",)
    automatic = fluxkiln.Pipeline.from_pretrained("shapes", device="cpu")("a red circle", seed=1, dry_run=True).record
    assert automatic.why == "the only one that can run this here"
    assert automatic.key == record.key  # how a backend was chosen does not decide the bytes


def test_a_size_that_the_backend_does_not_take_is_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe = fluxkiln.Pipeline.from_pretrained("shapes", device="cpu")
    asked = []
    monkeypatch.setattr(pipe.transformer, "refuse", lambda image, text: asked.append((image, text)) or "built for less")
    photo = Image.new("RGB", (64, 32))
    with pytest.raises(ValueError, match="built for less"):
        pipe("a red circle", image=[photo, photo], width=96, height=64, max_sequence_length=24, seed=1, dry_run=True)
    assert asked == [(6 * 4 + 2 * 6 * 3, 24)]  # the references are seen as 96 x 48


def test_repeating_takes_the_recorded_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice is replayed, not made again."""
    record = fluxkiln.Pipeline.from_pretrained("shapes", device="cpu")("a red circle", seed=1, dry_run=True).record
    engine = Part("engine", "0123456789ab", "tensorrt_rtx 1.7.1.116 sm_89", "ef" * 32)
    record = Record.from_json(replace(record, backend="trt", parts=(*record.parts, engine)).to_json())
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        fluxkiln.Pipeline, "from_pretrained", lambda model, **options: asked.update(options, model=model)
    )
    parser = argparse.ArgumentParser()
    cmd_generate.add_arguments(parser)
    cli_model.open_pipeline(parser.parse_args(["--from", "a.png"]), record)
    assert (asked["model"], asked["backend"], asked["engine"]) == ("shapes", "trt", "0123456789ab")
    cli_model.open_pipeline(parser.parse_args(["--from", "a.png", "--backend", "eager"]), record)
    assert asked["backend"] == "eager"
    other = replace(record, parts=(*record.parts[:-1], replace(engine, identity="00" * 32)))
    assert record.differences(other) == [
        "engine: recorded 0123456789ab (efefefefefef), here 0123456789ab (000000000000)"
    ]
    assert record.key != other.key


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "foo"}, "device must be cuda, cuda:N or cpu, got 'foo'"),
        ({"device": "cpu", "dtype": torch.int8}, "dtype must be torch.bfloat16 or torch.float32, got torch.int8"),
        ({"device": "cpu", "dtype": torch.float16}, "overflows float16"),
    ],
)
def test_what_cannot_be_computed_in_or_on_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fluxkiln.load_transformer("shapes", **options)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8", "nvfp4"])
def test_the_plan_is_what_the_operations_describe(precision: str) -> None:
    """Not what was asked for: an operation that describes itself otherwise shows in the record."""
    model = fluxkiln.load_transformer("shapes", precision=precision, backend="eager", device="cpu")
    before = {layer.name: layer for layer in plan_of(model)}
    weights = {layer.format for layer in before.values() if layer.weights and "blocks" in layer.name}
    assert weights == ({"bf16", "fp8", "nvfp4"} if precision == "nvfp4" else {precision})
    assert all(layer.emulated == (layer.format in ("fp8", "nvfp4")) for layer in before.values())
    assert before["embed"].format == before["final_norm"].format == ("fp32" if precision == "fp32" else "bf16")
    describe = model.ops.describe
    model.ops = replace(
        model.ops,
        describe=lambda op, layer=None: replace(describe(op, layer), implementation="torch" if op == "linear" else "x"),
    )
    after = {layer.name: layer.implementation for layer in plan_of(model)}
    assert {name for name, who in after.items() if who == "torch"} == {"embed", "final"}


def test_fp8_attention_shows_in_the_plan() -> None:
    recipe = replace(RECIPES["fp8"], attention="fp8")
    model = fluxkiln.load_transformer("shapes", precision="fp8", recipe=recipe, backend="eager", device="cpu")
    attention = [layer for layer in plan_of(model) if layer.op == "attention"]
    assert {(layer.format, layer.emulated) for layer in attention} == {("fp8", True)}


def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"device cuda:99: torch sees \d+ CUDA GPUs here"):
        default_device("cuda:99")
