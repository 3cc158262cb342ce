"""Kernels broken on purpose: the parity tests beside this file must notice every one of them.

A mutant is a kernel with a few characters of its source replaced, put in the place of the original wherever that is
used; what must fail is the very function that tests the original.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from fluxkiln.kernels import attention, linear_gate_residual, linear_gelu, matmul, norm_modulate, qkv_rope, quantize
from fluxkiln.kernels.formats import Quant


def suite(name: str) -> ModuleType:
    """A test module of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(f"mutation_{name}", Path(__file__).with_name(f"test_{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def norm_parity(output: Quant | None) -> None:
    tests = suite("norm_modulate")
    tests.test_parity(tests.Case("padded from 192 to 256", 2, 13, 192, 7), output)


def attention_parity(format: str) -> None:
    tests = suite("attention")
    tests.test_parity(format, 200, 77, 64, tests.POINTERS)


def product_parity(arch: int, format: str, rank: int = 0) -> None:
    suite("matmul").test_two_streams_of_ragged_rows_and_columns(arch, format, "f32", rank)


@dataclass(frozen=True)
class Mutant:
    name: str
    module: ModuleType
    function: str
    old: str
    new: str
    noticed_by: Callable[[], None]
    long: bool = False


MUTANTS = [
    Mutant(
        "padding in the variance", norm_modulate, "_norm_modulate_kernel",
        "tl.where(mask, x - mean[:, None], 0.0)", "x - mean[:, None]",
        lambda: norm_parity(None),
    ),
    Mutant(
        "shift and scale swapped", norm_modulate, "_norm_modulate_kernel",
        "(1.0 + scale)[None, :] + shift[None, :]", "(1.0 + shift)[None, :] + scale[None, :]",
        lambda: norm_parity(None),
    ),
    Mutant(
        "the other stream's modulation", norm_modulate, "_norm_modulate_kernel",
        "stream = image.to(tl.int32)", "stream = 1 - image.to(tl.int32)",
        lambda: norm_parity(None),
    ),
    Mutant(
        "norm of the codes instead of the row", quantize, "store_rows",
        "tl.sqrt(tl.sum(y * y, axis=1))", "tl.sqrt(tl.sum(tl.abs(y), axis=1))",
        lambda: norm_parity(Quant("fp8", "row")), long=True,
    ),
    Mutant(
        "block scale forgotten", quantize, "nvfp4_blocks",
        "inverse[:, None] / tl.maximum(step, 0.001953125)", "inverse[:, None] + 0.0 * step",
        lambda: norm_parity(Quant("nvfp4", "row", keep=True)),
    ),
    Mutant(
        "accumulator not rescaled", attention, "_attend",
        "acc * alpha[:, None])", "acc)",
        lambda: attention_parity("bf16"),
    ),
    Mutant(
        "denominator not rescaled", attention, "_attend",
        "l * alpha + tl.sum", "l + tl.sum",
        lambda: attention_parity("fp8"), long=True,
    ),
    Mutant(
        "padding in the softmax", attention, "_attend",
        'tl.where((n + tl.arange(0, BLOCK_N) < hi)[None, :], s, float("-inf"))', "s + 0.0",
        lambda: attention_parity("bf16"), long=True,
    ),
    Mutant(
        "scale of another block of v", attention, "_attend",
        "v_scale_ptr + (at + n - lo) // 128", "v_scale_ptr + 0 * (at + n - lo)",
        lambda: suite("attention").test_blocks_of_v_of_very_different_size(), long=True,
    ),
    Mutant(
        "rotation the wrong way", qkv_rope, "_rotated",
        "return first * cos - second * sin", "return first * cos + second * sin",
        lambda: suite("qkv_rope").test_every_format(90, "bf16", "f32", "bf16"),
    ),
    Mutant(
        "the other stream's rows of the weight", matmul, "_locate",
        "stream = image.to(tl.int32) if STREAMS == 2 else 0", "stream = 1 - image.to(tl.int32) if STREAMS == 2 else 0",
        lambda: product_parity(90, "bf16"), long=True,
    ),
    Mutant(
        "scale of the wrong row", matmul, "_finish",
        "tl.load(x_scale_ptr + rows,", "tl.load(x_scale_ptr + rows // 2,",
        lambda: product_parity(89, "fp8"),
    ),
    Mutant(
        "block scale of the wrong row", matmul, "_product",
        "x_block_ptr + b.to(tl.int64) * (stride_xb // 8) + rows[:, None]",
        "x_block_ptr + b.to(tl.int64) * (stride_xb // 8) + (rows // 2)[:, None]",
        lambda: product_parity(120, "nvfp4"),
    ),
    Mutant(
        "low-rank branch of the wrong output", matmul, "_finish",
        "up_ptr + outputs[:, None] * RANK", "up_ptr + (outputs // 2)[:, None] * RANK",
        lambda: product_parity(90, "bf16", 32), long=True,
    ),
    Mutant(
        "bias forgotten", matmul, "_finish",
        "acc += tl.load(bias_ptr + outputs, mask=mask_n, other=0.0)[None, :]", "acc += 0.0",
        lambda: product_parity(90, "bf16"), long=True,
    ),
    Mutant(
        "gate of another image", linear_gate_residual, "_linear_gate_residual",
        "gate_ptr + b * stride_gb", "gate_ptr + 0 * b",
        lambda: suite("linear_gate_residual").test_two_streams(90, "bf16", "f32"), long=True,
    ),
    Mutant(
        "the other GELU", linear_gelu, "_gelu",
        "- 0.1029432397", "- 0.0",
        lambda: suite("linear_gelu").test_every_output("bf16", 90, None), long=True,
    ),
]  # fmt: skip


@pytest.fixture
def mutate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Mutant], None]:
    """Put a mutant in the place of its original, in every module that uses it."""

    def put(mutant: Mutant) -> None:
        original = getattr(mutant.module, mutant.function)
        source = textwrap.dedent(inspect.getsource(original.fn))
        assert source.count(mutant.old) == 1, f"{mutant.function} has changed: say anew how to break it"
        path = tmp_path / "mutant.py"
        path.write_text(source[source.index("def ") :].replace(mutant.old, mutant.new))
        namespace: dict = {}
        exec(compile(path.read_text(), str(path), "exec"), vars(mutant.module), namespace)
        broken = type(original)(namespace[mutant.function])
        for name, module in list(sys.modules.items()):
            if name.startswith("fluxkiln.kernels"):
                for key, value in list(vars(module).items()):
                    if value is original:
                        monkeypatch.setattr(module, key, broken)

    return put


@pytest.mark.parametrize(
    "mutant", [pytest.param(m, id=m.name, marks=[pytest.mark.long] if m.long else []) for m in MUTANTS]
)
def test_a_broken_kernel_is_noticed(mutant: Mutant, mutate: Callable[[Mutant], None]):
    mutate(mutant)
    with pytest.raises(AssertionError):
        mutant.noticed_by()


@pytest.mark.long
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_same_kernel_unbroken_is_not(mutant: Mutant):
    mutant.noticed_by()
