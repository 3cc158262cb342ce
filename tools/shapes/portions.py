"""What a step of the denoiser's training is made of: samples of which kinds, at which times, on which paths."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from .data import Batch
from .model import PICTURE, Denoiser
from .rollouts import Rollouts
from .vocabulary import MAX_LENGTH

TOKENS = 1_536  # of a portion, text included: at 64 px 38 prompts, 37 short or 29 long edits
FULL = 1 / 6  # of the portions at 64 px have all 32 tokens of text, as pipelines pad


class Kind(NamedTuple):
    """Samples of one shape: prompts or edits, (width, height) of the pictures, and the tokens of text that nearly all
    fit in."""

    edit: bool
    size: tuple[int, int]
    text: int

    @property
    def tokens(self) -> int:
        """Of one picture: 16 x 16 pixels each."""
        return self.size[0] * self.size[1] // 256

    @property
    def pictures(self) -> int:
        """Tokens of a sample's pictures."""
        return self.tokens * (1 + self.edit)

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


class Portion(NamedTuple):
    """Samples of one kind in a step: shares of kinds, one of which is drawn, whether half of the samples of 64 px lie
    on the model's own paths, and of the others the share of times above 0.8."""

    kinds: Mapping[Kind, float]
    early: float
    own: bool = False


def portions_of(step: int, rank: int, args: argparse.Namespace) -> list[Portion]:
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


def on_own_paths(paths: Rollouts, n: int, rng: Random) -> Places:
    """On `n` paths of the model's own: wanted is the velocity that leads to the picture from there.

    In it, an error of the picture is divided by the time. Below 0.4 that is made good: the last steps, in which the
    picture hardly changes any more, would be most of the loss.
    """
    batch, img, t = paths.batch(n, rng)
    return Places(batch, img, t, (img - batch.target) / t[:, None, None], (t / 0.4).clamp(max=1).square())


def joined(first: Places, second: Places) -> Places:
    batch = Batch.joined((first.batch, second.batch))
    return Places(batch, *map(torch.cat, zip(first[1:], second[1:], strict=True)))
