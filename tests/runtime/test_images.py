"""Pictures of every awkward kind come in as 8-bit RGB or are refused by a sentence; sizes are diffusers'."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from PIL import Image

from fluxkiln import images

RED, GREEN = (200, 30, 40), (10, 150, 20)


def gradient(width: int = 37, height: int = 21) -> Image.Image:
    row, column = np.mgrid[:height, :width]
    return Image.fromarray(np.stack((row * 7 % 256, column * 5 % 256, (row + column) % 256), -1).astype(np.uint8))


def through_file(picture: Image.Image, path: Path, **options: Any) -> Image.Image:
    picture.save(path, **options)
    return images.open_picture(path)


def png(width: int, height: int, depth: int, data: bytes) -> bytes:
    """A file of one colour picture, its pixels as given: also what Pillow would not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def values(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


# --- what comes in ------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "webp", "tiff", "bmp"])
def test_lossless_files_keep_every_pixel(suffix: str, tmp_path: Path) -> None:
    options = {"lossless": True} if suffix == "webp" else {}
    got = images.rgb(through_file(gradient(), tmp_path / f"a.{suffix}", **options))
    assert got.mode == "RGB"
    assert np.array_equal(values(got), values(gradient()))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_exif_rotation_is_undone(orientation: int, suffix: str, tmp_path: Path) -> None:
    """Orientation 6 is how a phone held upright stores its picture: the first row is the right side."""
    turns = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: np.transpose(a, (1, 0, 2)),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(np.transpose(a, (1, 0, 2)), 2),
        8: np.rot90,
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    got = images.rgb(through_file(gradient(), tmp_path / f"a.{suffix}", exif=exif, **options))
    want = turns[orientation](np.asarray(gradient())).astype(int)
    assert values(got).shape == want.shape
    assert np.abs(values(got) - want).max() <= (4 if suffix == "jpg" else 0)


def test_palette_is_resolved(tmp_path: Path) -> None:
    picture = gradient(16, 16).quantize(50)
    got = images.rgb(through_file(picture, tmp_path / "a.png"))
    assert np.array_equal(values(got), values(picture.convert("RGB")))


def test_transparency_is_white_in_a_picture_and_black_in_a_mask(tmp_path: Path) -> None:
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[...] = (*RED, 0)
    rgba[0] = (*GREEN, 255)
    rgba[1] = (0, 0, 0, 128)
    picture = through_file(Image.fromarray(rgba), tmp_path / "a.png")
    got = values(images.rgb(picture))
    assert tuple(got[0, 0]) == GREEN
    assert tuple(got[3, 3]) == (255, 255, 255)
    assert abs(got[1, 0, 0] - 127) <= 1
    assert values(images.grey(picture))[3, 3] == 0


def test_transparent_palette_entry_is_white(tmp_path: Path) -> None:
    picture = Image.new("P", (4, 4), 0)
    picture.putpalette([*RED, *GREEN])
    picture.putpixel((1, 1), 1)
    got = values(images.rgb(through_file(picture, tmp_path / "a.gif", transparency=0)))
    assert tuple(got[1, 1]) == GREEN
    assert tuple(got[0, 0]) == (255, 255, 255)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    wide = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    want = [0, 0, 1, 1, 128, 255]
    for suffix in ("png", "tiff"):
        got = images.rgb(through_file(Image.fromarray(wide), tmp_path / f"a.{suffix}"))
        assert values(got)[0, :, 0].tolist() == want
    assert values(images.rgb(images.open_picture(wide)))[0, :, 1].tolist() == want
    assert values(images.grey(Image.fromarray(wide.astype(np.int32))))[0].tolist() == want


def test_sixteen_bit_colour_png_is_read(tmp_path: Path) -> None:
    row = b"\0" + struct.pack(">6H", 0, 0x8000, 0xFFFF, 0x1234, 0xABCD, 0x00FF)
    path = tmp_path / "a.png"
    path.write_bytes(png(2, 1, 16, row))
    got = values(images.rgb(images.open_picture(path)))
    assert np.abs(got[0] - [[0, 128, 255], [0x12, 0xAB, 1]]).max() <= 1


def test_cmyk_jpeg_keeps_its_colours(tmp_path: Path) -> None:
    got = images.rgb(through_file(Image.new("RGB", (16, 16), RED).convert("CMYK"), tmp_path / "a.jpg", quality=100))
    assert got.mode == "RGB"
    assert np.abs(values(got) - RED).max() <= 4


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGBA", "RGBX", "YCbCr", "HSV"])
def test_other_modes_come_in_as_rgb(mode: str) -> None:
    got = images.rgb(images.open_picture(Image.new(mode, (3, 2))))
    assert (got.mode, got.size) == ("RGB", (3, 2))


def test_floating_point_tiff_is_read(tmp_path: Path) -> None:
    picture = through_file(Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32)), tmp_path / "a.tiff")
    assert values(images.rgb(picture))[0, :, 0].tolist() == [0, 128, 255]


def test_arrays_and_tensors_come_in() -> None:
    data = np.asarray(gradient())
    tensor = torch.from_numpy(data.copy()).permute(2, 0, 1)
    sources = [data, data / 255, (data / 255).astype(np.float32), data.astype(np.uint16) * 257]
    tensors = [tensor, tensor.float() / 255, (tensor.float() / 255)[None], tensor.double() / 255]
    for source in sources + tensors:
        if isinstance(source, np.ndarray) and source.dtype == np.uint16:
            source = source[..., :1]
            assert np.array_equal(values(images.grey(images.open_picture(source))), data[..., 0])
            continue
        assert np.array_equal(values(images.rgb(images.open_picture(source))), data)
    white = images.grey(images.open_picture(np.array([[True, False]])))
    assert values(white)[0].tolist() == [255, 0]


@pytest.mark.parametrize("size", [(1, 1), (30_000, 1), (1, 30_000), (30_000, 20)])
def test_tiny_and_endless_pictures_come_in(size: tuple[int, int], tmp_path: Path) -> None:
    picture = images.rgb(through_file(Image.new("RGB", size, RED), tmp_path / "a.png"))
    assert picture.size == size
    for target in (images.kontext_size(*size), images.fit(*size, 1024)):
        assert images.resize(picture, target).size == target


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("width", "height"), [(30_000, 30_000), (9000, 9000), (10_000, 10_000)])
def test_too_many_pixels_are_refused_before_they_are_decoded(width: int, height: int, tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png(width, height, 8, b""))
    with pytest.raises(ValueError, match=r"67,108,864"):
        images.open_picture(path)


def test_too_many_pixels_in_memory_are_refused() -> None:
    picture = Image.new("1", (9000, 9000))
    with pytest.raises(ValueError, match=r"image has 9000 x 9000 = 81,000,000 pixels, at most 67,108,864 are read"):
        images.open_picture(picture)
    with pytest.raises(ValueError, match="81,000,000"):
        images.open_picture(np.broadcast_to(np.uint8(0), (9000, 9000)))


def test_damaged_files_are_refused_in_our_words(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    gradient(200, 200).save(buffer, "PNG")
    cases = {
        "cut.png": (buffer.getvalue()[:300], "damaged or cut short"),
        "text.png": (b"hello, this is no picture", "is not a picture in PNG, JPEG"),
        "empty.jpg": (b"", "is not a picture"),
        "header.png": (buffer.getvalue()[:20], "is not a picture|damaged"),
    }
    for name, (data, sentence) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=sentence) as caught:
            images.open_picture(tmp_path / name, "mask_image")
        assert str(caught.value).startswith("mask_image: ")
        assert "0x" not in str(caught.value)  # Pillow's own text shows an address
    with pytest.raises(ValueError, match="is a folder, expected a picture"):
        images.open_picture(tmp_path)
    with pytest.raises(FileNotFoundError, match="image: no file"):
        images.open_picture(tmp_path / "none.png")


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (np.zeros((4, 4, 2), np.uint8), r"must be an array \[H, W\] or \[H, W, 1 \| 3 \| 4\], got \[4, 4, 2\]"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"got \[2, 4, 4, 3\]"),
        (np.zeros((0, 4, 3), np.uint8), "empty: 4 x 0 pixels"),
        (np.full((2, 2), 255.0), r"must be in 0..1, got 255..255"),
        (np.full((2, 2), np.nan), r"must be in 0..1, got nan"),
        (np.full((2, 2), -0.1), r"must be in 0..1, got -0.1"),
        (np.zeros((2, 2), np.int64), "uint8, uint16, bool or floating point, got int64"),
        (torch.zeros(4, 4), r"must be a tensor \[C, H, W\] or \[1, C, H, W\], got \[4, 4\]"),
        (torch.zeros(2, 3, 4, 4), r"got \[2, 3, 4, 4\]"),
        (torch.zeros(16, 8, 8), r"got \[8, 8, 16\]"),
        (Image.new("RGB", (0, 4)), "empty: 0 x 4 pixels"),
        (42, "must be a file, a PIL image, an array or a tensor, got int"),
        (None, "got NoneType"),
    ],
)
def test_what_is_no_picture_is_said(source: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        images.open_picture(source)


def test_greys_beyond_sixteen_bits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"grey values must be in 0..65535, got 0..70000"):
        images.rgb(Image.fromarray(np.array([[0, 70_000]], np.int32)))


# --- sizes and pixels ---------------------------------------------------------------------------


def test_preferred_sizes_are_diffusers() -> None:
    assert sorted(images.KONTEXT_SIZES) == sorted(PREFERRED_KONTEXT_RESOLUTIONS)


@pytest.mark.parametrize(
    ("size", "want"),
    [
        ((1920, 1080), (1392, 752)),
        ((600, 800), (880, 1184)),
        ((512, 2048), (672, 1568)),
        ((1024, 768), (1184, 880)),
        ((1024, 1024), (1024, 1024)),
        ((1, 1), (1024, 1024)),
        ((30_000, 1), (1568, 672)),
    ],
)
def test_kontext_size(size: tuple[int, int], want: tuple[int, int]) -> None:
    assert images.kontext_size(*size) == want


def test_kontext_size_is_diffusers_rule_for_all_sizes() -> None:
    rng = np.random.default_rng(0)
    processor = VaeImageProcessor(vae_scale_factor=16)
    for w, h in rng.integers(16, 4000, (300, 2)).tolist():
        height, width = processor.get_default_height_width(Image.new("1", (w, h)))
        _, a, b = min((abs(width / height - x / y), x, y) for x, y in PREFERRED_KONTEXT_RESOLUTIONS)
        assert images.kontext_size(w, h) == (a, b)


def test_small_models_have_small_preferred_sizes() -> None:
    assert images.kontext_size(100, 100, side=64) == (64, 64)
    assert images.kontext_size(1920, 1080, side=64) == (80, 48)


@pytest.mark.parametrize(
    ("size", "side", "want"),
    [
        ((1024, 1024), 1024, (1024, 1024)),
        ((4000, 3000), 1024, (1184, 880)),
        ((30, 30), 1024, (1024, 1024)),
        ((30_000, 1), 1024, (2048, 512)),
        ((1, 30_000), 64, (32, 128)),
    ],
)
def test_fit_keeps_area_and_aspect_in_whole_tokens(size: tuple[int, int], side: int, want: tuple[int, int]) -> None:
    assert images.fit(*size, side) == want


@pytest.mark.parametrize("value", [0, 15, -16, 1.5, True, "64"])
def test_impossible_sides_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^width must be"):
        images.check_side("width", value)


def test_pixels_are_diffusers_preprocessing() -> None:
    picture, processor = gradient(61, 45), VaeImageProcessor(vae_scale_factor=16)
    resized = images.resize(picture, (48, 32))
    assert torch.equal(images.pixels(resized), processor.preprocess(picture, 32, 48))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_postprocessing_is_diffusers(dtype: torch.dtype) -> None:
    decoded = (1.5 * torch.randn(2, 3, 16, 24)).to(dtype)
    processor = VaeImageProcessor(vae_scale_factor=16)
    got = images.unit(decoded)
    assert torch.equal(got, processor.postprocess(decoded, output_type="pt").float())
    for ours, theirs in zip(images.to_pictures(got), processor.postprocess(decoded, output_type="pil"), strict=True):
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    assert torch.equal((images.to_tensor(images.to_pictures(got)) * 255).round(), (got * 255).round())
