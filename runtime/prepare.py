"""What a call means, settled before any model runs: its mode, its texts and seeds, its pictures and their sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, SupportsIndex, cast, get_args

import numpy as np
from PIL import Image
from torch import Tensor

from fluxkiln import images
from fluxkiln.config import TOKEN_PIXELS
from fluxkiln.images import Source
from fluxkiln.mask import Region
from fluxkiln.record import Mode, Picture, Role
from fluxkiln.sampling import UNSHIFTED, Guidance, Scheduler, first_step, guidance_values, seeds_of

Variant = Literal["dev", "schnell", "kontext", "fill", "canny", "depth", "control", "custom"]
VARIANTS: tuple[str, ...] = get_args(Variant)
CONTROLLED = ("canny", "depth", "control")
Text = str | Sequence[str]


@dataclass(frozen=True)
class Defaults:
    """What a mode does unless told otherwise: diffusers' defaults, and those of the releases for Canny and Depth."""

    steps: int = 28
    guidance: float = 3.5
    strength: float | None = None


def choose_mode(variant: str, image: bool, mask: bool, control: bool, strength: float | None) -> Mode:
    """Which job the arguments ask this variant of the model for.

    Raises:
        ValueError: the variant cannot do it, or a picture is missing; says which.
    """
    if mask and not image:
        raise ValueError("mask_image needs the image that it belongs to")
    if strength is not None and not image:
        raise ValueError("strength needs an image to start from")
    if variant in CONTROLLED:
        if not control or image:
            raise ValueError(f"a {variant} model takes a control_image, and neither image nor mask_image")
        return "control"
    if control:
        raise ValueError(f"control_image needs a Canny or Depth model, this is {variant}")
    if variant == "fill":
        if not mask:
            raise ValueError("a fill model takes an image and a mask_image")
        return "fill"
    if mask:
        return "masked-edit"
    if not image:
        return "text-to-image"
    return "edit" if variant == "kontext" and strength is None else "image-to-image"


def defaults(variant: str, mode: Mode) -> Defaults:
    """Steps, guidance and strength of a mode on this variant."""
    if variant == "schnell":
        return Defaults(4, strength=None if mode == "text-to-image" else 0.6)
    if mode == "control":
        return {"canny": Defaults(50, 30.0), "depth": Defaults(50, 10.0)}.get(variant, Defaults())
    if mode == "masked-edit" and variant == "kontext":
        return Defaults(strength=1.0)
    return {
        "image-to-image": Defaults(guidance=7.0, strength=0.6),
        "masked-edit": Defaults(guidance=7.0, strength=0.6),
        "fill": Defaults(50, 30.0, 1.0),
    }.get(mode, Defaults())


@dataclass(frozen=True)
class Course:
    """The steps that run.

    Attributes:
        steps: of the whole schedule.
        strength: None where a denoise starts from noise alone.
        schedule: sigmas of the steps that run, 0 included.
        guidance: of each of them; None where the model has none.
    """

    steps: int
    strength: float | None
    schedule: tuple[float, ...]
    guidance: tuple[float, ...] | None

    @classmethod
    def of(
        cls,
        default: Defaults,
        scheduler: Scheduler,
        image_tokens: int,
        steps: int | None,
        sigmas: Sequence[float] | None,
        strength: float | None,
        guidance: Guidance | None,
        guided: bool,
    ) -> Course:
        """Fill in what is None.

        Args:
            guided: the model has a guidance embedding.

        Raises:
            ValueError: no steps, sigmas that do not fall, a strength outside 0..1, guidance for other steps.
        """
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int)):
            raise ValueError(f"num_inference_steps must be an integer, got {steps!r}")
        steps = len(sigmas) if sigmas is not None else default.steps if steps is None else steps
        strength = default.strength if strength is None else float(strength)
        schedule = scheduler.sigmas(steps, image_tokens, sigmas)
        schedule = schedule[first_step(steps, 1.0 if strength is None else strength) :]
        values = guidance_values(default.guidance if guidance is None else guidance, schedule) if guided else None
        return cls(steps, strength, tuple(schedule), values)


def check(
    width: int | None = None,
    height: int | None = None,
    num_inference_steps: int | None = None,
    sigmas: Sequence[float] | None = None,
    strength: float | None = None,
    seed: SupportsIndex | Sequence[SupportsIndex] | None = None,
    **others: object,
) -> None:
    """Refuse arguments of a call that no model can take, before one is opened; `others` depend on the model.

    Raises:
        ValueError: a side, number of steps, sigma, strength or seed that cannot be.
    """
    _sides(width, height, (TOKEN_PIXELS, TOKEN_PIXELS), [])
    seeds_of(seed, 1)
    Course.of(Defaults(), UNSHIFTED, 1, num_inference_steps, sigmas, strength, None, guided=False)


# --- texts and seeds ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Embeddings:
    """Text as the transformer reads it: `sequence [n, L, D_ctx]` and `pooled [n, D_vec]`."""

    sequence: Tensor
    pooled: Tensor

    @classmethod
    def of(cls, sequence: Tensor | None, pooled: Tensor | None, name: str) -> Embeddings | None:
        """Both or neither.

        Raises:
            ValueError: one without the other, or of another number of texts.
        """
        if sequence is None and pooled is None:
            return None
        if sequence is None or pooled is None:
            raise ValueError(f"{name}_embeds and {name.replace('prompt', 'pooled_prompt')}_embeds belong together")
        if sequence.ndim != 3 or pooled.ndim != 2 or len(sequence) != len(pooled):
            shapes = f"{list(sequence.shape)} and {list(pooled.shape)}"
            raise ValueError(f"{name}_embeds must be [n, L, D_ctx] and its pooled ones [n, D_vec], got {shapes}")
        return cls(sequence, pooled)

    def rows(self, count: int) -> Embeddings:
        """One row for each of `count` images, the images of a text side by side."""
        each = count // len(self.sequence)
        return Embeddings(self.sequence.repeat_interleave(each, 0), self.pooled.repeat_interleave(each, 0))


@dataclass(frozen=True)
class Texts:
    """What each image of the batch is made from: a text of every kind and a seed, one for each image.

    Attributes:
        prompts_2: None where T5 reads `prompts`; likewise `negatives_2`.
        negatives: None without true classifier-free guidance.
        given, given_negative: embeddings that stand for `prompts` and `negatives`.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    prompts_2: tuple[str, ...] | None = None
    negatives: tuple[str, ...] | None = None
    negatives_2: tuple[str, ...] | None = None
    given: Embeddings | None = None
    given_negative: Embeddings | None = None

    @classmethod
    def of(
        cls,
        prompt: Text | None,
        prompt_2: Text | None,
        negative_prompt: Text | None,
        negative_prompt_2: Text | None,
        given: Embeddings | None,
        given_negative: Embeddings | None,
        images_per_prompt: int,
        seed: SupportsIndex | Sequence[SupportsIndex] | None,
        guided: bool,
    ) -> Texts:
        """Spread texts and seeds over the batch.

        Args:
            images_per_prompt: copies of each prompt, side by side.
            seed: see `seeds_of`; of a single prompt, a list of seeds makes one image for each.
            guided: true classifier-free guidance is wanted; it happens if there is a negative text.

        Raises:
            ValueError: numbers of texts that do not fit, or none at all.
        """
        if (prompt is None) == (given is None):
            raise ValueError("give either prompt, or prompt_embeds with pooled_prompt_embeds")
        if given is not None and prompt_2 is not None:
            raise ValueError("prompt_2 and prompt_embeds exclude each other")
        if given_negative is not None and not negative_prompt is negative_prompt_2 is None:
            raise ValueError("negative_prompt and negative_prompt_embeds exclude each other")
        if isinstance(images_per_prompt, bool) or not isinstance(images_per_prompt, int) or images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt must be at least 1, got {images_per_prompt!r}")
        count = len(given.sequence) if given is not None else 1 if isinstance(prompt, str) else len(prompt or ())
        if count == 0:
            raise ValueError("prompt is an empty list")
        if count == images_per_prompt == 1 and isinstance(seed, Sequence):
            images_per_prompt = len(seed)

        def spread(name: str, text: Text | None) -> tuple[str, ...] | None:
            if text is None:
                return None
            texts = [text] * count if isinstance(text, str) else list(text)
            if len(texts) != count or not all(isinstance(t, str) for t in texts):
                raise ValueError(f"{name} must be a text or a list of {count} texts, got {text!r}")
            return tuple(t for t in texts for _ in range(images_per_prompt))

        prompts = spread("prompt", "" if prompt is None else prompt) or ()
        prompts_2 = spread("prompt_2", prompt_2)
        negatives = spread("negative_prompt", negative_prompt) if guided else None
        negatives_2 = spread("negative_prompt_2", negative_prompt_2) if negatives else None
        if guided and given_negative is not None:
            if len(given_negative.sequence) != count:
                raise ValueError(f"{len(given_negative.sequence)} negative_prompt_embeds for {count} prompts")
            negatives = ("",) * len(prompts)
        return cls(
            prompts=prompts,
            seeds=seeds_of(seed, len(prompts)),
            prompts_2=None if prompts_2 == prompts else prompts_2,
            negatives=negatives,
            negatives_2=None if negatives_2 == negatives else negatives_2,
            given=given,
            given_negative=given_negative if guided else None,
        )


# --- pictures and sizes -------------------------------------------------------------------------


@dataclass
class Scene:
    """The pictures of a call as the model is to see them, and the sizes that follow.

    Attributes:
        width, height: at which the model works, whole tokens.
        start: what is noised and denoised again, RGB at the working size; None starts from noise alone.
        references: RGB, each at its own size; Kontext reads them beside the image.
        control: RGB at the working size.
        mask: `[height, width]`, True is repainted.
        region: where the result goes back into the picture that came in.
        pictures: what came in, for the record.
    """

    width: int
    height: int
    start: Image.Image | None = None
    references: list[Image.Image] = field(default_factory=list)
    control: Image.Image | None = None
    mask: np.ndarray | None = None
    region: Region | None = None
    pictures: list[Picture] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Of the result."""
        return (self.height // TOKEN_PIXELS) * (self.width // TOKEN_PIXELS)

    @property
    def result_size(self) -> tuple[int, int]:
        """Width and height of the pictures that come out."""
        return (self.width, self.height) if self.region is None else self.region.picture.size


def look(
    mode: Mode,
    variant: str,
    side: int,
    image: Source | Sequence[Source] | None,
    mask_image: Source | None,
    control_image: Source | None,
    width: int | None,
    height: int | None,
    padding: int | None,
    feather: int | None,
    notices: list[str],
) -> Scene:
    """Open the pictures of a call and settle the working size.

    Without `width` and `height`, the model works at its own square (`side` pixels) for text alone; otherwise at that
    area in the aspect of the picture, for Kontext at the nearest of its preferred sizes.

    Args:
        notices: gets a sentence for everything that is not as it was asked for.

    Raises:
        ValueError: a picture that cannot be read, a size that cannot be made, a mask without anything to repaint.
    """
    given = list(image) if isinstance(image, (list, tuple)) else [] if image is None else [cast(Source, image)]
    if image is not None and not given:
        raise ValueError("image is an empty list")
    if len(given) > 1 and (variant != "kontext" or mode == "image-to-image"):
        raise ValueError(f"{len(given)} images, but several need a Kontext model, and no strength")
    if padding is not None and mask_image is None:
        raise ValueError("padding_mask_crop needs a mask_image")
    opened = [images.open_picture(source, "image") for source in given]
    size_for = images.kontext_size if variant == "kontext" else images.fit

    if mode == "text-to-image":
        return Scene(*_sides(width, height, (side, side), notices))
    if mode == "control":
        assert control_image is not None
        given_control = images.open_picture(control_image, "control_image")
        control = images.rgb(given_control)
        scene = Scene(*_sides(width, height, images.fit(*control.size, side), notices))
        scene.control = _resized(scene, "control", given_control, control, (scene.width, scene.height))
        return scene
    first = images.rgb(opened[0])
    if mode == "edit":
        scene = Scene(*_sides(width, height, images.kontext_size(*first.size, side), notices))
        scene.references = _references(scene, opened, side)
        return scene
    if mode == "image-to-image":
        scene = Scene(*_sides(width, height, size_for(*first.size, side), notices))
        scene.start = _resized(scene, "image", opened[0], first, (scene.width, scene.height))
        return scene

    assert mask_image is not None
    given_mask = images.open_picture(mask_image, "mask_image")
    mask = _stretched(images.grey(given_mask), first.size, notices)
    region = Region.of(first, mask, padding, feather, width / height if width and height else None)
    if region.mask.getextrema() == (255, 255):
        notices.append("the mask is all white: the whole image is repainted")
    scene = Scene(*_sides(width, height, size_for(*region.size, side), notices), region=region)
    size = (scene.width, scene.height)
    scene.start, scene.mask = region.view(size)
    resized = region.size != size
    scene.pictures = [
        Picture.of("image", opened[0], size, "lanczos" if resized else "none"),
        Picture.of("mask", given_mask, size, "box" if resized else "none"),
    ]
    if mode == "masked-edit" and variant == "kontext":
        scene.references = [scene.start, *_references(scene, opened[1:], side)]
    return scene


def _sides(width: int | None, height: int | None, default: tuple[int, int], notices: list[str]) -> tuple[int, int]:
    sides = []
    for name, asked, usual in (("width", width, default[0]), ("height", height, default[1])):
        side = usual if asked is None else images.check_side(name, asked)
        if asked is not None and side != asked:
            notices.append(f"{name} {asked} is not a multiple of {TOKEN_PIXELS}: rounded down to {side}")
        sides.append(side)
    if sides[0] * sides[1] > images.MAX_PIXELS:
        raise ValueError(f"{sides[0]} x {sides[1]} pixels are asked for, at most {images.MAX_PIXELS:,} can be made")
    return sides[0], sides[1]


def _stretched(mask: Image.Image, size: tuple[int, int], notices: list[str]) -> Image.Image:
    if mask.size == size:
        return mask
    sizes = f"{mask.width} x {mask.height} pixels, the image {size[0]} x {size[1]}"
    notices.append(f"the mask has {sizes}: the mask is stretched to the image")
    return mask.resize(size, Image.Resampling.BILINEAR)


def _references(scene: Scene, opened: Sequence[Image.Image], side: int) -> list[Image.Image]:
    upright = [images.rgb(picture) for picture in opened]
    return [
        _resized(scene, "reference", picture, image, images.kontext_size(*image.size, side))
        for picture, image in zip(opened, upright, strict=True)
    ]


def _resized(scene: Scene, role: Role, given: Image.Image, picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    scene.pictures.append(Picture.of(role, given, size, "none" if picture.size == size else "lanczos"))
    return images.resize(picture, size)
