"""What a model file or folder is: kind, variant, sizes, number formats and memory, from headers alone.

Nothing here imports PyTorch or maps a tensor, so that a file of any size is described in the time its header takes.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fluxkiln.foreign import FOLDERS, PARTS, Kind, Part, identify
from fluxkiln.locate import Located, locate, open_file
from fluxkiln.native import Native
from fluxkiln.safetensors_file import CheckpointError, SafetensorsFile
from fluxkiln.workload import weight_bytes

_QUANTISED = ("fp8", "e5m2", "nvfp4")


@dataclass(frozen=True)
class PartInfo:
    """One part of a model.

    Attributes:
        part: `transformer`, `vae`, `clip` or `t5`.
        kind: how it is stored: `bfl`, `diffusers`, `comfyui`, `all-in-one`, or the part itself.
        variant: of a transformer: `dev`, `schnell`, `kontext`, `fill`, `canny`, `depth`, `control` or `custom`.
        parameters: how many.
        formats: storage format (`bf16`, `fp8`, ...) -> parameters stored in it.
        quantised: quantised format -> layers stored in it.
        stored_bytes: bytes on disk, scales included.
        memory: precision -> bytes of the loaded weights; in `fp8` and `nvfp4` the linears of the blocks are quantised
            and the rest is bf16.
        config: the transformer's sizes.
        problem: why it cannot be loaded, "" if it can.
    """

    part: Part
    kind: str
    parameters: int
    formats: dict[str, int]
    quantised: dict[str, int]
    stored_bytes: int
    memory: dict[str, int]
    variant: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True)
class Description:
    """A file or folder.

    Attributes:
        path: what was described.
        kind: short, for machines.
        what: the same in words.
        bytes: of all its weight files.
        parts: what can be read from it.
        problem: why nothing can, "" if something can.
    """

    path: str
    kind: str
    what: str
    bytes: int
    parts: tuple[PartInfo, ...] = ()
    problem: str = ""


def describe(path: str | Path) -> Description:
    """Describe a safetensors file, the folder of a part, or the folder of a diffusers pipeline.

    Raises:
        CheckpointError: it is damaged, or no safetensors file.
        FileNotFoundError: nothing is there.
    """
    path = Path(path).expanduser()
    if (path / "model_index.json").is_file():
        return _describe_pipeline(path)
    if path.is_file() and path.suffix != ".json":
        return _describe_file(path)
    return _describe_folder(path)


def to_text(description: Description) -> str:
    """A few lines for people."""
    lines = [f"{description.path}: {description.what}, {_size(description.bytes)}"]
    for part in description.parts:
        lines.append(f"  {part.part}" + (f", variant {part.variant}" if part.variant else "") + f" ({part.kind})")
        if part.config:
            lines.append(
                "    {depth} + {depth_single_blocks} blocks, width {hidden_size}, {num_heads} heads, "
                "{in_channels} -> {out_channels} channels, guidance {guidance}".format(
                    guidance="yes" if part.config["guidance_embed"] else "no", **part.config
                )
            )
        lines.append(f"    parameters  {part.parameters:,}")
        lines.append("    stored as   " + ", ".join(f"{name} {count:,}" for name, count in part.formats.items()))
        if part.quantised:
            lines.append("    quantised   " + ", ".join(f"{n} layers {name}" for name, n in part.quantised.items()))
        if part.memory:
            lines.append("    in memory   " + ", ".join(f"{name} {_size(n)}" for name, n in part.memory.items()))
        if part.problem:
            lines.append(f"    cannot be loaded: {part.problem}")
    if description.problem:
        lines.append(f"  cannot be loaded: {description.problem}")
    return "\n".join(lines)


def to_json(description: Description) -> str:
    """The same for machines."""
    return json.dumps(dataclasses.asdict(description), indent=2)


def _describe_file(path: Path) -> Description:
    file = open_file(path)
    kind = identify(file.entries, file.metadata)
    parts = []
    for part in kind.parts:
        try:
            parts.append(_part_info(locate(path, part), part))
        except CheckpointError as error:
            parts.append(_unreadable(file, part, kind, str(error)))
    problem = str(kind.refusal(path, "transformer")) if kind.advice else ""
    return Description(str(path), kind.name, kind.what, file.size, tuple(parts), problem)


def _describe_folder(folder: Path) -> Description:
    """A folder of one part: the first that it is."""
    refusal: CheckpointError | None = None
    for part in PARTS:
        try:
            located = locate(folder, part)
        except CheckpointError as error:
            refusal = refusal or error
        else:
            size = sum(file.size for file in located.files)
            return Description(str(folder), located.kind.name, located.kind.what, size, (_part_info(located, part),))
    assert refusal is not None
    raise refusal


def _describe_pipeline(folder: Path) -> Description:
    parts = [part for part, name in FOLDERS.items() if (folder / name).is_dir()]
    located = [locate(folder, part) for part in parts]
    size = sum(file.size for each in located for file in each.files)
    what = f"a diffusers {located[0].pipeline}" if located else "a diffusers pipeline without models"
    infos = tuple(_part_info(each, part) for each, part in zip(located, parts, strict=True))
    return Description(str(folder), "pipeline", what, size, infos)


def _part_info(located: Located, part: Part) -> PartInfo:
    native = Native(located) if part == "transformer" else None
    tensors = native.source if native else located.tensors(part)
    names = native.stored_names if native else list(tensors)
    formats: Counter[str] = Counter()
    for name in names:
        formats[tensors.format(name)] += math.prod(tensors.shape(name))
    quantised = Counter(tensors.format(name) for name in names if tensors.format(name) in _QUANTISED)
    parameters = formats.total()
    memory = {"fp32": 4 * parameters, "bf16": 2 * parameters}
    info = PartInfo(
        part=part,
        kind=located.kind.name,
        parameters=parameters,
        formats=dict(formats.most_common()),
        quantised=dict(quantised.most_common()),
        stored_bytes=sum(tensors.nbytes(name) for name in names),
        memory=memory,
    )
    if native is None:
        return info
    memory["fp8"] = weight_bytes(native.config, "bf16", lambda _linear: "fp8")
    memory["nvfp4"] = weight_bytes(native.config, "bf16", lambda _linear: "nvfp4")
    try:
        native.check(native.config)
        problem = ""
    except CheckpointError as error:
        problem = str(error)
    config = dataclasses.asdict(native.config)
    return dataclasses.replace(info, variant=native.variant, config=config, problem=problem)


def _unreadable(file: SafetensorsFile, part: Part, kind: Kind, problem: str) -> PartInfo:
    """What the header alone tells of a part that cannot be understood: dtypes, not formats."""
    entries = [entry for name, entry in file.entries.items() if name.startswith(kind.parts[part])]
    formats: Counter[str] = Counter()
    for entry in entries:
        formats[entry.dtype.lower()] += math.prod(entry.shape)
    stored = sum(entry.end - entry.start for entry in entries)
    return PartInfo(part, kind.name, formats.total(), dict(formats.most_common()), {}, stored, {}, problem=problem)


def _size(count: int) -> str:
    """Bytes in the unit that suits them; GB are 10^9, as disks and model pages count."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"
