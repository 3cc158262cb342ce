"""Which files make up a part of a model: a single file, a folder, the shards of an index."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.foreign import FOLDERS, PARTS, Kind, Part, identify, refuse_format
from fluxkiln.safetensors_file import CheckpointError, SafetensorsFile
from fluxkiln.tensors import Tensors

if TYPE_CHECKING:
    import torch

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_STEMS = ("diffusion_pytorch_model", "model")  # what diffusers and transformers call the weights of a folder
_CONFIGS: dict[Part, tuple[str, tuple[str, ...]]] = {  # how a `config.json` says which part it describes
    "transformer": ("_class_name", ("FluxTransformer2DModel",)),
    "vae": ("_class_name", ("AutoencoderKL",)),
    "clip": ("model_type", ("clip_text_model", "clip")),
    "t5": ("model_type", ("t5",)),
}
_ENDINGS = (".safetensors", ".sft")


@dataclass(frozen=True)
class Located:
    """The files of one part.

    Attributes:
        path: what was asked for.
        files: where its tensors are.
        kind: what they are.
        config: the `config.json` beside them; {} when there is none, or it is another part's.
        pipeline: `_class_name` of the `model_index.json` it belongs to, "" when there is none.
        linear_nvfp4: the folder says that its quantisation is ModelOpt's.
    """

    path: Path
    files: tuple[SafetensorsFile, ...]
    kind: Kind
    config: Mapping[str, Any] = field(default_factory=dict)
    pipeline: str = ""
    linear_nvfp4: bool = False

    @functools.cached_property
    def identity(self) -> str:
        """sha256 (hex) over header, length and a page of every tensor of every file, and the configuration beside them.

        It tells any two models apart that differ in training or format.
        """
        digest = hashlib.sha256("".join(file.digest for file in self.files).encode())
        digest.update(json.dumps(self.config, sort_keys=True).encode())
        return digest.hexdigest()

    def tensors(self, part: Part, dtype: torch.dtype | None = None, linear_nvfp4: bool = False) -> Tensors:
        """The tensors of one of the parts; `dtype` and `linear_nvfp4` as `Tensors` has them."""
        prefix = self.kind.parts[part]
        return Tensors(
            self.files,
            prefix,
            exclude=tuple(p for p in self.kind.parts.values() if p != prefix and p.startswith(prefix)),
            dtype=dtype,
            linear_nvfp4=linear_nvfp4 or self.linear_nvfp4,
            config=self.config,
        )


def locate(path: str | Path, part: Part) -> Located:
    """Find the files of `part` at `path`: a file, the part's folder, or the folder of the whole pipeline.

    Raises:
        CheckpointError: what is there is something else; the message says what, and what to use instead.
        FileNotFoundError: nothing is there.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: expected {PARTS[part]}, a safetensors file or a folder")
    files: tuple[SafetensorsFile, ...]
    if path.is_file() and not path.name.endswith(".index.json"):
        if match := _SHARD.fullmatch(path.name):
            raise CheckpointError(
                f"{path} is shard {int(match[2])} of {int(match[3])}; give the folder {path.parent} instead"
            )
        folder, files = path.parent, (open_file(path),)
    elif path.is_file():
        folder, files = path.parent, _indexed(path)
    else:
        folder = path / FOLDERS[part] if (path / FOLDERS[part]).is_dir() else path
        files = _folder_files(folder, part)
    metadata = {key: text for file in files for key, text in file.metadata.items()}
    kind = identify((name for file in files for name in file.entries), metadata)
    config = _read_json(folder / "config.json")
    key, accepted = _CONFIGS[part]
    config = config if config.get(key) in accepted else {}
    quantisation = config.get("quantization_config") or {}
    if part not in kind.parts:
        raise kind.refusal(path, part)
    if not isinstance(quantisation, Mapping):
        raise CheckpointError(f"{folder / 'config.json'} is corrupt: its quantization_config is {quantisation!r}")
    method = quantisation.get("quant_method")
    if method not in (None, "modelopt"):
        raise CheckpointError(
            f"{folder} is quantised with {method}, which is not read; use a bf16, fp8 or nvfp4 model instead"
        )
    index = next((index for place in (folder, folder.parent) if (index := _read_json(place / "model_index.json"))), {})
    return Located(
        path=path,
        files=files,
        kind=kind,
        config=config,
        pipeline=str(index.get("_class_name", "")),
        linear_nvfp4=method == "modelopt" or (folder / "hf_quant_config.json").is_file(),
    )


def open_file(path: Path) -> SafetensorsFile:
    """Open one weight file, refusing by name those that hold weights in another format."""
    refuse_format(path)
    return SafetensorsFile(path)


def _folder_files(folder: Path, part: Part) -> tuple[SafetensorsFile, ...]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    indices = [name for name in names if name.endswith(".safetensors.index.json")]
    for stem in _STEMS:
        if f"{stem}.safetensors.index.json" in indices:
            return _indexed(folder / f"{stem}.safetensors.index.json")
        if f"{stem}.safetensors" in names:
            return (open_file(folder / f"{stem}.safetensors"),)
    if len(indices) == 1:
        return _indexed(folder / indices[0])
    weights = [name for name in names if name.endswith(_ENDINGS)]
    if weights and all(_SHARD.fullmatch(name) for name in weights):
        return _unindexed(folder, weights)
    if not weights:
        raise _nothing_in(folder, names, part)
    files = [open_file(folder / name) for name in weights]
    fitting = [file for file in files if part in identify(file.entries, file.metadata).parts]
    if len(files) > 1 and len(fitting) != 1:
        if not fitting and (kind := identify((name for file in files for name in file.entries), {})).advice:
            raise kind.refusal(folder, part)
        raise CheckpointError(
            f"{folder} holds {len(fitting)} files with {PARTS[part]} among its {len(files)} "
            f"({', '.join(file.path.name for file in (fitting or files)[:3])}, ...); name the file"
        )
    return tuple(fitting or files)


def _indexed(index: Path) -> tuple[SafetensorsFile, ...]:
    try:
        shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        missing = [shard for shard in shards if not (index.parent / shard).is_file()]
        outside = [shard for shard in shards if Path(shard).name != shard]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise CheckpointError(f"{index} is corrupt: it is not an index of shards") from None
    if outside:
        raise CheckpointError(f"{index} names the shard {outside[0]}, which is not beside it")
    if missing:
        raise CheckpointError(
            f"{index} names {len(shards)} shards, but {len(missing)} are missing ({', '.join(missing[:3])}); "
            "download them as well"
        )
    return tuple(open_file(index.parent / shard) for shard in shards)


def _unindexed(folder: Path, shards: list[str]) -> tuple[SafetensorsFile, ...]:
    matches = [match for shard in shards if (match := _SHARD.fullmatch(shard))]
    stem, _, total = matches[0].groups()
    expected = [f"{stem}-{i:05d}-of-{total}.safetensors" for i in range(1, int(total) + 1)]
    if shards != expected:
        absent = ", ".join(sorted(set(expected) - set(shards))[:3])
        raise CheckpointError(
            f"{folder} holds {len(shards)} of {int(total)} shards ({absent} missing); download the rest"
        )
    return tuple(open_file(folder / shard) for shard in shards)


def _nothing_in(folder: Path, names: list[str], part: Part) -> Exception:
    for name in names:
        if not name.endswith(".json"):
            try:
                refuse_format(folder / name)
            except CheckpointError as error:
                return error
    if "model_index.json" in names:
        pipeline = _read_json(folder / "model_index.json").get("_class_name", "unnamed")
        return CheckpointError(f"{folder} is a {pipeline} without the folder {FOLDERS[part]}/, so it has no {part}")
    found = f"only {', '.join(names[:3])}" if names else "nothing"
    return CheckpointError(f"{folder} holds no safetensors file ({found}); expected {PARTS[part]}")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError:
        raise CheckpointError(f"{path} is corrupt: it is not JSON") from None
    return value if isinstance(value, dict) else {}
