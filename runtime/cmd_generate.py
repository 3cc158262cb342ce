"""`fluxkiln generate`: images from text; what `fluxkiln edit` shares with it.

Images are made one at a time, so that each is what the same request alone would make, and is on disk when the next
one begins.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fluxkiln import cli_model
from fluxkiln.batch import Job, Results, read_jobs
from fluxkiln.cli import sentence

if TYPE_CHECKING:
    from PIL import Image

    from fluxkiln.cache import ImageCache
    from fluxkiln.pipeline import Output, Pipeline
    from fluxkiln.record import Picture, Record

DEFAULT_OUTPUT = "{prompt}-{seed}.png"
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

# Options that are arguments of the pipeline's call: option -> (argument, reader of its text, what it is).
Reader = Callable[[str], Any]


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers with commas between, got {text!r}") from None


def _number_or_numbers(text: str) -> float | list[float]:
    values = _numbers(text)
    return values[0] if len(values) == 1 else values


def unicode_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("is not text: it holds bytes that are not UTF-8") from None
    return text


REQUEST: dict[str, tuple[str, Reader, str]] = {
    "--width": ("width", int, "pixels; rounded down to a multiple of 16"),
    "--height": ("height", int, "pixels; rounded down to a multiple of 16"),
    "--steps": ("num_inference_steps", int, "denoise steps (default: the model's)"),
    "--guidance": ("guidance_scale", _number_or_numbers, "distilled guidance; one number, or one for each step: 4,4,3"),
    "--seed": ("seed", int, "of the first image, the next has the next (default: random, and said)"),
    "--negative-prompt": ("negative_prompt", unicode_text, "what to lead away from; needs --true-cfg-scale above 1"),
    "--true-cfg-scale": ("true_cfg_scale", float, "classifier-free guidance, at twice the cost (default 1: off)"),
    "--prompt-2": ("prompt_2", unicode_text, "what T5 reads, if not the prompt"),
    "--max-sequence-length": ("max_sequence_length", int, "tokens that T5 reads"),
    "--sigmas": ("sigmas", _numbers, "where the steps are: 1,0.75,0.5,0.25"),
    "--strength": ("strength", float, "0..1: how far back to noise the picture goes"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", type=unicode_text, help="what to make")
    parser.add_argument("--image", action="append", metavar="FILE", help="start from it, or (Kontext) refer to it")
    parser.add_argument("--mask", metavar="FILE", help="repaint only its white part of --image")
    parser.add_argument("--control-image", metavar="FILE", help="edges or depth, for Canny and Depth models")
    parser.add_argument("--crop", nargs="?", type=int, const=32, metavar="PIXELS", help="render only around the mask")
    parser.add_argument("--from", dest="repeat", type=Path, metavar="IMAGE", help="repeat that image exactly")
    add_shared(parser)


def add_shared(parser: argparse.ArgumentParser) -> None:
    """Everything that `generate` and `edit` have in common."""
    parser.add_argument(
        "-o", "--output", help="file name (.png .jpg .webp), with {seed} {index} {prompt} {date} … filled in"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace files of earlier runs; otherwise name-1.png is written",
    )
    parser.add_argument("-n", type=int, default=1, metavar="N", help="images of each prompt")
    for option, (name, reader, what) in REQUEST.items():
        parser.add_argument(option, dest=name, type=reader, metavar="X", help=what)
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt a line (.txt), or requests (.jsonl)")

    cli_model.add_arguments(parser.add_argument_group("model"))

    parser.add_argument("--no-metadata", action="store_true", help="do not write into the image how it was made")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="keep images here and take them from here")
    parser.add_argument("--cache-size", type=_bytes, default=_bytes("10GB"), metavar="SIZE", help="default 10GB")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and do not do it")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    if args.repeat is not None:
        return repeat(args)
    from fluxkiln import metadata, prepare

    template = output_template(args)
    metadata.check_template(template)
    jobs = list(jobs_of(args))
    if not args.prompts:  # one of many requests fails by itself
        for job in jobs:
            prepare.check(**job.arguments)
    folder = None if args.dry_run else _writable_folder(template)
    results = Results(folder / "results.jsonl") if args.prompts and folder else None
    made = set[Path]()  # images of this run, which --overwrite is not to replace
    if results is not None:
        made |= {results[job] for job in jobs if job in results}
        _say(f"{sum(job in results for job in jobs)} of {len(jobs)} images are in {results.path} already")
        jobs = [job for job in jobs if job not in results]
        if not jobs:
            return _end(args, [], 0, 0)
    cache = _cache(args)
    pipe = cli_model.open_pipeline(args)
    _say_choice(pipe)

    done: list[dict[str, Any]] = []
    failed = 0
    for job in jobs:
        try:
            output = pipe(**job.arguments, cache=cache, dry_run=args.dry_run, progress=False if args.json else None)
        except (ValueError, OSError, RuntimeError) as error:
            if results is None:
                raise
            failed += 1
            _say(f"{job.name}: {sentence(error)}")
            results.add(job, error=sentence(error))
            continue
        record = output.record.image(0)
        path = metadata.expand(template, record, job.index)
        if not args.dry_run:
            overwrite = args.overwrite and path.resolve() not in made
            path = metadata.save(_image(output, 0), path, None if args.no_metadata else record, overwrite)
            made.add(path.resolve())
            if results is not None:
                results.add(job, path=path, seed=record.seed)
        done.append(_report(args, output, record, path))
    return _end(args, done, failed, len(jobs))


def repeat(args: argparse.Namespace) -> int:
    """Make an image again from the record that it carries, and compare."""
    from fluxkiln import metadata

    _only_repeat(args)
    record = metadata.read(args.repeat)
    arguments = record.request.arguments() | _recorded_pictures(args, record)
    name = f"{args.repeat.stem}-repeated{args.repeat.suffix}"
    template = args.output or name.replace("{", "{{").replace("}", "}}")
    metadata.check_template(template)
    if not args.dry_run:
        _writable_folder(template)
    pipe = cli_model.open_pipeline(args, record)
    _say_choice(pipe)
    now = pipe(**arguments, dry_run=True).record
    differences = record.differences(now)
    for difference in differences:
        _say(f"not as recorded: {difference}")
    # In a batch an image may differ from itself alone by a rounding, so the whole batch is run again.
    index = record.index or 0
    output = pipe(**arguments, cache=_cache(args), dry_run=args.dry_run, progress=False if args.json else None)
    path = metadata.expand(template, record, 0)
    same = None
    if not args.dry_run:
        made = _image(output, index)
        path = metadata.save(made, path, None if args.no_metadata else output.record.image(index), args.overwrite)
        same = _compare(args.repeat, made)
    report = _report(args, output, output.record.image(index), path)
    if args.json:
        print(
            json.dumps(
                {"images": [report], "differences": differences, "same_pixels": same}, ensure_ascii=False, indent=2
            )
        )
    elif same:
        print(f"{path} has the same pixels as {args.repeat}")
    if same is False:
        reason = "; ".join(differences) or "nothing that the record knows has changed"
        raise RuntimeError(f"{path} does not have the pixels of {args.repeat}: {reason}")
    return 0


# --- what is asked for --------------------------------------------------------------------------


def output_template(args: argparse.Namespace) -> str:
    output = args.output or DEFAULT_OUTPUT
    return os.path.join(output, DEFAULT_OUTPUT) if output.endswith("/") or Path(output).is_dir() else output


def jobs_of(args: argparse.Namespace) -> Iterator[Job]:
    """One job for each image, in order.

    Raises:
        ValueError, OSError: there is none, or a picture for all of them is not there: said before a model is opened.
    """
    for path in filter(None, (*(args.image or ()), args.mask, args.control_image)):
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} is not a file: expected a picture")
    shared = {name: getattr(args, name) for name, _, _ in REQUEST.values() if getattr(args, name) is not None}
    pictures = {
        "image": args.image[0] if args.image and len(args.image) == 1 else args.image,
        "mask_image": args.mask,
        "control_image": args.control_image,
        "padding_mask_crop": args.crop,
    }
    shared |= {name: value for name, value in pictures.items() if value is not None}
    if args.n < 1:
        raise ValueError(f"-n must be at least 1, got {args.n}")
    if (args.prompt is None) == (args.prompts is None):
        raise ValueError("give either a prompt or --prompts FILE" + (", not both" if args.prompts else ""))
    model = {name: getattr(args, name) for name in ("model", *cli_model.FILES, *cli_model.OPTIONS)}
    requests = [{"prompt": args.prompt}] if args.prompts is None else read_jobs(args.prompts)
    yield from Job.expand(requests, shared, args.n, model)


def _recorded_pictures(args: argparse.Namespace, record: Record) -> dict[str, Any]:
    """The pictures that the recorded call was given: those named now, else those of the recorded names."""
    from fluxkiln.images import open_picture
    from fluxkiln.record import pixel_digest

    named = list(args.image or [])
    given = {
        "image": named,
        "reference": named,
        "mask": [args.mask] if args.mask else [],
        "control": [args.control_image] if args.control_image else [],
    }
    found: dict[str, list[str]] = {}
    for picture in record.request.pictures:
        path = given[picture.role].pop(0) if given[picture.role] else _beside(args.repeat, picture)
        if pixel_digest(open_picture(path, picture.role)) != picture.sha256:
            raise ValueError(f"{path} is not the {picture.role} picture that {args.repeat} was made from")
        found.setdefault(picture.role, []).append(str(path))
    if unused := [path for paths in given.values() for path in paths]:
        raise ValueError(f"{args.repeat} was not made from {unused[0]}: leave it out")
    arguments: dict[str, Any] = {"mask_image": found.get("mask"), "control_image": found.get("control")}
    arguments = {name: paths[0] for name, paths in arguments.items() if paths}
    images = [*found.get("image", []), *found.get("reference", [])]
    if images:
        arguments["image"] = images[0] if len(images) == 1 else images
    return arguments


def _beside(image: Path, picture: Picture) -> Path:
    option = {"mask": "--mask", "control": "--control-image"}.get(picture.role, "--image")
    for folder in (image.parent, Path()):
        if picture.name and (folder / picture.name).is_file():
            return folder / picture.name
    name = picture.name or "given in memory"
    raise FileNotFoundError(f"{image} needs its {picture.role} picture ({name}): name it with {option}")


def _only_repeat(args: argparse.Namespace) -> None:
    names = {name: option for option, (name, _, _) in REQUEST.items()}
    names |= {"prompt": "a prompt", "prompts": "--prompts", "crop": "--crop"}
    for name, option in names.items():
        if getattr(args, name) is not None:
            raise ValueError(f"--from repeats an image exactly: leave out {option}")
    if args.n != 1:
        raise ValueError("--from repeats one image: leave out -n")


# --- what is said -------------------------------------------------------------------------------


def _report(args: argparse.Namespace, output: Output, record: Record, path: Path) -> dict[str, Any]:
    """Tell about one image; returns the same for machines."""
    from fluxkiln.report import timings_text

    if args.dry_run and not args.json:
        print(f"{record}\n{'output':12} {path}")
    elif not args.json:
        request = record.request
        how = "from the cache" if output.cached else timings_text(record)
        print(
            f"{path}  {request.width}x{request.height}, seed {record.seed}, {record.backend} {record.precision}, {how}"
        )
    if not args.dry_run:
        for notice in record.notices:
            _say(f"notice: {notice}")
    return {
        "path": str(path),
        "seed": record.seed,
        "prompt": record.prompt,
        "cached": output.cached,
        "record": json.loads(record.to_json()),
    }


def _end(args: argparse.Namespace, done: list[dict[str, Any]], failed: int, jobs: int) -> int:
    """Tell how a run ended; returns its exit code."""
    if args.json:
        print(json.dumps({"images": done, "failed": failed}, ensure_ascii=False, indent=2))
    if failed:
        _say(f"{failed} of {jobs} images failed")
    return 1 if failed else 0


def _say_choice(pipe: Pipeline) -> None:
    """What will run, and why nothing else."""
    _say(pipe.summary())
    if pipe.transformer.loaded:
        _say(f"chosen: {pipe.transformer.loaded.choice.why}")
        for backend, reason in pipe.transformer.loaded.choice.reasons.items():
            _say(f"not {backend}: {reason}")


def _image(output: Output, index: int) -> Image.Image:
    return cast("list[Image.Image]", output.images)[index]


def _compare(path: Path, made: Image.Image) -> bool | None:
    """Whether a file has the same pixels; None where its format cannot keep them."""
    from PIL import Image

    from fluxkiln import metadata
    from fluxkiln.record import pixel_digest

    if metadata.format_of(path) == "JPEG":
        return None
    with Image.open(path) as before:
        return pixel_digest(before) == pixel_digest(made)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


# --- small tools --------------------------------------------------------------------------------


def _cache(args: argparse.Namespace) -> ImageCache | None:
    if args.cache is None:
        return None
    if args.cache.exists() and not args.cache.is_dir():
        raise ValueError(f"--cache: {args.cache} is no folder")
    from fluxkiln.cache import ImageCache

    return ImageCache(args.cache, args.cache_size)


def _bytes(text: str) -> int:
    """`500MB`, `2GB` or a plain number of bytes."""
    number = text.upper().rstrip("BKMGT")
    unit = text.upper()[len(number) :]
    if unit not in UNITS:
        raise argparse.ArgumentTypeError(f"a size is like 500MB or 2GB, got {text!r}")
    try:
        size = int(float(number) * UNITS[unit])
    except (ValueError, OverflowError):  # no number, or an infinite one
        size = -1
    if size < 0:
        raise argparse.ArgumentTypeError(f"a size is like 500MB or 2GB, got {text!r}")
    return size


def _writable_folder(template: str) -> Path:
    """The folder that a template names before its first field: it is there, or can be made with the first image.

    Raises:
        OSError: neither.
    """
    folder = Path(template.split("{")[0] + "x").parent
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is a file, not a folder")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"{there} cannot be written")
    return folder
