"""The registry: who runs what, why not, and the table that the README shows."""

import json
from pathlib import Path

import pytest
import torch

from fluxkiln.cli import main
from fluxkiln.kernels import registry
from fluxkiln.kernels.arch import ARCHS, NATIVE
from fluxkiln.kernels.formats import Quant, dequantize, quantize_nvfp4
from fluxkiln.kernels.layers import Linear, Streams
from fluxkiln.kernels.recipe import RECIPES, Recipe, Rule
from fluxkiln.kernels.registry import RefusedError, run

CPU = torch.device("cpu")


def rows(k: int = 64, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(1, 5, k, generator=torch.Generator().manual_seed(0)).to(dtype)


def layer(n: int = 32, k: int = 64) -> Streams:
    g = torch.Generator().manual_seed(1)
    return Streams((Linear(torch.randn(n, k, generator=g).bfloat16(), torch.randn(n, generator=g).bfloat16()),))


def test_one_call_on_either_backend():
    eager, triton = (run("linear_gelu", rows(), layer(), 0, backend=backend) for backend in ("eager", "triton"))
    torch.testing.assert_close(triton, eager, rtol=0.02, atol=0.02)
    assert torch.equal(run("linear_gelu", rows(), layer(), 0), eager)  # auto: nobody waits for an interpreter
    q = run("quantize", rows(), quant=Quant("fp8", "row"), backend="triton", arch=90)
    torch.testing.assert_close(dequantize(q), rows().float(), rtol=0.07, atol=0.02)


def test_nothing_that_is_given_is_overwritten():
    residual, gate = rows(32), torch.ones(1, 1, 32, dtype=torch.bfloat16)
    before = residual.clone()
    y = run("linear_gate_residual", (rows(),), layer(), gate, residual, 0, backend="triton")
    assert torch.equal(residual, before)
    assert not torch.equal(y, before)


def test_a_call_that_is_wrong_says_what_was_expected():
    with pytest.raises(ValueError, match=r"operation must be one of norm_modulate, .* got 'conv'"):
        run("conv", rows())
    with pytest.raises(ValueError, match="backend must be auto, eager or triton, got 'cuda'"):
        run("quantize", rows(), Quant("fp8", "row"), backend="cuda")
    with pytest.raises(ValueError, match="takes K = 64, got 48"):
        run("linear_gelu", rows(48), layer(), 0)


def test_a_backend_that_cannot_says_why():
    q = run("quantize", rows(), Quant("nvfp4", "row"))
    g = torch.Generator().manual_seed(2)
    fp4 = Streams((Linear(quantize_nvfp4(torch.randn(32, 64, generator=g)), torch.zeros(32).bfloat16()),))
    with pytest.raises(RefusedError, match="NVFP4 needs the block-scaled tensor cores of sm_100 or sm_120"):
        run("linear_gelu", q, fp4, 0, backend="triton", arch=90)
    assert run("linear_gelu", q, fp4, 0, backend="triton", arch=120).shape == (1, 5, 32)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"dtype": torch.float32}, "compute in bfloat16, the model's dtype is float32"),
        ({"head_dim": 96}, "head dim 96 is not one of 64, 128"),
        ({"hidden_size": 9216}, "more than the 8192"),
        ({"recipe": Recipe("x", (("double_blocks.*_mlp.2", Rule("fp8", "row")),))}, "a tile does not see a row's"),
        (
            {"recipe": Recipe("x", (("*_mlp.0", Rule("fp8", accumulate="f16")),))},
            "no kernel accumulates fp8 by f16 on sm_120",
        ),
    ],
)
def test_models_are_refused_with_the_reason(change, reason):
    model = {"head_dim": 64, "hidden_size": 128, "recipe": RECIPES["nvfp4"], "device": CPU, "dtype": torch.bfloat16}
    got = registry.refuse_model(**(model | change))
    assert got is None if reason is None else reason in got


@pytest.mark.parametrize("capability", [(8, 0), (8, 6)])
def test_attention_in_fp8_is_refused_where_its_products_are(capability, monkeypatch):
    monkeypatch.setattr(registry, "unavailable", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    model = {"head_dim": 64, "hidden_size": 128, "device": torch.device("cuda"), "dtype": torch.bfloat16}
    got = registry.refuse_model(**model, recipe=Recipe("x", attention="fp8"))
    assert got is not None
    assert "attention: FP8 tensor cores begin with sm_89" in got
    assert registry.refuse_model(**model, recipe=RECIPES["bf16"]) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert registry.refuse_model(**model, recipe=Recipe("x", attention="fp8")) is None


def test_a_machine_without_what_triton_needs_is_told_the_remedy(monkeypatch):
    import triton

    fresh = registry.unavailable.__wrapped__
    assert fresh(CPU) is None
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    assert "Triton 3.5.1 is too old: pip install 'triton>=3.6'" in fresh(CPU)
    monkeypatch.setattr(triton, "__version__", "3.7.1")
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "this GPU is sm_75" in fresh(gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setenv("CC", "/no/such/compiler")
    assert "install gcc or clang" in fresh(gpu)
    monkeypatch.setattr(registry, "tl", None)
    assert "Triton is not installed: pip install" in fresh(CPU)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_operation_and_format_has_a_kernel_or_a_reason(arch):
    shipped = [(c.op, c.format.split()[0]) for c in registry.configurations(arch)]
    refused = {(row["op"], row["format"]): row["refused"] for row in registry.refusals(arch)}
    assert set(shipped) | set(refused) == {(op, format) for op in registry.OPS for format in registry.FORMATS}
    assert not set(shipped) & set(refused)
    assert all(len(reason) > 20 for reason in refused.values())
    names = [(c.op, c.format, c.name) for c in registry.configurations(arch)]
    assert len(names) == len(set(names))


def test_the_older_and_the_larger_run_what_their_relatives_run():
    formats = {arch: {c.format.split()[0] for c in registry.configurations(arch)} for arch in ARCHS}
    assert formats[80] == formats[86] == {"bf16"}
    assert formats[89] == formats[90] == {"bf16", "fp8"}
    assert formats[100] == formats[103] == formats[120] == formats[121] == {"bf16", "fp8", "nvfp4"}


def test_the_listing_names_architecture_and_reason(capsys):
    assert main(["kernels", "--arch", "sm_86", "--op", "quantize", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [(row["arch"], row["op"], row["format"]) for row in listed] == [
        ("sm_86", "quantize", format) for format in registry.FORMATS
    ]
    assert all("refused" in row for row in listed)
    assert main(["kernels", "--arch", "sm_75"]) == 1
    assert "unknown architecture" in capsys.readouterr().err


def test_the_readme_shows_the_matrix_of_today():
    readme = Path(__file__).parents[2] / "README.md"
    assert f"<!-- kernels -->\n{registry.markdown(NATIVE)}\n<!-- /kernels -->" in readme.read_text()
