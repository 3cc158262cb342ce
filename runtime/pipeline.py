"""The way of one image: text and pictures in, noise denoised, an image and its record out.

    request ─ text ────────┐              modulate(pooled, t, guidance) for the whole schedule, once
    image ── autoencoder ──┤                                  │        repeated per step
                           ├──────► [ step(img, txt, mods, rope) ─► Euler ] ─► autoencoder ─► image + record
    seed ─── noise ────────┘

`Pipeline.__call__` is that line. What a call means (mode, sizes, defaults) is settled in `prepare`, the arithmetic of
the schedule is in `sampling`, masks are in `mask`.

Numbers equal those of diffusers' pipelines for the same model, seed (a CPU generator) and size: text-to-image, true
classifier-free guidance, Kontext, image-to-image, inpainting, Kontext inpainting, Fill and Control. On purpose,
ours differ where theirs would surprise:

    size        Kontext makes the size asked for instead of one of about a megapixel, by default that of the picture.
    batch       Every image draws all its random numbers from its own seed, so it equals the same image made alone;
                diffusers draws the latents of a start picture from the first generator for all.
    references  A list of images is several references for every prompt, not one image for each prompt.
    mask        Every latent pixel that the mask touches is repainted, not only those whose first pixel it covers, and
                the rest of the picture comes back bit for bit instead of through the autoencoder.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, SupportsIndex, cast, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fluxkiln import images, mask, plan, sampling
from fluxkiln.autoencoder import Autoencoder
from fluxkiln.cache import ImageCache
from fluxkiln.config import LATENT_SCALE, PATCH, TOKEN_PIXELS
from fluxkiln.images import Source
from fluxkiln.kernels.recipe import Recipe
from fluxkiln.opening import SIDE, open_parts
from fluxkiln.prepare import VARIANTS, Course, Embeddings, Scene, Text, Texts, choose_mode, defaults, look
from fluxkiln.record import Part, Record, Request, versions
from fluxkiln.sampling import Callback, Guidance, Scheduler
from fluxkiln.text import TextEncoders
from fluxkiln.transformer import Network
from fluxkiln.watch import Bar, Clock

OutputType = Literal["pil", "np", "pt", "latent"]


class BrokenImageError(RuntimeError):
    """The model computed no image: NaN, infinity, or nothing but black."""


@dataclass(frozen=True)
class Output:
    """What a call makes.

    Attributes:
        images: by `output_type`: a list of PIL images, an array `[B, H, W, 3]` or a tensor `[B, 3, H, W]` in 0..1,
            or packed latents `[B, L, 4C]`; an empty list after a dry run.
        record: of the whole batch; `record.image(i)` is that of one image.
        cached: the images come from the cache.
    """

    images: list[Image.Image] | np.ndarray | Tensor
    record: Record
    cached: bool = False


@dataclass(frozen=True)
class _Start:
    """Where a denoise begins and what stays fixed through it; tokens, one row for each image."""

    x: Tensor  # [B, L, 4C] at the first sigma
    channels: Tensor | None = None  # [B, L, .] beside x: Fill's picture and mask, or the control picture
    references: Tensor | None = None  # [B, L_ref, 4C] after x
    keep: Callable[[int, Tensor], Tensor] | None = None  # after each step, puts the known part back


class Pipeline:
    """A FLUX.1 model with its autoencoder and text encoders, ready to make images.

    Args:
        transformer: the velocity network.
        autoencoder: pixels to latents and back.
        text: both text encoders; without them, calls need `prompt_embeds`.
        scheduler: None is the variant's own: unshifted for schnell, shifted for the others.
        variant: what the model was trained for, where its sizes do not tell: `kontext`, `canny`, `depth`.
        side: of the square made unless told otherwise, in pixels.
        parts: identity of the files, for the record; so are `load_seconds`.

    Raises:
        ValueError: an unknown variant, or parts that do not fit each other.
    """

    def __init__(
        self,
        transformer: Network,
        autoencoder: Autoencoder,
        text: TextEncoders | None = None,
        *,
        scheduler: Scheduler | None = None,
        variant: str | None = None,
        side: int = SIDE,
        parts: Sequence[Part] = (),
        load_seconds: float = 0.0,
    ) -> None:
        self.transformer, self.autoencoder, self.text = transformer, autoencoder, text
        self.variant = variant or transformer.config.variant
        self.scheduler = scheduler or (sampling.UNSHIFTED if self.variant == "schnell" else sampling.SHIFTED)
        self.side, self.parts = side, tuple(parts)
        self.load_seconds = load_seconds
        self.notices = list(transformer.loaded.choice.notices) if transformer.loaded else []
        if self.variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {self.variant!r}")
        tokens, latents = transformer.config.out_channels, autoencoder.config.latent_channels
        if tokens != latents * PATCH**2:
            raise ValueError(f"the transformer makes {tokens} channels, the autoencoder has {latents} x {PATCH**2}")

    def __call__(
        self,
        prompt: Text | None = None,
        *,
        image: Source | Sequence[Source] | None = None,
        mask_image: Source | None = None,
        control_image: Source | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: Guidance | None = None,
        strength: float | None = None,
        seed: SupportsIndex | Sequence[SupportsIndex] | None = None,
        num_images_per_prompt: int = 1,
        prompt_2: Text | None = None,
        negative_prompt: Text | None = None,
        negative_prompt_2: Text | None = None,
        true_cfg_scale: float = 1.0,
        max_sequence_length: int | None = None,
        padding_mask_crop: int | None = None,
        mask_feather: int | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        output_type: OutputType = "pil",
        callback: Callback | None = None,
        progress: bool | None = None,
        cache: ImageCache | None = None,
        dry_run: bool = False,
    ) -> Output:
        """Make images.

        What is made follows from the pictures given and the variant of the model: text alone makes a picture from
        noise; an image is edited by Kontext and, given a strength or another model, started from; with a mask only
        the white part is repainted. Fill takes image and mask, Canny and Depth take a control image.

        Args:
            prompt: one text, or a list with one for each image.
            image: a file, PIL image, array or tensor (see `images.open_picture`); for Kontext also several.
            mask_image: white is repainted; stretched to the image.
            control_image: edges or depth, already drawn.
            height, width: of the result in pixels, rounded down to multiples of 16; with a mask, the size at which
                the repainted part is worked on (the result has the image's size). By default the model's usual
                area in the aspect of the image.
            num_inference_steps: by default 28, schnell 4, Fill and Canny and Depth 50.
            sigmas: where the steps are instead, without the 0 at the end; they are shifted all the same.
            guidance_scale: distilled guidance: a number, one for each step that runs, or a function of
                (step, sigma). Models without it (schnell) ignore it.
            strength: 0..1, how far back to noise the image goes.
            seed: of the first image, the next has the next; or a list with one for each; None draws one.
            num_images_per_prompt: the images of a prompt stand side by side.
            prompt_2: what T5 reads, if not `prompt`; likewise `negative_prompt_2`.
            negative_prompt: with `true_cfg_scale` above 1, what to lead away from, at twice the cost.
            max_sequence_length: tokens that T5 reads: 512, schnell 256, by default.
            padding_mask_crop: render only the mask and this many pixels around it, at the working size.
            mask_feather: pixels around the mask over which the result fades into the image.
            latents: packed noise `[B, L, 4C]` instead of the seed's; in modes that start from an image, what the
                first step begins with.
            prompt_embeds, pooled_prompt_embeds: instead of `prompt`: `[n, L, D_ctx]` and `[n, D_vec]`.
            negative_prompt_embeds, negative_pooled_prompt_embeds: likewise.
            output_type: `pil`, `np` or `pt` (0..1), or `latent` (packed, not decoded).
            callback: told (step, sigma at its start, packed latents after it); returning True cancels.
            progress: show a bar; by default on a terminal.
            cache: look here first and keep the result; used when a seed is given and `output_type` is `pil`.
            dry_run: settle everything, run nothing: the record says what would be made.

        Raises:
            ValueError: an argument that cannot be; the message says which and why.
            FileNotFoundError: no such picture.
            BrokenImageError: the model computed no image.
            sampling.Cancelled: the callback asked for it.
        """
        clock, notices = Clock(self.device), list(self.notices)
        if not math.isfinite(true_cfg_scale):
            raise ValueError(f"true_cfg_scale must be finite, got {true_cfg_scale}")
        if output_type not in get_args(OutputType):
            raise ValueError(f"output_type must be one of {', '.join(get_args(OutputType))}, got {output_type!r}")

        # What is asked for, with every default and every random choice filled in.
        mode = choose_mode(self.variant, image is not None, mask_image is not None, control_image is not None, strength)
        texts = Texts.of(
            prompt,
            prompt_2,
            negative_prompt,
            negative_prompt_2,
            Embeddings.of(prompt_embeds, pooled_prompt_embeds, "prompt"),
            Embeddings.of(negative_prompt_embeds, negative_pooled_prompt_embeds, "negative_prompt"),
            num_images_per_prompt,
            seed,
            guided=true_cfg_scale > 1,
        )
        pictures, sizes = (image, mask_image, control_image), (width, height, padding_mask_crop, mask_feather)
        scene = look(mode, self.variant, self.side, *pictures, *sizes, notices)
        course = Course.of(
            defaults(self.variant, mode),
            self.scheduler,
            scene.tokens,
            num_inference_steps,
            sigmas,
            strength,
            guidance_scale,
            guided=self.transformer.config.guidance_embed,
        )
        has_negative = negative_prompt is not None or negative_prompt_embeds is not None
        if has_negative != (true_cfg_scale > 1):
            notices.append("true_cfg_scale above 1 and a negative_prompt act only together: ignored")
        length = self._text_length(max_sequence_length)
        notices += self._cut(texts, length)
        request = Request(
            mode=mode,
            prompts=texts.prompts,
            seeds=texts.seeds,
            width=scene.result_size[0],
            height=scene.result_size[1],
            num_inference_steps=course.steps,
            schedule=course.schedule,
            sigmas=None if sigmas is None else tuple(map(float, sigmas)),
            guidance=course.guidance,
            prompts_2=texts.prompts_2,
            negative_prompts=texts.negatives,
            negative_prompts_2=texts.negatives_2,
            true_cfg_scale=float(true_cfg_scale),
            max_sequence_length=length,
            strength=course.strength,
            pictures=tuple(scene.pictures),
            options=_mask_options(scene, padding_mask_crop, width, height),
            unrepeatable=_named(
                latents=latents, prompt_embeds=prompt_embeds, negative_prompt_embeds=texts.given_negative
            ),
        )
        record = self._record(request, notices)
        self._check_size(scene, texts, length)

        if dry_run:
            return Output([], record)
        if seed is None or output_type != "pil" or request.unrepeatable:
            cache = None
        if cache is not None and (hit := cache.get(record.key)) is not None:
            return Output(*hit, cached=True)

        # The way of the image.
        with torch.no_grad(), Bar(len(course.schedule) - 1, progress) as bar:
            clock.mark("prepare")
            words, negative = self._encode_texts(texts, length)
            clock.mark("text")
            start = self._encode_pictures(scene, texts.seeds, course.schedule, latents)
            clock.mark("encode")
            velocity = self._velocity(words, start, scene, course)
            if negative is not None:
                velocity = _led_away(velocity, self._velocity(negative, start, scene, course), true_cfg_scale)
            clock.mark("modulate")
            watch = _all(clock.step, bar.step, callback)
            tokens = sampling.denoise(velocity, start.x, course.schedule, start.keep, watch)
            result = self._decode(tokens, scene, output_type)
            clock.mark("decode")

        timings = clock.timings(self.load_seconds)
        memory = None if record.backend == "trt" else clock.peak_memory()  # torch does not see what an engine takes
        record = replace(record, timings=timings, peak_memory=memory)
        if cache is not None:
            cache.put(record.key, cast(list[Image.Image], result), record)
        return Output(result, record)

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    @property
    def dtype(self) -> torch.dtype:
        """Of latents, noise and text."""
        return self.transformer.dtype

    # --- from files ------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        precision: str = "bf16",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        variant: str | None = None,
        recipe: Recipe | str | Path | None = None,
        fallback: bool = False,
        engine: str | Path | None = None,
    ) -> Pipeline:
        """Open a whole model: bundled, a diffusers folder, an all-in-one file, or a repository of the hub.

        Args:
            model: `shapes`, a path, or `owner/name`, which is downloaded.
            precision, backend, device, dtype, recipe, fallback, engine: see `load_transformer`.
            variant: what the model was trained for, where neither its sizes nor its name tell.

        Raises:
            CheckpointError: a part is missing or damaged, or is something else.
            ModelUnavailableError: it is not there, and not to be had from the hub.
            RefusedError: the backend cannot run this here.
        """
        return cls.from_files(
            model,
            precision=precision,
            backend=backend,
            device=device,
            dtype=dtype,
            variant=variant,
            recipe=recipe,
            fallback=fallback,
            engine=engine,
        )

    @classmethod
    def from_files(
        cls,
        transformer: str | Path,
        vae: str | Path | None = None,
        clip: str | Path | None = None,
        t5: str | Path | None = None,
        tokenizers: str | Path | None = None,
        *,
        precision: str = "bf16",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        variant: str | None = None,
        recipe: Recipe | str | Path | None = None,
        fallback: bool = False,
        engine: str | Path | None = None,
    ) -> Pipeline:
        """Open a model from single files, as ComfyUI has them, or from folders.

        Args:
            transformer: and everything that is not named beside it: a pipeline's folder or an all-in-one file.
            vae, clip, t5: autoencoder and text encoders.
            tokenizers: folder with `tokenizer` and `tokenizer_2`.
            precision, backend, device, dtype, recipe, fallback, engine: see `load_transformer`.
            variant: as in `from_pretrained`.

        Raises:
            as `from_pretrained`.
        """
        started = time.perf_counter()
        parts = open_parts(
            {"transformer": transformer, "vae": vae, "clip": clip, "t5": t5, "tokenizers": tokenizers},
            precision=precision,
            backend=backend,
            device=device,
            dtype=dtype,
            recipe=recipe,
            fallback=fallback,
            engine=engine,
        )
        return cls(
            parts.transformer,
            parts.autoencoder,
            parts.text,
            scheduler=parts.scheduler,
            variant=variant or parts.variant,
            side=parts.side,
            parts=parts.identities,
            load_seconds=time.perf_counter() - started,
        )

    def summary(self) -> str:
        """What runs, in one line."""
        source = self.parts[0].source if self.parts else "a model in memory"
        loaded = self.transformer.loaded
        precision = f"{loaded.choice.backend}, {loaded.precision}" if loaded else f"eager, {plan.DTYPES[self.dtype]}"
        return f"{source} ({self.variant}): {precision} on {self.device}"

    # --- the parts of the way, in order ---------------------------------------------------------

    def _encode_texts(self, texts: Texts, length: int) -> tuple[Embeddings, Embeddings | None]:
        """Text as the transformer reads it, one row for each image; and the negative text, if there is one."""
        count = len(texts.prompts)

        def encode(
            name: str, given: Embeddings | None, first: tuple[str, ...], second: tuple[str, ...] | None
        ) -> Embeddings:
            if given is None:
                given = self._read(first, second or first, length)
            words = given.rows(count)
            config = self.transformer.config
            for part, width in ((words.sequence, config.context_in_dim), (words.pooled, config.vec_in_dim)):
                if part.shape[-1] != width:
                    raise ValueError(f"{name} has width {part.shape[-1]}, the transformer reads {width}")
                if not part.isfinite().all():
                    raise BrokenImageError(f"{name} holds NaN or infinity: the text encoders' weights are damaged")
            return Embeddings(*(part.to(self.device, self.dtype) for part in (words.sequence, words.pooled)))

        words = encode("prompt_embeds", texts.given, texts.prompts, texts.prompts_2)
        if texts.negatives is None:
            return words, None
        return words, encode("negative_prompt_embeds", texts.given_negative, texts.negatives, texts.negatives_2)

    def _encode_pictures(
        self, scene: Scene, seeds: Sequence[int], schedule: Sequence[float], latents: Tensor | None
    ) -> _Start:
        """Where the denoise begins. The order in which a seed's numbers are drawn is diffusers' order."""
        sources, batch = sampling.generators(seeds), len(seeds)
        channels = self.autoencoder.config.latent_channels
        references = [self._mean(picture).expand(batch, -1, -1) for picture in scene.references]
        fixed: list[Tensor] = []
        known = None
        if scene.control is not None:
            fixed.append(self._sample(images.pixels(scene.control), sources))
        if scene.start is not None:
            # Kontext's masked edit starts from the picture that it also reads, its first reference.
            known = references[0] if references else self._sample(images.pixels(scene.start), sources)

        if latents is None:
            shape = (channels, scene.height // LATENT_SCALE, scene.width // LATENT_SCALE)
            noise = sampling.pack(sampling.draw(sources, shape, self.dtype)).to(self.device)
            x = noise if known is None else sampling.add_noise(known, noise, schedule[0])
        else:
            wanted = [batch, scene.tokens, channels * PATCH**2]
            if list(latents.shape) != wanted:
                raise ValueError(f"latents must be packed, {wanted}, got {list(latents.shape)}")
            x = noise = latents.to(self.device, self.dtype)

        keep = None
        if scene.mask is not None and self.variant == "fill":
            white = torch.from_numpy(scene.mask).float()
            assert scene.start is not None
            fixed.append(self._sample(images.pixels(scene.start) * (1 - white), sources))
            fixed.append(mask.fill_mask(scene.mask).to(self.device, self.dtype).expand(batch, -1, -1))
        elif scene.mask is not None:
            assert known is not None
            keep = _keeper(mask.latent_mask(scene.mask, channels).to(self.device, self.dtype), known, noise, schedule)
        return _Start(
            x=x,
            channels=torch.cat(fixed, dim=2) if fixed else None,
            references=torch.cat(references, dim=1) if references else None,
            keep=keep,
        )

    def _velocity(
        self, words: Embeddings, start: _Start, scene: Scene, course: Course
    ) -> Callable[[int, Tensor], Tensor]:
        """Velocity `[B, L, 4C]` of (step, tokens `[B, L, 4C]`); what does not depend on the tokens is computed here."""
        model = self.transformer
        ids = sampling.positions(*_grid(scene.width, scene.height))
        if scene.references:
            grids = [_grid(*picture.size) for picture in scene.references]
            ids = torch.cat((ids, sampling.reference_positions(grids)))
        batch, text, _ = words.sequence.shape
        model.prepare(batch, text, len(ids))
        rope = model.rope(torch.zeros(text, 3), ids)
        timestep = sampling.timesteps(course.schedule, self.dtype).to(self.device)
        guidance = (
            None if course.guidance is None else torch.tensor(course.guidance, dtype=torch.float32).to(self.device)
        )
        # One image at a time, so that a batch cannot change a row. [N, B, M, D]
        each = [model.modulate(row.expand(len(timestep), -1), timestep, guidance) for row in words.pooled]
        mods = torch.stack(each, dim=1)

        def velocity(i: int, x: Tensor) -> Tensor:
            tokens = x if start.channels is None else torch.cat((x, start.channels), dim=2)
            tokens = tokens if start.references is None else torch.cat((tokens, start.references), dim=1)
            return model.step(tokens, words.sequence, mods[i], rope)[:, : x.shape[1]]

        return velocity

    def _decode(self, tokens: Tensor, scene: Scene, output_type: OutputType) -> list[Image.Image] | np.ndarray | Tensor:
        """Images of the denoised tokens, put back into the picture of a masked edit."""
        _check(tokens.isfinite().flatten(1).all(1), "denoising ended in NaN or infinity")
        if output_type == "latent":
            return tokens
        latents = sampling.unpack(tokens, scene.height // LATENT_SCALE, scene.width // LATENT_SCALE)
        made = images.unit(self.autoencoder.decode(latents))
        _check(made.isfinite().flatten(1).all(1), "decoding made NaN")
        _check(made.flatten(1).amax(1) * 255 > 0.5, "the image is all black")
        if scene.region is not None:
            pasted = [scene.region.paste(picture) for picture in images.to_pictures(made)]
            if output_type == "pil":
                return pasted
            made = images.to_tensor(pasted)
        if output_type == "pil":
            return images.to_pictures(made)
        return made if output_type == "pt" else made.cpu().permute(0, 2, 3, 1).numpy()

    # --- their tools ----------------------------------------------------------------------------

    def _mean(self, picture: Image.Image) -> Tensor:
        """Tokens `[1, L, 4C]` of a picture."""
        return sampling.pack(self.autoencoder.encode(images.pixels(picture)).to(self.device, self.dtype))

    def _sample(self, pixels: Tensor, sources: Sequence[torch.Generator]) -> Tensor:
        """Tokens `[len(sources), L, 4C]` of `pixels [1, 3, H, W]`, drawn from the autoencoder's distribution."""
        vae = self.autoencoder
        mean, logvar = vae.encode_moments(pixels)
        noise = sampling.draw(sources, mean.shape[1:], vae.dtype).to(vae.device)
        latents = mean + (0.5 * logvar.clamp(-30.0, 20.0)).exp() * noise
        latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        return sampling.pack(latents.to(self.device, self.dtype))

    def _read(self, first: Sequence[str], second: Sequence[str], length: int) -> Embeddings:
        if self.text is None:
            raise ValueError("this pipeline has no text encoders: give prompt_embeds and pooled_prompt_embeds")
        rows = [self.text.encode(a, b, length) for a, b in zip(first, second, strict=True)]
        return Embeddings(torch.cat([sequence for sequence, _ in rows]), torch.cat([pooled for _, pooled in rows]))

    def _cut(self, texts: Texts, length: int) -> list[str]:
        """What the text encoders will not see of the texts, in a sentence each."""
        if self.text is None:
            return []
        pairs: list[tuple[str, str]] = []
        if texts.given is None:
            pairs += zip(texts.prompts, texts.prompts_2 or texts.prompts, strict=True)
        if texts.negatives is not None and texts.given_negative is None:
            pairs += zip(texts.negatives, texts.negatives_2 or texts.negatives, strict=True)
        return [said for pair in dict.fromkeys(pairs) for said in self.text.cut(*pair, length)]

    def _check_size(self, scene: Scene, texts: Texts, length: int) -> None:
        """Raise where the backend was built for other sizes, before anything runs."""
        references = sum(math.prod(_grid(*picture.size)) for picture in scene.references)
        for given in (texts.given, texts.given_negative):
            text = length if given is None else given.sequence.shape[1]
            if reason := self.transformer.refuse(scene.tokens + references, text):
                raise ValueError(reason)

    def _text_length(self, asked: int | None) -> int:
        """Tokens of T5: schnell was trained with half as many as the others."""
        usual = 256 if self.variant == "schnell" else 512
        if self.text is None:
            return usual if asked is None else asked
        return min(usual, self.text.length) if asked is None else asked

    def _record(self, request: Request, notices: Sequence[str]) -> Record:
        model, loaded = self.transformer, self.transformer.loaded
        backend = loaded.choice.backend if loaded else "eager"
        return Record(
            request=request,
            parts=self.parts,
            backend=backend,
            precision=loaded.precision if loaded else plan.DTYPES[self.dtype],
            dtype=str(self.dtype).removeprefix("torch."),
            device=self.device.type,
            plan=plan.plan_of(model),
            determinism=plan.PROMISES[backend],
            versions=versions(self.device),
            reasons=loaded.choice.reasons if loaded else {},
            why=loaded.choice.why if loaded else "",
            measured=loaded.choice.measured if loaded else {},
            notices=tuple(notices),
            variant=self.variant,
            recipe=loaded.recipe.to_json() if loaded else "",
        )


# --- one image's small parts --------------------------------------------------------------------


def _grid(width: int, height: int) -> tuple[int, int]:
    """Rows and columns of tokens of a picture."""
    return height // TOKEN_PIXELS, width // TOKEN_PIXELS


def _keeper(white: Tensor, known: Tensor, noise: Tensor, schedule: Sequence[float]) -> Callable[[int, Tensor], Tensor]:
    """Put the known tokens back where `white [1, L, 4C]` is 0, noised to where the step ended."""
    levels = torch.tensor(schedule, dtype=torch.float32).to(known)

    def keep(i: int, x: Tensor) -> Tensor:
        return (1 - white) * sampling.add_noise(known, noise, levels[i + 1]) + white * x

    return keep


def _led_away(
    toward: Callable[[int, Tensor], Tensor], away: Callable[[int, Tensor], Tensor], scale: float
) -> Callable[[int, Tensor], Tensor]:
    """True classifier-free guidance: two passes a step."""

    def velocity(i: int, x: Tensor) -> Tensor:
        to = toward(i, x).clone()  # a backend may write its next result where this one is
        base = away(i, x)
        return base + scale * (to - base)

    return velocity


def _check(good: Tensor, problem: str) -> None:
    if not good.all():
        bad = [i for i, ok in enumerate(good.tolist()) if not ok]
        which = "" if len(good) == 1 else f" (image {', '.join(map(str, bad))} of the batch)"
        raise BrokenImageError(f"{problem}{which}: the weights are damaged, or do not belong together")


def _mask_options(scene: Scene, padding: int | None, width: int | None, height: int | None) -> dict[str, int | None]:
    """The arguments of a masked edit that the request has no field for.

    Around a mask, what is rendered has the aspect of the sides that were asked for; where none were, it is not to get
    that of those which were found.
    """
    if scene.region is None:
        return {}
    sides = (scene.width, scene.height) if padding is None else (width, height)
    asked = {name: side if side is None else int(side) for name, side in zip(("width", "height"), sides, strict=True)}
    return {**asked, "padding_mask_crop": padding, "mask_feather": scene.region.feather}


def _named(**tensors: object) -> tuple[str, ...]:
    return tuple(name for name, value in tensors.items() if value is not None)


def _all(*callbacks: Callback | None) -> Callback:
    """Tell all of them; one that returns True is enough to stop."""

    def tell(step: int, sigma: float, x: Tensor) -> bool:
        return any(callback(step, sigma, x) is True for callback in callbacks if callback is not None)

    return tell
