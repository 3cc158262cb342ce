"""How far the pictures of one folder are from those of another, ours or anybody's: `fluxkiln bench image compare`."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import textwrap
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from fluxkiln.bench import learned, metrics
from fluxkiln.bench.metrics import Metric
from fluxkiln.images import open_picture, rgb

METRICS: dict[str, Metric] = {
    "psnr": metrics.psnr,
    "ssim": metrics.ssim,
    "ms_ssim": metrics.ms_ssim,
    "flip": metrics.flip,
}
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
SHEET_COLUMNS = 6
LINE, LETTER = 12, 6  # height and width of a caption's letter, pixels


def read(path: Path) -> np.ndarray:
    """A picture `[H, W, 3]`, uint8."""
    return np.asarray(rgb(open_picture(path)))


def shared(*folders: Path, names: Collection[str] | None = None) -> dict[str, list[Path]]:
    """The pictures of each name, or of these `names`, that all folders or their `images` have, in their order.

    Raises:
        ValueError: there is none.
    """
    insides = [path / "images" if (path / "images").is_dir() else path for path in folders]
    found = [{p.stem: p for p in sorted(f.glob("*")) if p.suffix.lower() in SUFFIXES} for f in insides]
    common = [name for name in found[0] if all(name in pictures for pictures in found)]
    result = {name: [pictures[name] for pictures in found] for name in common if names is None or name in names}
    if not result:
        asked = "" if names is None else " of this run"
        raise ValueError(f"{' and '.join(map(str, folders))} have no picture{asked} of the same name")
    return result


def fidelity(
    folder: Path, reference: Path, extra: Mapping[str, Metric] | None = None, names: Collection[str] | None = None
) -> dict[str, Any]:
    """Means of PSNR, SSIM, MS-SSIM and FLIP, and of `extra` metrics, over the pictures that two folders share.

    Args:
        names: only of these.

    Returns:
        also `n` pairs, `equal` ones (whose PSNR is infinite and not in its mean), and `low`: the worst PSNR.

    Raises:
        ValueError: they share none, or two of one name have different sizes.
    """
    scores: dict[str, list[float]] = {name: [] for name in (*METRICS, *(extra or {}))}
    for name, (a, b) in shared(folder, reference, names=names).items():
        x, y = read(a), read(b)
        if x.shape != y.shape:
            sizes = f"{x.shape[1]} x {x.shape[0]} and {y.shape[1]} x {y.shape[0]}"
            raise ValueError(f"{name}: the pictures have different sizes, {sizes}")
        for metric, measure in {**METRICS, **(extra or {})}.items():
            scores[metric].append(measure(x, y))
    n, finite = len(scores["psnr"]), [value for value in scores["psnr"] if math.isfinite(value)]
    means = {name: statistics.mean(values) for name, values in scores.items() if name != "psnr"}
    psnr = {"psnr": statistics.mean(finite), "low": min(finite)} if finite else {"psnr": None, "low": None}
    return {"n": n, "equal": n - len(finite), **psnr, **means}


def line(name: str, scores: Mapping[str, float | None]) -> str:
    """Scores as text."""
    return f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in scores.items() if value is not None)


def contact_sheet(pictures: Iterable[tuple[str, Iterable[Image.Image]]], side: int = 128) -> Image.Image:
    """One picture to look at: captions, each above its pictures side by side; of these, one is in memory at a time."""
    rows = [(caption, [_shrunk(picture, side) for picture in several]) for caption, several in pictures]
    count = max(len(several) for _, several in rows)
    columns = max(1, SHEET_COLUMNS // count)
    cell, head = count * (side + 2) + 6, 2 * LINE + 4
    tall = side + head + 2
    sheet = Image.new("RGB", (columns * cell, -(-len(rows) // columns) * tall), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (caption, several) in enumerate(rows):
        x, y = i % columns * cell, i // columns * tall
        lines = textwrap.wrap(caption, cell // LETTER - 1, max_lines=2, placeholder=" ...")
        pen.text((x + 2, y + 2), "\n".join(lines), fill="black")
        for j, picture in enumerate(several):
            sheet.paste(picture, (x + 2 + j * (side + 2), y + head))
    return sheet


def _shrunk(picture: Image.Image, side: int) -> Image.Image:
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    smooth = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    return rgb(picture).resize(size, smooth)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", type=Path)
    parser.add_argument("b", type=Path, help="the reference")
    parser.add_argument("--floor", type=Path, help="another implementation's pictures: how far chance alone goes")
    parser.add_argument("--sheet", type=Path, help="contact sheet to write, the pictures side by side")
    parser.add_argument("--lpips", choices=learned.LPIPS_NETS, help="also LPIPS, with the package and weights you have")
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    extra = {"lpips": learned.lpips(args.lpips)} if args.lpips else None
    pictures = shared(args.a, args.b, *([args.floor] if args.floor else []))
    results = {"fidelity": fidelity(args.a, args.b, extra, pictures)}
    if args.floor:
        results["noise_floor"] = fidelity(args.floor, args.b, extra, pictures)
    if args.sheet:
        sides = (args.a, args.b) if args.a.name == args.b.name else (args.a.name, args.b.name)
        rows = ((f"{name}: {sides[0]} | {sides[1]}", map(open_picture, files[:2])) for name, files in pictures.items())
        contact_sheet(rows).save(args.sheet)
    if args.json:
        print(json.dumps(results))
    else:
        print("\n".join(line(name, scores) for name, scores in results.items()))
    return 0
