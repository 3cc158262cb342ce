"""`fluxkiln bench image`: make the pictures of a suite, measure them, compare runs.

    fluxkiln bench image --suite shapes --out run                make and measure; run/results.json, run/images/
    fluxkiln bench image --suite shapes --reference other-run    and say how far from the pictures of another run
    fluxkiln bench image compare run other-run --sheet s.png     any two folders of pictures, side by side
    fluxkiln bench image ablate --format fp8                     which block linears tolerate a format

Fidelity to a reference means little alone, since trajectories diverge by rounding: `--floor` names a run of the same
seeds through another implementation in the same precision, and its distance is printed beside ours.
What low precision does to the little "shapes" model does not transfer to 12 B parameters.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw

from fluxkiln.bench import metrics, shapes_judge, suite
from fluxkiln.bench.suite import Item

if TYPE_CHECKING:
    from fluxkiln.pipeline import Pipeline

SHAPES_NOTE = "The shapes model is tiny: what a precision or kernel does to it does not transfer to 12 B parameters."
SHEET_COLUMNS = 6


@dataclass(frozen=True)
class Settings:
    """How the pictures are made."""

    steps: int | None
    guidance: float | None
    seed: int


# -- making ---------------------------------------------------------------------------------------------------------


def make(pipe: Pipeline, items: Sequence[Item], folder: Path, settings: Settings, progress: bool = True) -> list[dict]:
    """Make each item's picture as `folder/images/ID.png`; return its record and digests. Finished ones are kept."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    log, made = folder / "made.jsonl", {}
    if log.exists():
        made = {entry["id"]: entry for entry in map(json.loads, log.read_text().splitlines())}
    began = time.monotonic()
    for number, item in enumerate(items, 1):
        path = folder / "images" / f"{item.id}.png"
        wanted = _digest([item.prompt, item.seed, settings.steps, settings.guidance, settings.seed])
        if item.id in made and made[item.id]["request"] == wanted and path.exists():
            continue
        source = item.source(pipe.side)
        out = pipe(
            item.prompt,
            image=source,
            width=item.width,
            height=item.height,
            seed=settings.seed + number if item.seed is None else item.seed,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            progress=False,
        )
        picture = out.images[0]
        partial = path.with_suffix(".writing")
        picture.save(partial, format="PNG")
        partial.replace(path)
        made[item.id] = {"id": item.id, "request": wanted, "record": json.loads(out.record.to_json())}
        with open(log, "a") as file:
            file.write(json.dumps(made[item.id]) + "\n")
        if progress and (number % 10 == 0 or number == len(items)):
            rate = (time.monotonic() - began) / number
            print(f"\r{number} of {len(items)}, {rate:.2f} s each ", end="", file=sys.stderr, flush=True)
    if progress:
        print(file=sys.stderr)
    return [made[item.id] for item in items]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def read(path: Path) -> np.ndarray:
    """A picture `[H, W, 3]`, uint8."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


# -- measuring ------------------------------------------------------------------------------------------------------


def measure(items: Sequence[Item], folder: Path) -> list[dict[str, Any]]:
    """What the judge says of each picture in `folder/images`; items without a scene have no `checks`."""
    rows = []
    for item in items:
        row: dict[str, Any] = {"id": item.id, "category": item.category}
        if item.scene is not None:
            pixels = read(folder / "images" / f"{item.id}.png")
            source = item.source(min(pixels.shape[:2]))
            if source is None or item.before is None:
                verdict = shapes_judge.judge(pixels, item.scene)
            else:
                verdict = shapes_judge.judge_edit(np.asarray(source), pixels, item.before, item.scene)
                row["unchanged_psnr"] = verdict.unchanged_psnr
            row |= {"ok": verdict.ok, "checks": verdict.checks}
            if item.text is not None:
                read_as = verdict.word or ""
                row |= {"read": read_as, "edit_distance": shapes_judge.edit_distance(read_as, item.text)}
        rows.append(row)
    return rows


def summarize(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per category and for `all`: n, how many are all right, its Wilson interval, and the share of each check."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if "checks" in row:
            groups.setdefault(row["category"], []).append(row)
    if len(groups) > 1:
        groups["all"] = [row for group in groups.values() for row in group]
    result = {}
    for category, group in groups.items():
        right = sum(row["ok"] for row in group)
        names = dict.fromkeys(name for row in group for name in row["checks"])
        entry: dict[str, Any] = {
            "n": len(group),
            "right": right,
            "interval": metrics.wilson(right, len(group)),
            "checks": {name: _share([row["checks"][name] for row in group if name in row["checks"]]) for name in names},
        }
        if distances := [row["edit_distance"] for row in group if "edit_distance" in row]:
            entry["edit_distance"] = statistics.mean(distances)
        result[category] = entry
    return result


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


def fidelity(folder: Path, reference: Path) -> dict[str, Any]:
    """PSNR, SSIM, MS-SSIM and FLIP of the pictures that two folders share, by name.

    Raises:
        ValueError: they share none.
    """
    pairs = list(_shared(folder, reference))
    scores: dict[str, list[float]] = {"psnr": [], "ssim": [], "ms_ssim": [], "flip": []}
    for _, a, b in pairs:
        x, y = read(a), read(b)
        for name, function in (
            ("psnr", metrics.psnr),
            ("ssim", metrics.ssim),
            ("ms_ssim", metrics.ms_ssim),
            ("flip", metrics.flip),
        ):
            scores[name].append(function(x, y))
    equal = sum(value == float("inf") for value in scores["psnr"])
    finite = [value for value in scores["psnr"] if value != float("inf")]
    return {
        "n": len(pairs),
        "equal": equal,
        "psnr": statistics.mean(finite) if finite else None,
        **{name: statistics.mean(scores[name]) for name in ("ssim", "ms_ssim", "flip")},
    }


def _shared(a: Path, b: Path) -> list[tuple[str, Path, Path]]:
    folders = [path / "images" if (path / "images").is_dir() else path for path in (a, b)]
    found = [{p.stem: p for p in sorted(f.glob("*")) if p.suffix in (".png", ".jpg", ".webp")} for f in folders]
    names = [name for name in found[0] if name in found[1]]
    if not names:
        raise ValueError(f"{a} and {b} have no picture of the same name")
    return [(name, found[0][name], found[1][name]) for name in names]


def latency(made: Sequence[dict[str, Any]], gpu_hour_price: float | None) -> dict[str, float]:
    """Median seconds of text encoding, denoising, decoding and the whole, and the cost of a picture."""
    timings = [{**t, "denoise": sum(t["steps"])} for entry in made if (t := entry["record"].get("timings"))]
    result = {
        name: statistics.median(t[name] for t in timings)
        for name in ("text", "encode", "modulate", "denoise", "decode", "total")
        if timings
    }
    if gpu_hour_price is not None and "total" in result:
        result["cost_per_image"] = result["total"] / 3600 * gpu_hour_price
    return result


# -- showing --------------------------------------------------------------------------------------------------------


def table(summary: dict[str, dict[str, Any]]) -> str:
    """The summary as text."""
    lines = [f"{'category':12} {'n':>5} {'right':>7}   {'95 % interval':15} {'checks'}"]
    for category, entry in summary.items():
        low, high = entry["interval"]
        failing = " ".join(f"{name} {share:.1%}" for name, share in entry["checks"].items() if share < 1)
        extra = f" (mean edit distance {entry['edit_distance']:.2f})" if "edit_distance" in entry else ""
        share = entry["right"] / entry["n"]
        lines.append(f"{category:12} {entry['n']:5} {share:7.1%}   {low:6.1%} – {high:6.1%} {failing}{extra}")
    return "\n".join(lines)


def contact_sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]], side: int = 128) -> Image.Image:
    """One picture to look at: captions, each above its pictures side by side."""
    count = max(len(pictures) for _, pictures in rows)
    columns = max(1, SHEET_COLUMNS // count)
    cell, tall = count * (side + 2) + 6, side + 30
    height = -(-len(rows) // columns) * tall
    sheet = Image.new("RGB", (columns * cell, height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (caption, pictures) in enumerate(rows):
        x, y = i % columns * cell, i // columns * tall
        width = cell // 6 - 1
        pen.text((x + 2, y + 2), caption[:width] + "\n" + caption[width : 2 * width], fill="black")
        for j, picture in enumerate(pictures):
            scale = side / max(picture.size)
            size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
            sheet.paste(
                picture.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS),
                (x + 2 + j * (side + 2), y + 28),
            )
    return sheet


def _pictures(item: Item, folders: Sequence[Path], side: int) -> list[Image.Image]:
    source = item.source(side)
    made = [Image.fromarray(read(folder / "images" / f"{item.id}.png")) for folder in folders]
    return made if source is None else [source, *made]


# -- commands -------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Callable[[Sequence[str]], int]] = {"compare": _compare, "ablate": _ablate}
    parser = argparse.ArgumentParser(prog="fluxkiln bench image")
    add_arguments(parser)
    try:
        if argv and argv[0] in commands:
            return commands[argv[0]](argv[1:])
        return run(parser.parse_args(argv))
    except (ValueError, OSError) as error:
        print(f"fluxkiln bench image: {error}", file=sys.stderr)
        return 2


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What says which model makes which pictures."""
    parser.add_argument("--suite", default="shapes", help="bundled suite, JSONL file, or KontextBench folder")
    parser.add_argument("--model", default="shapes", help="anything Pipeline.from_pretrained takes")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--guidance", type=float, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="only so many items of each category")
    parser.add_argument("--category", nargs="+", help="only these categories")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments for `Pipeline.from_pretrained` and `load_transformer`."""
    options = {key: getattr(args, key) for key in ("device", "dtype") if getattr(args, key) is not None}
    return {"precision": args.precision, "backend": args.backend, **options}


def select(args: argparse.Namespace) -> list[Item]:
    """The items of the suite that the arguments ask for.

    Raises:
        ValueError: there are none.
    """
    items, counts = [], dict[str, int]()
    for item in suite.load(args.suite):
        counts[item.category] = counts.get(item.category, 0) + 1
        wanted = args.category is None or item.category in args.category
        if wanted and (args.limit is None or counts[item.category] <= args.limit):
            items.append(item)
    if not items:
        raise ValueError(f"nothing to make: the suite has the categories {', '.join(counts)}")
    return items


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(metavar="COMMAND")
    for name in ("compare", "ablate"):
        # What follows is for the command's own parser: nothing of it is an option here.
        command = commands.add_parser(name, add_help=False, prefix_chars="\0")
        command.add_argument("argv", nargs="*")
        command.set_defaults(command=name)
    add_model_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("bench-image"), help="folder for pictures and results")
    parser.add_argument("--reference", type=Path, help="run to compare the pictures with")
    parser.add_argument("--floor", type=Path, help="run of another implementation: its distance is the noise floor")
    parser.add_argument("--gpu-hour-price", type=float, help="for the cost of a picture")
    parser.add_argument("--sheet", type=Path, help="contact sheet to write")


def run(args: argparse.Namespace) -> int:
    if "command" in args:
        return main([args.command, *args.argv])
    items = select(args)

    import fluxkiln

    pipe = fluxkiln.Pipeline.from_pretrained(args.model, **model_options(args))
    made = make(pipe, items, args.out, Settings(args.steps, args.guidance, args.seed))
    rows = measure(items, args.out)
    results: dict[str, Any] = {
        "suite": str(args.suite),
        "model": args.model,
        "backend": args.backend,
        "precision": args.precision,
        "steps": args.steps,
        "guidance": args.guidance,
        "seed": args.seed,
        "summary": summarize(rows),
        "latency": latency(made, args.gpu_hour_price),
        "items": rows,
        "records": {entry["id"]: entry["record"] for entry in made},
    }
    if args.reference:
        results["fidelity"] = fidelity(args.out, args.reference)
    if args.floor and args.reference:
        results["noise_floor"] = fidelity(args.floor, args.reference)
    _write(args.out / "results.json", json.dumps(results, indent=1))
    if args.sheet:
        contact_sheet([(item.prompt, _pictures(item, [args.out], pipe.side)) for item in items]).save(args.sheet)
    if args.json:
        print(json.dumps({key: value for key, value in results.items() if key != "records"}))
        return 0
    print(table(results["summary"]))
    for name in ("fidelity", "noise_floor", "latency"):
        if results.get(name):
            print(f"{name}: " + ", ".join(f"{k} {v:.4g}" for k, v in results[name].items() if v is not None))
    if args.model == "shapes" and args.precision not in ("fp32", "bf16"):
        print(SHAPES_NOTE)
    print(f"{args.out / 'results.json'}")
    return 0


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(".writing")
    partial.write_text(text)
    partial.replace(path)


def _compare(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="fluxkiln bench image compare", description="Two folders of pictures.")
    parser.add_argument("a", type=Path)
    parser.add_argument("b", type=Path, help="the reference")
    parser.add_argument("--floor", type=Path, help="another implementation's pictures: how far chance alone goes")
    parser.add_argument("--sheet", type=Path, help="contact sheet to write, the pictures side by side")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    results = {"fidelity": fidelity(args.a, args.b)}
    if args.floor:
        results["noise_floor"] = fidelity(args.floor, args.b)
    if args.sheet:
        rows = [(name, [Image.fromarray(read(a)), Image.fromarray(read(b))]) for name, a, b in _shared(args.a, args.b)]
        contact_sheet(rows).save(args.sheet)
    if args.json:
        print(json.dumps(results))
    else:
        for name, scores in results.items():
            print(f"{name}: " + ", ".join(f"{k} {v:.4g}" for k, v in scores.items() if v is not None))
    return 0


def _ablate(argv: Sequence[str]) -> int:
    from fluxkiln.bench import ablation

    return ablation.main(argv)


if __name__ == "__main__":
    sys.exit(main())
