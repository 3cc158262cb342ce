"""Compile a kernel's launch for a GPU that is not there, and read what the machine code needs.

Every file with a Triton kernel tells how it is shipped, on each architecture, in each format:

    def configurations(arch: int) -> Iterator[Configuration]: ...

A `Configuration` holds the very `Launch` that the operation would do for a FLUX.1 shape, made by the same function,
over tensors on the meta device (`torch.empty(..., device="meta")`; descriptors over them too), and what its author
expects of the machine code. `compile_launch` compiles it, and `Resources.broken` says which expectation fails.
The registry collects the configurations; tests hold all of them to zero spills and to their promises.

    python -m fluxkiln.kernels sm_90 [--op linear]     every configuration, one JSON object a line
"""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from fluxkiln.kernels.arch import ARCHS
from fluxkiln.kernels.language import Launch

SERIALIZED = "wgmma.mma_async instructions are serialized"  # a remark of ptxas
TENSOR_CORE = re.compile(r"(wgmma\.mma_async\S*|tcgen05\.mma\.[\w.:]+|mma\.sync[\w.:]+)")

# What multiplies a format on an architecture at its full rate; a kernel's main loop has nothing else.
INSTRUCTIONS = {
    (89, "bf16"): r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16\.f32",
    (89, "fp8"): r"mma\.sync\.aligned\.m16n8k32\.row\.col\.f32\.e4m3\.e4m3\.f32",
    (90, "bf16"): r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.bf16\.bf16",
    (90, "fp8"): r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.f32\.e4m3\.e4m3",
    (100, "bf16"): r"tcgen05\.mma\.cta_group::1\.kind::f16",
    (100, "fp8"): r"tcgen05\.mma\.cta_group::1\.kind::f8f6f4",
    (100, "nvfp4"): r"tcgen05\.mma\.cta_group::1\.kind::mxf4nvf4\.block_scale.*",
    (120, "bf16"): r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16\.f32",
    (120, "fp8"): r"mma\.sync\.aligned\.m16n8k32\.row\.col\.kind::mxf8f6f4\.block_scale.*e4m3\.e4m3.*",
    (120, "nvfp4"): r"mma\.sync\.aligned\.m16n8k64\.row\.col\.kind::mxf4nvf4\.block_scale.*e2m1\.e2m1.*",
}


@dataclass(frozen=True)
class Configuration:
    """One way in which an operation is shipped on an architecture.

    Attributes:
        op: name of the operation, as in `Ops`.
        format: what the operation multiplies or writes: `bf16`, `fp8`, `nvfp4`, ... as the recipe spells it.
        name: the choice among several launches of one op and format, for people: "N=9216 128x256x128 w8 s3".
        launch: the launch for a FLUX.1 shape, over tensors on the meta device.
        instruction: regular expression that each tensor-core instruction of the main loop must match in full;
            "" for a kernel that has none.
        copies: how operands reach shared memory: asynchronously (`cp.async`), by the tensor memory accelerator
            (`tma`), or not at all (None).
        occupancy: blocks per multiprocessor, at least.
    """

    op: str
    format: str
    name: str
    launch: Launch
    instruction: str
    copies: Literal["cp.async", "tma"] | None
    occupancy: int = 1


@dataclass(frozen=True)
class Resources:
    """What one compiled launch needs; the fields that `fluxkiln kernels --json` prints."""

    arch: str
    registers: int
    spill_bytes: int  # stores and loads
    shared_bytes: int
    shared_limit: int
    occupancy: int
    instructions: list[str]  # tensor-core mnemonics in the kernel's loops
    products: int  # how many of them the code has there
    copies: list[str]
    serialized: bool  # each wgmma waits for the one before: ptxas does so where registers are too few
    compile_seconds: float
    triton: str

    def broken(self, configuration: Configuration) -> list[str]:
        """Every promise of the configuration that the machine code does not keep, one sentence each."""
        c, sentences = configuration, []
        if self.spill_bytes:
            sentences.append(f"spills {self.spill_bytes} bytes of registers")
        if self.shared_bytes > self.shared_limit:
            sentences.append(f"asks for {self.shared_bytes} bytes of shared memory, the limit is {self.shared_limit}")
        if self.serialized:
            sentences.append("waits for each wgmma before the next")
        if self.occupancy < c.occupancy:
            sentences.append(f"{self.occupancy} blocks fit a multiprocessor, planned were {c.occupancy}")
        if c.copies and c.copies not in self.copies:
            sentences.append(f"has no {c.copies} copies")
        strangers = [name for name in self.instructions if not re.fullmatch(c.instruction, name)]
        if strangers or bool(c.instruction) != bool(self.instructions):
            sentences.append(f"multiplies with {self.instructions or 'no tensor core'}, expected {c.instruction!r}")
        return sentences


def compile_launch(launch: Launch, arch: int) -> Resources:
    """Compile for `arch` (a number of `ARCHS`), with no GPU, and measure.

    Raises:
        RuntimeError: Triton or ptxas refuses the kernel.
    """
    from triton import __version__

    limits, log = ARCHS[arch], io.StringIO()
    start = time.perf_counter()
    with no_gpu(arch), contextlib.redirect_stdout(log):  # on an error Triton prints all of the PTX
        compiled = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.options, enable_fp_fusion=True)
    seconds = time.perf_counter() - start
    ptx, shared = compiled.asm["ptx"], compiled.metadata.shared
    said = log.getvalue()
    used = usage(said)
    if used is None:  # it was in Triton's cache
        said = assemble(ptx, arch)
        used = usage(said)
    if used is None:
        raise RuntimeError(f"ptxas gave no resource usage for sm_{arch}: {said.strip() or 'no output'}")
    registers, spill = used
    products = tensor_core_instructions(ptx)
    threads = re.search(r"\.reqntid (\d+)", ptx)  # warp specialisation adds to num_warps
    warps = int(threads[1]) // 32 if threads else compiled.metadata.num_warps
    tensor_memory = getattr(compiled.metadata, "tmem_size", None) or 0
    return Resources(
        arch=str(limits),
        registers=registers,
        spill_bytes=spill,
        shared_bytes=shared,
        shared_limit=limits.shared_limit,
        occupancy=limits.occupancy(registers, warps, shared, tensor_memory),
        instructions=sorted(set(products)),
        products=len(products),
        copies=[
            name
            for name, mnemonic in (("cp.async", r"cp\.async\.c[ag]"), ("tma", r"cp\.async\.bulk\.tensor"))
            if re.search(mnemonic, ptx)
        ],
        serialized=SERIALIZED in said,
        compile_seconds=round(seconds, 2),
        triton=__version__,
    )


def tensor_core_instructions(ptx: str) -> list[str]:
    """Tensor-core mnemonics in loops (between a label and a branch back to it), in order, or all if no loop has any."""
    lines = ptx.splitlines()
    labels = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r"\s*(\$\w+):", line))}
    looped: set[int] = set()
    for i, line in enumerate(lines):
        target = re.search(r"\bbra(?:\.uni)?\s+(\$\w+)", line)
        if target and labels.get(target[1], i) < i:
            looped.update(range(labels[target[1]], i))
    found = {i: match[1] for i, line in enumerate(lines) if (match := TENSOR_CORE.search(line))}
    return [name for i, name in found.items() if i in looped] or list(found.values())


def usage(log: str) -> tuple[int, int] | None:
    """Registers per thread and bytes spilled, as ptxas tells them."""
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    return (int(registers[1]), int(spills[1]) + int(spills[2])) if registers and spills else None


def assemble(ptx: str, arch: int) -> str:
    """What ptxas says of a PTX text, run as Triton runs it."""
    from triton import __version__
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    version = tuple(map(int, __version__.split(".")[:2]))
    options = ["--regAllocOptLevel=2"] if version >= (3, 7) else []
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(arch).path, "-v", *options, f"--gpu-name={sm_arch_from_capability(arch)}"]
        run = subprocess.run([*command, file.name, "-o", "/dev/null"], capture_output=True, text=True)
    return run.stderr


class Target:
    """Stands in for Triton's driver, so that a launch takes its real path up to the machine code."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return -self.arch  # keys Triton's per-device caches: never that of a device that is there

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def no_gpu(arch: int) -> Iterator[None]:
    """Launches inside compile for `arch` instead of for the GPU of this machine.

    Raises:
        RuntimeError: Triton was imported with TRITON_INTERPRET set, its own library cannot be compiled then.
    """
    from triton import knobs
    from triton.runtime import driver

    if knobs.runtime.interpret:
        raise RuntimeError("kernels cannot be compiled in a process that runs with TRITON_INTERPRET: unset it")
    before = driver._active, knobs.nvidia.dump_ptxas_log
    driver.set_active(Target(arch))
    knobs.nvidia.dump_ptxas_log = True
    try:
        yield
    finally:
        driver._active, knobs.nvidia.dump_ptxas_log = before
