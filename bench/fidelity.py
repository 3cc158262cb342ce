"""How far the pictures of one folder are from those of another, ours or anybody's: `fluxkiln bench image compare`."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from fluxkiln.bench import learned, metrics
from fluxkiln.bench.metrics import Metric

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
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def shared(a: Path, b: Path, names: Collection[str] | None = None) -> list[tuple[str, Path, Path]]:
    """(name, picture of a, picture of b) for every name, or of these `names`, that both folders or their `images` have.

    Raises:
        ValueError: there is none.
    """
    folders = [path / "images" if (path / "images").is_dir() else path for path in (a, b)]
    found = [{p.stem: p for p in sorted(f.glob("*")) if p.suffix.lower() in SUFFIXES} for f in folders]
    both = [name for name in found[0] if name in found[1] and (names is None or name in names)]
    if not both:
        raise ValueError(f"{a} and {b} have no picture of the same name")
    return [(name, found[0][name], found[1][name]) for name in both]


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
    for name, a, b in shared(folder, reference, names):
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


def contact_sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]], side: int = 128) -> Image.Image:
    """One picture to look at: captions, each above its pictures side by side."""
    count = max(len(pictures) for _, pictures in rows)
    columns = max(1, SHEET_COLUMNS // count)
    cell, head = count * (side + 2) + 6, 2 * LINE + 4
    tall = side + head + 2
    sheet = Image.new("RGB", (columns * cell, -(-len(rows) // columns) * tall), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (caption, pictures) in enumerate(rows):
        x, y = i % columns * cell, i // columns * tall
        lines = textwrap.wrap(caption, cell // LETTER - 1, max_lines=2, placeholder=" ...")
        pen.text((x + 2, y + 2), "\n".join(lines), fill="black")
        for j, picture in enumerate(pictures):
            scale = side / max(picture.size)
            size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
            smooth = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
            sheet.paste(picture.resize(size, smooth), (x + 2 + j * (side + 2), y + head))
    return sheet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", type=Path)
    parser.add_argument("b", type=Path, help="the reference")
    parser.add_argument("--floor", type=Path, help="another implementation's pictures: how far chance alone goes")
    parser.add_argument("--sheet", type=Path, help="contact sheet to write, the pictures side by side")
    parser.add_argument("--lpips", choices=learned.LPIPS_NETS, help="also LPIPS, with the package and weights you have")
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    extra = {"lpips": learned.lpips(args.lpips)} if args.lpips else None
    results = {"fidelity": fidelity(args.a, args.b, extra)}
    if args.floor:
        results["noise_floor"] = fidelity(args.floor, args.b, extra)
    if args.sheet:
        sides = (args.a, args.b) if args.a.name == args.b.name else (args.a.name, args.b.name)
        pairs = ((f"{name}: {sides[0]} | {sides[1]}", (read(a), read(b))) for name, a, b in shared(args.a, args.b))
        contact_sheet([(caption, list(map(Image.fromarray, both))) for caption, both in pairs]).save(args.sheet)
    if args.json:
        print(json.dumps(results))
    else:
        print("\n".join(line(name, scores) for name, scores in results.items()))
    return 0
