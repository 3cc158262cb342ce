"""What was asked for and what ran: the record that every image carries.

A record has two halves. The *determinants* (request, parts, backend, plan, versions) decide the bytes of the image:
the same determinants give the same bytes, and `key` is their digest. The *measurements* (timings, peak memory) only
say how it went. A record without measurements is a plan: what `--dry-run` prints and what a cache is asked for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

if typing.TYPE_CHECKING:
    import torch
    from PIL.Image import Image

SCHEMA = 1
MAX_BLOCKS, MAX_LAYERS = 1_000, 10_000  # bound what a hostile file can make of ranges of blocks
ORIENTATION = 0x0112  # EXIF's tag
_TRAINED_MEDIA = "digitalsourcetype/trainedAlgorithmicMedia"  # end of the IPTC term's address

Role = Literal["image", "reference", "mask", "control"]
Mode = Literal["text-to-image", "image-to-image", "edit", "masked-edit", "fill", "control"]
Determinism = Literal["rows-bitwise", "rows-to-rounding", "repeatable"]
DETERMINISM: dict[str, str] = {
    "rows-bitwise": "same request, machine and versions: same bytes; an image of a batch equals itself run alone",
    "rows-to-rounding": "same request, machine and versions: same bytes; an image of a batch equals itself run alone "
    "up to rounding",
    "repeatable": "same request, machine and versions: same bytes; batches are not compared",
}


@dataclass(frozen=True)
class Picture:
    """A picture that came in.

    Attributes:
        role: what it was for: `image`, `reference`, `mask` or `control`.
        name: file name without its folder, None for a picture in memory.
        sha256: digest of its pixels as decoded, see `pixel_digest`.
        size: width and height as given, in pixels.
        used: width and height in which the model saw it.
        resize: how it got from `size` to `used`, for example `lanczos`; `none` if it was taken as it is.
        synthetic: its own metadata says that a model made all of it.
    """

    role: Role
    name: str | None
    sha256: str
    size: tuple[int, int]
    used: tuple[int, int]
    resize: str
    synthetic: bool = False

    @classmethod
    def of(cls, role: Role, image: Image, used: tuple[int, int], resize: str = "none") -> Picture:
        """Describe a picture as it was given: before rotation, conversion and resizing."""
        name = getattr(image, "filename", None)
        synthetic = _TRAINED_MEDIA in _xmp(image)
        return cls(role, Path(name).name if name else None, pixel_digest(image), image.size, used, resize, synthetic)


@dataclass(frozen=True)
class Request:
    """Everything needed to repeat a call, with every default and every random choice filled in.

    Attributes:
        mode: which job it was.
        prompts: one for each image, in the order of the batch.
        seeds: one for each image.
        width, height: size of the result in pixels.
        num_inference_steps: as asked for (image-to-image runs fewer).
        schedule: the sigmas that ran, from the first to 0.
        sigmas: custom sigmas as asked for, None for the default schedule.
        guidance: distilled guidance at each step that ran; None where the model has none.
        prompts_2: what T5 read, where it differs from `prompts`.
        negative_prompts: only with true classifier-free guidance, as are `negative_prompts_2`.
        strength: of image-to-image and masked edits; None elsewhere.
        pictures: what came in, in the order given.
        options: the other arguments of the call that change the image, by their own names.
        unrepeatable: arguments that the record does not hold (latents or embeddings given as tensors).
    """

    mode: Mode
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    width: int
    height: int
    num_inference_steps: int
    schedule: tuple[float, ...]
    sigmas: tuple[float, ...] | None = None
    guidance: tuple[float, ...] | None = None
    prompts_2: tuple[str, ...] | None = None
    negative_prompts: tuple[str, ...] | None = None
    negative_prompts_2: tuple[str, ...] | None = None
    true_cfg_scale: float = 1.0
    max_sequence_length: int = 512
    strength: float | None = None
    pictures: tuple[Picture, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    unrepeatable: tuple[str, ...] = ()

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments with which a `Pipeline` repeats the call, all but the pictures.

        Raises:
            ValueError: tensors were given that the record does not hold.
        """
        if self.unrepeatable:
            raise ValueError(f"the record does not hold the {' and '.join(self.unrepeatable)} that the call was given")
        arguments = {
            "prompt": self.prompts,
            "prompt_2": self.prompts_2,
            "negative_prompt": self.negative_prompts,
            "negative_prompt_2": self.negative_prompts_2,
            "true_cfg_scale": self.true_cfg_scale,
            "width": self.width,
            "height": self.height,
            "num_inference_steps": self.num_inference_steps,
            "sigmas": self.sigmas,
            "guidance_scale": self.guidance,
            "strength": self.strength,
            "seed": self.seeds,
            "max_sequence_length": self.max_sequence_length,
            **self.options,
        }
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in arguments.items()
            if value is not None
        }


@dataclass(frozen=True)
class Part:
    """One file or folder of the model: `identity` names its content, `source` is where it came from, without folders
    of the machine (a hub name, a file name)."""

    name: str
    source: str
    kind: str
    identity: str


@dataclass(frozen=True, order=True)
class Layer:
    """What one layer is bound to.

    Attributes:
        name: the layer, in native names without the stream where both streams run together
            (`double_blocks.0.qkv`, `single_blocks.3.out`).
        op: the operation that runs it (`qkv_rope`, `attention`, ...).
        implementation: who runs it (`eager`, `triton`, `trt`), with the kernel's name where it has one.
        format: number format of its weights and products (`fp32`, `bf16`, `fp8`, `nvfp4`).
        weights: number of its weight elements; 0 for an operation without.
        emulated: the format is computed in wider arithmetic than the hardware would use.
    """

    name: str
    op: str
    implementation: str
    format: str
    weights: int = 0
    emulated: bool = False


@dataclass(frozen=True)
class Timings:
    """Seconds: between events in the queue of a GPU, by the wall clock elsewhere."""

    load: float = 0.0
    text: float = 0.0
    encode: float = 0.0
    modulate: float = 0.0
    steps: tuple[float, ...] = ()
    decode: float = 0.0
    total: float = 0.0


@dataclass(frozen=True)
class Record:
    """What was asked for and what ran.

    Attributes:
        request: the call.
        parts: transformer, autoencoder, text encoders: which they were.
        backend, precision, dtype, device: what ran, not what was asked for.
        plan: what every layer was bound to; each ran once a step (twice with true classifier-free guidance).
        determinism: the promise that held, a key of `DETERMINISM`.
        reasons: for every backend that was not picked, why not.
        notices: what was said to the user on the way (a rounded size, a cut prompt, a fallback).
        versions: of fluxkiln, python, torch and the rest, see `versions`.
        timings, peak_memory: measurements, None before the run; memory in bytes, of the device or, on a CPU, of
            the process.
        index: which image of the batch the record belongs to; None for the whole batch.
        variant: what the model was taken for (`dev`, `kontext`, ...).
        why: the backend was picked.
        measured: other backends that were timed beside it -> their step's time, as a multiple of its.
        recipe: which layer has which format and scales, as JSON; "" for a model in memory.
    """

    request: Request
    parts: tuple[Part, ...]
    backend: str
    precision: str
    dtype: str
    device: str
    plan: tuple[Layer, ...]
    determinism: Determinism
    versions: Mapping[str, str]
    reasons: Mapping[str, str] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    timings: Timings | None = None
    peak_memory: int | None = None
    index: int | None = None
    variant: str = ""
    why: str = ""
    measured: Mapping[str, float] = field(default_factory=dict)
    recipe: str = ""

    def __str__(self) -> str:
        from fluxkiln.report import to_text

        return to_text(self)

    @property
    def coverage(self) -> dict[str, float]:
        """Format -> share of the planned weights that are computed in it (shares sum to 1; empty without a plan)."""
        counts: dict[str, int] = {}
        for layer in self.plan:
            if layer.weights:
                name = f"{layer.format} (emulated)" if layer.emulated else layer.format
                counts[name] = counts.get(name, 0) + layer.weights
        total = sum(counts.values())
        return {name: counts[name] / total for name in sorted(counts)}

    @property
    def seed(self) -> int:
        """Of the image, or of the first of the batch."""
        return self.request.seeds[self.index or 0]

    @property
    def prompt(self) -> str:
        """Of the image, or of the first of the batch."""
        return self.request.prompts[self.index or 0]

    @property
    def key(self) -> str:
        """SHA-256 of the determinants: the same key, the same images."""
        return hashlib.sha256(json.dumps(self.determinants(), sort_keys=True, allow_nan=False).encode()).hexdigest()

    def determinants(self) -> dict[str, Any]:
        """Everything that decides the bytes of the images, as plain data."""
        data = _encode(self)
        data["plan"] = _group(self.plan)
        for name in ("reasons", "why", "measured", "notices", "timings", "peak_memory", "index"):
            del data[name]
        data["parts"] = [{k: part[k] for k in ("name", "identity")} for part in data["parts"]]
        for picture in data["request"]["pictures"]:
            del picture["name"]
        return data

    def image(self, index: int) -> Record:
        """The record of one image of the batch.

        Raises:
            ValueError: the batch has no such image.
        """
        if not 0 <= index < len(self.request.seeds):
            raise ValueError(f"the batch has {len(self.request.seeds)} images, there is no image {index}")
        return dataclasses.replace(self, index=index)

    def differences(self, now: Record) -> list[str]:
        """What stands between this record and the same bytes today, one sentence each; empty if nothing does."""
        found = []
        before = {part.name: part for part in self.parts}
        after = {part.name: part for part in now.parts}
        for name in sorted(before.keys() | after.keys()):
            was, is_ = before.get(name), after.get(name)
            if was is None or is_ is None or was.identity != is_.identity:
                found.append(f"{name}: recorded {_identity(was)}, here {_identity(is_)}")
        for name in ("variant", "backend", "precision", "dtype", "device"):
            if getattr(self, name) != getattr(now, name):
                found.append(f"{name}: recorded {getattr(self, name)}, here {getattr(now, name)}")
        if self.recipe and self.recipe != now.recipe:
            found.append("recipe: other rules than recorded")
        if changed := set(self.plan) ^ set(now.plan):
            name = min(layer.name for layer in changed)
            found.append(f"plan: {len({layer.name for layer in changed})} layers are bound otherwise, first {name}")
        for name in sorted(self.versions.keys() | now.versions.keys()):
            was_v, is_v = self.versions.get(name, "none"), now.versions.get(name, "none")
            if was_v != is_v:
                found.append(f"{name}: recorded {was_v}, here {is_v}")
        return found

    def to_json(self, indent: int | None = None) -> str:
        """JSON text, always in the same order; the plan is grouped by what its layers have in common."""
        data = {"schema": SCHEMA, **_encode(self)}
        data["plan"] = _group(self.plan)
        data["coverage"] = self.coverage
        return json.dumps(data, ensure_ascii=False, allow_nan=False, indent=indent)

    @classmethod
    def from_json(cls, text: str) -> Record:
        """Read what `to_json` wrote.

        Raises:
            ValueError: it is not a record, or one of a later schema.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not a fluxkiln record: {error}") from None
        if not isinstance(data, dict) or not isinstance(data.get("schema"), int):
            raise ValueError("not a fluxkiln record: it has no schema number")
        if data["schema"] > SCHEMA:
            raise ValueError(f"the record has schema {data['schema']}, this fluxkiln reads up to {SCHEMA}: update it")
        try:
            data["plan"] = _ungroup(data["plan"])
            record = _decode(cls, {k: v for k, v in data.items() if k not in ("schema", "coverage")})
            return record if record.index is None else record.image(record.index)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"not a fluxkiln record: {type(error).__name__}: {error}") from None


def pixel_digest(picture: Image) -> str:
    """SHA-256 of a picture's mode, size, pixels, and how to see them: which way up, and which colour is transparent.

    It is the same whatever file format and other metadata the picture came in.
    """
    head = f"{picture.mode} {picture.width}x{picture.height} "
    if (turned := picture.getexif().get(ORIENTATION, 1)) != 1:
        head += f"orientation {turned} "
    if picture.mode == "P":
        picture = picture.convert("RGBA")
    elif (transparent := picture.info.get("transparency")) is not None:
        head += f"transparent {transparent} "
    return hashlib.sha256(head.encode() + picture.tobytes()).hexdigest()


def _xmp(image: Image) -> str:
    packet = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or ""
    return packet.decode("utf-8", "replace") if isinstance(packet, bytes) else packet


def versions(device: torch.device | str = "cpu") -> dict[str, str]:
    """Versions of everything that can change a byte of the result on this device."""
    import torch

    import fluxkiln
    from fluxkiln.kernels import tiles

    device = torch.device(device)
    found = {"fluxkiln": fluxkiln.__version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("numpy", "pillow", "transformers", "tokenizers", "triton", "tensorrt-rtx", "tensorrt"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        found |= {
            "gpu": f"{torch.cuda.get_device_name(device)} (sm_{major}{minor})",
            "cuda": torch.version.cuda or "none",
            "driver": _driver(),
        }
        if tiles.MEASURED.is_file():  # another tile is another order of sums
            found["tiles"] = hashlib.sha256(tiles.MEASURED.read_bytes()).hexdigest()[:12]
    else:
        # A matrix product on a CPU is split over its threads, and its instruction set decides the order of sums.
        capability = torch.backends.cpu.get_cpu_capability()
        found["cpu"] = f"{platform.machine()} {capability}, {torch.get_num_threads()} threads"
    return found


def _driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "unknown"
    match = re.search(r"\d+\.\d+(\.\d+)?", text)
    return match.group() if match else "unknown"


def _identity(part: Part | None) -> str:
    return "none" if part is None else f"{part.source} ({part.identity[:12]})"


# --- JSON ---------------------------------------------------------------------------------------


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _encode(value[k]) for k in sorted(value)}
    if isinstance(value, (tuple, list)):
        return [_encode(v) for v in value]
    return value


def _decode(kind: Any, data: Any) -> Any:
    """Plain data to what a type hint says: dataclasses, tuples, mappings, `X | None`, literals and leaves."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return None if data is None else _decode(next(a for a in arguments if a is not type(None)), data)
    if origin is tuple and isinstance(data, list):
        inner: Iterable[Any] = [arguments[0]] * len(data) if arguments[-1] is Ellipsis else arguments
        return tuple(_decode(a, d) for a, d in zip(inner, data, strict=True))
    if origin is Mapping and isinstance(data, dict):
        return {k: _decode(arguments[1], v) for k, v in data.items()}
    if origin is Literal and data in arguments:
        return data
    if dataclasses.is_dataclass(kind) and isinstance(data, dict):
        hints = typing.get_type_hints(kind)
        if unknown := sorted(data.keys() - hints.keys()):
            raise TypeError(f"{kind} has no field {unknown[0]!r}")
        return typing.cast(Any, kind)(**{name: _decode(hints[name], value) for name, value in data.items()})
    if kind is Any or type(data) is kind or (kind is float and type(data) is int):
        return data
    raise TypeError(f"expected {kind}, got {data!r}")


def _group(plan: Sequence[Layer]) -> list[dict[str, Any]]:
    """Layers that differ only in their block's number and share everything else become one entry."""
    groups: dict[tuple, list[int]] = {}
    for layer in plan:
        match = re.fullmatch(r"(\w+)\.(\d+)\.(.+)", layer.name)
        name = f"{match[1]}.*.{match[3]}" if match else layer.name
        groups.setdefault((name, *dataclasses.astuple(layer)[1:]), []).append(int(match[2]) if match else -1)
    names = [f.name for f in dataclasses.fields(Layer)]
    return [
        dict(zip(names, group, strict=True)) | ({"blocks": _ranges(numbers)} if numbers[0] >= 0 else {})
        for group, numbers in groups.items()
    ]


def _ungroup(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Inverse of `_group`: block after block, within a block in the order in which its layers first appear."""
    layers: list[tuple[tuple[int, int, int], dict[str, Any]]] = []
    prefixes: dict[str, int] = {}
    names: dict[str, int] = {}
    for group in groups:
        name, layer = group["name"], {k: v for k, v in group.items() if k != "blocks"}
        prefix = prefixes.setdefault(name.split(".")[0], len(prefixes))
        order = names.setdefault(name, len(names))
        if "blocks" not in group:
            layers.append(((prefix, 0, order), layer))
        for first, last in group.get("blocks", []):
            if not 0 <= first <= last < MAX_BLOCKS or len(layers) > MAX_LAYERS:
                raise ValueError(f"blocks {first} to {last} of {name} after {len(layers)} layers: no model has them")
            layers += [
                ((prefix, i, order), layer | {"name": name.replace("*", str(i), 1)}) for i in range(first, last + 1)
            ]
    return [layer for _, layer in sorted(layers, key=lambda item: item[0])]


def _ranges(numbers: Iterable[int]) -> list[list[int]]:
    ranges: list[list[int]] = []
    for n in numbers:
        if ranges and n == ranges[-1][1] + 1:
            ranges[-1][1] = n
        else:
            ranges.append([n, n])
    return ranges
