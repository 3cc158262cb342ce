"""Machine code without a GPU: what is read from it, and every shipped kernel held to its budget."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
import torch

from fluxkiln.cli import main
from fluxkiln.kernels import registry, resources
from fluxkiln.kernels.arch import ARCHS, NATIVE, RELATIVE, parse
from fluxkiln.kernels.compile import Configuration, Resources, compile_launch, tensor_core_instructions
from fluxkiln.kernels.language import Launch, jit, tl

MMA = {  # format -> the tensor cores' instruction for it, by architecture
    89: {"bf16": r"mma\.sync.*m16n8k16.*bf16", "fp8": r"mma\.sync.*m16n8k32.*e4m3"},
    90: {"bf16": r"wgmma.*bf16", "fp8": r"wgmma.*e4m3"},
    100: {"bf16": r"tcgen05\.mma.*kind::f16", "fp8": r"tcgen05\.mma.*kind::f8f6f4", "nvfp4": r"tcgen05.*mxf4nvf4.*"},
    120: {
        "bf16": r"mma\.sync.*m16n8k16.*bf16",
        "fp8": r"mma\.sync.*mxf8f6f4\.block_scale.*e4m3",
        "nvfp4": r".*mxf4nvf4.*",
    },
}
MULTIPLY = ("qkv_rope", "attention", "linear_gelu", "linear_gate_residual", "linear")


def test_instructions_are_those_of_loops():
    ptx = """
$L__BB0_1:
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {a}, {b};
    @%p1 bra $L__BB0_1;
$L__BB0_2:
    mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {a}, {b};
    bra.uni $L__BB0_3;
$L__BB0_3:
    ret;
"""
    assert tensor_core_instructions(ptx) == ["mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"]
    straight = ptx.replace("bra $L__BB0_1", "bra $L__BB0_3")
    assert len(tensor_core_instructions(straight)) == 2


@pytest.mark.parametrize(
    ("arch", "registers", "warps", "shared", "tensor_memory", "blocks"),
    [
        (89, 128, 8, 32 << 10, 0, 2),  # registers: 65536 / (128 * 256)
        (89, 32, 8, 49 << 10, 0, 2),  # shared memory: 100 KiB / (49 + 1)
        (89, 32, 4, 0, 0, 12),  # 48 warps
        (90, 32, 8, 0, 0, 8),  # 64 warps
        (90, 168, 12, 227 << 10, 0, 1),
        (90, 16, 1, 0, 0, 32),  # blocks
        (100, 64, 4, 1 << 10, 256, 2),  # tensor memory
        (120, 130, 8, 64 << 10, 0, 1),  # 136 registers: they come by eights
    ],
)
def test_occupancy(arch, registers, warps, shared, tensor_memory, blocks):
    assert ARCHS[arch].occupancy(registers, warps, shared, tensor_memory) == blocks


def test_architecture_names():
    assert parse("sm_90") == parse("90") == parse(90) == 90
    with pytest.raises(ValueError, match=r"unknown architecture 'sm_75': expected one of sm_80, "):
        parse("sm_75")
    assert all(ARCHS[a].shared_limit >= ARCHS[b].shared_limit for a, b in RELATIVE.items())


@jit
def _squares(x_ptr, WIDTH: tl.constexpr):
    offs = tl.arange(0, WIDTH)
    x = tl.load(x_ptr + offs[:, None] * WIDTH + offs[None, :])
    for _ in range(4):
        x = tl.dot(x, x).to(tl.bfloat16)
    tl.store(x_ptr + offs[:, None] * WIDTH + offs[None, :], x)


@jit
def _centred(x_ptr, WIDTH: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, WIDTH)).to(tl.float32)
    tl.store(x_ptr + tl.arange(0, WIDTH), x - tl.sum(x, axis=0))  # all of x stays alive over the sum


def launch(kernel, width: int) -> Launch:
    x = torch.empty(width, width, dtype=torch.bfloat16, device="meta")
    return Launch(kernel, (1,), (x,), {"WIDTH": width, "num_warps": 1})


def test_a_kernel_that_breaks_its_promises_is_found():
    kept = Configuration("op", "bf16", "small", launch(_squares, 32), MMA[120]["bf16"] + ".*", None)
    resources = compile_launch(kept.launch, 120)
    assert resources.broken(kept) == []
    greedy = dataclasses.replace(kept, launch=launch(_centred, 8192 * 2), instruction="")
    (sentence,) = compile_launch(greedy.launch, 120).broken(greedy)
    assert "spills" in sentence
    large = dataclasses.replace(resources, shared_bytes=101377)
    assert large.broken(kept) == ["asks for 101377 bytes of shared memory, the limit is 101376"]
    waiting = dataclasses.replace(resources, serialized=True)
    assert waiting.broken(kept) == ["waits for each wgmma before the next"]
    changed = {
        "no tma copies": {"copies": "tma"},
        "planned were 99": {"occupancy": 99},
        "expected": {"instruction": "w.*"},
    }
    for sentence, fields in changed.items():
        (found,) = resources.broken(dataclasses.replace(kept, **fields))
        assert sentence in found


def test_compiling_says_when_it_cannot(monkeypatch):
    from triton import knobs

    monkeypatch.setattr(knobs.runtime, "interpret", True)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET: unset it"):
        compile_launch(launch(_squares, 32), 90)


# --- every shipped kernel ---------------------------------------------------------------------


def rows_of(arch: int, configurations) -> list[dict]:
    """Rows of the table of resources, compiled here."""
    rows = []
    for each in configurations:
        compiled = compile_launch(each.launch, arch)
        row = {"op": each.op, "format": each.format, "config": each.name, **dataclasses.asdict(compiled)}
        rows.append(json.loads(json.dumps(row | {"broken": compiled.broken(each)})))
    return rows


def hold(arch: int, rows: list[dict]) -> None:
    """No spills, shared memory within the limit, planned occupancy, the right instructions, asynchronous copies; and
    what the table says."""
    table = resources.rows(resources.PINNED)
    for row in rows:
        assert row["broken"] == [], row
        assert not row["serialized"]
        assert row["spill_bytes"] == 0
        assert row["shared_bytes"] <= row["shared_limit"] == ARCHS[arch].shared_limit
        assert row["occupancy"] >= 1
        if row["op"] in MULTIPLY:
            expected = MMA[arch][row["format"].split()[0]]
            assert row["instructions"], row
            assert all(re.match(expected, name) for name in row["instructions"]), row
            assert row["copies"], row
        known = table[row["arch"], row["op"], row["format"], row["config"]]
        assert {name: row[name] for name in known} == known


def test_the_table_has_what_is_shipped_and_nothing_in_it_spills():
    """Stale? `fluxkiln.kernels.resources` says how it is written."""
    shipped = {arch: list(registry.configurations(arch)) for arch in NATIVE}
    pinned = resources.rows(resources.PINNED)
    assert pinned.keys() == names(shipped)
    assert all(row["spill_bytes"] == 0 and row["broken"] == [] for row in pinned.values())
    largest = {arch: resources.hungriest(arch, shipped[arch]) for arch in NATIVE}
    for version in resources.OTHERS:
        assert resources.rows(version).keys() == names(largest)


def names(configurations: dict) -> set[tuple[str, ...]]:
    return {(str(ARCHS[arch]), c.op, c.format, c.name) for arch, found in configurations.items() for c in found}


def test_the_hungriest_is_the_one_that_takes_the_most_registers():
    shipped = list(registry.configurations(90))
    chosen = resources.hungriest(90, shipped)
    assert len(chosen) == len({(c.op, c.format) for c in shipped})
    table = {key[1:]: row["registers"] for key, row in resources.rows(resources.PINNED).items() if key[0] == "sm_90"}
    for c in chosen:
        assert table[c.op, c.format, c.name] == max(n for name, n in table.items() if name[:2] == (c.op, c.format))
    unknown = dataclasses.replace(chosen[0], name="one more")
    assert unknown in resources.hungriest(90, [*shipped, unknown])


@pytest.mark.compiled
@pytest.mark.parametrize("arch", NATIVE)
def test_the_hungriest_keep_their_budget(arch):
    hold(arch, rows_of(arch, resources.hungriest(arch, registry.configurations(arch))))


@pytest.mark.long
@pytest.mark.compiled
@pytest.mark.parametrize("arch", NATIVE)
def test_every_shipped_kernel_keeps_its_budget(arch, capsys):
    code = main(["kernels", "--arch", f"sm_{arch}", "--json"])
    rows = json.loads(capsys.readouterr().out)
    compiled = [row for row in rows if "refused" not in row]
    assert code == 0, [row for row in compiled if row["broken"]]
    fields = {field.name for field in dataclasses.fields(Resources)} | {"op", "backend", "format", "config"}
    assert all(fields <= row.keys() for row in compiled)
    hold(arch, compiled)
    shipped = {(row["op"], row["format"].split()[0]) for row in compiled}
    for op in MULTIPLY:
        for format in MMA[arch]:
            assert (op, format) in shipped or (op, format) == ("attention", "nvfp4")
    assert {(row["op"], row["format"]) for row in rows if "refused" in row}.isdisjoint(shipped)
    assert len(compiled) == sum(1 for _ in registry.configurations(arch))


@pytest.mark.long
@pytest.mark.compiled
@pytest.mark.parametrize("version", resources.OTHERS)
def test_the_table_holds_for_another_triton(version, tmp_path):
    """3.6.0 is what torch 2.11 brings. The package comes from pip, into a folder of this test."""
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        tmp_path,
        f"triton=={version}",
    ]
    installed = subprocess.run(install, capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"pip has no Triton {version} here: {installed.stderr.strip().splitlines()[-1]}")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    archs = [f"sm_{arch}" for arch in NATIVE]
    command = [sys.executable, "-P", "-m", "fluxkiln.kernels", *archs, "--hungriest"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    table = resources.rows(version)
    for row in map(json.loads, found.splitlines()):
        known = table[row["arch"], row["op"], row["format"], row["config"]]
        assert {name: row[name] for name in known} == known
