"""Finished images on disk, found again by everything that decides their bytes.

An entry is a folder `ab/abcdef…/` named by `Record.key`, with one PNG for each image and `entry.json`. It is built
under a temporary name and renamed, so it exists whole or not at all, and two processes that write the same entry
cannot mix. What is read is checked against its digests; a damaged entry counts as absent and is removed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from fluxkiln import metadata
from fluxkiln.record import Record, pixel_digest

_KEY = re.compile(r"[0-9a-f]{64}")
_ABANDONED_SECONDS = 3600  # a temporary folder this old belongs to a process that died


@dataclasses.dataclass(frozen=True)
class ImageCache:
    """A bounded store of images.

    Attributes:
        folder: where it lives; made when first written to.
        limit: bytes to keep at most; the entries used longest ago go first.
    """

    folder: Path
    limit: int

    def get(self, key: str) -> tuple[list[Image.Image], Record] | None:
        """The images of a request and the record of the run that made them, or None."""
        entry = self._entry(key)
        try:
            data = json.loads((entry / "entry.json").read_text("utf-8"))
            record = Record.from_json(data["record"])
            images = [_load(entry / f"{i}.png", digest) for i, digest in enumerate(data["digests"])]
            os.utime(entry)
        except (OSError, ValueError, TypeError, KeyError, SyntaxError):
            self._remove(entry)
            return None
        return images, record

    def put(self, key: str, images: Sequence[Image.Image], record: Record) -> None:
        """Keep the images of a request, and drop what was used longest ago to stay within the limit.

        Raises:
            OSError: the folder cannot be written.
        """
        temporary = self._temporary()
        temporary.mkdir(parents=True)
        try:
            for i, image in enumerate(images):
                (temporary / f"{i}.png").write_bytes(metadata.encode(image, "PNG"))
            data = {"record": record.to_json(), "digests": [pixel_digest(image) for image in images]}
            (temporary / "entry.json").write_text(json.dumps(data), "utf-8")
            if _bytes_of(temporary) > self.limit:
                return
            entry = self._entry(key)
            entry.parent.mkdir(exist_ok=True)
            try:
                temporary.rename(entry)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # these: another wrote the same images first
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self._trim()

    def size(self) -> int:
        """Bytes of all entries."""
        return sum(_bytes_of(entry) for entry in self._entries())

    def _trim(self) -> None:
        used = []
        for entry in self._entries():
            try:
                used.append((entry.stat().st_mtime_ns, _bytes_of(entry), entry))
            except FileNotFoundError:  # another process removed it
                continue
        total = sum(size for _, size, _ in used)
        for _, size, entry in sorted(used):
            if total <= self.limit:
                break
            self._remove(entry)
            total -= size
        for left in self.folder.glob(".*.part"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
                    shutil.rmtree(left, ignore_errors=True)

    def _entries(self) -> Iterator[Path]:
        """Entries alone: whatever else lies in the folder is not ours to count or remove."""
        for entry in self.folder.glob("[0-9a-f][0-9a-f]/*"):
            if _KEY.fullmatch(entry.name) and entry.name.startswith(entry.parent.name):
                yield entry

    def _entry(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ValueError(f"a cache key is 64 hexadecimal digits, got {key!r}")
        return self.folder / key[:2] / key

    def _temporary(self) -> Path:
        return self.folder / f".{secrets.token_hex(8)}.part"

    def _remove(self, entry: Path) -> None:
        """Out of sight by a rename first, so that nobody reads an entry half removed."""
        temporary = self._temporary()
        try:
            entry.rename(temporary)
        except OSError:
            return
        shutil.rmtree(temporary, ignore_errors=True)


def _load(path: Path, digest: str) -> Image.Image:
    with Image.open(path, formats=("PNG",)) as image:
        image.load()
        picture = image.copy()
    if pixel_digest(picture) != digest:
        raise ValueError(f"{path} is damaged")
    return picture


def _bytes_of(folder: Path) -> int:
    try:
        return sum(file.stat().st_size for file in folder.iterdir())
    except FileNotFoundError:
        return 0
