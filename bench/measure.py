"""One honest timer: warmed up, with a cold L2 cache, and the GPU never waiting for the host.

On a GPU a run is timed by events around it. Before each run a read of far more memory than the L2 cache holds evicts
what earlier runs left there (a read, so that no dirty line is written back while the clock runs); while the GPU is
busy with it, the host enqueues the run. A run that takes the host longer than that to enqueue is captured as a CUDA
graph and replayed. On a CPU a run is timed by the wall clock.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

COLD_BYTES = 2**30  # read before each run: 0.3 ms at 3.35 TB/s (H100), in which the host enqueues several launches
WARM_UP = 3  # runs that do not count: they compile, choose algorithms, allocate
MOST = 200  # samples


@dataclass(frozen=True)
class Samples:
    """Seconds of every counted run."""

    seconds: tuple[float, ...]
    how: str  # "launched", "graph" or "wall clock"

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def quantile(self, q: float) -> float:
        """The smallest sample that at least a share `q` of the samples do not exceed."""
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))]

    def row(self) -> dict[str, Any]:
        """What a result says about time: median, 20th and 80th percentile in microseconds, and their number."""
        median, low, high = (round(1e6 * s, 3) for s in (self.median, self.quantile(0.2), self.quantile(0.8)))
        return {"us": median, "us_p20": low, "us_p80": high, "samples": len(self.seconds), "timed": self.how}


def measure(run: Callable[[], Any], device: torch.device, budget: float = 0.3) -> Samples:
    """Time `run` for about `budget` seconds, at least 5 times.

    Args:
        run: enqueues work on the current stream; always the same work on the same memory.
        device: where it runs.
        budget: seconds of sampling, warm-up apart.
    """
    return _on_gpu(run, device, budget) if device.type == "cuda" else _on_cpu(run, budget)


def captured(run: Callable[[], Any]) -> Callable[[], None]:
    """`run` as a CUDA graph, with all that `run` holds kept for as long.

    Raises:
        RuntimeError: it waits for the GPU, or allocates in a way that cannot be captured.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay(held: Any = run) -> None:  # the graph reads the memory of what `run` holds, but does not own it
        graph.replay()

    return replay


# --- work that may not come back ----------------------------------------------------------------

LOST = 4  # exit code of a process whose GPU work has not come back, or has left CUDA unusable: start another
DIED = "took the process with it"  # a compiler's or a driver's signal: nobody was left to say more
SLOW = 180  # seconds after which work has not come back, compilation included


@contextlib.contextmanager
def watched(device: torch.device, tell: Callable[[str], object]) -> Iterator[None]:
    """On a GPU: work inside that takes longer than `SLOW` seconds is told of, and the process ends with `LOST`."""

    def give_up() -> None:
        why = f"did not come back within {SLOW} s"
        print(why, file=sys.stderr, flush=True)
        tell(why)
        os._exit(LOST)  # nothing is cleaned up: that would wait for the GPU

    timer = threading.Timer(SLOW, give_up)
    timer.daemon = True
    if device.type == "cuda":
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def lost(device: torch.device) -> bool:
    """Whether a kernel has faulted: every call of CUDA fails then, as long as the process lives."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


# --- time -------------------------------------------------------------------------------------


def _on_cpu(run: Callable[[], Any], budget: float) -> Samples:
    run()
    seconds: list[float] = []
    while len(seconds) < 5 or (sum(seconds) < budget and len(seconds) < MOST):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
        if sum(seconds) > 10 * budget:  # an interpreted kernel: one run is enough
            break
    return Samples(tuple(seconds), "wall clock")


def _on_gpu(run: Callable[[], Any], device: torch.device, budget: float) -> Samples:
    cold = Cold(device)
    for _ in range(WARM_UP):
        run()
    torch.cuda.synchronize(device)
    how = "launched"
    if 2 * _host_seconds(run, device) > cold.seconds:
        run, how = captured(run), "graph"
        run()
    first = _events(run, cold, 5)
    count = int(min(MOST, max(5, budget / (cold.seconds + statistics.median(first)))))
    return Samples(tuple(_events(run, cold, count)), how)


def _host_seconds(run: Callable[[], Any], device: torch.device) -> float:
    """What it takes the host to enqueue a run."""
    seconds = []
    for _ in range(5):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    torch.cuda.synchronize(device)
    return statistics.median(seconds)


def _events(run: Callable[[], Any], cold: Cold, count: int) -> list[float]:
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for start, end in pairs:
        cold()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize(cold.device)
    return [1e-3 * start.elapsed_time(end) for start, end in pairs]


class Cold:
    """Evicts the L2 cache when called; takes `seconds`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.buffer = torch.zeros(COLD_BYTES // 4, dtype=torch.int32, device=device)
        self.result: Tensor = self.buffer.max()
        self()  # loads the kernel
        torch.cuda.synchronize(device)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        self()
        end.record()
        torch.cuda.synchronize(device)
        self.seconds = 1e-3 * start.elapsed_time(end)

    def __call__(self) -> None:
        torch.amax(self.buffer, 0, out=self.result)


# --- roofs ------------------------------------------------------------------------------------


def empty(device: torch.device, budget: float = 0.3) -> float:
    """Seconds that the timer finds for a kernel with nothing to do: so much of every short time is not the kernel's."""
    one = torch.zeros(1, device=device)
    return measure(lambda: one.add_(1), device, budget).median


def roofs(device: torch.device, formats: Sequence[str], side: int = 8192, budget: float = 0.5) -> dict[str, float]:
    """What this device reaches at best, by the same timer: `copy` in bytes/s, each format's matrix product in flop/s.

    A copy counts bytes read and bytes written, and is so large that it pays for all of its writes; what a kernel wrote
    last may still be in the L2 cache when its time ends, so one that is bound by memory may exceed this roof. FP8 is
    the library's product with one scale for a whole operand and fast accumulation; a format that the device or the
    library has not is left out.
    """
    found = {"copy": 2 * 16 * side**2 / measure(_copy(16 * side**2, device), device, budget).median}
    for format in formats:
        run = _product(format, side, device)
        if run is not None:
            found[format] = 2 * side**3 / measure(run, device, budget).median
    return found


def _copy(nbytes: int, device: torch.device) -> Callable[[], Tensor]:
    source = torch.empty(nbytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _product(format: str, side: int, device: torch.device) -> Callable[[], Tensor] | None:
    x = torch.randn(side, side, device=device).bfloat16()  # random: zeros would draw less power and run faster
    if format == "bf16":
        y = torch.empty_like(x)
        return lambda: torch.mm(x, x.T, out=y)
    if format == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        codes, one = (x * 100).clamp(-448, 448).to(torch.float8_e4m3fn), torch.ones((), device=device)
        return lambda: torch._scaled_mm(
            codes, codes.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    return None
