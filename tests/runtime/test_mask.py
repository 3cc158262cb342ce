"""Masked edits: nothing outside the mask and its feather changes by a bit, and the model is told the whole mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

from fluxkiln import mask
from fluxkiln.mask import Region


def picture_of(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def mask_of(width: int, height: int, *boxes: mask.Box) -> Image.Image:
    data = np.zeros((height, width), np.uint8)
    for left, top, right, bottom in boxes:
        data[top:bottom, left:right] = 255
    return Image.fromarray(data)


def distance(white: np.ndarray) -> np.ndarray:
    """Of every pixel to the nearest white one, the larger of rows and columns: by definition, pixel by pixel."""
    rows, columns = np.nonzero(white)
    y, x = np.mgrid[: white.shape[0], : white.shape[1]]
    return np.maximum(np.abs(y[..., None] - rows), np.abs(x[..., None] - columns)).min(-1)


@pytest.mark.parametrize("feather", [0, 1, 2, 3, 8])
@pytest.mark.parametrize("padding", [None, 0, 5])
@pytest.mark.parametrize("boxes", [[(10, 12, 20, 15)], [(0, 0, 3, 3), (60, 40, 61, 41)], [(5, 0, 60, 41)]])
def test_paste_changes_the_mask_and_its_feather_alone(boxes: list[mask.Box], padding: int | None, feather: int) -> None:
    picture, white = picture_of(61, 41), mask_of(61, 41, *boxes)
    region = Region.of(picture, white, padding, feather)
    rendered = picture_of(*region.size, seed=1)
    result = np.asarray(region.paste(rendered)).astype(int)
    before = np.asarray(picture).astype(int)
    away = distance(np.asarray(white) > 0)
    whole = Image.new("RGB", picture.size)
    whole.paste(rendered, region.box[:2])
    new = np.asarray(whole).astype(int)

    assert np.array_equal(result[away > feather], before[away > feather])
    assert np.array_equal(result[away == 0], new[away == 0])
    between = (away > 0) & (away <= feather)
    low, high = np.minimum(before, new)[between], np.maximum(before, new)[between]
    assert ((result[between] >= low) & (result[between] <= high)).all()


def test_feather_falls_from_the_mask_outwards() -> None:
    """A white rendering in a black picture shows the opacity itself."""
    region = Region.of(Image.new("RGB", (64, 32)), mask_of(64, 32, (0, 0, 20, 32)), feather=9)
    row = np.asarray(region.paste(Image.new("RGB", (64, 32), "white")))[16, :, 0].astype(int)
    assert (row[:20] == 255).all()
    assert (np.diff(row[19:30]) <= 0).all()
    assert 100 < row[24] < 155
    assert row[28] > 0
    assert (row[29:] == 0).all()


def test_a_rendering_of_another_size_is_resized_first() -> None:
    picture, white = picture_of(100, 80), mask_of(100, 80, (40, 20, 60, 60))
    region = Region.of(picture, white, feather=4)
    result = np.asarray(region.paste(Image.new("RGB", (64, 48), "red")))
    assert (result[20:60, 40:60] == (255, 0, 0)).all()
    assert np.array_equal(result[:16], np.asarray(picture)[:16])


@pytest.mark.parametrize(
    ("box", "padding", "aspect", "want"),
    [
        ((50, 50, 60, 60), 10, None, (40, 40, 70, 70)),
        ((0, 0, 10, 10), 10, None, (0, 0, 20, 20)),
        ((0, 40, 100, 50), 0, None, (0, 20, 100, 70)),  # widened to 2:1
        ((0, 0, 100, 10), 0, None, (0, 0, 100, 50)),  # and moved into the picture
        ((50, 50, 60, 60), 10, 2.0, (25, 40, 85, 70)),
        ((190, 50, 200, 60), 10, 2.0, (140, 40, 200, 70)),
        ((0, 0, 200, 100), 50, 0.5, (0, 0, 200, 100)),  # never larger than the picture, never smaller than the mask
    ],
)
def test_crop_box(box: mask.Box, padding: int, aspect: float | None, want: mask.Box) -> None:
    region = Region.of(picture_of(200, 100), mask_of(200, 100, box), padding, 0, aspect)
    assert region.box == want
    picture, white = region.view((32, 32))
    assert picture.size == (32, 32)
    assert white.any()


def test_the_feather_lies_inside_the_crop() -> None:
    region = Region.of(picture_of(200, 200), mask_of(200, 200, (100, 100, 110, 110)), padding=2, feather=20)
    assert region.box == (80, 80, 130, 130)


def test_without_padding_the_whole_picture_is_rendered() -> None:
    region = Region.of(picture_of(256, 512), mask_of(256, 512, (100, 100, 110, 110)))
    assert region.box == (0, 0, 256, 512)
    assert region.feather == 2


def test_soft_masks_are_cut_at_half() -> None:
    grey = Image.fromarray(np.array([[0, 127, 128, 255]], np.uint8))
    assert np.asarray(Region.of(picture_of(4, 1), grey).mask)[0].tolist() == [0, 0, 255, 255]


def test_thin_lines_survive_the_way_to_the_working_size() -> None:
    white = mask_of(1600, 1600, (801, 0, 802, 1600), (33, 1000, 34, 1001))
    _, seen = Region.of(picture_of(1600, 1600), white).view((64, 64))
    assert seen[:, 801 * 64 // 1600].all()
    assert seen[1000 * 64 // 1600, 33 * 64 // 1600]
    assert seen.sum() == 64 + 1


def test_black_and_white_masks() -> None:
    picture = picture_of(32, 16)
    with pytest.raises(ValueError, match="the mask is all black: there is nothing to repaint"):
        Region.of(picture, mask_of(32, 16))
    for padding in (None, 4):
        region = Region.of(picture, mask_of(32, 16, (0, 0, 32, 16)), padding)
        rendered = picture_of(32, 16, seed=1)
        assert region.box == (0, 0, 32, 16)
        assert np.array_equal(np.asarray(region.paste(rendered)), np.asarray(rendered))


def test_a_feather_wider_than_the_picture_is_all_of_it() -> None:
    white = mask_of(61, 41, (0, 40, 1, 41))
    for feather in (10**6, 10**15):  # nothing of their size is made
        region = Region.of(picture_of(61, 41), white, feather=feather)
        rendered = picture_of(61, 41, seed=1)
        assert np.array_equal(np.asarray(region.paste(rendered)), np.asarray(rendered))


def test_negative_widths_are_refused() -> None:
    for arguments in ({"padding": -1}, {"feather": -1}):
        with pytest.raises(ValueError, match="must not be negative"):
            Region.of(picture_of(8, 8), mask_of(8, 8, (0, 0, 1, 1)), **arguments)


def test_latent_mask_covers_every_pixel_and_is_diffusers_on_whole_cells() -> None:
    white = np.zeros((32, 48), bool)
    white[8:24, 16:32] = True
    got = mask.latent_mask(white, 4)
    cells = torch.nn.functional.interpolate(torch.from_numpy(white)[None, None].float(), size=(4, 6))
    assert torch.equal(got, FluxPipeline._pack_latents(cells.repeat(1, 4, 1, 1), 1, 4, 4, 6))
    white[:] = False
    white[15, 31] = True
    assert mask.latent_mask(white, 4).sum() == 4  # one latent pixel, its four channels


def test_fill_mask_holds_every_pixel_once() -> None:
    """Channel 4 (8 row + column) + 2 (latent row % 2) + latent column % 2, rows and columns within 8 x 8 pixels."""
    white = np.random.default_rng(0).random((32, 48)) > 0.5
    got = mask.fill_mask(white)
    assert got.shape == (1, 6, 256)
    for y, x in np.ndindex(white.shape):
        channel = 4 * (8 * (y % 8) + x % 8) + 2 * (y // 8 % 2) + x // 8 % 2
        assert got[0, y // 16 * 3 + x // 16, channel] == white[y, x]
