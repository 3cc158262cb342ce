"""Watching a denoise: a progress bar, and where the time goes."""

from __future__ import annotations

import itertools
import sys
import time
from typing import Any

import torch
from torch import Tensor

from fluxkiln.record import Timings


class Bar:
    """A progress bar of the steps; by default only on a terminal."""

    def __init__(self, steps: int, show: bool | None) -> None:
        from tqdm import tqdm

        self._bar = tqdm(
            total=steps, desc="denoise", unit="step", leave=False, disable=None if show is None else not show
        )

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def step(self, step: int, sigma: float, x: Tensor) -> None:
        self._bar.update()


class Clock:
    """Seconds between the parts of the way, without making the device wait: events on a GPU, wall clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._names, self._times = device, list[str](), list[Any]()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.mark("start")

    def mark(self, name: str) -> None:
        """The part `name` ends here."""
        self._names.append(name)
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._times.append(event)
        else:
            self._times.append(time.perf_counter())

    def step(self, step: int, sigma: float, x: Tensor) -> None:
        self.mark("step")

    def timings(self, load: float) -> Timings:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            seconds = [a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(self._times)]
        else:
            seconds = [b - a for a, b in itertools.pairwise(self._times)]
        parts = dict(zip(self._names[1:], seconds, strict=True))
        steps = tuple(s for name, s in zip(self._names[1:], seconds, strict=True) if name == "step")
        named = {name: parts[name] for name in ("text", "encode", "modulate", "decode")}
        return Timings(load=load, steps=steps, total=sum(seconds), **named)

    def peak_memory(self) -> int | None:
        """Bytes: allocated on the GPU since the start, or ever resident in this process; None where nobody counts."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if sys.platform != "linux":
            return None
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
