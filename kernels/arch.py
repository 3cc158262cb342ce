"""GPU architectures: which ones have kernels of their own, and what one streaming multiprocessor of each holds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Arch:
    """Limits of a compute capability (CUDA programming guide, technical specifications)."""

    number: int
    name: str
    shared_limit: int  # bytes one block may ask for
    shared_per_sm: int  # bytes; each resident block costs 1 KiB more than it asks for
    warps_per_sm: int
    blocks_per_sm: int

    def __str__(self) -> str:
        return f"sm_{self.number}"

    def occupancy(self, registers: int, warps: int, shared: int, tensor_memory: int = 0) -> int:
        """Blocks of `warps` warps that fit one multiprocessor; `tensor_memory` in columns of 512."""
        per_block = -(-registers // 8) * 8 * 32 * warps  # registers are handed out by eights
        return min(
            65536 // max(1, per_block),
            self.warps_per_sm // warps,
            self.shared_per_sm // (shared + 1024),
            512 // max(1, tensor_memory),
            self.blocks_per_sm,
        )


ARCHS = {
    arch.number: arch
    for arch in (
        Arch(80, "Ampere (A100)", 166912, 167936, 64, 32),
        Arch(86, "Ampere", 101376, 102400, 48, 16),
        Arch(89, "Ada", 101376, 102400, 48, 24),
        Arch(90, "Hopper", 232448, 233472, 64, 32),
        Arch(100, "Blackwell (B200)", 232448, 233472, 64, 32),
        Arch(103, "Blackwell (B300)", 232448, 233472, 64, 32),
        Arch(120, "Blackwell (RTX)", 101376, 102400, 48, 24),
        Arch(121, "Blackwell (GB10)", 101376, 102400, 48, 24),
    )
}

NATIVE = (89, 90, 100, 120)  # kernels are written, compiled and tuned for these

# The others run what their nearest relative runs: the same instructions and no more shared memory than they have.
# 80 and 86 have no FP8 tensor cores, but share the pointer loads and `cp.async` of 89.
RELATIVE = {80: 89, 86: 89, 103: 100, 121: 120}


def parse(name: str | int) -> int:
    """`"sm_89"`, `"89"` or 89 to 89.

    Raises:
        ValueError: not one of `ARCHS`.
    """
    text = str(name).removeprefix("sm_")
    if not text.isdigit() or int(text) not in ARCHS:
        raise ValueError(f"unknown architecture {name!r}: expected one of {', '.join(map(str, ARCHS.values()))}")
    return int(text)
