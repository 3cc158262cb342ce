"""Pictures that come in and go out, and the sizes at which a model sees them.

Whatever comes in (a file, a PIL image, an array, a tensor; rotated by EXIF, with a palette, 16 bits, CMYK,
transparent) becomes 8-bit RGB once, here, and everything after reads that. Embedded colour profiles are not applied.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fluxkiln.config import TOKEN_PIXELS

Source = str | Path | Image.Image | np.ndarray | Tensor

MAX_PIXELS = 2**26  # 8192 x 8192: a photo fits, and its RGB takes 200 MB
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")
MAX_ASPECT = 4.0  # beyond this, a picture is squeezed rather than turned into a strip of a few tokens

# (width, height) of the pictures that Kontext was trained on, around 1024 x 1024.
KONTEXT_SIZES = (
    *((672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104)),
    (1024, 1024),
    *((1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752), (1456, 720), (1504, 688), (1568, 672)),
)


# --- in -----------------------------------------------------------------------------------------


def open_picture(source: Source, role: str = "image") -> Image.Image:
    """A picture as it was given: still with its own mode and rotation, but known to be readable and not too large.

    Args:
        source: a file, a PIL image, an array `[H, W]` or `[H, W, 1 | 3 | 4]`, or a tensor `[C, H, W]` or
            `[1, C, H, W]`; numbers are 0..255 in uint8, 0..65535 in uint16, 0..1 in floating point.
        role: what to call it in an error.

    Raises:
        ValueError: not a picture, damaged, empty, or of more than `MAX_PIXELS`.
        FileNotFoundError: no such file.
    """
    if isinstance(source, (str, Path)):
        return _open_file(Path(source), role)
    if isinstance(source, Tensor):
        source = _array_of(source, role)
    if isinstance(source, np.ndarray):
        return _from_array(source, role)
    if not isinstance(source, Image.Image):
        raise ValueError(f"{role} must be a file, a PIL image, an array or a tensor, got {type(source).__name__}")
    _check_size(*source.size, role)
    return source


def rgb(picture: Image.Image) -> Image.Image:
    """8-bit RGB, upright by its EXIF orientation, transparent parts laid over white."""
    picture = _upright(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def grey(picture: Image.Image) -> Image.Image:
    """8-bit brightness, upright by its EXIF orientation, transparent parts laid over black."""
    picture = _upright(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture)
    return picture.convert("L")


def pixels(picture: Image.Image) -> Tensor:
    """`[1, 3, H, W]` fp32 in -1..1 of an RGB picture."""
    return torch.from_numpy(np.asarray(picture).astype(np.float32) / 255.0).permute(2, 0, 1)[None] * 2.0 - 1.0


def _open_file(path: Path, role: str) -> Image.Image:
    try:
        with Image.open(path, formats=FORMATS) as picture:
            _check_size(*picture.size, role)
            picture.load()
            return picture
    except FileNotFoundError:
        raise FileNotFoundError(f"{role}: no file {path}") from None
    except IsADirectoryError:
        raise ValueError(f"{role}: {path} is a folder, expected a picture") from None
    except UnidentifiedImageError:
        raise ValueError(f"{role}: {path} is not a picture in {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError:
        raise ValueError(f"{role}: {path} has more than the {MAX_PIXELS:,} pixels that are read") from None
    except (OSError, SyntaxError, EOFError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{role}: {path} is damaged or cut short") from None


def _check_size(width: int, height: int, role: str) -> None:
    if not width * height:
        raise ValueError(f"{role} is empty: {width} x {height} pixels")
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{role} has {width} x {height} = {width * height:,} pixels, at most {MAX_PIXELS:,} are read: "
            "make it smaller first"
        )


def _array_of(tensor: Tensor, role: str) -> np.ndarray:
    shape = list(tensor.shape)
    if tensor.ndim == 4 and len(tensor) == 1:
        tensor = tensor[0]
    if tensor.ndim != 3:
        raise ValueError(f"{role} must be a tensor [C, H, W] or [1, C, H, W], got {shape}")
    tensor = tensor.detach().cpu().permute(1, 2, 0)
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def _from_array(array: np.ndarray, role: str) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        raise ValueError(f"{role} must be an array [H, W] or [H, W, 1 | 3 | 4], got {list(array.shape)}")
    _check_size(array.shape[1], array.shape[0], role)
    if array.dtype == np.bool_:
        array = array * np.uint8(255)
    elif np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):  # also false for NaN
            raise ValueError(f"{role}: floating-point pixels must be in 0..1, got {low:g}..{high:g}")
        array = (array * 255).round().astype(np.uint8)
    elif array.dtype == np.uint16:
        array = _to_bytes(array)
    elif array.dtype != np.uint8:
        raise ValueError(f"{role}: pixels must be uint8, uint16, bool or floating point, got {array.dtype}")
    return Image.fromarray(np.ascontiguousarray(array))


def _upright(picture: Image.Image) -> Image.Image:
    """Turned by its EXIF orientation, and 8 bits deep: Pillow clips deeper greys instead of scaling them."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):
        values = np.asarray(picture)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"grey values must be in 0..65535, got {values.min()}..{values.max()}")
        return Image.fromarray(_to_bytes(values))
    if picture.mode == "F":
        return _from_array(np.asarray(picture), "picture")
    return picture


def _to_bytes(values: np.ndarray) -> np.ndarray:
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)  # rounded v / 65535 * 255


# --- sizes --------------------------------------------------------------------------------------


def check_side(name: str, value: Any) -> int:
    """A side of the result in pixels, rounded down to whole tokens.

    Raises:
        ValueError: not an integer of at least one token.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if value < TOKEN_PIXELS:
        raise ValueError(f"{name} must be at least {TOKEN_PIXELS} pixels, got {value}")
    return int(value) // TOKEN_PIXELS * TOKEN_PIXELS


def fit(width: float, height: float, side: int) -> tuple[int, int]:
    """The (width, height) in whole tokens with this aspect and about `side`² pixels.

    Aspects beyond `MAX_ASPECT` are held there.
    """
    aspect = min(max(width / height, 1 / MAX_ASPECT), MAX_ASPECT)
    w, h = side * math.sqrt(aspect), side / math.sqrt(aspect)
    return _tokens(w), _tokens(h)


def kontext_size(width: int, height: int, side: int = 1024) -> tuple[int, int]:
    """The (width, height) at which Kontext wants to see a picture: the preferred size nearest in aspect.

    Args:
        side: of the model's usual square; the preferred sizes scale with it.
    """
    # diffusers compares with the aspect of the size rounded down to whole tokens.
    aspect = max(width // TOKEN_PIXELS, 1) / max(height // TOKEN_PIXELS, 1)
    _, w, h = min((abs(aspect - w / h), w, h) for w, h in KONTEXT_SIZES)
    return (w, h) if side == 1024 else (_tokens(w * side / 1024), _tokens(h * side / 1024))


def resize(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture at exactly (width, height), by Lanczos; the same pixels if it has that size."""
    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)


def _tokens(pixels: float) -> int:
    return max(round(pixels / TOKEN_PIXELS), 1) * TOKEN_PIXELS


# --- out ----------------------------------------------------------------------------------------


def unit(decoded: Tensor) -> Tensor:
    """Decoded pixels `[B, 3, H, W]`, about -1..1, as fp32 in 0..1; rounded in their own dtype first, as diffusers."""
    return (decoded * 0.5 + 0.5).clamp(0, 1).float()


def to_pictures(images: Tensor) -> list[Image.Image]:
    """8-bit RGB pictures of `[B, 3, H, W]` fp32 in 0..1."""
    data = (images.cpu().permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)
    return [Image.fromarray(image) for image in data]


def to_tensor(pictures: Iterable[Image.Image]) -> Tensor:
    """`[B, 3, H, W]` fp32 in 0..1 of RGB pictures of one size."""
    return torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1).float() / 255 for p in pictures])
