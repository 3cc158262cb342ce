"""Train the autoencoder, whiten its latents, polish its decoder."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss

from fluxkiln.autoencoder import Autoencoder
from fluxkiln.bench.shapes_scene import Scene, Thing

from . import workers
from .data import pixels, training_sample
from .model import AUTOENCODER
from .muon import Muon
from .workers import average_gradients

# (width, height, pictures a step); the first is drawn more often than all others together
_SIZES = ((64, 64, 8), (96, 96, 4), (64, 128, 4), (128, 64, 4), (128, 128, 2), (96, 64, 5))
_CROP, _CROPS = 32, 24  # side in pixels, and how many a step
# Most noise on a latent, in its standard deviations. The denoiser's own latents are 0.1 to 0.25 beside the true ones:
# what the decoder has to tell apart, the encoder puts further apart than that. Once the encoder has settled, the
# decoder sees less of it: what differs by less than the noise it can only blur.
_NOISE, _POLISH_NOISE = 0.4, 0.2


def _pictures(rng: Random) -> Tensor:
    """A step's pictures: whole ones, or every other time crops around things, where there is something to learn."""
    crops = rng.random() < 1 / 2
    width, height, n = (64, 64, _CROPS) if crops else _SIZES[0] if rng.random() < 0.8 else rng.choice(_SIZES[1:])
    scenes = [_scene(rng, fine=crops and rng.random() < 0.6) for _ in range(n)]
    pictures = pixels(scenes, width, height)
    if not crops:
        return pictures
    return torch.stack([_crop(rng, picture, scene) for picture, scene in zip(pictures, scenes, strict=True)])


def _scene(rng: Random, fine: bool) -> Scene:
    """One of training's; `fine`: with a thing in it whose details are smaller than a latent's 8 x 8 pixels."""
    while True:
        scene = training_sample(rng, edit=rng.random() < 0.4).scene
        if not fine or any(map(_fine, scene.things)):
            return scene


def _fine(thing: Thing) -> bool:
    return thing.style != "plain" or (thing.shape in ("star", "cross") and thing.size == "small")


def _crop(rng: Random, picture: Tensor, scene: Scene) -> Tensor:
    side = picture.shape[-1]
    things = [thing for thing in scene.things if _fine(thing)] or scene.things
    x, y = ((thing := rng.choice(things)).x, thing.y) if things else (rng.random(), 0.5)
    left, top = (min(max(round(at * side) - _CROP // 2 + rng.randint(-10, 10), 0), side - _CROP) for at in (x, y))
    return picture[:, top : top + _CROP, left : left + _CROP]


def _edges(pictures: Tensor) -> Tensor:
    """`[B, C, H, W]` to the differences with the right and the lower neighbour, `[B, 2 C, H - 1, W - 1]`."""
    here = pictures[..., :-1, :-1]
    return torch.cat((pictures[..., :-1, 1:] - here, pictures[..., 1:, :-1] - here), 1)


def _reconstruction(made: Tensor, picture: Tensor) -> Tensor:
    """L1 and L2 of pixels and L1 of edges; a picture of weak contrast counts up to four times as much.

    Without that, blue letters on purple stay a blur: their error is small however wrong they are.
    """
    edges, across = _edges(picture), (1, 2, 3)
    contrast = edges.abs().unflatten(1, (2, -1)).mean(2).amax(across)
    error, edge_error = made - picture, _edges(made) - edges
    each = error.abs().mean(across) + 2 * error.square().mean(across) + 0.5 * edge_error.abs().mean(across)
    return (each * (1 / contrast).clamp(1, 4)).mean()


def train(
    rank: int,
    path: Path,
    steps: int,
    seed: int,
    device: torch.device,
    log: Callable[..., None],
    encoder_from: Path | None = None,
) -> None:
    """One worker's part of training the tensors at `path`: reconstruction in L1 and L2, with noise on the latents.

    With `encoder_from`, start from that autoencoder and leave its encoder, and so every latent there is, as it was.
    """
    torch.manual_seed(seed)  # the first weights; what a step draws is decided by its number
    model, config, began = Autoencoder(AUTOENCODER).to(device), AUTOENCODER, time.time()
    if encoder_from is not None:
        model.load_state_dict(torch.load(encoder_from, map_location=device))
        model.encoder.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = Muon([p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim == 1])
    average, start = {name: tensor.clone() for name, tensor in model.state_dict().items()}, 0
    partial = path.with_suffix(".partial")
    if partial.exists():
        state = torch.load(partial, map_location=device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average, start = state["average"], state["step"]
    total, peak, most_noise = 0.0, *((1.5e-3, _POLISH_NOISE) if encoder_from else (3e-3, _NOISE))
    for step in range(start, steps):
        rng = Random(f"{seed} {path.stem} {step} {rank}")
        noise = torch.Generator().manual_seed(rng.getrandbits(62))
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        picture = _pictures(rng).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            mean, _ = model.encoder(picture).chunk(2, 1)  # `encode_moments` would polish from pictures one by one
            strength = most_noise * torch.rand(len(mean), 1, 1, 1, generator=noise).to(device)
            spread = strength * mean.detach().float().std((0, 2, 3), keepdim=True)
            raw = mean + spread * torch.randn(mean.shape, generator=noise).to(device)
            again = model.decode((raw - config.shift_factor) * config.scaling_factor).float()
        size = 5e-5 * mean.float().square().mean()  # keeps the latents from growing away from the noise
        error = l1_loss(again, picture)
        loss = _reconstruction(again, picture) + size
        optimizer.zero_grad()
        loss.backward()
        average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                average[name].lerp_(tensor, max(0.01, 1 / (step + 1)))
        if rank:
            continue
        done = step + 1
        total += error.item()
        if done % 100 == 0:
            log(stage=path.stem, step=done, of=steps, loss=total / 100, seconds=time.time() - began)
            total = 0.0
        if done % workers.SAVE_EVERY == 0 and done < steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average, "step": done}
            workers.save(state, partial)
    if rank == 0:
        workers.save(average, path)
        partial.unlink(missing_ok=True)


@torch.no_grad()
def whiten(model: Autoencoder, rng: Random, pictures: int = 1024) -> None:
    """Fold the latents' statistics into the last convolution of the encoder and the first of the decoder.

    Afterwards every channel of `encode`'s latents has mean 0 and standard deviation 1 under FLUX.1's scalar shift and
    scale. The decoder's zero padding now stands for another value, so the picture's borders need another round of
    `train`, with `encoder_from`.
    """
    scenes = [training_sample(rng, edit=i % 2 == 1).scene for i in range(pictures)]
    means = torch.cat([model.encode_moments(pixels(scenes[i : i + 64], 64, 64))[0] for i in range(0, pictures, 64)])
    mean, std = means.mean((0, 2, 3)), means.std((0, 2, 3))
    channels, config = len(mean), model.config
    gain = 1 / (std * config.scaling_factor)  # new = (old - mean) * gain + shift_factor
    out, into = model.encoder.conv_out, model.decoder.conv_in
    out.weight[:channels] *= gain[:, None, None, None]
    out.bias[:channels] = (out.bias[:channels] - mean) * gain + config.shift_factor
    out.bias[channels:] += 2 * gain.log()
    offset = mean - config.shift_factor / gain  # old = new / gain + offset
    into.bias += torch.einsum("oikl,i->o", into.weight, offset)
    into.weight /= gain[None, :, None, None]


def load(path: Path) -> Autoencoder:
    model = Autoencoder(AUTOENCODER)
    model.load_state_dict(torch.load(path, map_location="cpu"))
    return model.eval()
