"""Train the bundled "shapes" model from nothing: `python -m shapes.train --run RUN --out FOLDER` (in tools/).

    tokenizers   from the captions' own words
    autoencoder  pictures to 16 channels of latents and back; latents whitened, the decoder polished
    reading      T5 alone: what do the captions say
    denoiser     FLUX.1 transformer, CLIP and T5 together; what its steps are made of changes, see `portions`

Every stage is seeded and resumes where it stopped. Training runs in `--workers` processes of one thread each that
average their gradients: on few cores this is faster than threads, which wait for each other at every operation. On a
GPU, one should do: `--device cuda --workers 1` (no GPU has run it yet).
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import mse_loss

from fluxkiln.autoencoder import Autoencoder

from . import autoencoder as ae
from . import plot, reading, workers
from .data import Batch, Pool
from .model import AUTOENCODER, PICTURE, Denoiser, position_ids, save_pipeline, save_tokenizers
from .muon import Muon, matrices
from .vocabulary import MAX_LENGTH
from .workers import average_gradients

USUAL = (PICTURE, PICTURE)
# Shares of sizes, (width, height).
SQUARE = {USUAL: 1.0}
OTHER_SIZES = {(96, 96): 0.22, (128, 128): 0.22, (64, 128): 0.12, (128, 64): 0.12, (64, 96): 0.12, (96, 64): 0.12}
OTHER_SIZES |= {(96, 128): 0.04, (128, 96): 0.04}
# Kontext is shown a reference at one of its own sizes: scaled down to 64 px, these are those it can come to.
EDIT_SIZES = {USUAL: 0.9, (48, 80): 0.025, (80, 48): 0.025, (48, 96): 0.025, (96, 48): 0.025}
LEARNING_RATE, WARMUP = 2e-3, 100
FIRST_CHUNKS, GROW_EVERY = 14, 80  # chunks of 256 at the start, and steps between one more of each kind


class Portion(NamedTuple):
    """Samples of one kind in a step: shares of sizes, one of which is drawn, tokens in all, text included, and the
    share of times above 0.8."""

    edit: bool
    sizes: Mapping[tuple[int, int], float]
    tokens: int
    early: float


def portions(step: int, args: argparse.Namespace) -> list[Portion]:
    """What a step is made of. What lies where is learned all at once, from enough of it in each step, or not at all.

    So it is with 64 px at first, and with every other size when its turn comes, mostly at times where it is decided;
    but a few hundred steps of nothing else cost all that was known of 64 px. Edits take longest to learn, so most
    tokens are theirs.
    """
    if step < args.edits_from:
        return [Portion(False, SQUARE, 3070, 0.8)]
    if step < args.sizes_from:
        return [Portion(False, SQUARE, 920, 0.4), Portion(True, SQUARE, 2150, 0.4)]
    return [
        Portion(False, SQUARE, 600, 0.4),
        Portion(False, OTHER_SIZES, 770, 0.65),
        Portion(True, EDIT_SIZES, 1700, 0.4),
    ]


def times(n: int, noise: torch.Generator, early: float) -> Tensor:
    """`[n]` in 0..1, 1 = noise: a share `early` above 0.8, one in ten anywhere, the rest where most of the path bends.

    What is drawn, and in which colour, is decided above 0.9: below, even a noisy picture shows its background, since
    all of its latents say the same, and nobody needs to read the prompt.
    """
    middle = torch.sigmoid(torch.randn(n, generator=noise) + 0.2)
    start, anywhere = torch.rand(2, n, generator=noise)
    kind = torch.rand(n, generator=noise)
    return torch.where(kind < early, 0.8 + 0.2 * start, torch.where(kind < early + 0.1, anywhere, middle))


def velocity_loss(model: Denoiser, predict: nn.Module, batch: Batch, t: Tensor, noise: torch.Generator) -> Tensor:
    """Flow matching: the velocity of `predict`, `model` itself or compiled, against noise - picture at times `t [B]`.

    Two batches in three have the shortest text length that holds their captions: over a third of the tokens would be
    padding. The rest have all 32, as pipelines do.
    """
    (width, height), x0 = batch.size, batch.target.to(t.device)
    x1 = torch.randn(x0.shape, generator=noise).to(t.device)
    img = torch.lerp(x0, x1, t[:, None, None])
    ids = position_ids(height // 16, width // 16)
    if batch.reference is not None:
        blur = 0.03 * torch.randn(batch.reference.shape, generator=noise)
        img = torch.cat((img, (batch.reference + blur).to(t.device)), 1)
        ids = torch.cat((ids, position_ids(height // 16, width // 16, 1)))
    short = torch.rand((), generator=noise).item() < 2 / 3
    # At these lengths the fused attention's backward takes twice as long as plain products do on a CPU.
    with torch.autocast(t.device.type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        txt, pooled = model.encode(batch.captions, short)
        velocity = predict(img, txt, pooled, t, batch.guidance.to(t.device), ids.to(t.device))[:, : x0.shape[1]]
    return mse_loss(velocity.float(), x1 - x0)


def micro_batch(pools: Mapping[tuple, Pool], rng: Random, portion: Portion) -> Batch:
    width, height = rng.choices(list(portion.sizes), list(portion.sizes.values()))[0]
    n = max(4, portion.tokens // (width * height // 256 * (2 if portion.edit else 1) + MAX_LENGTH))
    return pools[portion.edit, width, height].batch(n, rng)


def learning_rate(step: int, steps: int, decay: int) -> float:
    """Constant after a warm-up, then linear to zero over the last `decay` steps: any run can be cut short or go on."""
    return LEARNING_RATE * min(1.0, (step + 1) / WARMUP, (steps - step) / max(decay, 1))


def train_denoiser(rank: int, args: argparse.Namespace) -> None:
    """One worker's loop; worker 0 keeps the books."""
    run: Path = args.run
    torch.manual_seed(args.seed)
    model = Denoiser(run / "tokenizers").to(args.device)
    at_64 = torch.compile(model, dynamic=False) if args.compile else model
    parameters = list(model.parameters())
    optimizer = Muon(*matrices(model))
    average, start, path = [p.detach().clone() for p in parameters], 0, run / "denoiser.pt"
    if path.exists():
        state = torch.load(path, map_location=args.device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average, start = state["average"], state["step"]
    else:
        model.t5.load_state_dict(torch.load(run / "t5.pt"))
    autoencoder = load_autoencoder(run / "autoencoder.pt").to(args.device)
    pools = {
        (edit, *size): Pool(run / "latents", autoencoder, edit, *size, seed=args.seed * 100 + rank)
        for edit, sizes in ((False, [USUAL, *OTHER_SIZES]), (True, EDIT_SIZES))
        for size in sizes
    }
    began, total, logged = time.time(), 0.0, start
    for step in range(start, args.steps):
        for pool in pools.values():
            if pool.size == USUAL:
                pool.grow(FIRST_CHUNKS + step // GROW_EVERY)
            elif step >= args.sizes_from:
                share = (EDIT_SIZES if pool.edit else OTHER_SIZES)[pool.size]
                pool.grow(2 + int(share * (FIRST_CHUNKS + (step - args.sizes_from) / GROW_EVERY)))
        rng = Random(f"{args.seed} {step} {rank}")
        noise = torch.Generator().manual_seed(rng.getrandbits(62))
        optimizer.zero_grad()
        parts = portions(step, args)
        batches = [micro_batch(pools, rng, part) for part in parts]
        samples = sum(len(batch.captions) for batch in batches)
        for part, batch in zip(parts, batches, strict=True):
            t = times(len(batch.captions), noise, part.early).to(args.device)
            predict = at_64 if batch.size == USUAL else model
            loss = velocity_loss(model, predict, batch, t, noise) * len(batch.captions) / samples
            loss.backward()
            total += loss.item()
        average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.decay)
        optimizer.step()
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - min(0.998, (1 + step) / (10 + step)))
        if rank:
            continue
        done = step + 1
        if done % 50 == 0 or done == args.steps:
            log(run, stage="denoiser", step=done, loss=total / (done - logged), seconds=time.time() - began)
            total, logged = 0.0, done
        if done % workers.SAVE_EVERY == 0 or done == args.steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average, "step": done}
            workers.save(state, path)
            workers.save(average, run / f"average-{done:06}.pt")
            plot.losses(run / "log.jsonl", run / "loss.png")


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
    """Write `autoencoder.pt`: trained, its latents whitened, and the decoder polished, which then knows them."""
    run: Path = args.run
    raw, whitened, polished = (run / f"autoencoder{name}.pt" for name in ("-raw", "-whitened", ""))
    more = (args.seed, args.device, partial(log, run))
    if not raw.exists():
        workers.run(ae.train, args.workers, run, raw, args.autoencoder_steps, *more)
    if not whitened.exists():
        model = load_autoencoder(raw)
        ae.whiten(model, Random(f"{args.seed} whiten"))
        workers.save(model.state_dict(), whitened)
    if not polished.exists():
        workers.run(ae.train, args.workers, run, polished, args.polish_steps, *more, whitened)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the bundled shapes model.")
    parser.add_argument("--run", type=Path, required=True, help="working folder: checkpoints, latents, log, loss plot")
    parser.add_argument("--out", type=Path, required=True, help="diffusers folder to write")
    parser.add_argument("--steps", type=int, default=10_500, help="steps of the denoiser")
    parser.add_argument("--decay", type=int, default=5_500, help="last steps, in which the learning rate falls to 0")
    parser.add_argument("--edits-from", type=int, default=1_000, help="until this step, prompts alone, mostly noise")
    parser.add_argument("--sizes-from", type=int, default=4_000, help="until this step, 64 px alone")
    parser.add_argument("--autoencoder-steps", type=int, default=6_000)
    parser.add_argument("--polish-steps", type=int, default=2_000, help="of the decoder alone, on whitened latents")
    parser.add_argument("--reading-steps", type=int, default=1_500)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each; 1 for a GPU")
    parser.add_argument("--compile", action="store_true", help="a faster transformer, after minutes of compiling")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu, cuda (default: cpu)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.run.mkdir(parents=True, exist_ok=True)
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
