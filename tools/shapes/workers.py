"""Several single-threaded processes that train one model: gradients are averaged after each step.

On few cores this is faster than threads, which wait for each other at every operation.
"""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing, nn

SAVE_EVERY = 200  # steps between two states of a stage, from which it goes on when it was stopped


def run(function: Callable[..., None], workers: int, folder: Path, *args: Any) -> None:
    """Call `function(rank, *args)` in `workers` processes."""
    rendezvous = (folder / "rendezvous").absolute()
    rendezvous.unlink(missing_ok=True)
    multiprocessing.spawn(_enter, (function, workers, str(rendezvous), args), nprocs=workers)


def _enter(rank: int, function: Callable[..., None], workers: int, rendezvous: str, args: tuple[Any, ...]) -> None:
    # Sent when the parent dies. What a script puts into the background ignores it, and so would its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    keep_memory()
    distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=workers)
    function(rank, *args)
    distributed.destroy_process_group()


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the workers."""
    if distributed.get_world_size() == 1:
        return
    parameters = list(parameters)
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = grad.view_as(p)


def keep_memory() -> None:
    """Have the C library reuse freed memory: returning it costs a page fault per page and step (Linux)."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def save(state: Any, path: Path) -> None:
    """`torch.save` that never leaves half a file under the final name."""
    partial = path.with_suffix(".writing")
    torch.save(state, partial)
    partial.replace(path)
