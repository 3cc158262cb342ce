"""Run a convolutional network over an image tile by tile, without a seam although its GroupNorms see the whole image.

Two things make tiles differ from the whole. A convolution near a cut sees the cut: every tile is read with a margin as
wide as the network looks, and only its core is kept. And a GroupNorm needs the mean and variance of the whole image,
which depend on every layer before it, while memory holds one tile. So the statistics are predicted, used for all
tiles alike (hence no seam), measured on the way, and corrected until both agree:

    predict   a sample of small windows, spread evenly and together as large as one tile, runs layer by layer as one
              batch; a layer's statistics are those of the sample, corrected by what is known of the difference
    measure   every tile runs with the predicted statistics, and writes its core of the result; what the statistics
              of the whole image really were gives the next correction

Errors of earlier layers are nearly the same in sample and image, so two or three rounds are enough.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import EllipsisType

import torch
from torch import Tensor, nn

Norm = Callable[[nn.GroupNorm, Tensor], Tensor]
Slices = tuple[EllipsisType, slice, slice]

TOLERANCE = 4e-3  # of predicted statistics: of a mean in standard deviations, of a variance relative
MAX_ROUNDS = 6
SAMPLE_CORE = 64  # pixels: side of a window of the sample, without its margin


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

        def spans(size: int) -> list[Span]:
            points, count = size // self.grid, -(-size // self.tile)
            cuts = [points * i // count * self.grid for i in range(count)] + [size]
            return [
                Span(a, b, max(a - self.margin, 0), min(b + self.margin, size)) for a, b in itertools.pairwise(cuts)
            ]

        return [Tile(rows, columns) for rows in spans(self.size[0]) for columns in spans(self.size[1])]

    def sample(self) -> list[Tile]:
        """Windows of one size, spread evenly from border to border, together at most as large as a tile."""
        side = SAMPLE_CORE + 2 * self.margin
        across = max(1, (self.tile + 2 * self.margin) // side)

        def spans(size: int) -> list[Span]:
            window = min(side, size)
            count = min(across, -(-size // SAMPLE_CORE)) if window < size else 1
            starts = [(size - window) * i // max(count - 1, 1) // self.grid * self.grid for i in range(count)]
            return [
                Span(a + self.margin * (a > 0), a + window - self.margin * (a + window < size), a, a + window)
                for a in starts
            ]

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
    tiles, sample = cut.tiles(), cut.sample()
    windows = torch.cat([source[tile.outer(pixels_in)] for tile in sample])
    statistics = SharedNorm()
    result = None
    for _ in range(MAX_ROUNDS):
        network(windows, partial(statistics.predict, sample))
        for tile in tiles:
            part = network(source[tile.outer(pixels_in)], partial(statistics.apply, tile))
            if result is None:
                result = part.new_empty(1, part.shape[1], *(side // pixels_out for side in cut.size))
            result[tile.core(pixels_out)] = part[tile.inner(part)]
        if statistics.correct() < TOLERANCE:
            break
    assert result is not None
    return result


class SharedNorm:
    """GroupNorm of many parts of an image with common statistics, those of the whole.

    Statistics are kept as `[3, groups]` sums in fp64: how many values, their sum, the sum of their squares.
    """

    def __init__(self) -> None:
        self._sample: dict[nn.GroupNorm, Tensor] = {}
        self._measured: dict[nn.GroupNorm, Tensor] = {}
        self._predicted: dict[nn.GroupNorm, tuple[Tensor, Tensor]] = {}
        self._correction: dict[nn.GroupNorm, tuple[Tensor, Tensor]] = {}

    def predict(self, windows: list[Tile], norm: nn.GroupNorm, x: Tensor) -> Tensor:
        """Normalise the sample `x [N, C, h, w]` with its own, corrected statistics, and remember them."""
        sums = torch.stack([_sums(row[None][w.inner(x)], norm) for row, w in zip(x, windows, strict=True)]).sum(0)
        self._sample[norm] = sums
        mean, var = _moments(sums, norm)
        shift, ratio = self._correction.get(norm, (0.0, 1.0))
        self._predicted[norm] = mean + shift * var.sqrt(), var * ratio
        return affine(norm, x, *self._predicted[norm])

    def apply(self, tile: Tile, norm: nn.GroupNorm, x: Tensor) -> Tensor:
        """Normalise a tile `x [1, C, h, w]` with the predicted statistics, and add to the measured ones."""
        sums = _sums(x[tile.inner(x)], norm)
        self._measured[norm] = self._measured[norm] + sums if norm in self._measured else sums
        return affine(norm, x, *self._predicted[norm])

    def correct(self) -> float:
        """Learn from the measured statistics; returns how far off the predicted ones were (see `TOLERANCE`)."""
        worst = 0.0
        for norm, sums in self._measured.items():
            (mean, var), (sample_mean, sample_var) = _moments(sums, norm), _moments(self._sample[norm], norm)
            predicted_mean, predicted_var = self._predicted[norm]
            deviation = (mean - predicted_mean).abs() / predicted_var.sqrt()
            worst = max(worst, deviation.max().item(), (var / predicted_var - 1).abs().max().item())
            self._correction[norm] = (mean - sample_mean) / sample_var.sqrt(), var / sample_var
        self._measured = {}
        return worst


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
