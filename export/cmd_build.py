"""`fluxkiln build`: TensorRT engines of a checkpoint, for the GPUs that will run them."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fluxkiln.cli import pixels
from fluxkiln.engines.store import Manifest, Store, default_root, read_manifest
from fluxkiln.export.arguments import add_graph_arguments

GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_graph_arguments(parser, ("bf16", "fp8", "nvfp4"))
    parser.add_argument("--arch", nargs="+", default=["sm_89"], metavar="sm_NN", help="of the GPUs, e.g. sm_89 sm_120")
    parser.add_argument(
        "--weights",
        choices=("refit", "inside"),
        help="supplied at load (small engines), or inside: the autoencoder's are",
    )
    parser.add_argument("--max-size", type=pixels, default="2048x2048", metavar="WxH", help="largest image, in pixels")
    parser.add_argument("--references", type=int, default=2, help="Kontext references that must fit beside it")
    parser.add_argument("--max-batch", type=int, default=1)
    parser.add_argument("--flavour", default="tensorrt_rtx", choices=("tensorrt_rtx", "tensorrt"))
    parser.add_argument("--fallback", action="store_true", help="accept products that fell back to another format")
    parser.add_argument("--store", type=Path, default=default_root(), help="folder of the engines")
    parser.add_argument("--force", action="store_true", help="build again what the store has")
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    from fluxkiln.engines.flavour import flavour
    from fluxkiln.export.build import Profile, build, memory_needed, refuse
    from fluxkiln.export.parts import export

    installed = flavour(args.flavour)
    for arch in args.arch:
        if reason := refuse(args.precision, arch, installed):
            raise ValueError(reason)
    convolutions = args.part.startswith("vae")
    weights = args.weights or ("inside" if convolutions else "refit")
    if convolutions and weights == "refit":
        raise ValueError(f"the {args.part} has its weights inside: TensorRT takes those of convolutions no other way")
    exported = export(args.model, args.part, args.precision, args.form, args.recipe)
    traced = exported.traced
    profile = Profile.of(args.max_size, args.references, args.max_batch)
    say = (lambda text: None) if args.json else print
    need, free = memory_needed(traced, weights), available_memory()
    say(f"{args.model}: {exported.part}, {exported.recipe.name}; the build needs up to {need / GIB:.1f} GiB")
    for note in exported.notes:
        say(note)
    if free is not None and need > free:
        other = ": build with --weights refit, which needs a fraction" if args.weights == "inside" else ""
        raise MemoryError(
            f"the build needs up to {need / GIB:.1f} GiB of memory and {free / GIB:.1f} GiB are free{other}"
        )
    store, results = Store(args.store), []
    store.root.mkdir(parents=True, exist_ok=True)  # fails now rather than after a build
    for arch in args.arch:
        subject = exported.subject(args.precision, arch, profile, weights, installed)
        if args.fallback:
            subject = replace(subject, options={"fallback": True})
        if not args.force and (found := store.find(subject)):
            if (damage := store.verify(found)) is None:
                say(f"{arch}: in the store already, {found.folder}")
                results.append(_result(found.folder, found.manifest, built=False))
                continue
            say(f"{arch}: {damage}: it is built again")
        tensors = exported.values() if weights == "inside" else None
        with _Bar(arch, hidden=args.json) as bar:
            built = build(
                traced, arch, profile, tensors, name=args.flavour, progress=bar.update, fallback=args.fallback
            )
        peak = peak_memory()
        beyond = f"the build took {peak / GIB:.1f} GiB of memory, more than the {need / GIB:.1f} GiB it was to need"
        notes = (*exported.notes, *built.messages) + (beyond,) * (peak > need)
        folder = store.add(
            subject,
            built.plan,
            model_name=str(args.model),
            structure=asdict(built.structure),
            parameters={name: asdict(p) for name, p in traced.parameters.items()} if tensors is None else {},
            seconds=built.seconds,
            peak_bytes=peak,
            notes=notes,
        )
        if peak > need:
            say(beyond)
        say(
            f"{arch}: built in {built.seconds:.0f} s and {peak / GIB:.1f} GiB, {len(built.plan) / 1e6:.1f} MB, "
            f"products {built.structure.products or 'not held'}, attention {built.structure.attentions or 'not held'}: "
            f"{folder}"
        )
        results.append(_result(folder, read_manifest(folder), built=True))
    if args.json:
        print(json.dumps(results, indent=1))
    return 0


def available_memory() -> int | None:
    """Bytes of memory that are free for a program, None where it cannot be told."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def peak_memory() -> int:
    """Most bytes this process had resident; 0 where it cannot be told."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _result(folder: Path, manifest: Manifest | None, built: bool) -> dict[str, Any]:
    assert manifest is not None, folder
    return {
        "folder": str(folder),
        "part": manifest.subject.part,
        "arch": manifest.subject.arch,
        "precision": manifest.subject.precision,
        "weights": manifest.subject.weights,
        "bytes": manifest.nbytes,
        "seconds": manifest.seconds,
        "peak_bytes": manifest.peak_bytes,
        "structure": manifest.structure,
        "built": built,
    }


class _Bar:
    """A progress bar over the builder's phases, which nest and come by the thousand."""

    def __init__(self, title: str, hidden: bool) -> None:
        from tqdm import tqdm

        self._title = title
        self._bar = tqdm(desc=title, disable=True if hidden else None, leave=False, unit="step", mininterval=0.2)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, phase: str, step: int, steps: int) -> None:
        self._bar.set_description_str(f"{self._title}: {phase}", refresh=False)
        self._bar.total = steps
        self._bar.update(step - self._bar.n)
