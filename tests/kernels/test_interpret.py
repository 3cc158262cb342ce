"""The repaired interpreter equals torch bit for bit, where the stock one does not, and leaves no trace of itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import interpreter_cases
import pytest
import torch
import triton.language as tl
import triton.runtime.interpreter as stock

from fluxkiln.kernels import language
from fluxkiln.kernels.compile import compile_launch
from fluxkiln.kernels.language import Launch, TensorDescriptor, jit

WRONG_IN_STOCK = {  # of Triton 3.6 to 3.9
    *("fp32 -> bf16", "fp32 -> e4m3", "fp32 -> e5m2", "e4m3 -> fp32", "bf16 +", "bf16 *", "bf16 * constant"),
    *("bf16 where", "bf16 dot", "nvfp4 dot", "masked load without a fill value is undefined"),
}


def in_stock_interpreter() -> dict:
    """The same cases where Triton was imported with TRITON_INTERPRET."""
    script = Path(interpreter_cases.__file__)
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


@pytest.mark.parametrize("name", interpreter_cases.CASES)
def test_every_bit_agrees_with_torch(name):
    assert interpreter_cases.CASES[name](jit) is True


def test_the_stock_interpreter_is_wrong_where_it_is_said_to_be():
    stock_outcomes = in_stock_interpreter()
    assert not {name for name in WRONG_IN_STOCK if stock_outcomes[name] is True}


def test_the_repair_also_holds_in_a_process_with_triton_interpret():
    code = (
        "import interpreter_cases, json; from fluxkiln.kernels.language import jit; "
        "print(json.dumps(interpreter_cases.outcomes(jit)))"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    folder = Path(interpreter_cases.__file__).parent
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=folder, capture_output=True, text=True, check=True
    )
    assert all(outcome is True for outcome in json.loads(run.stdout).values())


def state() -> dict:
    """Everything that the repair touches."""
    places = (tl, tl.core, tl.standard, tl.math, tl.tensor, stock, stock.ReduceScanOpInterface)
    return {(place.__name__, name): id(value) for place in places for name, value in vars(place).items()}


def test_the_repair_is_taken_back_even_after_an_error():
    interpreter_cases.CASES["bf16 dot"](jit)
    before = state()
    interpreter_cases.CASES["nvfp4 dot"](jit)
    assert state() == before
    with pytest.raises(Exception, match=r"incompatible|broadcast"):
        failing[(1,)](torch.ones(4))
    assert state() == before


@jit
def failing(x_ptr):
    tl.store(x_ptr + tl.arange(0, 4), tl.zeros((4,), tl.float32) + tl.zeros((8,), tl.float32))


@jit
def _scaled(x, factor):
    return x * factor


@jit(do_not_specialize=["N"])
def calls_and_descriptors(x, y_ptr, N, BLOCK: tl.constexpr):
    start = tl.program_id(0) * BLOCK
    block = x.load([start, 0]).to(tl.float32)  # rows past the end are zeros
    total = tl.sum(_scaled(block, 2.0), axis=1) + block.max(axis=1)
    rows = start + tl.arange(0, BLOCK)
    tl.store(y_ptr + rows, total, mask=rows < N)


def test_helpers_the_standard_library_and_descriptors_work():
    x, y = torch.randn(77, 32).bfloat16(), torch.zeros(80)
    calls_and_descriptors[(3,)](TensorDescriptor.from_tensor(x, [32, 32]), y, 77, BLOCK=32, num_warps=4)
    torch.testing.assert_close(y[:77], 2 * x.float().sum(1) + x.float().amax(1))
    assert (y[77:] == 0).all()


def test_one_process_interprets_and_compiles():
    x = torch.empty(4608, 32, dtype=torch.bfloat16, device="meta")
    args = (TensorDescriptor.from_tensor(x, [32, 32]), torch.empty(4608, device="meta"), 4608)
    launch = Launch(calls_and_descriptors, (144,), args, {"BLOCK": 32, "num_warps": 4})
    assert compile_launch(launch, 90).registers > 0
    test_helpers_the_standard_library_and_descriptors_work()


def test_without_triton_files_import_and_launching_says_what_to_install(monkeypatch):
    monkeypatch.setattr(language, "tl", None)

    @language.jit
    def kernel(x_ptr): ...

    with pytest.raises(ImportError, match=r"pip install 'triton>=3.6'"):
        kernel[(1,)](torch.ones(1))
    assert language.constexpr(3) == 3
