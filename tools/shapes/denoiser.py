"""Train the denoiser: FLUX.1's transformer, CLIP and T5 together, by flow matching."""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

import torch
from torch import Tensor, distributed, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import autoencoder as ae
from . import rollouts, workers
from .data import Batch, Pool
from .fast import Fast
from .model import Denoiser, velocity
from .muon import Muon, matrices
from .portions import SHARES, USUAL, Places, has_tokens, joined, on_own_paths, portions_of, straight, text_length
from .rollouts import Rollouts
from .vocabulary import MAX_LENGTH
from .workers import average_gradients

LEARNING_RATE, WARMUP = 4e-3, 100
# Chunks of 256 at the start, and steps between one more: drawing and encoding one takes as long as two steps.
FIRST_CHUNKS, GROW_EVERY = 10, 100


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
        n, tokens = kind.samples, kind.tokens
        reference = torch.zeros(n, tokens, 64) if kind.edit else None
        batch = Batch(kind.size, [""] * n, torch.zeros(n, tokens, 64), reference, torch.ones(n))
        for length in (kind.text, MAX_LENGTH):
            places[n, tokens, length, kind.edit] = straight(batch, 0.0, torch.Generator()), length
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


def train(rank: int, args: argparse.Namespace, log: Callable[..., None]) -> None:
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
    autoencoder = ae.load(run / "autoencoder.pt").to(args.device)
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
        phase = portions_of(step, rank, args)
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
                places = joined(places, on_own_paths(drawn[kind], own_paths, rng))
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
            log(stage="denoiser", step=done, of=args.steps, loss=total / (done - logged), seconds=time.time() - began)
            total, logged = 0.0, done
        if done % workers.SAVE_EVERY == 0 or done == args.steps:
            workers.save(average, run / f"average-{done:06}.pt")
            weights = {"model": model.state_dict(), "average": average}
            workers.save({**weights, "optimizer": optimizer.state_dict(), "step": done, "first": first}, path)


def load(run: Path, average: Path) -> Denoiser:
    """The averaged weights of a snapshot."""
    model = Denoiser(run / "tokenizers")
    with torch.no_grad():
        for p, value in zip(model.parameters(), torch.load(average, map_location="cpu"), strict=True):
            p.copy_(value)
    return model.eval()
