"""Pictures and latents to train on, drawn as they are needed and kept on disk so that a run can resume."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor

from fluxkiln.autoencoder import Autoencoder
from fluxkiln.bench.shapes_scene import Scene, draw

from . import captions
from .model import pack
from .workers import save

CHUNK = 256  # samples that are made and kept together
COMPLETE = 0.5  # of the captions leave nothing to chance: what is left open is noise in every gradient


def pixels(scenes: list[Scene], width: int, height: int) -> Tensor:
    """`[B, 3, H, W]` in -1..1."""
    pictures = np.stack([np.asarray(draw(scene, width, height)) for scene in scenes])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def training_sample(rng: Random, edit: bool) -> captions.Sample:
    """A sample of which the benchmark holds out neither what is asked for nor a picture.

    Of the edits without stripes or outlines, every other one is left out: most mistakes are made where there are some.
    """
    while True:
        sample = captions.edit(rng) if edit else captions.text_to_image(rng)
        if sample.shows_held_out:
            continue
        if sample.before is None or any(map(_patterned, (sample.before, sample.scene))) or rng.random() < 0.5:
            return sample


def _patterned(scene: Scene) -> bool:
    return scene.background.kind == "striped" or any(thing.style != "plain" for thing in scene.things)


@dataclass
class Batch:
    """One step's worth of one kind and size (width, height). `reference` is None for text to image."""

    size: tuple[int, int]
    captions: list[str]
    target: Tensor
    reference: Tensor | None
    guidance: Tensor

    def __getitem__(self, part: slice) -> Batch:
        reference = None if self.reference is None else self.reference[part]
        return Batch(self.size, self.captions[part], self.target[part], reference, self.guidance[part])

    @staticmethod
    def joined(parts: Sequence[Batch]) -> Batch:
        """Batches of one kind and size as one."""
        captions = [caption for part in parts for caption in part.captions]
        references = [part.reference for part in parts if part.reference is not None]
        target, guidance = torch.cat([part.target for part in parts]), torch.cat([part.guidance for part in parts])
        return Batch(parts[0].size, captions, target, torch.cat(references) if references else None, guidance)


class Pool:
    """A growing collection of samples of one kind and size: scenes, and the latents of their pictures in bf16.

    Args:
        folder: where chunks of latents are kept, each under a digest of its scenes and the encoder's weights: those of
            other scenes, because the captions' code has changed since, are never taken for them.
        autoencoder: its encoder makes the latents.
        edit: edits, with the latents of the reference beside those of the target.
        width, height: of the pictures, in pixels.
        seed: decides the samples, together with kind, size and a chunk's number.
        fits: which instructions may be among its edits; the captions of pictures are worded when they are used.
    """

    def __init__(
        self,
        folder: Path,
        autoencoder: Autoencoder,
        edit: bool,
        width: int,
        height: int,
        seed: int,
        fits: Callable[[str], bool] = lambda caption: True,
    ) -> None:
        self.folder, self.autoencoder, self.edit, self.seed, self.fits = folder, autoencoder, edit, seed, fits
        self.size = width, height
        self.samples: list[captions.Sample] = []
        self.latents: list[Tensor] = []  # chunks of [CHUNK, 1 or 2, L, 64]
        weights = autoencoder.encoder.state_dict().values()
        self.encoder = hashlib.sha256(b"".join(weight.cpu().numpy().tobytes() for weight in weights)).hexdigest()

    def grow(self, chunks: int) -> None:
        """Make or load chunks until there are `chunks` of them."""
        for number in range(len(self.latents), chunks):
            kind = "edit" if self.edit else "text"
            rng = Random(f"{self.seed} {kind} {self.size} {number}")
            samples = [self._sample(rng) for _ in range(CHUNK)]
            scenes = [s.scene for s in samples] + [s.before for s in samples if s.before]
            digest = hashlib.sha256(repr((self.encoder, scenes)).encode()).hexdigest()[:16]
            path = self.folder / f"{kind}-{self.size[0]}x{self.size[1]}-{digest}.pt"
            if not path.exists():
                latents = torch.cat([self._encode(scenes[i : i + 64]) for i in range(0, len(scenes), 64)])
                latents = latents.unflatten(0, (-1, CHUNK)).transpose(0, 1).contiguous()
                path.parent.mkdir(parents=True, exist_ok=True)
                save(latents, path)
            self.samples += samples
            self.latents.append(torch.load(path))

    def _sample(self, rng: Random) -> captions.Sample:
        while True:
            sample = training_sample(rng, self.edit)
            if not self.edit or self.fits(sample.caption):
                return sample

    def _encode(self, scenes: list[Scene]) -> Tensor:
        # Not under no_grad, in which the autoencoder would take its pictures one by one.
        pictures = pixels(scenes, *self.size).to(next(self.autoencoder.parameters()).device)
        return pack(self.autoencoder.encode(pictures).detach()).to("cpu", torch.bfloat16)

    def batch(self, n: int, rng: Random, certain: bool = False) -> Batch:
        """`n` random samples, with what teaches guidance mixed in, or `certain`: one picture alone is asked for.

        Guidance is the chance that the prompt is to be believed: below 2, the picture has nothing to do with the
        prompt with probability (1 - guidance / 2)^2, so that 0 ignores the prompt and 2 and above follow it. An empty
        prompt (8 %) belongs to any picture, which is what true classifier-free guidance needs. For an edit,
        "nothing to do with the prompt" is the reference as it was.
        """
        texts, targets, references, strengths = [], [], [], []
        for _ in range(n):
            i = rng.randrange(len(self.samples))
            latents = self.latents[i // CHUNK][i % CHUNK].float()
            guidance = rng.uniform(0, 2) if rng.random() < 0.2 and not certain else rng.uniform(2, 6)
            told, complete = self.samples[i], certain or rng.random() < COMPLETE
            ignore = rng.random() < max(0.0, 1 - guidance / 2) ** 2
            if ignore and not self.edit:
                told = rng.choice(self.samples)
            text = told.caption if self.edit else captions.caption_of(rng, told.scene, complete)
            if rng.random() < 0.08 and not certain:
                text, ignore = "", True
            texts.append(text)
            targets.append(latents[1] if self.edit and ignore else latents[0])
            references.append(latents[-1])
            strengths.append(guidance)
        reference = torch.stack(references) if self.edit else None
        return Batch(self.size, texts, torch.stack(targets), reference, torch.tensor(strengths))
