"""Run a convolutional network over an image tile by tile, without a seam although its GroupNorms see the whole image.

Two things make tiles differ from the whole. A convolution near a cut sees the cut: every tile is read with a margin as
wide as the network looks, and only its core is kept. And a GroupNorm needs the mean and variance of the whole image,
which depend on every layer before it, while memory holds one tile. So the statistics are predicted, used for all
tiles alike (hence no seam), measured on the way, and corrected until both agree:

    predict   a sample of small windows, together at most as large as one tile, runs layer by layer as one batch; a
              layer's statistics are those of the sample, corrected by what is known of the difference
    measure   every tile runs with the predicted statistics, and writes its core of the result; what the statistics
              of the whole image really were gives the next correction

Errors of earlier layers are nearly the same in sample and image, so two to four rounds are enough for most images.
No image needs more rounds than there are norms: each round makes at least one more exact, in the order they run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import EllipsisType

import torch
from torch import Tensor, nn

Norm = Callable[[nn.GroupNorm, Tensor], Tensor]
Slices = tuple[EllipsisType, slice, slice]

TOLERANCE = 5e-3  # of predicted statistics: of a mean in standard deviations, of a variance relative
CELL = 32  # pixels: largest side of a window of the sample, without its margin


@dataclass(frozen=True)
class Span:
    """One side of a tile, in pixels: what it keeps, and what it reads for that."""

    start: int
    stop: int
    outer_start: int
    outer_stop: int

    def inner(self, size: int) -> slice:
        """What it keeps, as a slice of a tensor that covers what it reads with `size` points."""
        # A network halves odd sizes downwards: the quotient is the stride or a little more.
        stride = 1 << (((self.outer_stop - self.outer_start) // size).bit_length() - 1)
        start = (self.start - self.outer_start) // stride
        return slice(start, size if self.stop == self.outer_stop else start + (self.stop - self.start) // stride)


@dataclass(frozen=True)
class Tile:
    rows: Span
    columns: Span

    def core(self, pixels: int) -> Slices:
        """What it keeps, as slices of an image with so many pixels per point."""
        rows, columns = (slice(span.start // pixels, span.stop // pixels) for span in (self.rows, self.columns))
        return ..., rows, columns

    def outer(self, pixels: int) -> Slices:
        """What it reads, as slices of an image with so many pixels per point."""
        spans = (self.rows, self.columns)
        rows, columns = (slice(span.outer_start // pixels, span.outer_stop // pixels) for span in spans)
        return ..., rows, columns

    def inner(self, x: Tensor) -> Slices:
        """What it keeps, as slices of a layer's output `x [B, C, h, w]` for this tile."""
        return ..., self.rows.inner(x.shape[2]), self.columns.inner(x.shape[3])


@dataclass(frozen=True)
class Cut:
    """How an image is cut.

    Attributes:
        size: height and width of the image, in pixels.
        tile: side of a tile without its margin, in pixels.
        margin: pixels read beyond it on each side.
        grid: pixels on whose multiples cuts may lie.
    """

    size: tuple[int, int]
    tile: int
    margin: int
    grid: int

    def tiles(self) -> list[Tile]:
        """Tiles of nearly equal size that cover the image."""
        return self._cut(self.tile, lambda a, b, size: (max(a - self.margin, 0), min(b + self.margin, size)))

    def cells(self) -> list[Tile]:
        """Small windows that cover the image, all read at one size so that they can run as a batch."""
        side = CELL + 2 * self.margin

        def window(a: int, b: int, size: int) -> tuple[int, int]:
            start = min(max(a - self.margin, 0), max(size - side, 0))
            return start, min(start + side, size)

        whole = (self.size[0] // self.grid * self.grid, self.size[1] // self.grid * self.grid)
        return replace(self, size=whole)._cut(CELL, window)

    def _cut(self, step: int, outer: Callable[[int, int, int], tuple[int, int]]) -> list[Tile]:
        """Cut both sides in nearly equal parts of at most `step`; `outer` says what (start, stop, size) reads."""

        def spans(size: int) -> list[Span]:
            points, count = size // self.grid, -(-size // step)
            cuts = [points * i // count * self.grid for i in range(count)] + [size]
            return [Span(a, b, *outer(a, b, size)) for a, b in itertools.pairwise(cuts)]

        return [Tile(rows, columns) for rows in spans(self.size[0]) for columns in spans(self.size[1])]


def run_tiled(
    network: Callable[[Tensor, Norm], Tensor], source: Tensor, cut: Cut, pixels_in: int, pixels_out: int
) -> Tensor:
    """`network(source)` of one image, with the memory of one tile beside source and result.

    Args:
        network: a convolutional network that takes its GroupNorms' function as an argument.
        source: `[1, C, h, w]`, `pixels_in` pixels of the image per point.
        cut: the tiles, with a margin as wide as the network looks.
        pixels_in: pixels per point of the source, along each side.
        pixels_out: the same for the result.

    Returns:
        `[1, C', H / pixels_out, W / pixels_out]`.
    """
    tiles = cut.tiles()
    sample = choose_sample(source, cut, pixels_in)
    windows = torch.cat([source[window.outer(pixels_in)] for window, _ in sample])
    statistics, rounds = SharedNorm(), 0
    result: Tensor | None = None
    while True:
        network(windows, partial(statistics.predict, sample))
        for tile in tiles:
            part = network(source[tile.outer(pixels_in)], partial(statistics.apply, tile))
            if result is None:
                result = part.new_empty(1, part.shape[1], *(side // pixels_out for side in cut.size))
            result[tile.core(pixels_out)] = part[tile.inner(part)]
        rounds += 1
        error, norms = statistics.correct()
        if result is not None and (not error > TOLERANCE or rounds > norms):  # NaN ends it too
            return result


def choose_sample(source: Tensor, cut: Cut, pixels: int) -> list[tuple[Tile, float]]:
    """Cells that stand for the whole image `source [1, C, h, w]`, each with the number of cells it stands for.

    Cells are sorted by their energy, the mean square of the deviation from the image's mean, and split in strata of
    equal share, half by number and half by energy; the middle of each stratum stands for it. So the flat part of an
    image needs few, and the few cells in which most happens are not missed.
    """
    cells = cut.cells()
    count = max(1, (cut.tile + 2 * cut.margin) ** 2 // (CELL + 2 * cut.margin) ** 2)
    mean = source.mean((2, 3), keepdim=True, dtype=torch.float32)
    energies = torch.stack([(source[cell.core(pixels)].float() - mean).square().mean() for cell in cells]).cpu()
    order = energies.argsort(stable=True)
    share = (1 + energies[order] / energies.mean().clamp_min(1e-12)).cumsum(0)
    stratum = (share / share[-1] * count).ceil().clamp(1, count).int()
    sample = []
    for members in (order[stratum == i] for i in range(1, count + 1)):
        if len(members):
            sample.append((cells[int(members[len(members) // 2])], float(len(members))))
    return sample


class SharedNorm:
    """GroupNorm of many parts of an image with common statistics, those of the whole.

    Statistics are kept as `[3, groups]` sums in fp64: how many values, their sum, the sum of their squares.
    """

    def __init__(self) -> None:
        self._sample: dict[nn.GroupNorm, Tensor] = {}
        self._measured: dict[nn.GroupNorm, Tensor] = {}
        self._predicted: dict[nn.GroupNorm, tuple[Tensor, Tensor]] = {}
        self._correction: dict[nn.GroupNorm, tuple[Tensor, Tensor]] = {}

    def predict(self, sample: list[tuple[Tile, float]], norm: nn.GroupNorm, x: Tensor) -> Tensor:
        """Normalise the sample `x [N, C, h, w]` with its own, corrected statistics, and remember them."""
        sums = [
            weight * _sums(row[None][window.inner(row[None])], norm)
            for row, (window, weight) in zip(x, sample, strict=True)
        ]
        self._sample[norm] = torch.stack(sums).sum(0)
        mean, var = _moments(self._sample[norm], norm)
        shift, ratio = self._correction.get(norm, (0.0, 1.0))
        self._predicted[norm] = mean + shift * var.sqrt(), var * ratio
        return affine(norm, x, *self._predicted[norm])

    def apply(self, tile: Tile, norm: nn.GroupNorm, x: Tensor) -> Tensor:
        """Normalise a tile `x [1, C, h, w]` with the predicted statistics, and add to the measured ones."""
        sums = _sums(x[tile.inner(x)], norm)
        self._measured[norm] = self._measured[norm] + sums if norm in self._measured else sums
        return affine(norm, x, *self._predicted[norm])

    def correct(self) -> tuple[float, int]:
        """Learn from the measured statistics; returns the largest error of the predicted, and how many norms ran."""
        errors = []
        for norm, sums in self._measured.items():
            (mean, var), (sample_mean, sample_var) = _moments(sums, norm), _moments(self._sample[norm], norm)
            predicted_mean, predicted_var = self._predicted[norm]
            deviation = (mean - predicted_mean).abs() / predicted_var.sqrt()
            errors += [deviation.max(), (var / predicted_var - 1).abs().max()]
            self._correction[norm] = (mean - sample_mean) / sample_var.sqrt(), var / sample_var
        self._measured = {}
        return (torch.stack(errors).max().item() if errors else 0.0), len(errors) // 2


def affine(norm: nn.GroupNorm, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Normalise `x [B, C, h, w]` with given statistics `[B or nothing, groups]`, eps already in the variance.

    Rounds once, to the dtype of `x`, whose memory layout it keeps.
    """
    per_group = norm.num_channels // norm.num_groups
    scale = norm.weight * var.rsqrt().repeat_interleave(per_group, dim=-1)
    shift = norm.bias - scale * mean.repeat_interleave(per_group, dim=-1)
    dtype = torch.promote_types(x.dtype, torch.float32)
    scale, shift = (v.to(dtype)[..., None, None] for v in (scale, shift))
    return torch.addcmul(shift, x, scale, out=torch.empty_like(x))


def _sums(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    x = x.unflatten(1, (norm.num_groups, -1))
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    var, mean = (v[0].double() for v in torch.var_mean(wide, dim=(2, 3, 4), correction=0))
    count = torch.full_like(mean, x[0, 0].numel())
    return torch.stack((count, count * mean, count * (var + mean * mean)))


def _moments(sums: Tensor, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """Mean, and variance with the eps that the norm adds to it."""
    count, first, second = sums
    mean = first / count
    return mean, (second / count - mean * mean).clamp_min(0) + norm.eps
