"""The folder of engines: each with a manifest that says what it is, found again only by all that makes it what it is.

    STORE/<key>/manifest.json
    STORE/<key>/engine.plan

The key is a hash of the graph's bytes, the identity of the weights, precision and recipe, profile, target, flavour and
version of TensorRT, the form of the weights, and the builder's options. An engine is written under a temporary name and
renamed when it is whole, so a folder with a manifest holds a whole engine; of two builders of one key the last one's
stays. The header is compared whenever an engine is looked at, every byte before one is run or copied.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import mmap
import os
import shlex
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from fluxkiln.engines.header import SIZE, Header, HeaderError, decode

MANIFEST, PLAN = "manifest.json", "engine.plan"
VERSION = 1
_CHUNK = 2**22


class StoreError(ValueError):
    """An engine that is missing, damaged, or not what its manifest says."""


def default_root() -> Path:
    """Where engines are kept unless told otherwise: beside the other caches of the user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fluxkiln" / "engines"


def refit_name(parameter: str) -> str:
    """Name of a parameter in an engine without weights; the plain one is taken by the constant it replaces."""
    return f"{parameter}.refit"


@dataclass(frozen=True)
class Subject:
    """Everything that makes an engine the engine it is; the key is its hash.

    Attributes:
        part: `transformer`, `vae_decoder`, ...
        graph: sha256 (hex) of the ONNX bytes without weights.
        model: identity of the weights; for an engine without weights, of the model it was built for.
        precision: `bf16`, `fp8` or `nvfp4`; recipe: which layer is in which format, as the recipe prints itself.
        profile: input -> its least, best and most shape.
        arch: `sm_89`, ...
        flavour, version: of TensorRT.
        weights: `inside` or `refit`.
        options: what else the builder was told, name -> value.
    """

    part: str
    graph: str
    model: str
    precision: str
    recipe: str
    profile: dict[str, list[list[int]]]
    arch: str
    flavour: str
    version: str
    weights: Literal["inside", "refit"]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Manifest:
    """What the store knows of an engine.

    Attributes:
        subject: what it is.
        model_name: for people.
        nbytes, sha256: of the plan.
        structure: what the builder's listing showed.
        parameters: name in the engine -> where its values come from, for an engine that is supplied with weights.
        seconds, peak_bytes, built: how long the build took, its peak memory, when (seconds since 1970).
        notes: what was said on the way.
    """

    subject: Subject
    model_name: str
    nbytes: int
    sha256: str
    structure: dict[str, Any]
    parameters: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0
    peak_bytes: int = 0
    built: float = 0.0
    notes: tuple[str, ...] = ()
    format: int = VERSION

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        data = json.loads(text)
        if not isinstance(data, dict):
            raise StoreError("it is no JSON object")
        if data.get("format") != VERSION:
            raise StoreError(f"manifest format {data.get('format')} is not {VERSION}, the one this version reads")
        return cls(**{**data, "subject": Subject(**data["subject"]), "notes": tuple(data["notes"])})

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True)


@dataclass(frozen=True)
class Stored:
    """An engine in the store.

    Attributes:
        manifest: what it is; None where there is no readable one.
        refusal: what is wrong with its files, if anything; looking only at the manifest and the header.
        header: what the engine says of itself; only TensorRT-RTX's do.
    """

    folder: Path
    manifest: Manifest | None
    refusal: str | None
    header: Header | None = None

    @property
    def plan(self) -> Path:
        return self.folder / PLAN

    @property
    def subject(self) -> Subject:
        """Of the manifest.

        Raises:
            StoreError: there is none.
        """
        if self.manifest is None:
            raise StoreError(self.refusal or f"{self.folder} holds no engine")
        return self.manifest.subject

    @property
    def key(self) -> str:
        return self.folder.name

    def read(self) -> mmap.mmap:
        """The engine's bytes, mapped; close it when they are not needed any more.

        Raises:
            StoreError: they are not those that were built.
        """
        if self.refusal or self.manifest is None:
            raise StoreError(self.refusal or f"{self.folder} holds no engine")
        with open(self.plan, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if hashlib.sha256(data).hexdigest() != self.manifest.sha256:
            data.close()
            raise StoreError(f"{self.plan} was changed after it was built")
        return data


class Store:
    """A folder of engines.

    Args:
        root: the folder; made when the first engine is written.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser()

    def add(self, subject: Subject, plan: memoryview | bytes, **facts: Any) -> Path:
        """Write an engine; `facts` are the manifest's other fields. Replaces an engine of the same key.

        Raises:
            OSError: the disk is full, or the folder cannot be written: the store is as it was.
        """
        with scratch_for(self.root / subject.key) as scratch:
            digest = hashlib.sha256()
            with open(scratch / PLAN, "wb") as file:
                for start in range(0, len(plan), _CHUNK):
                    part = plan[start : start + _CHUNK]
                    digest.update(part)
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            manifest = Manifest(subject, nbytes=len(plan), sha256=digest.hexdigest(), built=time.time(), **facts)
            (scratch / MANIFEST).write_text(manifest.to_json())
            return self._publish(scratch, subject.key)

    def find(self, subject: Subject) -> Stored | None:
        """The engine of that subject, or None; `refusal` says what is wrong with it, if anything."""
        folder = self.root / subject.key
        return open_engine(folder) if folder.is_dir() else None

    def one(self, name: str) -> Stored:
        """The engine whose key begins with `name`.

        Raises:
            StoreError: there is none, or more than one.
        """
        found = [stored for stored in self if stored.key.startswith(name)]
        if len(found) != 1:
            raise StoreError(f"{len(found)} engines in {self.root} begin with {name!r}, expected one")
        return found[0]

    def __iter__(self) -> Iterator[Stored]:
        """All engines, by name; folders that are no engines are skipped, damaged ones say why."""
        if self.root.is_dir():
            for folder in sorted(self.root.iterdir()):
                if folder.is_dir() and not folder.name.startswith("."):
                    yield open_engine(folder)

    def verify(self, stored: Stored) -> str | None:
        """Read the whole plan: why it is not what its manifest says, or None."""
        try:
            stored.read().close()
        except StoreError as error:
            return str(error)
        return None

    def remove(self, stored: Stored) -> None:
        """Delete an engine: out of sight at once, then its bytes."""
        gone = self.root / f".{stored.folder.name}.{uuid.uuid4().hex[:8]}"
        stored.folder.rename(gone)
        shutil.rmtree(gone)

    def leftovers(self) -> list[Path]:
        """What builds that were killed left behind; nobody uses it, `prune` deletes it."""
        return sorted(path for path in self.root.glob(".*") if path.is_dir()) if self.root.is_dir() else []

    def prune(self, older_than: float) -> int:
        """Delete leftovers not touched for `older_than` seconds; a build may still be writing to younger ones."""
        count = 0
        for path in self.leftovers():
            with contextlib.suppress(FileNotFoundError):  # whoever else prunes was faster
                if time.time() - path.stat().st_mtime > older_than:
                    shutil.rmtree(path)
                    count += 1
        return count

    def export(self, stored: Stored, folder: str | Path) -> Path:
        """Copy an engine with its manifest to another folder, from which `take` adds it to another store."""
        target = Path(folder).expanduser() / stored.key
        if target.exists():
            raise StoreError(f"{target} exists already")
        _copy(stored, target, lambda scratch: scratch.rename(target))
        return target

    def take(self, folder: str | Path) -> Stored:
        """Add an engine that `export` wrote.

        Raises:
            StoreError: the folder holds no engine, or a damaged one.
        """
        stored = open_engine(Path(folder).expanduser())
        key = stored.subject.key
        _copy(stored, self.root / key, lambda scratch: self._publish(scratch, key))
        return open_engine(self.root / key)

    def _publish(self, scratch: Path, key: str) -> Path:
        """Give a whole engine its name; the one that has it is moved out of the way, by whoever is first."""
        target = self.root / key
        for last in (False,) * 99 + (True,):
            try:
                scratch.rename(target)
                break
            except OSError as error:  # the name is taken: which error that is depends on the system
                if last or error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EACCES):
                    raise
            with contextlib.suppress(FileNotFoundError):  # another builder moved it
                self.remove(Stored(target, None, None))
        return target


def open_engine(folder: Path) -> Stored:
    """An engine by its manifest and header, nothing else is read; `refusal` says what is wrong with them."""
    try:
        manifest = read_manifest(folder)
    except (OSError, ValueError, TypeError, KeyError) as error:
        return Stored(folder, None, f"{folder} has no readable manifest: {error}")
    subject, plan = manifest.subject, folder / PLAN
    if folder.name != subject.key:
        renamed = f"{folder} holds the engine {subject.key}: it was renamed or its manifest was changed"
        return Stored(folder, manifest, renamed)
    if not plan.is_file() or plan.stat().st_size != manifest.nbytes:
        found = plan.stat().st_size if plan.is_file() else 0
        return Stored(folder, manifest, f"{plan} is not whole: {found} bytes of {manifest.nbytes}")
    if subject.flavour != "tensorrt_rtx":
        return Stored(folder, manifest, None)  # TensorRT's own plans have no header that can be read
    with open(plan, "rb") as file:
        try:
            header = decode(file.read(SIZE))
        except HeaderError as error:
            return Stored(folder, manifest, f"{plan}: {error}")
    swapped = f"{plan} is an engine for {', '.join(header.archs)} of version {header.version} and {header.nbytes} bytes"
    if header.nbytes != manifest.nbytes or subject.arch not in header.archs or header.version != subject.version:
        said = f"its manifest says {subject.arch}, {subject.version} and {manifest.nbytes}"
        return Stored(folder, manifest, f"{swapped}, {said}", header)
    return Stored(folder, manifest, None, header)


def read_manifest(folder: Path) -> Manifest:
    """The manifest in an engine's folder.

    Raises:
        OSError, ValueError, TypeError, KeyError: there is none, or it is not one.
    """
    return Manifest.from_json((folder / MANIFEST).read_text())


def refuse_here(manifest: Manifest, arch: str | None, versions: dict[str, str]) -> str | None:
    """Why an engine cannot run on this machine, or None.

    Args:
        arch: of this machine's GPU, None without one; versions: installed flavour -> version.
    """
    subject = manifest.subject
    installed = versions.get(subject.flavour)
    if installed is None:
        return f"it needs {subject.flavour} {subject.version}, which is not installed"
    if installed != subject.version:
        return f"it was built with {subject.flavour} {subject.version}, installed is {installed}: build it again"
    if arch is None:
        return "this machine has no NVIDIA GPU"
    return None if arch == subject.arch else f"it was built for {subject.arch}, this GPU is {arch}"


def refuse_tokens(manifest: Manifest, image: int, text: int) -> str | None:
    """Why an engine cannot take a call, with the command that builds one that can, or None.

    Args:
        image: image tokens, those of references included; text: text tokens.
    """
    least, most = (manifest.subject.profile["hidden_states"][i][1] for i in (0, 2))
    least_text, most_text = (manifest.subject.profile["encoder_hidden_states"][i][1] for i in (0, 2))
    if not least_text <= text <= most_text:
        return f"the engine takes {least_text} to {most_text} text tokens, got {text}: set max_sequence_length"
    if least <= image <= most:
        return None
    # More tokens fit a square that holds them; fewer have to be met exactly, as they are the least of an engine.
    height = math.isqrt(image)
    height = next(h for h in range(height, 0, -1) if image % h == 0) if image < least else height + (height**2 < image)
    width = image // height if image < least else height
    subject = manifest.subject
    flavour = "" if subject.flavour == "tensorrt_rtx" else f" --flavour {subject.flavour}"
    return (
        f"the engine takes {least} to {most} image tokens (16 x 16 pixels each, references included), got {image}: "
        f"`fluxkiln build --model {shlex.quote(manifest.model_name)} --precision {subject.precision} "
        f"--arch {subject.arch}{flavour} --weights {subject.weights} --max-size {16 * width}x{16 * height} "
        "--references 0` builds one that fits"
    )


@contextlib.contextmanager
def scratch_for(target: Path) -> Iterator[Path]:
    """A new folder beside `target`, to be given its name when it is whole; deleted if anything fails before.

    Raises:
        OSError: the disk is full, or the folder cannot be written: it names the folder of `target`.
    """
    scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        scratch.mkdir(parents=True)
        yield scratch
    except BaseException as error:
        shutil.rmtree(scratch, ignore_errors=True)
        # A full disk does not say which, a copy to it names what it read, and the temporary name tells nobody anything.
        if isinstance(error, OSError) and (
            error.errno == errno.ENOSPC or str(error.filename or scratch).startswith(str(scratch))
        ):
            error.filename = str(target.parent)
        raise


def _copy(stored: Stored, target: Path, publish: Callable[[Path], object]) -> None:
    """Copy an engine's two files under a temporary name, compare every byte, then publish the folder.

    Raises:
        StoreError: it is damaged, or was while it was copied.
    """
    if stored.refusal:
        raise StoreError(stored.refusal)
    with scratch_for(target) as scratch:
        for name in (PLAN, MANIFEST):
            shutil.copyfile(stored.folder / name, scratch / name)
        replace(stored, folder=scratch).read().close()
        publish(scratch)
