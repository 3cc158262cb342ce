"""The step benchmark measures what it says: the right amount of work, of the same function, in honest bytes."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fluxkiln import measurements, workload
from fluxkiln.bench import step
from fluxkiln.bench.step import TINY, RandomWeights, Spec, agreement, spec_of, take_turns
from fluxkiln.cli import main
from fluxkiln.config import DEV, FILL
from fluxkiln.record import versions
from fluxkiln.workload import Tokens

SPEC = Spec(TINY, Tokens(5, 9, 4, batch=2), "fp32", "fp32", "eager", "cpu")


@pytest.fixture
def unmeasured_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory needs a new process for each contestant: seconds of imports."""
    monkeypatch.setattr(step, "memory", lambda spec, name: {"weights_bytes": 4, "working_bytes": 2, "peak_bytes": 6})


def parse(*arguments: str) -> Spec:
    parser = argparse.ArgumentParser()
    step.add_arguments(parser)
    return spec_of(parser.parse_args([*arguments, "--device", "cpu", "--backend", "eager"]))


def test_contestants_compute_the_same_function() -> None:
    with torch.inference_mode():
        tensors = dict(RandomWeights(TINY, torch.float32, "cpu"))
        velocities = [build(SPEC, tensors)[name]() for name, build in step.CONTESTANTS.items()]
    assert [v.shape for v in velocities] == [(2, 13, 16)] * 3
    assert agreement(velocities[1], velocities[0]) == 0
    assert agreement(velocities[0], velocities[2]) < 1e-5
    assert velocities[0].std() > 0.1


def test_weights_are_the_same_however_often_they_are_drawn() -> None:
    weights = RandomWeights(TINY, torch.bfloat16, "cpu")
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == TINY.tensor_shapes()
    assert all(torch.equal(weights[name], weights[name]) for name in weights)
    one, two = weights["double_blocks.0.img_attn.qkv.weight"], weights["double_blocks.1.img_attn.qkv.weight"]
    assert not torch.equal(one, two)


@pytest.mark.parametrize("precision", ["fp8", "nvfp4"])
def test_a_precision_quantises_the_blocks(precision: str) -> None:
    spec = dataclasses.replace(SPEC, dtype="bf16", precision=precision)
    with torch.inference_mode():
        tensors = dict(RandomWeights(TINY, torch.bfloat16, "cpu"))
        quantised, dense = (
            step.fluxkiln_runs(s, tensors)["fluxkiln"]() for s in (spec, dataclasses.replace(spec, precision="bf16"))
        )
    assert 0.01 < agreement(quantised, dense) < step.AGREEMENT[precision]


def test_contestants_take_turns() -> None:
    order: list[str] = []

    def run(name: str) -> Callable[[], Tensor]:
        return lambda: order.append(name) or torch.zeros(1)  # type: ignore[func-returns-value]

    seconds = take_turns({"a": run("a"), "b": run("b")}, rounds=3, device="cpu")
    assert order == ["a", "b", *"ab", *"ba", *"ab"]
    assert [len(values) for values in seconds.values()] == [3, 3]


def test_one_model_runs_the_call_and_the_step(monkeypatch: pytest.MonkeyPatch, unmeasured_memory: None) -> None:
    built: list[Spec] = []
    build = step._transformer
    monkeypatch.setattr(step, "_transformer", lambda spec, tensors: built.append(spec) or build(spec, tensors))
    result = step.measure(SPEC, rounds=1)
    assert built == [SPEC]
    assert list(result["contestants"]) == ["fluxkiln", "fluxkiln step"]
    assert all(values["seconds"] > 0 for values in result["contestants"].values())


def test_a_peer_that_computes_something_else_stops_it(monkeypatch: pytest.MonkeyPatch, unmeasured_memory: None) -> None:
    theirs = step.diffusers_runs

    def wrong(spec: Spec, tensors: Any) -> dict[str, Callable[[], Tensor]]:
        return theirs(spec, dict(tensors) | {"img_in.bias": torch.ones(128)})

    monkeypatch.setitem(step.CONTESTANTS, "diffusers", wrong)
    with pytest.raises(RuntimeError, match="diffusers computes something else: its velocity differs by"):
        step.measure(SPEC, "diffusers", rounds=1)


def test_memory_is_counted_in_a_process_of_its_own() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system cannot reset the peak of the resident set")
    config = dataclasses.replace(DEV, hidden_size=512, num_heads=4, depth=1, depth_single_blocks=1)
    spec = Spec(config, Tokens(256, 1792), "fp32", "fp32", "eager", "cpu")
    measured = step.memory(spec, "fluxkiln")
    assert measured is not None
    assert measured["peak_bytes"] == measured["weights_bytes"] + measured["working_bytes"]
    weights = workload.weight_bytes(config, "fp32")
    # a little less, where weights take over what imports have left free
    assert 0.93 * weights < measured["weights_bytes"] < 1.1 * weights
    # At its peak a single block holds both inputs of its last linear, side by side and apart, and the residual.
    held = 4 * 2048 * 512 * (5 + 5 + 1)
    assert held < measured["working_bytes"] < 1.5 * held


def test_the_command(tmp_path: Path, unmeasured_memory: None, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "bench",
        "step",
        "--config",
        "tiny",
        "--size",
        "64x48",
        "--text",
        "7",
        "--dtype",
        "fp32",
        "--rounds",
        "2",
    ]
    command += ["--device", "cpu", "--results", str(tmp_path)]
    assert main([*command, "--peer", "diffusers", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    (kept,) = tmp_path.iterdir()
    assert json.loads(kept.read_text()) == result
    assert result["tokens"] == {"text": 7, "image": 12, "reference": 0, "batch": 1}
    assert result["flops"] == sum(call.flops for call in workload.step(TINY, Tokens(7, 12)))
    assert set(result["contestants"]) == {"fluxkiln", "fluxkiln step", "diffusers"}
    assert all(len(c["runs"]) == 2 for c in result["contestants"].values())
    assert result["ratio"]["memory"] == 1
    assert result["agreement"] < 1e-5

    assert main([*command, "--double", "1", "--single", "0"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("1 double and 0 single blocks, width 128, 7 text + 12 image + 0 reference tokens")
    assert len(list(tmp_path.iterdir())) == 2


def test_arguments_become_a_configuration() -> None:
    spec = parse(
        "--config", "fill", "--double", "1", "--single", "2", "--width", "256", "--size", "512x256", "--batch", "3"
    )
    assert spec.config == dataclasses.replace(FILL, depth=1, depth_single_blocks=2, hidden_size=256, num_heads=2)
    assert spec.tokens == Tokens(512, 512, 0, batch=3)
    assert parse("--config", "kontext").tokens == Tokens(512, 4096, 4096)
    assert parse("--reference", "32x64", "--reference", "16x16", "--tokens", "77").tokens == Tokens(512, 77, 9)
    assert (parse().dtype, parse().precision, parse("--precision", "fp8").precision) == ("bf16", "bf16", "fp8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "big"], "--size: must be WIDTHxHEIGHT in pixels, each at least 16, such as 1024x768, got 'big'"),
        (["--reference", "8x1024"], "got '8x1024'"),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--text", "-1"], "--text must be at least 0, got -1"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--width", "1000"], "1000"),
        (["--config", "absent.safetensors"], "absent"),
        (["--dtype", "fp32", "--precision", "bf16"], "give --dtype bf16"),
    ],
)
def test_bad_arguments_are_one_sentence(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["bench", "step", *arguments]) == (2 if arguments[0] in ("--size", "--reference") else 1)
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.usefixtures("unmeasured_memory")
def test_what_is_kept_is_what_the_choice_of_a_backend_reads(tmp_path: Path) -> None:
    command = ["bench", "step", "--config", "tiny", "--tokens", "9", "--text", "5", "--rounds", "1"]
    assert main([*command, "--backend", "eager", "--device", "cpu", "--results", str(tmp_path)]) == 0
    (eager,) = measurements.read([tmp_path])
    triton = dataclasses.replace(eager, backend="triton", seconds=eager.seconds / 2)
    here = measurements.device_name(versions("cpu"))
    pick = measurements.choose(("eager", "triton"), TINY, "bf16", "bf16", here, [eager, triton])
    assert (pick.backend, pick.measured) == ("triton", {"eager": 2.0})


def test_a_backend_that_cannot_run_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ["bench", "step", "--config", "tiny", "--backend", "trt", "--device", "cpu", "--results", str(tmp_path)]
    assert main(command) == 1
    assert "backend trt: an engine runs on an NVIDIA GPU" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
