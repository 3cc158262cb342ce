"""How far the pictures of one folder are from those of another, ours or anybody's: `fluxkiln bench image compare`."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np
from PIL import Image, ImageDraw

from fluxkiln.bench import learned, metrics
from fluxkiln.bench.metrics import Metric
from fluxkiln.foreign import Part
from fluxkiln.images import open_picture, rgb

METRICS: dict[str, Metric] = {
    "psnr": metrics.psnr,
    "ssim": metrics.ssim,
    "ms_ssim": metrics.ms_ssim,
    "flip": metrics.flip,
}
T = TypeVar("T")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
SHEET_COLUMNS, SHEET_ROWS = 6, 60  # pictures across, and captions in all: more than that nobody looks at
LINE, LETTER = 12, 6  # height and width of a caption's letter, pixels


def read(path: Path) -> np.ndarray:
    """A picture `[H, W, 3]`, uint8."""
    return np.asarray(rgb(open_picture(path)))


def files(folder: Path) -> dict[str, Path]:
    """The pictures of a folder, or of its `images`, by name.

    Raises:
        ValueError: two have one name.
    """
    inside, found = folder / "images" if (folder / "images").is_dir() else folder, dict[str, Path]()
    for path in sorted(inside.glob("*")):
        if path.suffix.lower() in SUFFIXES:
            if path.stem in found:
                raise ValueError(f"{inside} has two pictures of one name, {found[path.stem].name} and {path.name}")
            found[path.stem] = path
    return found


def _of_run(folder: Path) -> dict[str, Path]:
    """The pictures of a folder; where it has a `results.json`, those that it names, and not an earlier run's."""
    found, results = files(folder), _results(folder)
    items = found if results is None else {item["id"] for item in results["items"]}
    return {name: path for name, path in found.items() if name in items}


def _results(folder: Path) -> dict[str, Any] | None:
    """What a run of ours says of its pictures; None of other pictures."""
    path = folder / "results.json"
    try:
        results = json.loads(path.read_text()) if path.is_file() else None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    return results if isinstance(results, dict) and {"items", "record"} <= results.keys() else None


def shared(*folders: Path, names: Collection[str] | None = None) -> dict[str, list[Path]]:
    """The pictures of each name, or of these `names`, that all folders or their `images` have, in their order.

    Raises:
        ValueError: a folder is not there, no name is in all, or two pictures in one folder have one name.
    """
    if missing := [folder for folder in folders if not folder.is_dir()]:
        raise ValueError(f"no folder {missing[0]}")
    found = [_of_run(folder) for folder in folders]
    common = [name for name in found[0] if all(name in pictures for pictures in found)]
    result = {name: [pictures[name] for pictures in found] for name in common if names is None or name in names}
    if not result:
        asked = "" if names is None else " of this run"
        raise ValueError(f"{' and '.join(map(str, folders))} have no picture{asked} of the same name")
    return result


def fidelity(pairs: Mapping[str, tuple[Path, Path]], extra: Mapping[str, Metric] | None = None) -> dict[str, Any]:
    """Means of PSNR, SSIM, MS-SSIM, FLIP and `extra` metrics over pairs of a picture and its reference, by name.

    Returns:
        also `n` pairs, `equal` ones (whose PSNR is infinite and not in its mean), and `low`: the worst PSNR.

    Raises:
        ValueError: two of one name have different sizes.
    """
    scores: dict[str, list[float]] = {name: [] for name in (*METRICS, *(extra or {}))}
    for name, (a, b) in pairs.items():
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


def check_floor(reference: Path, floor: Path) -> None:
    """Where both folders say how they were made: a noise floor differs in who made it and in nothing else.

    Raises:
        ValueError: it has other weights or another precision, suite, seed, number of steps or guidance.
    """
    made = [_asked(results) for folder in (reference, floor) if (results := _results(folder)) is not None]
    if len(made) < 2:
        return
    wanted, found = made
    for key, value in wanted.items():
        if found[key] != value:
            values = f"{floor} has {key} {found[key]}, the reference {reference} {value}"
            raise ValueError(f"a noise floor is another implementation's run of the same requests: {values}")


def _asked(results: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a run's pictures, whoever makes them. A peer's record has no tokenizers: they are the model's."""
    keys = ("suite_sha256", "precision", "seed", "steps", "guidance", "true_cfg_scale", "negative_prompt")
    weights = {part["name"]: part["identity"] for part in results["record"].get("parts", ())}
    asked = {key: results.get(key) for key in keys}
    return asked | {f"a {name} of sha256": weights.get(name) for name in get_args(Part)}


def to_show(rows: Sequence[T], goodness: Callable[[T], float]) -> list[T]:
    """Rows for a contact sheet, worst first: of too many, half are the worst, and half are spread over the others."""
    ranked, half = sorted(rows, key=goodness), SHEET_ROWS // 2
    if len(rows) <= SHEET_ROWS:
        return ranked
    worst, rest = ranked[:half], ranked[half:]
    return [*worst, *(rest[i * len(rest) // half] for i in range(half))]


def sheet_path(text: str) -> Path:
    """An argument that names a picture to write: said to be wrong now, not after the work."""
    path = Path(text)
    if path.suffix.lower() not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"must end with {', '.join(SUFFIXES)}, got {text!r}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"must be in a folder that is there, got {text!r}")
    return path


def line(name: str, scores: Mapping[str, float | None]) -> str:
    """Scores as text."""
    return f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in scores.items() if value is not None)


def contact_sheet(pictures: Iterable[tuple[str, Iterable[Image.Image]]], side: int = 128) -> Image.Image:
    """One picture to look at: captions, each above its pictures side by side; of these, one is in memory at a time."""
    rows = [(caption, [_shrunk(picture, side) for picture in several]) for caption, several in pictures]
    count = max(len(several) for _, several in rows)
    columns = min(len(rows), max(1, SHEET_COLUMNS // count))
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
    parser.add_argument("--sheet", type=sheet_path, help="contact sheet of at most 60 pairs to write, worst first")
    parser.add_argument("--suite", help="with --sheet: what was asked for, and the pictures to edit, from this suite")
    parser.add_argument("--lpips", choices=learned.LPIPS_NETS, help="also LPIPS, with the package and weights you have")
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    from fluxkiln.bench.suite import load

    if args.suite is not None and args.sheet is None:
        raise ValueError("--suite says what a --sheet shows: give both")
    extra = {"lpips": learned.lpips(args.lpips)} if args.lpips else None
    pictures = shared(args.a, args.b, *([args.floor] if args.floor else []))
    if args.floor:
        check_floor(args.b, args.floor)
    items = {} if args.suite is None else {item.id: item for item in load(args.suite)}
    prompts = {name: item.prompt for name, item in items.items()}

    def sources(name: str) -> Iterator[Image.Image]:
        """The picture that was to be edited, if the suite says that there is one."""
        if name in items and (source := items[name].source(made=args.a)) is not None:
            yield source

    results = {"fidelity": fidelity({name: (a, b) for name, (a, b, *_) in pictures.items()}, extra)}
    if args.floor:
        results["noise_floor"] = fidelity({name: (floor, b) for name, (_, b, floor) in pictures.items()}, extra)
    if args.sheet:
        sides = (args.a, args.b) if args.a.name == args.b.name else (args.a.name, args.b.name)
        shown = to_show(list(pictures), lambda name: metrics.psnr(*map(read, pictures[name][:2])))
        captions = (f"{prompts.get(name, name)}: {sides[0]} | {sides[1]}" for name in shown)
        rows = ([*sources(name), *map(open_picture, pictures[name][:2])] for name in shown)
        contact_sheet(zip(captions, rows, strict=True)).save(args.sheet)
    if args.json:
        print(json.dumps(results))
    else:
        print("\n".join(line(name, scores) for name, scores in results.items()))
    return 0
