"""How far apart two pictures or words are, and how sure a share is.

Pictures are RGB `[H, W, 3]`, uint8 or floats in 0..1; two that are compared must have one size.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, pad

PIXELS_PER_DEGREE = 67.0  # of FLIP: a 0.7 m wide 4K monitor seen from 0.7 m
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)

Picture = NDArray[np.generic]
Metric = Callable[[Picture, Picture], float]


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share; (0, 1) when nothing was tried."""
    if n == 0:
        return 0.0, 1.0
    z = 1.96
    share, spread = successes / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def _unit(picture: Picture) -> Tensor:
    """`[3, H, W]` in 0..1, fp64."""
    array = torch.from_numpy(np.array(picture)).double()
    if array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"expected a picture [H, W, 3], got {list(array.shape)}")
    return (array / 255 if picture.dtype == np.uint8 else array).permute(2, 0, 1)


def _pair(a: Picture, b: Picture) -> tuple[Tensor, Tensor]:
    if a.shape != b.shape:
        raise ValueError(f"expected two pictures of one size, got {list(a.shape)} and {list(b.shape)}")
    return _unit(a), _unit(b)


def psnr(a: Picture, b: Picture, mask: NDArray[np.bool_] | None = None) -> float:
    """Peak signal-to-noise ratio in dB over the pixels of `mask [H, W]`, or all; infinite where they are equal.

    Raises:
        ValueError: the pictures have different sizes, or there is no pixel to compare.
    """
    x, y = _pair(a, b)
    squares = (x - y).square()
    if mask is not None:
        squares = squares[:, torch.from_numpy(mask)]
    if not squares.numel():
        raise ValueError("expected pixels to compare, got none")
    error = squares.mean().item()
    return 10 * math.log10(1 / error) if error else math.inf


def _gray(x: Tensor) -> Tensor:
    """Rec. 601 luma `[1, 1, H, W]`."""
    return (x * torch.tensor([0.299, 0.587, 0.114], dtype=x.dtype)[:, None, None]).sum(0)[None, None]


def _ssim_maps(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """SSIM and its contrast-structure part at every place where the 11 x 11 Gaussian window (sigma 1.5) fits."""
    at = torch.arange(11, dtype=x.dtype) - 5
    window = torch.exp(-at.square() / (2 * 1.5**2))
    window = window / window.sum()

    def blur(image: Tensor) -> Tensor:
        return conv2d(conv2d(image, window[None, None, :, None]), window[None, None, None, :])

    c1, c2 = 0.01**2, 0.03**2
    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    structure = (2 * cov + c2) / (vx + vy + c2)
    return (2 * mx * my + c1) / (mx * mx + my * my + c1) * structure, structure


def ssim(a: Picture, b: Picture) -> float:
    """Structural similarity of the luma (Wang et al. 2004).

    Raises:
        ValueError: a side is below 11 pixels.
    """
    x, y = _pair(a, b)
    if min(x.shape[1:]) < 11:
        raise ValueError(f"SSIM needs at least 11 pixels a side, got {list(a.shape)}")
    return _ssim_maps(_gray(x), _gray(y))[0].mean().item()


def ms_ssim(a: Picture, b: Picture) -> float:
    """Multi-scale SSIM of the luma; as many of the five scales as leave 11 pixels, their weights scaled to sum 1.

    Raises:
        ValueError: a side is below 11 pixels.
    """
    x, y = (_gray(t) for t in _pair(a, b))
    side = min(x.shape[2:])
    if side < 11:
        raise ValueError(f"MS-SSIM needs at least 11 pixels a side, got {list(a.shape)}")
    scales = min(len(MS_SSIM_WEIGHTS), 1 + int(math.log2(side / 11)))
    weights = [w / sum(MS_SSIM_WEIGHTS[:scales]) for w in MS_SSIM_WEIGHTS[:scales]]
    result = 1.0
    for scale, weight in enumerate(weights):
        whole, structure = _ssim_maps(x, y)
        last = scale == scales - 1
        result *= max(0.0, (whole if last else structure).mean().item()) ** weight
        x, y = avg_pool2d(x, 2), avg_pool2d(y, 2)
    return result


# -- FLIP (Andersson et al. 2020, LDR) ------------------------------------------------------------------------------

_RGB_TO_XYZ = torch.tensor(
    [
        [10135552 / 24577794, 8788810 / 24577794, 4435075 / 24577794],
        [2613072 / 12288897, 8788810 / 12288897, 887015 / 12288897],
        [1425312 / 73733382, 8788810 / 73733382, 70074185 / 73733382],
    ],
    dtype=torch.float64,
)
_WHITE = _RGB_TO_XYZ.sum(1)
# Contrast sensitivity of each channel of YCxCz: sums of Gaussians a1 sqrt(pi/b1) exp(-pi^2 x^2 / b1) + ...
_SENSITIVITY = ((1.0, 0.0047, 0.0, 1e-5), (1.0, 0.0053, 0.0, 1e-5), (34.1, 0.04, 13.5, 0.025))


def _linear(x: Tensor) -> Tensor:
    return torch.where(x <= 0.04045, x / 12.92, ((x.clamp_min(0.04045) + 0.055) / 1.055) ** 2.4)


def _apply(matrix: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("ij,jhw->ihw", matrix, x)


def _lab(linear: Tensor) -> Tensor:
    """CIELAB of linear RGB, with the Hunt effect: colours fade in the dark."""
    relative = _apply(_RGB_TO_XYZ, linear) / _WHITE[:, None, None]
    delta = 6 / 29
    f = torch.where(relative > delta**3, relative.clamp_min(delta**3) ** (1 / 3), relative / (3 * delta**2) + 4 / 29)
    light = 116 * f[1] - 16
    return torch.stack((light, 0.01 * light * 500 * (f[0] - f[1]), 0.01 * light * 200 * (f[1] - f[2])))


def _hyab(x: Tensor, y: Tensor) -> Tensor:
    d = x - y
    return d[0].abs() + (d[1].square() + d[2].square()).sqrt()


def _opponent(linear: Tensor) -> Tensor:
    relative = _apply(_RGB_TO_XYZ, linear) / _WHITE[:, None, None]
    return torch.stack((116 * relative[1] - 16, 500 * (relative[0] - relative[1]), 200 * (relative[1] - relative[2])))


def _from_opponent(x: Tensor) -> Tensor:
    y = (x[0] + 16) / 116
    relative = torch.stack((x[1] / 500 + y, y, y - x[2] / 200))
    return _apply(torch.linalg.inv(_RGB_TO_XYZ), relative * _WHITE[:, None, None])


def _filter(x: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """`x [H, W]` filtered by the product of two vectors of odd length, its edges repeated outwards."""
    margins = (len(across) // 2,) * 2 + (len(down) // 2,) * 2
    padded = pad(x[None, None], margins, mode="replicate")
    return conv2d(conv2d(padded, down[None, None, :, None]), across[None, None, None, :])[0, 0]


def _seen(picture: Tensor, per_degree: float) -> Tensor:
    """What the eye resolves of a picture, as linear RGB in 0..1."""
    radius = math.ceil(3 * math.sqrt(0.04 / (2 * math.pi**2)) * per_degree)
    at = torch.arange(-radius, radius + 1, dtype=torch.float64) / per_degree
    channels = []
    for channel, (a1, b1, a2, b2) in zip(_opponent(_linear(picture)), _SENSITIVITY, strict=True):
        seen, total = torch.zeros_like(channel), 0.0
        for a, b in ((a1, b1), (a2, b2)):
            if a == 0:
                continue
            gauss = torch.exp(-(math.pi**2) * at.square() / b)
            weight = a * math.sqrt(math.pi / b)
            seen += weight * _filter(channel, gauss, gauss)
            total += weight * gauss.sum().item() ** 2
        channels.append(seen / total)
    return _from_opponent(torch.stack(channels)).clamp(0, 1)


def _features(light: Tensor, per_degree: float) -> tuple[Tensor, Tensor]:
    """Strength of edges and of points of a lightness map in 0..1."""
    sigma = 0.5 * 0.082 * per_degree
    radius = math.ceil(3 * sigma)
    at = torch.arange(-radius, radius + 1, dtype=torch.float64)
    gauss = torch.exp(-at.square() / (2 * sigma**2))
    smooth, strengths = gauss / gauss.sum(), []
    for kernel in (-at * gauss, (at.square() / sigma**2 - 1) * gauss):
        positive, negative = kernel.clamp_min(0), (-kernel).clamp_min(0)
        kernel = positive / positive.sum() - negative / negative.sum()
        ways = _filter(light, smooth, kernel), _filter(light, kernel, smooth)
        strengths.append((ways[0].square() + ways[1].square()).sqrt())
    return strengths[0], strengths[1]


def flip(a: Picture, b: Picture, per_degree: float = PIXELS_PER_DEGREE) -> float:
    """Mean FLIP error, 0 (looks the same) to 1, at so many pixels per degree of sight."""
    x, y = _pair(a, b)
    corners = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)[:, :, None, None]
    largest = _hyab(_lab(corners[0]), _lab(corners[1])).item() ** 0.7
    color = _hyab(_lab(_seen(x, per_degree)), _lab(_seen(y, per_degree))) ** 0.7
    knee = 0.4 * largest
    color = torch.where(color < knee, 0.95 / knee * color, 0.95 + (color - knee) / (largest - knee) * 0.05)
    lights = [(_opponent(_linear(t))[0] + 16) / 116 for t in (x, y)]
    edges, points = zip(*(_features(light, per_degree) for light in lights), strict=True)
    feature = torch.maximum((edges[0] - edges[1]).abs(), (points[0] - points[1]).abs())
    feature = ((1 / math.sqrt(2)) * feature).sqrt()
    return (color ** (1 - feature)).mean().item()
