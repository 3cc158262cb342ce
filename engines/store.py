"""The folder of engines: each with a manifest that says what it is, found again only by all that makes it what it is.

    STORE/<key>/manifest.json
    STORE/<key>/engine.plan

The key is a hash of the graph's bytes, the identity of the weights, precision and recipe, profile, target, flavour and
version of TensorRT, and the form of the weights. An engine is written under a temporary name and renamed when it is
whole, so a folder with a manifest holds a whole engine; two builders of one key write the same thing.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from fluxkiln.engines.header import SIZE, HeaderError, decode

MANIFEST, PLAN = "manifest.json", "engine.plan"
VERSION = 1
_CHUNK = 2**22


class StoreError(ValueError):
    """An engine that is missing, damaged, or not what its manifest says."""


def default_root() -> Path:
    """Where engines are kept unless told otherwise: beside the other caches of the user."""
    return Path("~/.cache/fluxkiln/engines").expanduser()


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
        if data.get("format") != VERSION:
            raise StoreError(f"manifest format {data.get('format')} is not {VERSION}, the one this version reads")
        return cls(**{**data, "subject": Subject(**data["subject"]), "notes": tuple(data["notes"])})

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True)


@dataclass(frozen=True)
class Stored:
    """An engine in the store: its manifest, and why it cannot be used here, if so."""

    folder: Path
    manifest: Manifest | None
    refusal: str | None

    @property
    def plan(self) -> Path:
        return self.folder / PLAN


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
        self.root.mkdir(parents=True, exist_ok=True)
        scratch = self.root / f".{subject.key}.{uuid.uuid4().hex[:8]}"
        scratch.mkdir()
        try:
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
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise

    def find(self, subject: Subject) -> Stored | None:
        """The engine of that subject, or None; `refusal` says what is wrong with it, if anything."""
        folder = self.root / subject.key
        return self._open(folder) if folder.is_dir() else None

    def __iter__(self) -> Iterator[Stored]:
        """All engines, by name; folders that are no engines are skipped, damaged ones say why."""
        if self.root.is_dir():
            for folder in sorted(self.root.iterdir()):
                if folder.is_dir() and not folder.name.startswith("."):
                    yield self._open(folder)

    def verify(self, stored: Stored) -> str | None:
        """Read the whole plan: why it is not what its manifest says, or None."""
        if stored.refusal or stored.manifest is None:
            return stored.refusal
        digest = hashlib.sha256()
        with open(stored.plan, "rb") as file:
            while part := file.read(_CHUNK):
                digest.update(part)
        return None if digest.hexdigest() == stored.manifest.sha256 else f"{stored.plan} was changed after it was built"

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
        old = [path for path in self.leftovers() if time.time() - path.stat().st_mtime > older_than]
        for path in old:
            shutil.rmtree(path, ignore_errors=True)
        return len(old)

    def export(self, stored: Stored, folder: str | Path) -> Path:
        """Copy an engine with its manifest to another folder, from which `take` adds it to another store."""
        if refusal := self.verify(stored):
            raise StoreError(refusal)
        target = Path(folder).expanduser() / stored.folder.name
        if target.exists():
            raise StoreError(f"{target} exists already")
        _copy(stored.folder, target)
        return target

    def take(self, folder: str | Path) -> Stored:
        """Add an engine that `export` wrote.

        Raises:
            StoreError: the folder holds no engine, or a damaged one.
        """
        source = Path(folder).expanduser()
        stored = self._open(source)
        if refusal := self.verify(stored):
            raise StoreError(refusal)
        assert stored.manifest is not None
        self.root.mkdir(parents=True, exist_ok=True)
        scratch = self.root / f".{source.name}.{uuid.uuid4().hex[:8]}"
        _copy(source, scratch)
        return self._open(self._publish(scratch, stored.manifest.subject.key))

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

    def _open(self, folder: Path) -> Stored:
        """Read the manifest and the header of one engine, nothing else."""
        try:
            manifest = read_manifest(folder)
        except (OSError, ValueError, TypeError, KeyError) as error:
            return Stored(folder, None, f"{folder} has no readable manifest: {error}")
        return Stored(folder, manifest, self._damage(folder, manifest))

    def _damage(self, folder: Path, manifest: Manifest) -> str | None:
        if folder.name != manifest.subject.key:
            return f"{folder} holds the engine {manifest.subject.key}: it was renamed or its manifest was changed"
        plan = folder / PLAN
        if not plan.is_file() or plan.stat().st_size != manifest.nbytes:
            found = plan.stat().st_size if plan.is_file() else 0
            return f"{plan} is not whole: {found} bytes of {manifest.nbytes}"
        if manifest.subject.flavour != "tensorrt_rtx":
            return None  # TensorRT's own plans have no header that can be read
        with open(plan, "rb") as file:
            try:
                header = decode(file.read(SIZE))
            except HeaderError as error:
                return f"{plan}: {error}"
        if header.nbytes != manifest.nbytes or manifest.subject.arch not in header.archs:
            return f"{plan} is an engine for {', '.join(header.archs)}, its manifest says {manifest.subject.arch}"
        return None


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


def _copy(source: Path, target: Path) -> None:
    """Copy an engine's two files under a temporary name, then rename the folder."""
    scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    scratch.mkdir(parents=True)
    try:
        for name in (PLAN, MANIFEST):
            shutil.copyfile(source / name, scratch / name)
        scratch.rename(target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
