"""Train the bundled "shapes" model from nothing: `python -m shapes.train --run RUN --out FOLDER` (in tools/).

    tokenizers   from the captions' own words
    autoencoder  pictures to 16 channels of latents and back; latents whitened, the decoder polished
    reading      T5 alone: what do the captions say
    denoiser     FLUX.1 transformer, CLIP and T5 together; what its steps are made of changes, see `shapes.portions`;
                 `--start` takes a finished pipeline once more through the last part, in which the learning rate falls

Every stage is seeded and resumes where it stopped. Training runs in `--workers` processes of one thread each that
average their gradients: on few cores this is faster than threads, which wait for each other at every operation. On a
GPU, one should do: `--device cuda --workers 1` (no GPU has run it yet).
"""

from __future__ import annotations

import argparse
import json
import shutil
from functools import partial
from pathlib import Path
from random import Random

import torch

from fluxkiln.cli import at_least_one
from fluxkiln.hub import BUNDLED, resolve

from . import autoencoder as ae
from . import denoiser, plot, reading, workers
from .model import load_pipeline, save_pipeline, save_tokenizers
from .muon import Muon, matrices


def log(run: Path, **entry: float | str) -> None:
    with open(run / "log.jsonl", "a") as file:
        file.write(json.dumps(entry) + "\n")
    print(" ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in entry.items()), flush=True)
    plot.curves(run)


def train_autoencoder(args: argparse.Namespace) -> None:
    """Write `autoencoder.pt`: trained, its latents whitened, and the decoder polished, which then knows them.

    Polished is also the decoder of a pipeline that the run began from.
    """
    run: Path = args.run
    raw, whitened, polished = (run / f"autoencoder{name}.pt" for name in ("-raw", "-whitened", ""))
    more = (args.seed, args.device, partial(log, run))
    if not raw.exists() and not whitened.exists():
        workers.run(ae.train, args.workers, run, raw, args.autoencoder_steps, *more)
    if not whitened.exists():
        model = ae.load(raw)
        ae.whiten(model, Random(f"{args.seed} whiten"))
        workers.save(model.state_dict(), whitened)
    if not polished.exists():
        workers.run(ae.train, args.workers, run, polished, args.polish_steps, *more, whitened)


def begin_from(pipeline: Path, run: Path, step: int) -> None:
    """Lay out `run` as if it had come to `step` with the weights of a pipeline; the optimizer has seen nothing."""
    model, autoencoder = load_pipeline(pipeline)
    for part in ("tokenizer", "tokenizer_2"):
        shutil.copytree(pipeline / part, run / "tokenizers" / part, dirs_exist_ok=True)
    workers.save(autoencoder.state_dict(), run / "autoencoder-whitened.pt")
    workers.save(model.t5.state_dict(), run / "t5.pt")
    weights = {"model": model.state_dict(), "average": [p.detach() for p in model.parameters()]}
    optimizer = Muon(*matrices(model)).state_dict()
    workers.save({**weights, "optimizer": optimizer, "step": step, "first": step}, run / "denoiser.pt")


def device(name: str) -> torch.device:
    """An argument that names a device that there is, such as cuda:0."""
    kind = name.split(":")[0]
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise argparse.ArgumentTypeError(f"must be cpu, or cuda where there is a GPU, got {name!r}")
    return torch.device(name)


def pipeline(name: str) -> Path:
    """An argument that names a folder that `save_pipeline` wrote, or a bundled one."""
    folder = resolve(name) if name in BUNDLED else Path(name)
    if not all((folder / part).is_dir() for part in ("tokenizer", "tokenizer_2", "transformer", "vae")):
        raise argparse.ArgumentTypeError(f"must be the folder of a pipeline that this command wrote, got {name!r}")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the bundled shapes model.")
    parser.add_argument("--run", type=Path, required=True, help="working folder: checkpoints, latents, log, loss plot")
    parser.add_argument("--out", type=Path, required=True, help="diffusers folder to write")
    parser.add_argument("--steps", type=at_least_one, default=6_600, help="steps of the denoiser")
    parser.add_argument("--edits-from", type=int, default=1_400, help="until this step, prompts alone, mostly noise")
    parser.add_argument(
        "--own-from",
        type=int,
        default=2_000,
        help="from then on, the model's own paths too, and the learning rate falls to 0",
    )
    parser.add_argument("--start", type=pipeline, help="pipeline that this command wrote: begin there, at --own-from")
    parser.add_argument("--autoencoder-steps", type=at_least_one, default=5_000)
    parser.add_argument(
        "--polish-steps", type=at_least_one, default=8_000, help="of the decoder alone, on whitened latents"
    )
    parser.add_argument("--reading-steps", type=at_least_one, default=500)
    parser.add_argument("--workers", type=at_least_one, default=2, help="processes of one thread each; 1 for a GPU")
    parser.add_argument("--compile", action="store_true", help="a faster transformer; takes a C++ compiler")
    parser.add_argument("--device", type=device, default=torch.device("cpu"), help="cpu, cuda (default: cpu)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.compile and shutil.which("g++") is None and args.device.type == "cpu":
        parser.error("--compile takes a C++ compiler, and there is no g++")
    if args.edits_from > args.own_from:
        parser.error("--own-from must not come before --edits-from")
    if args.start is not None and args.steps <= args.own_from:
        parser.error(f"--start goes on at step {args.own_from}, so --steps must be more, got {args.steps}")
    args.run.mkdir(parents=True, exist_ok=True)
    if args.start is not None and any(args.run.glob("autoencoder-raw*")):
        parser.error(f"--start needs an empty folder, and another run has begun in {args.run}")
    if (state := args.run / "denoiser.pt").exists():
        done = torch.load(state, mmap=True)["step"]
        if done > args.steps:
            parser.error(f"--steps is {args.steps}, but the run in {args.run} has come to step {done} already")
    elif args.start is not None:
        begin_from(args.start, args.run, args.own_from)
    if not (tokenizers := args.run / "tokenizers").exists():
        save_tokenizers(unfinished := args.run / "tokenizers.writing")
        unfinished.rename(tokenizers)
    train_autoencoder(args)
    log_here = partial(log, args.run)
    if not (t5 := args.run / "t5.pt").exists():
        more = (args.reading_steps, args.seed, args.device, log_here)
        workers.run(reading.train, args.workers, args.run, args.run, t5, *more)
    workers.run(denoiser.train, args.workers, args.run, args, log_here)
    model = denoiser.load(args.run, args.run / f"average-{args.steps:06}.pt")
    # The ones it was trained with: captions may have changed since.
    shutil.copytree(args.run / "tokenizers", args.out, dirs_exist_ok=True)
    save_pipeline(args.out, model, ae.load(args.run / "autoencoder.pt"))


if __name__ == "__main__":
    main()
