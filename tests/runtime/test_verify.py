"""`fluxkiln verify` and `fluxkiln quantize` as a user runs them."""

import dataclasses
import json

import pytest
import torch

from fluxkiln import verify
from fluxkiln.checkpoint import open_checkpoint, save_checkpoint
from fluxkiln.cli import main
from fluxkiln.config import FluxConfig, scaled_axes
from fluxkiln.kernels import linear_gelu, registry
from fluxkiln.kernels.formats import Fp8, Nvfp4
from fluxkiln.kernels.layers import Streams
from fluxkiln.verify import SMALL, Verdict

from parity import random_tensors

CPU = torch.device("cpu")


def test_every_operation_and_format_is_verified():
    cases = {(op, format) for op, format, _ in verify.cases(SMALL, CPU)}
    offered = {(c.op, c.format.split()[0]) for arch in (90, 120) for c in registry.configurations(arch)}
    assert cases == offered


def test_eager_and_triton_pass_here():
    verdicts = list(verify.operations(SMALL, CPU, ("eager", "triton")))
    assert [v for v in verdicts if not v.passed] == []
    assert all(v.refused is None for v in verdicts)
    assert all(v.eager_error > 0 for v in verdicts)


def test_a_wrong_kernel_is_found_out_and_the_exit_code_says_so(monkeypatch, capsys):
    right = linear_gelu.launch

    def wrong(*args, **options):
        output, launches = right(*args, **options)
        scale = {Fp8: "row_scale", Nvfp4: "global_scale"}.get(type(output))
        return output, [*launches, lambda: (getattr(output, scale) if scale else output).mul_(1.3)]

    monkeypatch.setattr(linear_gelu, "launch", wrong)
    monkeypatch.setattr(verify, "denoises", lambda device, backends: iter(()))
    assert main(["verify", "--backend", "triton", "--device", "cpu", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert {row["op"] for row in rows if not row["passed"]} == {"linear_gelu"}


def test_a_kernel_that_cannot_run_is_a_verdict_beside_the_others(monkeypatch, capsys):
    def broken(*args, **options):
        raise RuntimeError("PassManager::run failed\nand a page of code")

    monkeypatch.setattr(linear_gelu, "launch", broken)
    monkeypatch.setattr(verify, "denoises", lambda device, backends: iter(()))
    some = [case for case in verify.cases(SMALL, CPU) if case[:2] in (("linear_gelu", "bf16"), ("linear", "bf16"))]
    monkeypatch.setattr(verify, "cases", lambda sizes, device: iter(some))
    assert main(["verify", "--backend", "triton", "--device", "cpu"]) == 1
    *_, failed, passed, last = capsys.readouterr().out.splitlines()
    assert " ".join(failed.split()) == "linear_gelu bf16 triton FAILED: RuntimeError: PassManager::run failed"
    assert passed.startswith("linear ")
    assert passed.endswith("ok")
    assert last.startswith("1 of 2 failed")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_a_gpu_that_is_not_there(capsys):
    assert main(["verify", "--device", "cuda"]) == 1
    assert capsys.readouterr().err == "fluxkiln: device cuda: torch sees 0 CUDA GPUs here\n"


def test_the_librarys_error_is_that_of_a_sum():
    assert 0 < verify.library_error(64, 256, CPU) < 1e-6  # on a CPU in fp32


def test_a_denoise_on_eager_is_near_the_truth():
    verdicts = list(verify.denoises(CPU, ("eager",)))
    errors = {v.format: v.error for v in verdicts}
    assert 0 < errors["bf16"] < errors["fp8"] < errors["nvfp4"] < 0.1


@pytest.mark.long
def test_a_denoise_on_triton_is_as_near():
    verdicts = list(verify.denoises(CPU, ("triton",)))
    assert all(v.passed and v.refused is None for v in verdicts), verdicts


def test_what_was_refused_does_not_fail():
    assert Verdict("linear", "nvfp4", "triton", refused="no such GPU").passed
    assert Verdict("linear", "bf16", "triton", error=2e-3, eager_error=1.1e-3).passed
    assert not Verdict("linear", "bf16", "triton", error=2.3e-3, eager_error=1.1e-3).passed


def test_what_the_tensor_cores_lose_in_a_sum_is_allowed_for(monkeypatch):
    assert verify.lost_in_sums(3072, CPU) == 0
    monkeypatch.setattr(verify, "lost_in_sums", lambda k, device: 1e-6 * k)
    sums = {(op, format): verify.sums_of(args) for op, format, args in verify.cases(SMALL, CPU)}
    longest = {"qkv_rope": 128, "linear_gelu": 128, "linear_gate_residual": 384, "linear": 128}
    assert {op: value for (op, format), value in sums.items() if value} == pytest.approx(
        {op: 1e-6 * k for op, k in longest.items()}
    )
    assert all(format == "fp8" for (_, format), value in sums.items() if value)
    args = next(
        args for op, format, args in verify.cases(SMALL, CPU) if (op, format) == ("linear_gate_residual", "fp8")
    )
    promoted = Streams(dataclasses.replace(linear, accumulate="promote128") for linear in args[1])
    assert verify.sums_of((args[0], promoted)) == pytest.approx(1e-6 * 128)
    assert Verdict("linear", "fp8", "triton", error=4e-3, eager_error=1.1e-3, sums=1e-3).passed
    assert not Verdict("linear", "fp8", "triton", error=4.3e-3, eager_error=1.1e-3, sums=1e-3).passed


@pytest.mark.parametrize(("options", "format"), [([], "fp8"), (["--precision", "nvfp4", "--rank", "16"], "nvfp4")])
def test_quantize_writes_what_load_takes_as_it_is(tmp_path, capsys, options, format):
    config = FluxConfig(
        in_channels=16, out_channels=16, hidden_size=64, num_heads=1, depth=1, depth_single_blocks=1,
        context_in_dim=32, vec_in_dim=16, axes_dim=scaled_axes(64),
    )  # fmt: skip
    source, target = tmp_path / "plain.safetensors", tmp_path / "quantised.safetensors"
    save_checkpoint(source, ((name, t.bfloat16()) for name, t in random_tensors(config).items()))
    assert main(["quantize", str(source), str(target), *options, "--device", "cpu", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["bytes"] == target.stat().st_size < source.stat().st_size
    checkpoint = open_checkpoint(target)
    assert checkpoint.format("single_blocks.0.linear1.weight") == format
    assert (checkpoint.low_rank("single_blocks.0.linear1.weight") is not None) == (format == "nvfp4")
    assert main(["quantize", str(source), str(target), "--recipe", str(tmp_path / "none.json")]) == 1
    assert "none.json" in capsys.readouterr().err
    assert main(["quantize", str(source), str(target), "--recipe", str(source)]) == 1
    assert capsys.readouterr().err.startswith(f"fluxkiln: {source}: ")
    assert main(["quantize", str(source), str(target), "--precision", "fp8", "--rank", "16"]) == 1
    assert "--rank is of branches beside NVFP4 weights" in capsys.readouterr().err
