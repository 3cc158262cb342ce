"""`fluxkiln bench image`: make the pictures of a suite, measure them, compare runs.

    fluxkiln bench image --suite shapes --out run                make and measure; run/results.json, run/images/
    fluxkiln bench image --suite shapes --reference other-run    and say how far from the pictures of another run
    fluxkiln bench image --guidance 0 1 2 3.5 --out sweep        a run for each value, one table
    fluxkiln bench image compare run other-run --sheet s.png     any two folders of pictures, side by side
    fluxkiln bench image ablate --format fp8                     which block linears tolerate a format

Fidelity to a reference means little alone, since trajectories diverge by rounding: `--floor` names a run of the same
seeds through another implementation in the same precision (`--peer diffusers` makes one), and its distance is printed
beside ours. What low precision does to the little "shapes" model does not transfer to 12 B parameters.

Pictures are made one at a time, so that each is what the same request alone would make.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from fluxkiln.bench import fidelity, learned, metrics, report, scoring, suite
from fluxkiln.bench.fidelity import contact_sheet, read
from fluxkiln.bench.suite import Item
from fluxkiln.cli import above_zero, at_least_one, finite, pixels
from fluxkiln.cli_model import DEFAULT_MODEL, add_source, model_files
from fluxkiln.files import write_text

if TYPE_CHECKING:
    from fluxkiln.pipeline import Output, Pipeline
    from fluxkiln.sampling import Callback

SHAPES_NOTE = "The shapes model is tiny: what a precision or kernel does to it does not transfer to 12 B parameters."
DTYPES = ("fp32", "bf16")
BUNDLED_STEPS = 12
COMMON = ("parts", "variant", "backend", "precision", "dtype", "device", "plan", "coverage", "versions", "determinism")


@dataclass(frozen=True)
class Settings:
    """How the pictures are made. A negative prompt, by default an empty one, acts where `true_cfg_scale` is above 1."""

    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    true_cfg_scale: float = 1.0
    negative_prompt: str | None = None

    @property
    def name(self) -> str:
        """A folder's name that tells it from the other settings of a sweep."""
        cfg = f" cfg-{self.true_cfg_scale:g}" if self.true_cfg_scale > 1 else ""
        return f"guidance-{'default' if self.guidance is None else format(self.guidance, 'g')}{cfg}"


# -- making ---------------------------------------------------------------------------------------------------------


def request(pipe: Pipeline, item: Item, settings: Settings, made: Path | None = None, **options: Any) -> Output:
    """Call the pipeline with what an item asks for; `made` is the folder of pictures that it may follow."""
    if settings.true_cfg_scale > 1:
        negative = settings.negative_prompt if item.negative_prompt is None else item.negative_prompt
        options |= {"true_cfg_scale": settings.true_cfg_scale, "negative_prompt": negative or ""}
    return pipe(
        item.prompt,
        image=item.source(pipe.side, made),
        mask_image=item.mask,
        control_image=item.control,
        width=item.width,
        height=item.height,
        seed=settings.seed + item.number if item.seed is None else item.seed,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        progress=False,
        **options,
    )


def make(
    pipe: Pipeline,
    items: Sequence[Item],
    folder: Path,
    settings: Settings,
    progress: bool = True,
    callback: Callback | None = None,
) -> list[dict]:
    """Make each item's picture as `folder/images/ID.png`; return its id, key and record.

    A picture that is there already is made again if anything that can change a byte of it is another now. `callback`
    is the pipeline's.
    """
    pictures, log, made = folder / "images", folder / "made.jsonl", dict[str, dict]()
    pictures.mkdir(parents=True, exist_ok=True)
    if log.exists():
        made = {entry["id"]: entry for entry in report.lines(log)}
        if not log.read_text().endswith("\n"):  # the run was stopped within a line
            with open(log, "a") as file:
                file.write("\n")
    began = time.monotonic()
    for count, item in enumerate(items, 1):
        path = pictures / f"{item.id}.png"
        if item.id in made and path.exists():
            planned = request(pipe, item, settings, pictures, dry_run=True)
            if made[item.id]["key"] == planned.record.key:
                continue
        out = request(pipe, item, settings, pictures, callback=callback)
        partial = path.with_suffix(".writing")
        out.images[0].save(partial, format="PNG")
        path.unlink(missing_ok=True)  # one that stayed would be taken for what the next line says, if stopped there
        made[item.id] = {"id": item.id, "key": out.record.key, "record": json.loads(out.record.to_json())}
        with open(log, "a") as file:
            file.write(json.dumps(made[item.id]) + "\n")
        partial.replace(path)
        if progress and (count % 10 == 0 or count == len(items)):
            rate = (time.monotonic() - began) / count
            print(f"\r{count} of {len(items)}, {rate:.2f} s each ", end="", file=sys.stderr, flush=True)
    if progress:
        print(file=sys.stderr)
    return [made[item.id] for item in items]


# -- measuring ------------------------------------------------------------------------------------------------------


def common(made: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the records of all pictures share: the model's parts, the plan, versions, the device."""
    return {name: made[0]["record"][name] for name in COMMON if name in made[0]["record"]}


def latency(made: Sequence[dict[str, Any]], gpu_hour_price: float | None) -> dict[str, float]:
    """Median seconds of text encoding, denoising, decoding and the whole, and what a picture costs in the mean."""
    timings = [{**t, "denoise": sum(t["steps"])} for entry in made if (t := entry["record"].get("timings"))]
    if not timings:
        return {}
    names = ("text", "encode", "modulate", "denoise", "decode", "total")
    result = {name: statistics.median(t[name] for t in timings) for name in names}
    if gpu_hour_price is not None:
        result["cost_per_image"] = statistics.mean(t["total"] for t in timings) / 3600 * gpu_hour_price
    return result


# -- showing --------------------------------------------------------------------------------------------------------


def pictures(item: Item, folder: Path, side: int) -> list[Image.Image]:
    """An item's picture of a run, after the one to edit if there is one; `side` is that of a drawn one."""
    source, made = item.source(side, folder / "images"), Image.fromarray(read(folder / "images" / f"{item.id}.png"))
    return [made] if source is None else [source, made]


# -- commands -------------------------------------------------------------------------------------------------------


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What says which model makes which pictures."""
    parser.add_argument("--suite", default="shapes", help="bundled suite, JSONL file, or KontextBench folder")
    add_source(parser)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", choices=DTYPES, default=None, help="of everything but the block linears")
    parser.add_argument("--steps", type=at_least_one, help="default: the model's own, of the bundled one 12")
    parser.add_argument("--seed", type=int, default=0, help="the n-th item of the suite has this seed plus n")
    parser.add_argument("--size", type=pixels, metavar="WxH", help="of pictures whose item does not say, in pixels")
    parser.add_argument("--limit", type=at_least_one, help="only so many items of each category")
    parser.add_argument("--category", nargs="+", help="only these categories")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def open_model(args: argparse.Namespace) -> Pipeline:
    """The pipeline that the arguments name."""
    import fluxkiln

    return fluxkiln.Pipeline.from_files(
        **(model_files(args) or {"transformer": source(args)}), variant=args.variant, **model_options(args)
    )


def source(args: argparse.Namespace) -> str:
    """What the transformer is opened from."""
    return args.transformer or args.model or DEFAULT_MODEL


def steps(args: argparse.Namespace) -> int | None:
    """Of the denoising; None leaves it to the pipeline."""
    return args.steps or (BUNDLED_STEPS if source(args) == DEFAULT_MODEL else None)


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments for `Pipeline.from_pretrained` and `load_transformer`."""
    import torch

    dtypes = dict(zip(DTYPES, (torch.float32, torch.bfloat16), strict=True))
    options = {"device": args.device, "dtype": dtypes.get(args.dtype)}
    given = {key: value for key, value in options.items() if value is not None}
    return {"precision": args.precision, "backend": args.backend, **given}


def select(args: argparse.Namespace) -> list[Item]:
    """The items of the suite that the arguments ask for.

    Raises:
        ValueError: there are none, or none of a category that is named.
    """
    items, counts = [], dict[str, int]()
    for item in suite.load(args.suite):
        counts[item.category] = counts.get(item.category, 0) + 1
        wanted = args.category is None or item.category in args.category
        if wanted and (args.limit is None or counts[item.category] <= args.limit):
            if args.size and item.width is item.height is None:
                item = replace(item, width=args.size[0], height=args.size[1])
            items.append(item)
    missing = [category for category in args.category or () if category not in counts]
    if missing or not items:
        what = f"no category {missing[0]!r}" if missing else "nothing to make"
        raise ValueError(f"{what}: the suite has {'the categories ' + ', '.join(counts) if counts else 'no items'}")
    return items


class _Commands(argparse._SubParsersAction):
    """Refuses options before a command, which has its own: argparse would silently take these instead."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        for action in parser._actions:
            if action.option_strings and getattr(namespace, action.dest, action.default) != action.default:
                parser.error(f"{action.option_strings[-1]} stands before {values[0]}: give options after the command")
        super().__call__(parser, namespace, values, option)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from fluxkiln.bench import ablation, adherence

    commands = parser.add_subparsers(metavar="COMMAND", action=_Commands)
    for name, module, what in (
        ("compare", fidelity, "say how far the pictures of one folder are from those of another"),
        ("judge", adherence, "say how many pictures of a folder, whoever made them, are what a suite asked for"),
        ("ablate", ablation, "quantise one kind of layer at a time and measure the pictures"),
    ):
        command = commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    add_model_arguments(parser)
    several = "; several make a run each"
    parser.add_argument("--guidance", type=finite, nargs="+", default=[None], help=f"distilled guidance{several}")
    parser.add_argument(
        "--true-cfg-scale", type=finite, nargs="+", default=[1.0], help=f"1: off, above: twice the cost{several}"
    )
    parser.add_argument("--negative-prompt", help="with --true-cfg-scale, of items that have none; default: empty")
    parser.add_argument("--out", type=Path, default=Path("bench-image"), help="folder for pictures and results")
    parser.add_argument("--reference", type=Path, help="run to compare the pictures with")
    parser.add_argument("--floor", type=Path, help="run of another implementation: its distance is the noise floor")
    parser.add_argument("--peer", choices=("diffusers",), help="let it make the pictures: a run for --floor")
    parser.add_argument(
        "--step-errors", type=at_least_one, metavar="N", help="of N items: how far 1 and 4 steps end from eager in bf16"
    )
    parser.add_argument("--gpu-hour-price", type=above_zero, help="for the cost of a picture")
    parser.add_argument("--lpips", choices=learned.LPIPS_NETS, help="also LPIPS, with the package and weights you have")
    scoring.add_reader_arguments(parser)
    parser.add_argument(
        "--sheet", type=fidelity.sheet_path, help="contact sheet to write, of at most 60 items, wrong ones first"
    )


def run(args: argparse.Namespace) -> int:
    items = select(args)
    pairs = itertools.product(args.guidance, args.true_cfg_scale)
    sweep = [Settings(steps(args), guidance, args.seed, cfg, args.negative_prompt) for guidance, cfg in pairs]
    if len(sweep) > 1 and (args.reference or args.floor or args.sheet or args.step_errors):
        wanted = "--reference, --floor, --sheet and --step-errors go"
        raise ValueError(f"{wanted} with one --guidance and one --true-cfg-scale")
    if args.floor and not args.reference:
        raise ValueError("--floor is how far another run is from the --reference: give both")
    if args.peer and (args.step_errors or args.dtype or args.gpu_hour_price or args.variant):
        own = "--step-errors, --dtype, --gpu-hour-price and --variant"
        raise ValueError(f"{own} are of our own backends, not of a --peer")
    if args.peer and model_files(args):
        raise ValueError("--peer opens a --model in diffusers' layout, not single files")
    if args.peer and any(item.mask or item.control for item in items):
        raise ValueError("a --peer makes pictures from prompts and references, not from a mask or control picture")
    if args.out.resolve() in [other.resolve() for other in _others(args)]:
        raise ValueError(f"{args.out} is the --reference or the --floor: these pictures would be made over it")
    if args.reference:
        fidelity.shared(*_others(args), names=[item.id for item in items])
    if args.floor:
        fidelity.check_floor(args.reference, args.floor)
    judges = scoring.readers(args)
    extra = {"lpips": learned.lpips(args.lpips)} if args.lpips else {}
    pipe = _open(args)
    every = {}
    for settings in sweep:
        folder = args.out if len(sweep) == 1 else args.out / settings.name
        every[settings.name] = _one(args, pipe, items, folder, settings, judges, extra)
    if args.json:
        print(json.dumps(every if len(sweep) > 1 else every[sweep[0].name]))
    elif len(sweep) > 1:
        print(scoring.sweep_table({name: results["summary"] for name, results in every.items()}))
    else:
        _print(args, every[sweep[0].name])
    return 0


def _open(args: argparse.Namespace) -> Pipeline:
    if args.peer is None:
        return open_model(args)
    from fluxkiln.bench import peers

    if args.precision not in DTYPES or args.backend != "auto":
        raise ValueError(f"--peer has its own backend, and a --precision of {' or '.join(DTYPES)}")
    return peers.DiffusersPipeline(source(args), args.precision, args.device)


def _one(
    args: argparse.Namespace,
    pipe: Pipeline,
    items: Sequence[Item],
    folder: Path,
    settings: Settings,
    judges: scoring.Readers,
    extra: dict[str, metrics.Metric],
) -> dict[str, Any]:
    """Make, measure, compare; write `results.json` and return what is in it."""
    made = make(pipe, items, folder, settings)
    kinds = {
        name: [entry for item, entry in zip(items, made, strict=True) if item.is_edit is edit]
        for name, edit in (("prompts", False), ("edits", True))
    }
    rows = [
        row | {"key": entry["key"]} for row, entry in zip(scoring.measure(items, folder, judges), made, strict=True)
    ]
    results: dict[str, Any] = {
        "suite": str(args.suite),
        "suite_sha256": hashlib.sha256(suite.locate(args.suite).read_bytes()).hexdigest(),
        "model": source(args),
        "backend": args.peer or args.backend,
        "precision": args.precision,
        **{name: getattr(settings, name) for name in Settings.__dataclass_fields__},
        "steps": made[0]["record"]["request"]["num_inference_steps"],
        "summary": scoring.summarize(rows),
        "latency": {kind: latency(some, args.gpu_hour_price) for kind, some in kinds.items() if some},
        "items": rows,
        # The rest of every picture's record is in made.jsonl.
        "record": common(made),
    }
    if found := scoring.rewards(rows):
        results["image_reward"] = found
    if (whole := scoring.sequences(items, rows)) is not None:
        results["sequences"] = whole
    if source(args) == DEFAULT_MODEL:
        results["note"] = SHAPES_NOTE

    def keep() -> None:
        write_text(folder / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")

    keep()  # a comparison may fail, and what was judged is lost by none
    if args.reference:
        mine, others = fidelity.files(folder), fidelity.shared(*_others(args), names=[item.id for item in items])
        pairs = {name: (mine[name], reference) for name, (reference, *_) in others.items()}
        results["fidelity"] = fidelity.fidelity(pairs, extra)
    if args.floor:
        pairs = {name: (floor, reference) for name, (reference, floor) in others.items()}
        results["noise_floor"] = fidelity.fidelity(pairs, extra)
    if args.step_errors:
        from fluxkiln.bench import ablation

        n = min(args.step_errors, len(items))
        some = [items[i * len(items) // n] for i in range(n)]  # of all categories, if there are enough
        results["step_errors"] = ablation.step_errors(pipe, source(args), some, settings, folder / "images")
    keep()
    if args.sheet:
        right = {row["id"]: row.get("ok", True) for row in rows}
        shown = fidelity.to_show(items, lambda item: right[item.id])
        captions = (item.prompt if right[item.id] else f"WRONG {item.prompt}" for item in shown)
        contact_sheet(zip(captions, (pictures(item, folder, pipe.side) for item in shown), strict=True)).save(
            args.sheet
        )
    return results


def _others(args: argparse.Namespace) -> list[Path]:
    """What a run is compared with."""
    return [path for path in (args.reference, args.floor) if path]


def _print(args: argparse.Namespace, results: dict[str, Any]) -> None:
    nothing = "nothing to judge by: no item has a scene, or a text that --ocr reads"
    print(scoring.table(results["summary"]) if results["summary"] else nothing)
    if whole := results.get("sequences"):
        low, high = whole["interval"]
        print(f"right in every turn: {whole['right']} of {whole['n']} sequences ({low:.1%} – {high:.1%})")
    lines = {name: results.get(name) for name in ("fidelity", "noise_floor", "step_errors", "image_reward")}
    lines |= {f"seconds, {kind}": seconds for kind, seconds in results["latency"].items()}
    for name, scores in lines.items():
        if scores:
            print(fidelity.line(name, scores))
    if "note" in results and args.precision not in DTYPES:
        print(results["note"])
    print(f"{args.out / 'results.json'}")
