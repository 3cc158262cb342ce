"""How close is close enough, and buffers that show who wrote outside of them.

The truth is an operation's reference in float64. A kernel may be at most twice as wrong as eager in the same format in
the root mean square, and three times in its worst element; both read the same operands and round to the same format.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fluxkiln.kernels.formats import Activation, dequantize

NOISE = 1e-6  # relative: fp32 sums in another order, where eager happens to be exact

# Least signal to quantisation noise of a quantised activation, dB: rounding to 3 and to 1 bits of mantissa.
SQNR = {"fp8": 30.0, "nvfp4": 19.5}


def values(x: Activation) -> Tensor:
    """What an activation stands for, in float64."""
    return x.double() if isinstance(x, Tensor) else dequantize(x, torch.float64)


def errors(x: Activation, truth: Tensor) -> tuple[float, float]:
    """(root mean square error relative to the truth's, largest error relative to the truth's largest)."""
    difference = values(x) - truth
    scale = truth.square().mean().sqrt(), truth.abs().max()
    worst = difference.square().mean().sqrt(), difference.abs().max()
    return tuple((w / s.clamp_min(1e-30)).item() for w, s in zip(worst, scale, strict=True))


def sqnr(x: Activation, truth: Tensor) -> float:
    """Signal to quantisation noise, dB."""
    return -20 * torch.tensor(errors(x, truth)[0]).log10().item()


def assert_as_good_as_eager(got: Activation, eager: Activation, truth: Tensor) -> None:
    """Hold `got` to twice eager's error in the root mean square and three times in the worst element."""
    assert type(got) is type(eager)
    assert values(got).shape == truth.shape
    assert values(got).isfinite().all(), "not finite, or not written"
    for name, allowed, mine, eagers in zip(
        ("root mean square", "worst"), (2, 3), errors(got, truth), errors(eager, truth), strict=True
    ):
        if mine > allowed * eagers + NOISE:
            where = torch.unravel_index((values(got) - truth).abs().argmax(), truth.shape)
            at = tuple(int(i) for i in where)
            raise AssertionError(
                f"{name} error {mine:.2e}, eager's is {eagers:.2e}, allowed {allowed} times that; "
                f"worst at {at}: got {values(got)[at]:.6g}, truth {truth[at]:.6g}"
            )


class Canaries:
    """An `Empty` whose buffers are NaN before, and surrounded by bytes that must stay as they are."""

    GUARD = 4096

    def __init__(self) -> None:
        self.buffers: list[tuple[str, Tensor]] = []

    def __call__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        buffer = torch.full((size + 2 * self.GUARD,), 255, dtype=torch.uint8)  # NaN in every float format
        self.buffers.append((name, buffer))
        return buffer[self.GUARD : self.GUARD + size].view(dtype).view(shape)

    def check(self) -> None:
        for name, buffer in self.buffers:
            assert (buffer[: self.GUARD] == 255).all(), f"wrote before the start of {name}"
            assert (buffer[-self.GUARD :] == 255).all(), f"wrote past the end of {name}"


def run(launched: tuple[Activation, list], canaries: Canaries | None = None) -> Activation:
    """The output of an operation's `launch`, after running it."""
    y, launches = launched
    for launch in launches:
        launch()
    if canaries:
        canaries.check()
    return y
