"""The kernel benchmark: that it covers the step, resumes, says what was wrong, and reports only what was measured."""

import dataclasses
import json
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fluxkiln import workload
from fluxkiln.bench import gpu, kernels, report, tune
from fluxkiln.bench import measure as measure_module
from fluxkiln.bench.cases import SIZES, arguments, cases, everything
from fluxkiln.bench.kernels import TINY_SIZES, Results
from fluxkiln.bench.measure import Samples, measure, roofs
from fluxkiln.bench.step import TINY
from fluxkiln.config import DEV
from fluxkiln.kernels import attention, library, registry, tiles
from fluxkiln.kernels.formats import Fp8
from fluxkiln.kernels.layers import Linear, QKNorm, Streams

CPU = torch.device("cpu")
TINY_TUNED = [case for case in everything(TINY, TINY_SIZES, ("fp8",)) if case.op in tune.TUNED]


# --- the timer --------------------------------------------------------------------------------


def test_samples_give_order_statistics():
    samples = Samples(tuple(1e-6 * n for n in (5, 1, 4, 2, 3)), "launched")
    assert samples.row() == {"us": 3.0, "us_p20": 2.0, "us_p80": 5.0, "samples": 5, "timed": "launched"}


def test_a_run_is_counted_as_often_as_it_is_timed():
    runs = []
    samples = measure(lambda: runs.append(None), CPU, budget=1e-4)
    assert len(runs) == len(samples.seconds) + 1  # the first does not count
    assert len(samples.seconds) >= 5


def test_roofs_are_measured_here():
    found = roofs(CPU, ("bf16", "fp8"), side=64, budget=1e-3)
    assert set(found) == {"copy", "bf16"}  # a CPU has no library product in FP8
    assert all(rate > 0 for rate in found.values())


# --- the cases --------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", "fp8", "nvfp4"])
@pytest.mark.parametrize("size", SIZES)
def test_the_cases_of_a_step_are_the_step(size: str, precision: str):
    found = cases(DEV, SIZES[size], size, precision)
    step = workload.step(DEV, SIZES[size], "bf16", lambda name: precision if "blocks." in name else "bf16")
    assert sum(case.count for case in found) == len(step)
    assert sum(case.count * case.call.flops for case in found) == sum(call.flops for call in step)
    counted: Counter = Counter()
    for case in found:
        counted[case.op] += case.count
    assert counted == Counter(call.op for call in step)


def test_every_case_has_a_name_of_its_own():
    found = everything(DEV, SIZES, ("bf16", "fp8", "nvfp4"))
    assert len({case.key for case in found}) == len(found)
    assert {case.format for case in found if case.op == "attention"} == {"bf16", "fp8"}
    assert {case.op for case in found} == set(registry.OPS)


@pytest.mark.parametrize("case", everything(TINY, TINY_SIZES, ("bf16", "fp8", "nvfp4")), ids=lambda case: case.key)
def test_arguments_are_what_the_operation_takes(case):
    module, args = registry.OPS[case.op], arguments(case, CPU)
    module.check(*args)
    y = module.reference(*args)
    rows, width = case.call.result
    if case.op == "qkv_rope":
        q = y[0]
        assert isinstance(q, Fp8) == (case.attention == "fp8")
        assert (q if isinstance(q, torch.Tensor) else q.data).shape[1:] == (rows, TINY.num_heads, TINY.head_dim)
    else:
        assert tuple(y.shape) == (1, rows, width)
    again = arguments(case, CPU)
    assert torch.equal(torch.as_tensor(_first(args)), torch.as_tensor(_first(again)))


def _first(args):
    x = args[0]
    while isinstance(x, tuple):
        x = x[0]
    return x if isinstance(x, torch.Tensor) else x.data.view(torch.uint8)


# --- the benchmark ----------------------------------------------------------------------------


def attention_case():
    return next(case for case in everything(TINY, TINY_SIZES, ("fp8",)) if case.op == "attention")


def test_rows_are_written_as_they_come_and_not_measured_twice(tmp_path):
    path, case = tmp_path / "kernels.jsonl", attention_case()
    results = Results(path, {"source": "a"})
    assert kernels.bench(CPU, results, [case], budget=1e-4, side=64)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[0]["kind"] == "run"
    assert 0 < rows[0]["us_empty"] < 1e6
    assert rows[-1] == {"kind": "done", "case": case.key}
    ours = next(row for row in rows if row.get("contestant") == "triton")
    assert ours["passed"]
    assert ours["us"] > 0
    assert ours["error"] <= 2 * ours["eager_error"] + 1e-6

    again = Results(path, {"source": "a"})
    assert kernels.bench(CPU, again, [case], budget=1e-4, side=64)
    assert len(path.read_text().splitlines()) == len(rows)
    other = Results(path, {"source": "b"})  # other kernels: what was measured does not count
    assert not other.rows


def test_a_row_cut_off_costs_no_other(tmp_path):
    path = tmp_path / "kernels.jsonl"
    first = Results(path, {"source": "a"})
    first.add({"kind": "run", "identity": first.identity})
    first.add({"kind": "done", "case": "one"})
    path.write_text(path.read_text() + '{"kind": "done", "ca')
    again = Results(path, {"source": "a"})
    assert again.rows == [{"kind": "done", "case": "one"}]
    again.add({"kind": "done", "case": "two"})
    assert Results(path, {"source": "a"}).has(kind="done", case="two")


def test_no_case_is_begun_after_the_deadline(tmp_path):
    results = Results(tmp_path / "kernels.jsonl", {})
    assert not kernels.bench(CPU, results, [attention_case()], budget=1e-4, side=64, deadline=0.0)
    assert not results.rows


def test_what_does_not_come_back_is_told_and_ends_the_process(monkeypatch):
    told, codes = [], []
    ended = threading.Event()
    monkeypatch.setattr(measure_module, "SLOW", 0.02)
    monkeypatch.setattr(measure_module.os, "_exit", lambda code: (codes.append(code), ended.set()))
    with measure_module.watched(torch.device("cuda"), told.append):
        assert ended.wait(20)
    assert codes == [measure_module.LOST]
    assert told == ["did not come back within 0.02 s"]
    monkeypatch.setattr(measure_module, "SLOW", 60)
    threads = threading.active_count()
    with measure_module.watched(torch.device("cuda"), told.append):
        assert threading.active_count() == threads + 1
    assert len(told) == 1


def test_a_kernel_that_takes_the_gpu_with_it_costs_its_own_row(tmp_path, monkeypatch):
    def faulty(*args, **options):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(attention, "launch", faulty)
    monkeypatch.setattr(kernels, "lost", lambda device: True)
    monkeypatch.setattr(kernels.os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    path, case = tmp_path / "kernels.jsonl", attention_case()
    with pytest.raises(SystemExit) as ended:
        kernels.bench(CPU, Results(path, {}), [case], budget=1e-4, side=64)
    assert ended.value.code == measure_module.LOST
    monkeypatch.setattr(kernels, "lost", lambda device: False)
    again = Results(path, {})  # the next process does not launch it again, and does the rest
    assert kernels.bench(CPU, again, [case], budget=1e-4, side=64)
    rows = [row for row in again.rows if row["kind"] == "kernel"]
    found = [("failed" in row, row["contestant"]) for row in rows]
    assert found[:3] == [(True, "triton"), (True, "triton, raw q"), (False, "eager")]


def test_what_was_under_way_when_the_process_died_is_not_tried_again(tmp_path):
    path = tmp_path / "proofs.jsonl"
    stopped = Results(path, {})
    stopped.add({"kind": "run", "identity": {}})
    stopped.begin({"kind": "proof", "name": "one"})
    assert not Results(path, {}).bury(died=False)  # stopped from outside: nobody's fault
    dead = Results(path, {})
    assert not dead.bury(died=True)
    dead.begin({"kind": "proof", "name": "one"})
    after = Results(path, {})
    assert after.bury(died=True)
    assert after.rows == Results(path, {}).rows == [{"kind": "proof", "name": "one"}]
    after.begin({"kind": "proof", "name": "two"})
    after.add({"kind": "proof", "name": "two"})  # it lived
    assert not Results(path, {}).bury(died=True)


def test_a_wrong_kernel_is_seen(tmp_path, monkeypatch):
    launch = attention.launch

    def broken(q, k, v, out=None, **options):
        return launch(k, q, v, out, **options)

    monkeypatch.setattr(attention, "launch", broken)
    results = Results(tmp_path / "kernels.jsonl", {})
    kernels.bench(CPU, results, [attention_case()], budget=1e-4, side=64)
    ours = next(row for row in results.rows if row.get("contestant") == "triton")
    assert ours.get("failed") or ours["passed"] is False
    assert not [row for row in report.timed(results.rows) if row["contestant"] == "triton"]


def test_a_gpu_is_needed_for_the_real_shapes(capsys):
    from fluxkiln.cli import main

    for command in ("kernels", "tune"):
        assert main(["bench", command, "--device", "cpu"]) == 1
        assert "--tiny" in capsys.readouterr().err


# --- what a GPU proves ------------------------------------------------------------------------


def test_every_proof_has_a_name_of_its_own():
    proofs = list(gpu.proofs(CPU, tiny=True))
    assert len(dict(proofs)) == len(proofs)
    assert dict(proofs)["attention, raw q bf16: an image of a batch is what it is alone"]() == "yes, bit for bit"


def test_proofs_resume_and_failures_are_tried_again(tmp_path, monkeypatch):
    outcomes = {"good": lambda: "yes", "bad": lambda: 1 / 0}
    monkeypatch.setattr(gpu, "proofs", lambda device, tiny: iter(outcomes.items()))
    results = Results(tmp_path / "proofs.jsonl", {})
    assert gpu.prove(CPU, results, tiny=True, deadline=float("inf"))
    assert [(row["name"], row["passed"]) for row in results.rows] == [("good", True), ("bad", False)]
    outcomes["bad"] = lambda: "mended"
    gpu.prove(CPU, results, tiny=True, deadline=float("inf"))
    assert [(row["name"], row["passed"]) for row in results.rows][2:] == [("bad", True)]
    assert not gpu.prove(CPU, Results(tmp_path / "new.jsonl", {}), tiny=True, deadline=0.0)


def test_a_proof_that_takes_the_gpu_with_it_is_not_tried_again(tmp_path, monkeypatch):
    outcomes = {"bad": lambda: 1 / 0, "good": lambda: "yes"}
    monkeypatch.setattr(gpu, "proofs", lambda device, tiny: iter(outcomes.items()))
    monkeypatch.setattr(gpu, "lost", lambda device: True)
    monkeypatch.setattr(gpu.os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    path = tmp_path / "proofs.jsonl"
    first = Results(path, {})
    first.add({"kind": "run", "identity": {}})
    with pytest.raises(SystemExit):
        gpu.prove(CPU, first, tiny=True, deadline=float("inf"))
    again = Results(path, {})
    assert gpu.prove(CPU, again, tiny=True, deadline=float("inf"))
    assert [(row["name"], row["passed"]) for row in again.rows] == [("bad", False), ("good", True)]


def test_a_half_goes_on_in_a_fresh_process(monkeypatch):
    codes, commands = [measure_module.LOST, -6, measure_module.LOST, gpu.DONE], []  # -6: a compiler's abort

    def run(command):
        commands.append(command)
        return SimpleNamespace(returncode=codes[len(commands) - 1])

    monkeypatch.setattr(gpu.subprocess, "run", run)
    args = SimpleNamespace(minutes=1.0, results="folder", device=None, tiny=False)
    assert gpu.supervised("kernels", args) == gpu.DONE
    assert ["--died" in command for command in commands] == [False, False, True, False]
    args.minutes = 0.0
    assert gpu.supervised("kernels", args) == gpu.OUT_OF_TIME
    args.minutes, codes[:] = 1.0, [-11, 1]  # a driver's segmentation fault, and nothing was begun
    commands.clear()
    assert gpu.supervised("kernels", args) == gpu.FAILED


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_contestant_that_is_too_slow_leaves_nothing_behind(tmp_path):
    started = tmp_path / "started"
    command = ["sh", "-c", f"sh -c 'echo $$ > {started}; sleep 600'; true"]
    assert gpu._run(command, 5.0) == (None, "", "")
    pid = int(started.read_text())
    deadline = time.monotonic() + 60  # a busy machine may take its time to bury what was killed
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(pid)
    assert gpu._run(["sh", "-c", "echo out; echo err >&2; exit 5"], 60) == (5, "out\n", "err\n")


def test_every_layer_of_a_kind_is_compiled_once():
    """A name of its own is a constant to torch.compile, and after eight of them it gives up."""
    ops = gpu._compiled(CPU)
    layer, norm = Linear(torch.zeros(48, 16), torch.zeros(48), name="one"), QKNorm(torch.ones(16), torch.ones(16))
    streams = (Streams((layer,)), Streams((dataclasses.replace(layer, name="two"),)))
    one, two = (ops.pack_qkv(each, (norm,)) for each in streams)
    assert {linear.name for packed in (one, two) for linear in packed.streams} == {""}
    assert ops.pack(streams[0])[0].name == ""


def scaled_mm(a, b, *, scale_a, scale_b, bias=None, out_dtype=None, use_fast_accum=False, out=None):
    """torch._scaled_mm in fp32, with what its CUDA kernels want of their arguments."""
    assert a.dtype == b.dtype == torch.float8_e4m3fn
    assert (a.stride(1), b.stride(0)) == (1, 1)
    assert a.stride(0) >= a.shape[1]
    assert b.stride(1) >= b.shape[0]
    assert not any(n % 16 for n in (a.shape[1], *b.shape))
    assert scale_a.dtype == scale_b.dtype == torch.float32
    by_row = (scale_a.shape, scale_b.shape) == ((a.shape[0], 1), (1, b.shape[1]))
    assert by_row or scale_a.numel() == scale_b.numel() == 1
    assert scale_a.is_contiguous()
    assert scale_b.t().is_contiguous()
    assert out_dtype == torch.bfloat16
    assert bias is None or bias.dtype == torch.bfloat16
    y = (a.float() @ b.float()) * scale_a * scale_b + (0 if bias is None else bias.float())
    return y.to(out_dtype) if out is None else out.copy_(y)


def test_the_library_is_called_as_it_wants(monkeypatch):
    """A CPU's product takes more than a GPU's does."""
    called = Counter()
    monkeypatch.setattr(torch, "_scaled_mm", lambda *args, **options: called.update("x") or scaled_mm(*args, **options))
    for case in everything(TINY, TINY_SIZES, ("fp8",)):
        if case.format != "fp8" or not case.call.gemms:
            continue
        args = arguments(case, CPU)
        for name, run in kernels.contestants(case, args, CPU):
            before = called.total()
            run()
            assert (called.total() > before) == (name not in ("eager", "triton, raw q")), (case.key, name)
        if case.op == "linear":
            for call in library.linear(*registry.packed("linear", args), arch=90)[1]:
                call()


class CodesAreOnlyMoved(TorchDispatchMode):
    """PyTorch copies, joins and multiplies FP8; it adds, compares or gathers it not everywhere."""

    MOVES = (
        *("_to_copy", "clone", "copy_", "cat", "contiguous", "empty", "empty_like", "new_empty", "detach", "alias"),
        *("view", "_unsafe_view", "as_strided", "expand", "permute", "t", "transpose", "unsqueeze", "slice", "select"),
        *("split", "split_with_sizes", "unbind", "_scaled_mm", "_reshape_alias", "is_same_size"),
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if any(x.dtype == torch.float8_e4m3fn for x in tensors):
            assert func.overloadpacket.__name__ in self.MOVES, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp8", "nvfp4"])
def test_nothing_but_a_kernel_calculates_with_codes(precision: str):
    with CodesAreOnlyMoved():
        for case in everything(TINY, TINY_SIZES, (precision,)):
            args = arguments(case, CPU)
            kernels.parity(case, args, registry.OPS[case.op].reference(*args))
            registry.packed(case.op, args)


def test_what_is_emulated_in_nvfp4_is_not_timed():
    for case in everything(TINY, TINY_SIZES, ("fp8", "nvfp4")):
        names = {name for name, _ in kernels.contestants(case, arguments(case, CPU), CPU)}
        assert ("eager" in names) == ("nvfp4" not in (case.format, case.result)), case.key


@pytest.mark.parametrize(
    ("memory", "precisions"), [(16, ["nvfp4"]), (24, ["fp8", "nvfp4"]), (80, ["bf16", "fp8", "nvfp4"])]
)
def test_a_contestant_whose_weights_do_not_fit_is_refused(memory, precisions, monkeypatch):
    card = SimpleNamespace(total_memory=memory * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    found = {
        each.precision: gpu._refused(each, torch.device("cuda"), False)
        for each in gpu.CONTESTANTS
        if each.who == "triton"
    }
    assert [name for name, reason in sorted(found.items()) if reason is None] == precisions
    assert all(f"this GPU has {memory}.0" in reason for reason in found.values() if reason)
    assert gpu._refused(gpu.Contestant("triton", "bf16"), torch.device("cuda"), True) is None


def test_weights_are_counted_before_a_step_has_its_memory(monkeypatch):
    order = []
    monkeypatch.setattr(gpu, "_allocated", lambda device: order.append("weights"))
    monkeypatch.setattr(gpu.Transformer, "prepare", lambda *sizes: order.append("prepared"))
    gpu.compete(gpu.Contestant("eager", "bf16"), CPU, tiny=True)
    assert order == ["weights", "prepared"]


def test_the_parts_of_a_step_add_up():
    row = gpu.compete(gpu.Contestant("eager", "bf16"), CPU, tiny=True)
    assert set(row["parts_ms"]) == {call.op for call in workload.step(TINY, TINY_SIZES["tiny"])}
    assert all(value >= 0 for value in row["parts_ms"].values())
    assert row["ms"] > 0


def test_launches_are_known_by_their_operation():
    for case in everything(TINY, TINY_SIZES, ("fp8",)):
        todo = kernels.launches(case.op, arguments(case, CPU), CPU)[1]
        names = {gpu.kernel_name(launch) for launch in todo}
        assert names == {case.op}


@pytest.mark.parametrize("precision", ["bf16", "fp8", "nvfp4"])
def test_a_step_launches_what_its_plan_says(precision: str):
    step = gpu._Step(TINY, gpu.with_attention(precision, "bf16"), TINY_SIZES["tiny"], CPU)
    assert "launches planned" in step.names()
    triton, attend = step.model.ops.pack.__self__, step.model.ops.attention

    def silent(*args, **options):
        before = len(triton._collected)
        output = attend(*args, **options)
        del triton._collected[before:]
        return output

    step.model.ops = dataclasses.replace(step.model.ops, attention=silent)
    with pytest.raises(AssertionError, match="4 calls of attention on our kernels, 0 launches"):
        step.names()


@pytest.mark.long
@pytest.mark.parametrize("half", ["kernels", "step"])
def test_a_whole_half_is_rehearsed_and_goes_on_where_it_stopped(half: str, tmp_path, capsys):
    """Minutes of interpreting: every code path of `make gpu`, with tiny shapes."""
    command = ["--tiny", "--device", "cpu", "--half", half, "--minutes", "60", "--results", str(tmp_path)]
    assert gpu.main([*command, "--minutes", "0"]) == gpu.OUT_OF_TIME
    assert gpu.main(command) == gpu.DONE, capsys.readouterr()
    written = {path: path.read_text().splitlines() for path in tmp_path.iterdir()}
    assert gpu.main(command) == gpu.DONE
    for path, lines in written.items():
        fresh = path.read_text().splitlines()[len(lines) :]
        assert all(json.loads(line)["kind"] == "run" for line in fresh)


# --- tables -----------------------------------------------------------------------------------


def written(tmp_path, name: str, rows: list[dict]):
    header = {
        "kind": "run", "identity": {"versions": {"gpu": "a GPU", "torch": "2"}}, "card": {"date": "2026-01-01T00:00"},
        "roofs": {"copy": 1e12, "bf16": 1e14, "fp8": 2e14},
    }  # fmt: skip
    path = tmp_path / name
    path.write_text("\n".join(map(json.dumps, (header, *rows))) + "\n")
    return path


def kernel_row(contestant: str, us: float, **more) -> dict:
    return {
        "kind": "kernel", "case": "c", "op": "attention", "place": "attention", "size": "1024x1024", "shape": "S",
        "format": "bf16", "result": "fp8", "flops": 10**12, "bytes": 10**8, "contestant": contestant, "us": us,
        "tflops": 500.0, "gbytes_per_s": 1.0, "percent_of_roof": 60.0, **more,
    }  # fmt: skip


def test_only_what_was_measured_and_right_is_reported(tmp_path):
    written(tmp_path, "kernels-x.jsonl", [kernel_row("triton", 100.0, passed=True), kernel_row("flash", 120.0)])
    written(tmp_path, "kernels-y.jsonl", [kernel_row("triton", 77.0, passed=False)])
    written(tmp_path, "kernels-cpu-tiny.jsonl", [kernel_row("triton", 55.0, passed=True)])
    steps = [
        {"kind": "step", "contestant": "one", "size": "1024x1024", "ms": 80.0, "tflops": 900.0, "peak_bytes": 2**34},
        {"kind": "step", "contestant": "two", "size": "1024x1024", "failed": "out of memory"},
    ]
    written(tmp_path, "step-x.jsonl", steps)
    text = report.markdown(tmp_path)
    assert "| `attention` | S | bf16 → fp8 | 100.0 | 500 TFLOP/s | 60 | 120.0 | – |" in text
    assert report.ABOVE_ROOF in text
    assert "| one | 80.0 | 900 | 16.0 GiB |" in text
    assert "77.0" not in text
    assert "55.0" not in text
    assert "two" not in text


def test_the_readme_is_written_between_its_marks(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.START}old\n{report.END}\nafter\n")
    report.write_readme(readme, "table")
    assert readme.read_text() == f"before\n{report.START}\ntable\n\n{report.END}\nafter\n"
    report.write_readme(readme, "")
    assert readme.read_text() == f"before\n{report.START}{report.END}\nafter\n"
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="to write between"):
        report.write_readme(readme, "table")


def test_plots_are_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib draws the plots: pip install 'fluxkiln[dev]'")
    written(tmp_path, "kernels-x.jsonl", [kernel_row("triton", 100.0, passed=True)])
    step = {"kind": "step", "contestant": "one", "size": "s", "ms": 3.0, "tflops": 1.0}
    step["parts_ms"] = {"attention": 2.0, "others": 1.0}
    written(tmp_path, "step-x.jsonl", [step])
    report.main(["--results", str(tmp_path), "--plots", str(tmp_path / "plots")])
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"kernels-x.svg", "step-x.svg"}


# --- tuned tiles ------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path, monkeypatch):
    path = tmp_path / "tiles.json"
    monkeypatch.setattr(tiles, "MEASURED", path)
    tiles.section.cache_clear()
    yield path
    monkeypatch.undo()
    tiles.section.cache_clear()


def test_a_measured_tile_is_picked_at_the_nearest_length(table):
    problem = {"arch": 90, "format": "bf16", "head_dim": 128, "length": 4608}
    fast, slow = ({"m": 128, "n": n, "warps": 8, "stages": 2, "copies": "tma", "specialize": False} for n in (128, 32))
    tune.merge(table, "attention", {"problem": problem, "tile": slow})
    tune.merge(table, "attention", {"problem": problem, "tile": fast})  # in place of the first
    tune.merge(table, "attention", {"problem": problem | {"length": 1536}, "tile": slow})
    assert len(json.loads(table.read_text())["attention"]) == 2
    assert attention.pick(90, "bf16", 128, 4173) == attention.Tile(**fast)
    assert attention.pick(90, "bf16", 128, 1000) == attention.Tile(**slow)
    assert attention.pick(90, "fp8", 128, 4608) == attention.TILES[90, "fp8", 128]
    assert tiles.measured.__wrapped__() == {}


def test_what_tuning_writes_is_what_runs(table, capsys):
    from fluxkiln.cli import main

    command = "bench tune --tiny --device cpu --budget 1e-9 --precision bf16 --json --op attention linear --table"
    assert main([*command.split(), str(table)]) == 0
    tiles.section.cache_clear()
    written = json.loads(table.read_text())
    assert [row["tile"]["m"] for row in written["attention"]] == [attention.pick(120, "bf16", 64, 64).m]
    compared = {(row["problem"]["op"], row["problem"]["size"]) for row in written["library"]}
    assert compared == {("attention", "tiny"), ("linear", "tiny")}
    assert all(row["us"] > row["us_library"] > 0 for row in written["library"])  # an interpreter beside a library
    assert library.faster(library.attention_kind(120, 64))
    assert len(capsys.readouterr().out.splitlines()) == len(written["attention"]) + len(written["library"])


def _addresses(x) -> set[int]:
    if isinstance(x, torch.Tensor):
        return {x.data_ptr()}
    parts = x if isinstance(x, tuple) else vars(x).values() if dataclasses.is_dataclass(x) else ()
    return set().union(*map(_addresses, parts))


@pytest.mark.parametrize("case", TINY_TUNED, ids=lambda case: case.key)
def test_candidates_share_an_output(case, monkeypatch):
    module, made = registry.OPS[case.op], []
    launch = module.launch

    def noted(*args, **options):
        output, launches = launch(*args, **options)
        made.append(output)  # kept, so that no address comes again
        return output, [] if len(made) < 3 else launches  # the runs that are timed need not calculate

    monkeypatch.setattr(module, "launch", noted)
    assert tune.tune(case, CPU, 1e-9, print) is not None
    one, two, judged = map(_addresses, made)
    assert one == two
    assert not one & judged  # else a tile that writes nothing would have another's result


@pytest.mark.parametrize("case", TINY_TUNED, ids=lambda case: case.key)
def test_the_shipped_tile_is_the_first_candidate_and_none_comes_twice(case):
    operands = registry.packed(case.op, arguments(case, CPU))
    section, problem, found = tune.search(case, operands, 90)
    assert section in ("rows", case.op)
    assert len(found) > 3
    assert len(set(found)) == len(found)
    shipped = kernels.launches(case.op, arguments(case, CPU), CPU)[1][-1].options
    assert problem["arch"] == 90
    assert shipped["num_warps"] in {tile.warps for tile in found}
