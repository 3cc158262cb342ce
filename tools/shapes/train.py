"""Train the bundled "shapes" model from nothing: `python -m shapes.train --run RUN --out FOLDER` (in tools/).

    tokenizers   from the captions' own words
    autoencoder  pictures to 16 channels of latents and back; latents whitened, the decoder polished
    reading      T5 alone: what do the captions say
    denoiser     FLUX.1 transformer, CLIP and T5 together; what its steps are made of changes, see `portions`;
                 `--start` takes a finished pipeline once more through the last part, in which the learning rate falls

Every stage is seeded and resumes where it stopped. Training runs in `--workers` processes of one thread each that
average their gradients: on few cores this is faster than threads, which wait for each other at every operation. On a
GPU, one should do: `--device cuda --workers 1` (no GPU has run it yet).
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fluxkiln.autoencoder import Autoencoder
from fluxkiln.cli import at_least_one
from fluxkiln.hub import BUNDLED, resolve

from . import autoencoder as ae
from . import plot, reading, rollouts, workers
from .data import Batch, Pool
from .fast import Fast
from .model import AUTOENCODER, PICTURE, Denoiser, load_pipeline, save_pipeline, save_tokenizers, velocity
from .muon import Muon, matrices
from .rollouts import Rollouts
from .vocabulary import MAX_LENGTH
from .workers import average_gradients

TOKENS = 1_536  # of a portion, text included: at 64 px 38 prompts, 37 short or 29 long edits
FULL = 1 / 6  # of the portions at 64 px have all 32 tokens of text, as pipelines pad


class Kind(NamedTuple):
    """Samples of one shape: prompts or edits, (width, height) of the pictures, and the tokens of text that nearly all
    fit in."""

    edit: bool
    size: tuple[int, int]
    text: int

    @property
    def pictures(self) -> int:
        """Tokens of a sample's pictures."""
        return self.size[0] * self.size[1] // 256 * (1 + self.edit)

    @property
    def samples(self) -> int:
        """How many make a portion."""
        return TOKENS // (self.pictures + self.text)


# What a portion may be, and how often. Things are as large as the shorter side says: where it is not 64, all has to be
# drawn anew.
USUAL = (PICTURE, PICTURE)
PROMPTS = {Kind(False, USUAL, 24): 1.0}
OTHER_SIZES = {
    Kind(False, size, MAX_LENGTH): share
    for share, *sizes in (
        (0.32, (96, 96)),
        (0.28, (128, 128)),
        (0.08, (96, 128), (128, 96)),
        (0.05, (64, 128), (128, 64)),
        (0.07, (64, 96), (96, 64)),
    )
    for size in sizes
}
# Kontext is shown a reference at one of its own sizes: scaled down to 64 px, these are those it can come to.
_OTHER_EDITS = {Kind(True, size, MAX_LENGTH): 0.025 for size in ((48, 80), (80, 48), (48, 96), (96, 48))}
# Four in seven edits have at most 9 tokens of text, so that a portion of each are the edits as they come.
SHORT_EDITS = {Kind(True, USUAL, 9): 0.9} | _OTHER_EDITS
LONG_EDITS = {Kind(True, USUAL, 20): 0.9} | _OTHER_EDITS
SHARES = PROMPTS | OTHER_SIZES | SHORT_EDITS | LONG_EDITS
LEARNING_RATE, WARMUP = 4e-3, 100
# Chunks of 256 at the start, and steps between one more: drawing and encoding one takes as long as two steps.
FIRST_CHUNKS, GROW_EVERY = 10, 100


class Portion(NamedTuple):
    """Samples of one kind in a step: shares of kinds, one of which is drawn, whether half of the samples of 64 px lie
    on the model's own paths, and of the others the share of times above 0.8."""

    kinds: Mapping[Kind, float]
    early: float
    own: bool = False


def portions(step: int, rank: int, args: argparse.Namespace) -> list[Portion]:
    """What a step is made of. What lies where is learned all at once, from enough of it in each step, or not at all.

    So it comes first, for all sizes together, mostly at times where it is decided: a size that is met later has to be
    learned anew. Edits take longest, so then most tokens are theirs; of the prompts half are of other sizes, and whose
    turn it is differs between the workers. As soon as it can draw, the model is shown its own errors, see `rollouts`.
    """
    if step < args.edits_from:
        return [Portion(PROMPTS, 0.8), Portion(OTHER_SIZES, 0.8)]
    own = step >= args.own_from
    prompts = Portion(PROMPTS, 0.6, own) if (step + rank) % 2 == 0 else Portion(OTHER_SIZES, 0.65)
    return [prompts, Portion(SHORT_EDITS, 0.6, own), Portion(LONG_EDITS, 0.6, own)]


def has_tokens(model: Denoiser, kind: Kind, instruction: str) -> bool:
    """Whether an edit is of that kind; the longest takes whatever the others do not.

    A run that begins from a pipeline has its tokenizers, to which a word may be new and many tokens.
    """
    others = {other.text for other in SHARES if other.edit and other.size == USUAL}
    least = max((text for text in others if text < kind.text), default=0)
    most = kind.text if kind.text < max(others) else MAX_LENGTH
    return kind.size != USUAL or least < model.length(instruction) <= most


def text_length(kind: Kind, rng: Random) -> int:
    """Tokens of a portion's text, mostly no more than it takes: padding is looked at like words, and costs as much."""
    return MAX_LENGTH if rng.random() < FULL else kind.text


def times(n: int, noise: torch.Generator, early: float) -> Tensor:
    """`[n]` in 0..1, 1 = noise: a share `early` above 0.8, one in ten anywhere, the rest where most of the path bends.

    What is drawn, and in which colour, is decided above 0.9: below, even a noisy picture shows its background, since
    all of its latents say the same, and nobody needs to read the prompt.
    """
    middle = torch.sigmoid(torch.randn(n, generator=noise) + 0.2)
    start, anywhere = torch.rand(2, n, generator=noise)
    kind = torch.rand(n, generator=noise)
    return torch.where(kind < early, 0.8 + 0.2 * start, torch.where(kind < early + 0.1, anywhere, middle))


class Places(NamedTuple):
    """Latents `img [B, L, 64]` on the way from noise to the pictures of a batch, at times `t [B]`, the velocity wanted
    there, and what an error in it counts, `[B]`."""

    batch: Batch
    img: Tensor
    t: Tensor
    velocity: Tensor
    weight: Tensor


def straight(batch: Batch, early: float, noise: torch.Generator) -> Places:
    """On the straight lines from noise to picture."""
    t, x1 = times(len(batch.captions), noise, early), torch.randn(batch.target.shape, generator=noise)
    img = torch.lerp(batch.target, x1, t[:, None, None])
    return Places(batch, img, t, x1 - batch.target, torch.ones_like(t))


def own(paths: Rollouts, n: int, rng: Random) -> Places:
    """On `n` paths of the model's own: wanted is the velocity that leads to the picture from there.

    In it, an error of the picture is divided by the time. Below 0.4 that is made good: the last steps, in which the
    picture hardly changes any more, would be most of the loss.
    """
    batch, img, t = paths.batch(n, rng)
    return Places(batch, img, t, (img - batch.target) / t[:, None, None], (t / 0.4).clamp(max=1).square())


def joined(first: Places, second: Places) -> Places:
    batch = Batch.joined((first.batch, second.batch))
    return Places(batch, *map(torch.cat, zip(first[1:], second[1:], strict=True)))


def velocity_loss(
    model: Denoiser, predict: Callable[..., Tensor], places: Places, length: int, noise: torch.Generator
) -> Tensor:
    """Flow matching: the velocity of `predict`, `model` itself or faster, against the one wanted.

    Args:
        length: of the text, where all captions are that short.
    """
    batch, reference, device = places.batch, places.batch.reference, model.t5.device
    if reference is not None:
        reference = (reference + 0.03 * torch.randn(reference.shape, generator=noise)).to(device)
    img, t, wanted, guidance = (x.to(device) for x in (places.img, places.t, places.velocity, batch.guidance))
    # At these lengths the fused attention's backward takes twice as long as plain products do on a CPU.
    with torch.autocast(device.type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        text = model.encode(batch.captions, length)
        found = velocity(predict, img, reference, batch.size, *text, t, guidance)
    return (places.weight.to(device) * (found.float() - wanted).square().mean((1, 2))).mean()


def compile_together(rank: int, model: Denoiser, predict: Callable[..., Tensor]) -> None:
    """Compile all that a step can meet, each worker its share first: what others have compiled, it finds on disk."""
    places: dict[tuple[int, ...], tuple[Places, int]] = {}  # by batch, tokens of a picture and of text, and edit or not
    for kind in SHARES:
        n, size = kind.samples, kind.size[0] * kind.size[1] // 256
        reference = torch.zeros(n, size, 64) if kind.edit else None
        batch = Batch(kind.size, [""] * n, torch.zeros(n, size, 64), reference, torch.ones(n))
        for length in (kind.text, MAX_LENGTH):
            places[n, size, length, kind.edit] = straight(batch, 0.0, torch.Generator()), length
    every, world = list(places.values()), distributed.get_world_size()
    torch._dynamo.config.recompile_limit = max(8, len(every))  # beyond it, the rest would run as it is, without a word
    for turn in range(world):
        for one, length in every[(rank + turn) % world :: world]:
            velocity_loss(model, predict, one, length, torch.Generator()).backward()
        distributed.barrier()
    model.zero_grad()


def learning_rate(step: int, first: int, args: argparse.Namespace) -> float:
    """A warm-up, constant until `own_from`, then linear to zero; half where a run begins from a pipeline."""
    full = LEARNING_RATE / 2 if first else LEARNING_RATE
    return full * min(1.0, (step - first + 1) / WARMUP, (args.steps - step) / max(args.steps - args.own_from, 1))


def train_denoiser(rank: int, args: argparse.Namespace) -> None:
    """One worker's loop; worker 0 keeps the books."""
    run: Path = args.run
    torch.manual_seed(args.seed)
    model = Denoiser(run / "tokenizers").to(args.device)
    predict = Fast(model, args.compile)
    parameters = list(model.parameters())
    optimizer = Muon(*matrices(model))
    averaged = copy.deepcopy(model).requires_grad_(False)
    average, start, first, path = list(averaged.parameters()), 0, 0, run / "denoiser.pt"
    if path.exists():
        state = torch.load(path, map_location=args.device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch._foreach_copy_(average, state["average"])
        start, first = state["step"], state["first"]
    else:
        model.t5.load_state_dict(torch.load(run / "t5.pt"))
    autoencoder = load_autoencoder(run / "autoencoder.pt").to(args.device)
    pools = {}
    for kind in SHARES:
        fits = partial(has_tokens, model, kind)
        pools[kind] = Pool(run / "latents", autoencoder, kind.edit, *kind.size, seed=args.seed * 100 + rank, fits=fits)
    began, total, logged = time.time(), 0.0, start
    if args.compile:
        compile_together(rank, model, predict)
    for step in range(start, args.steps):
        for kind, pool in pools.items():
            since = step - max(first, args.edits_from if kind.edit else 0)
            if since >= 0:
                pool.grow(int(2 + (FIRST_CHUNKS + since / GROW_EVERY) * SHARES[kind]))
        rng = Random(f"{args.seed} {step} {rank}")
        noise = torch.Generator().manual_seed(rng.getrandbits(62))
        optimizer.zero_grad()
        phase = portions(step, rank, args)
        if step == start or step % workers.SAVE_EVERY == 0:
            # As a run that goes on has them.
            drawn = {kind: Rollouts(pool) for kind, pool in pools.items() if kind.size == USUAL}
        for paths in drawn.values() if any(portion.own for portion in phase) else ():
            if not paths.rolls or step % rollouts.EVERY == 0:  # in all workers at once: none waits for another
                paths.roll(averaged, Fast(averaged), rng)
        work = []
        for portion in phase:
            kind = rng.choices(list(portion.kinds), list(portion.kinds.values()))[0]
            own_paths = kind.samples // 2 if portion.own and kind in drawn else 0
            places = straight(pools[kind].batch(kind.samples - own_paths, rng), portion.early, noise)
            if own_paths:
                places = joined(places, own(drawn[kind], own_paths, rng))
            work.append((places, text_length(kind, rng)))
        total_samples = sum(len(places.t) for places, _ in work)
        for places, length in work:
            loss = velocity_loss(model, predict, places, length, noise) * len(places.t) / total_samples
            loss.backward()
            total += loss.item()
        average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, first, args)
        optimizer.step()
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - min(0.998, (1 + step) / (10 + step)))
        if rank:
            continue
        done = step + 1
        if done % 50 == 0 or done == args.steps:
            log(run, stage="denoiser", step=done, loss=total / (done - logged), seconds=time.time() - began)
            total, logged = 0.0, done
        if done % workers.SAVE_EVERY == 0 or done == args.steps:
            workers.save(average, run / f"average-{done:06}.pt")
            weights = {"model": model.state_dict(), "average": average}
            workers.save({**weights, "optimizer": optimizer.state_dict(), "step": done, "first": first}, path)
            plot.curves(run)


def log(run: Path, **entry: float | str) -> None:
    with open(run / "log.jsonl", "a") as file:
        file.write(json.dumps(entry) + "\n")
    print(" ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in entry.items()), flush=True)


def load_autoencoder(path: Path) -> Autoencoder:
    model = Autoencoder(AUTOENCODER)
    model.load_state_dict(torch.load(path, map_location="cpu"))
    return model.eval()


def load_denoiser(run: Path, average: Path) -> Denoiser:
    """The averaged weights of a snapshot."""
    model = Denoiser(run / "tokenizers")
    with torch.no_grad():
        for p, value in zip(model.parameters(), torch.load(average, map_location="cpu"), strict=True):
            p.copy_(value)
    return model.eval()


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
        model = load_autoencoder(raw)
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
    if not (t5 := args.run / "t5.pt").exists():
        log_here = partial(log, args.run)
        more = (args.reading_steps, args.seed, args.device, log_here)
        workers.run(reading.train, args.workers, args.run, args.run, t5, *more)
    workers.run(train_denoiser, args.workers, args.run, args)
    model = load_denoiser(args.run, args.run / f"average-{args.steps:06}.pt")
    # The ones it was trained with: captions may have changed since.
    shutil.copytree(args.run / "tokenizers", args.out, dirs_exist_ok=True)
    save_pipeline(args.out, model, load_autoencoder(args.run / "autoencoder.pt"))


if __name__ == "__main__":
    main()
