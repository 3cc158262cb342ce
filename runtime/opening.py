"""The parts of a pipeline, opened from a folder, from single files, or from the hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxkiln.autoencoder import Autoencoder, load_autoencoder
from fluxkiln.foreign import Part as PartName
from fluxkiln.hub import BUNDLED, resolve
from fluxkiln.load import load_transformer
from fluxkiln.locate import locate
from fluxkiln.record import Part
from fluxkiln.safetensors_file import CheckpointError
from fluxkiln.sampling import Scheduler
from fluxkiln.text import TextEncoders
from fluxkiln.transformer import Network

SIDE = 1024  # of FLUX.1's usual square, in pixels
ENGINE = "engine"  # name of the part that is no file of the model

# Folders of a diffusers pipeline that each argument stands for.
_FOLDERS = {
    "transformer": ("scheduler", "transformer"),
    "vae": ("vae",),
    "clip": ("text_encoder",),
    "t5": ("text_encoder_2",),
    "tokenizers": ("tokenizer", "tokenizer_2"),
}


@dataclass(frozen=True)
class Parts:
    """Arguments of `Pipeline`, as the files have them."""

    transformer: Network
    autoencoder: Autoencoder
    text: TextEncoders
    scheduler: Scheduler | None
    variant: str
    side: int
    identities: tuple[Part, ...]


def open_parts(files: Mapping[str, str | Path | None], **options: Any) -> Parts:
    """Open all parts of a model.

    Args:
        files: `transformer`, `vae`, `clip`, `t5` and `tokenizers`; where one is None, it is taken from the
            transformer's folder or file.
        options: of `load_transformer`; the other parts run where the transformer runs, in its dtype.

    Raises:
        CheckpointError: a part is missing or damaged, or is something else.
        ModelUnavailableError: it is not there, and not to be had from the hub.
    """
    main = files["transformer"]
    assert main is not None
    inside = [name for name, file in files.items() if name == "transformer" or file is None]
    whole = resolve(main, [folder for name in inside for folder in _FOLDERS[name]])
    paths = {name: whole if name in inside else resolve(file or main, _FOLDERS[name]) for name, file in files.items()}
    tokenizers = paths["tokenizers"] if (paths["tokenizers"] / "tokenizer").is_dir() else None
    if tokenizers is None and "tokenizers" not in inside:
        raise ValueError(f"tokenizers: {files['tokenizers']} must be a folder with tokenizer and tokenizer_2 in it")
    model = load_transformer(whole, **options)
    assert model.loaded is not None
    names: tuple[PartName, ...] = ("transformer", "vae", "clip", "t5")
    identities = [part(name, paths[name], files[name] or main) for name in names]
    if tokenizers is not None:
        source = _source(files["tokenizers"] or main)
        identities.append(Part("tokenizers", source, "tokenizers", _digest(tokenizers)))
    if (engine := model.loaded.choice.engine) is not None and engine.manifest is not None:
        kind = f"{engine.subject.flavour} {engine.subject.version} {engine.subject.arch}"
        identities.append(Part(ENGINE, engine.key, kind, engine.manifest.sha256))
    return Parts(
        transformer=model,
        autoencoder=load_autoencoder(paths["vae"], model.device, model.dtype),
        text=TextEncoders.from_files(paths["clip"], paths["t5"], tokenizers, model.device, model.dtype),
        scheduler=_scheduler(whole),
        variant=model.loaded.checkpoint.variant,
        side=locate(paths["vae"], "vae").config.get("sample_size", SIDE),
        identities=tuple(identities),
    )


def part(name: PartName, path: Path, given: str | Path) -> Part:
    """What a record says of one part of a model: the part in `path`, which was `given` by that name."""
    located = locate(path, name)
    return Part(name, _source(given), located.kind.name, located.identity)


def _source(given: str | Path) -> str:
    """A name as it was given, a path without the folders of this machine."""
    path = Path(given).expanduser()
    return path.resolve().name if given not in BUNDLED and path.exists() else str(given)


def _digest(folder: Path) -> str:
    """sha256 (hex) of the files of both tokenizers."""
    digest = hashlib.sha256()
    for file in sorted(file for name in _FOLDERS["tokenizers"] for file in (folder / name).glob("*") if file.is_file()):
        digest.update(
            f"{file.relative_to(folder).as_posix()} {hashlib.sha256(file.read_bytes()).hexdigest()} ".encode()
        )
    return digest.hexdigest()


def _scheduler(path: Path) -> Scheduler | None:
    """As a diffusers pipeline has it, given its folder or its transformer's."""
    for folder in (path, path.parent):
        file = folder / "scheduler" / "scheduler_config.json"
        if file.is_file():
            try:
                return Scheduler.from_diffusers(json.loads(file.read_bytes()))
            except (ValueError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{file}: {error}") from None
    return None
