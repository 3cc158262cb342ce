"""Masked edits: what is rendered, what the model is told about the mask, and how the result comes back.

White is repainted. The model renders the box of a region at its working size; only the mask and a feather around it
are taken over, at the size of the picture that came in. Every other pixel of the result is the input's, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import max_pool2d, pixel_unshuffle

from fluxkiln.config import LATENT_SCALE
from fluxkiln.images import resize
from fluxkiln.sampling import pack

Box = tuple[int, int, int, int]  # left, top, right, bottom; right and bottom are outside
FEATHER = 1 / 128  # of the shorter side of what is rendered
CROP_ASPECT = 2.0  # a longer strip than this is widened, so that the model sees what the mask lies in


@dataclass(frozen=True)
class Region:
    """A part of a picture to be repainted.

    Attributes:
        picture: the whole picture, 8-bit RGB.
        mask: 0 or 255 for each of its pixels; 255 is repainted.
        box: what is rendered.
        feather: pixels outside the mask over which the rendering fades into the picture.
    """

    picture: Image.Image
    mask: Image.Image
    box: Box
    feather: int

    @classmethod
    def of(
        cls,
        picture: Image.Image,
        mask: Image.Image,
        padding: int | None = None,
        feather: int | None = None,
        aspect: float | None = None,
    ) -> Region:
        """Settle what is rendered.

        Args:
            picture: 8-bit RGB.
            mask: 8-bit grey of the same size; from 128 on, a pixel is repainted.
            padding: render only the mask and this many pixels around it; None renders the whole picture.
            feather: in pixels; by default 1/128 of the shorter side of what is rendered.
            aspect: width / height that the box should have, as far as the picture allows.

        Raises:
            ValueError: the mask has nothing to repaint, or a negative padding or feather.
        """
        if any(n is not None and n < 0 for n in (padding, feather)):
            raise ValueError(f"padding_mask_crop and mask_feather must not be negative, got {padding} and {feather}")
        mask = mask.point(lambda value: 255 if value >= 128 else 0)
        inner = mask.getbbox()
        if inner is None:
            raise ValueError("the mask is all black: there is nothing to repaint (white is repainted, black is kept)")
        box = (0, 0, *picture.size) if padding is None else _crop(inner, padding, picture.size, aspect)
        if feather is None:
            feather = max(round(min(box[2] - box[0], box[3] - box[1]) * FEATHER), 1)
        if padding is not None:  # the feather lies inside the box
            left, top, right, bottom = _grown(inner, feather, picture.size)
            box = (min(box[0], left), min(box[1], top), max(box[2], right), max(box[3], bottom))
        return cls(picture, mask, box, feather)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the box, in pixels of the picture."""
        return self.box[2] - self.box[0], self.box[3] - self.box[1]

    def view(self, size: tuple[int, int]) -> tuple[Image.Image, np.ndarray]:
        """What the model works on: the box at (width, height), and its mask `[height, width]`, True is repainted.

        A pixel of the view is repainted if any part of it is: a mask thinner than a working pixel is not lost.
        """
        mask = np.asarray(self.mask.crop(self.box).convert("F").resize(size, Image.Resampling.BOX))
        return resize(self.picture.crop(self.box), size), mask > 0

    def paste(self, rendered: Image.Image) -> Image.Image:
        """The picture with the rendered box in it, of any size, taken over where the mask and its feather are."""
        bbox = self.mask.getbbox()
        assert bbox is not None
        area = _grown(bbox, self.feather, self.picture.size)  # nothing changes outside
        x, y = self.box[:2]
        new = resize(rendered, self.size).crop((area[0] - x, area[1] - y, area[2] - x, area[3] - y))
        opacity = _opacity(np.asarray(self.mask.crop(area)) > 0, self.feather)
        result = self.picture.copy()
        result.paste(new, area[:2], Image.fromarray(opacity))
        return result


def latent_mask(mask: np.ndarray, channels: int) -> Tensor:
    """`[1, L, 4C]`, 1 where the tokens of latents with C channels are repainted, from a mask `[H, W]`.

    A latent pixel is repainted if any of its 8x8 pixels is; diffusers looks at the first of them only.
    """
    cells = max_pool2d(torch.from_numpy(mask)[None, None].float(), LATENT_SCALE)
    return pack(cells.expand(-1, channels, -1, -1))


def fill_mask(mask: np.ndarray) -> Tensor:
    """`[1, L, 256]`: the mask `[H, W]` as Fill reads it, all 8x8 pixels of a latent pixel as 64 channels, packed."""
    return pack(pixel_unshuffle(torch.from_numpy(mask)[None, None].float(), LATENT_SCALE))


def _opacity(mask: np.ndarray, feather: int) -> np.ndarray:
    """255 on the mask `[H, W]`, falling to 0 over `feather` pixels around it: widened by half, then blurred by half."""
    feather = min(feather, 2 * max(mask.shape))  # half of which covers all of it
    wide = _sums(mask, (feather + 1) // 2) > 0
    radius = feather // 2
    return np.round(_sums(wide, radius) * (255 / (2 * radius + 1) ** 2)).astype(np.uint8)


def _sums(values: np.ndarray, radius: int) -> np.ndarray:
    """Sum of `values [H, W]` over a square of `2 * radius + 1` around each place; the border repeats."""
    total = np.pad(values.astype(np.int32), radius, mode="edge")
    for axis in (0, 1):
        total = np.cumsum(np.insert(total, 0, 0, axis=axis), axis=axis)
        upper, lower = np.arange(2 * radius + 1, total.shape[axis]), np.arange(total.shape[axis] - 2 * radius - 1)
        total = total.take(upper, axis=axis) - total.take(lower, axis=axis)
    return total


def _grown(box: Box, by: int, size: tuple[int, int]) -> Box:
    return (max(box[0] - by, 0), max(box[1] - by, 0), min(box[2] + by, size[0]), min(box[3] + by, size[1]))


def _crop(inner: Box, padding: int, size: tuple[int, int], aspect: float | None) -> Box:
    """`inner` with padding, its shorter side widened towards `aspect` within a picture of (width, height)."""
    left, top, right, bottom = _grown(inner, padding, size)
    width, height = right - left, bottom - top
    if aspect is None:
        aspect = min(max(width / height, 1 / CROP_ASPECT), CROP_ASPECT)
    left, right = _widened(left, right, round(height * aspect), size[0])
    top, bottom = _widened(top, bottom, round(width / aspect), size[1])
    return left, top, right, bottom


def _widened(low: int, high: int, length: int, limit: int) -> tuple[int, int]:
    """The interval made `length` long around its middle, moved and cut to lie in 0..limit; never made shorter."""
    length = min(max(length, high - low), limit)
    low = min(max((low + high - length) // 2, 0), limit - length)
    return low, low + length
