"""One safetensors file: its header, checked by hand; its tensors, memory-mapped; and a writer that streams.

    8 bytes    length H of the header, little-endian
    H bytes    JSON: name -> {dtype, shape, data_offsets}, and optionally __metadata__: text -> text
    the rest   the tensors, one after another, without holes

Everything but `tensor` and `save_file` works without PyTorch, so that a 24 GB file is described in the time its
header takes to read.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import math
import mmap
import os
import secrets
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
_TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "BOOL": "bool",
    **{f"{kind[0].upper()}{bits}": f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
}
_MAX_HEADER = 100_000_000  # the limit of the safetensors library; FLUX.1's own headers are under 0.3 MB
_SAMPLE = 4096  # bytes read from the middle of every tensor for the sampled digest: one page
_HEADER_ROOM = 1 << 20  # left in front of a streamed file; a FLUX.1 header with every scale of NVFP4 fills a third


class CheckpointError(ValueError):
    """A file is not what it should be; the message says what it is and what to use instead."""


@dataclass(frozen=True)
class TensorInfo:
    """What the header says of a tensor: safetensors' dtype code, shape, and its bytes `[start, end)` in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFile:
    """A safetensors file, opened by reading its header only.

    Attributes:
        path: where it is.
        entries: tensor name -> `TensorInfo`, in the file's order of names.
        metadata: the `__metadata__` of the header, {} when there is none.
        size: bytes on disk.

    Raises:
        CheckpointError: the header is not valid, or does not agree with the file's length.
        FileNotFoundError: there is no such file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} is {'a folder' if self.path.is_dir() else 'not there'}, not a file")
        self.size = self.path.stat().st_size
        self.entries, self.metadata = self._read_header()

    def tensor(self, name: str) -> Tensor:
        """The tensor as a view of the memory map: nothing is read until it is touched. Treat it as read-only.

        Raises:
            CheckpointError: its dtype has no counterpart of whole bytes in PyTorch.
        """
        import torch

        entry = self.entries[name]
        dtype = torch_dtype(entry.dtype)
        if not math.prod(entry.shape):
            return torch.empty(entry.shape, dtype=dtype)
        # from a buffer, not from a storage: the format allows tensors at odd addresses
        flat = torch.frombuffer(self._map, dtype=dtype, count=math.prod(entry.shape), offset=entry.start)
        return flat.view(entry.shape)

    def read(self, name: str) -> bytes:
        """The bytes of one small tensor, without PyTorch."""
        entry = self.entries[name]
        with self.path.open("rb") as file:
            file.seek(entry.start)
            return file.read(entry.end - entry.start)

    def release(self, name: str) -> None:
        """Let go of the memory behind a tensor that has been copied; it is read from disk again when needed."""
        entry = self.entries[name]
        first, last = -(-entry.start // mmap.PAGESIZE), entry.end // mmap.PAGESIZE
        if last > first and hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED, first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE)

    @property
    def digest(self) -> str:
        """sha256 (hex) of the header, the length and a page out of every tensor: milliseconds for any size."""
        status = self.path.stat()
        return _sampled_digest(self.path.resolve(), status.st_size, status.st_mtime_ns)

    def sha256(self) -> str:
        """sha256 (hex) of every byte of the file."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @functools.cached_property
    def _map(self) -> mmap.mmap:
        with self.path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # PyTorch has no read-only tensors

    def _read_header(self) -> tuple[dict[str, TensorInfo], dict[str, str]]:
        with self.path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= _MAX_HEADER:
                raise CheckpointError(f"{self.path} is not a safetensors file: {_first_bytes(start, file.read(56))}")
            if 8 + length > self.size:
                raise CheckpointError(
                    f"{self.path} is truncated: its header alone takes {8 + length:,} bytes, the file has "
                    f"{self.size:,}; download it again"
                )
            text = file.read(length)
        try:
            header = json.loads(text, object_pairs_hook=_unique)
            metadata = header.pop("__metadata__", None) or {}
            entries = {name: _entry(name, value, 8 + length) for name, value in header.items()}
            if not all(isinstance(text, str) for text in metadata.values()):
                raise ValueError("its metadata holds something other than text")
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            raise CheckpointError(f"{self.path} is corrupt: its safetensors header is not valid ({error})") from None
        self._check_offsets(entries, 8 + length)
        return entries, metadata

    def _check_offsets(self, entries: Mapping[str, TensorInfo], data_start: int) -> None:
        end, previous = data_start, "the header"
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
            if entry.start != end:
                fault = "overlap" if entry.start < end else "leave a hole"
                raise CheckpointError(f"{self.path} is corrupt: {previous} and {name} {fault} in its data")
            end, previous = entry.end, name
        if end > self.size:
            raise CheckpointError(
                f"{self.path} is truncated: its header promises {end:,} bytes, the file has {self.size:,}; "
                "download it again"
            )
        if end < self.size:
            raise CheckpointError(f"{self.path} is corrupt: {self.size - end:,} bytes follow its last tensor")


def torch_dtype(code: str) -> torch.dtype:
    """PyTorch's dtype for a safetensors dtype code.

    Raises:
        CheckpointError: there is none of whole bytes.
    """
    import torch

    if code not in _TORCH_NAMES:
        raise CheckpointError(f"tensors of dtype {code} cannot be read")
    return getattr(torch, _TORCH_NAMES[code])


def dtype_code(dtype: torch.dtype) -> str:
    """safetensors' code for a PyTorch dtype.

    Raises:
        ValueError: the format has no code for it.
    """
    name = str(dtype).removeprefix("torch.")
    for code, torch_name in _TORCH_NAMES.items():
        if torch_name == name:
            return code
    raise ValueError(f"safetensors files cannot hold {dtype}")


def save_file(path: str | Path, tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str]) -> None:
    """Write tensors one at a time as they come: memory holds one, and `path` appears only when it is complete.

    Args:
        path: the file to write or replace.
        tensors: (name, tensor) on any device, e.g. a generator.
        metadata: for the header.

    Raises:
        ValueError: two tensors have one name, or a dtype has no place in the format.
        OSError: `path` cannot be written, or its disk is full.
    """
    import torch

    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("x+b") as file:
            file.seek(_HEADER_ROOM)  # the header is known last and stands first
            for name, tensor in tensors:
                if name in header:
                    raise ValueError(f"two tensors are named {name}")
                data = tensor.detach().to("cpu").contiguous().reshape(-1)
                start = file.tell() - _HEADER_ROOM
                file.write(data.view(torch.uint8).numpy().data)
                offsets = [start, file.tell() - _HEADER_ROOM]
                header[name] = {"dtype": dtype_code(tensor.dtype), "shape": list(tensor.shape), "data_offsets": offsets}
            _finish(file, header)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        if error.filename in (None, str(partial)):  # a full disk has no name, the temporary one tells nobody anything
            error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def _finish(file: Any, header: dict[str, Any]) -> None:
    """Put the header in front: padded to the room left for it, or, in a small file, followed at once by the data."""
    text = json.dumps(header, separators=(",", ":")).encode()
    end = file.tell()
    room = _HEADER_ROOM - 8
    if end < 32 * _HEADER_ROOM:
        file.seek(_HEADER_ROOM)
        data = file.read()
        room = -(-len(text) // 8) * 8
        file.seek(8 + room)
        file.write(data)
        file.truncate()
    if len(text) > room:
        raise ValueError(f"a header of {len(text):,} bytes does not fit the {room:,} left for it")
    file.seek(0)
    file.write(struct.pack("<Q", room) + text.ljust(room))


def _entry(name: str, value: dict[str, Any], data_start: int) -> TensorInfo:
    dtype, shape, (start, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    if dtype not in DTYPE_BITS:
        raise ValueError(f"{name} has the unknown dtype {dtype}")
    if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
        raise ValueError(f"{name} has a shape or offset that is not a whole number")
    if (end - start) * 8 != math.prod(shape) * DTYPE_BITS[dtype]:
        raise ValueError(f"{name} is {dtype} {list(shape)} but takes {end - start:,} bytes")
    return TensorInfo(dtype, shape, data_start + start, data_start + end)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(result := dict(pairs)) != len(pairs):
        raise ValueError("a name stands twice")
    return result


def _first_bytes(start: bytes, more: bytes) -> str:
    """What the first bytes of a file that has no safetensors header say it is."""
    text = start + more
    if not text:
        return "it is empty"
    if text.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; fetch the file itself with `git lfs pull`"
    if text.lstrip()[:1] == b"<":
        return "it is a web page, as a download without the right to it leaves behind; log in and download it again"
    return f"it begins with {text[:8]!r}, which is no header length"


@functools.lru_cache(maxsize=256)
def _sampled_digest(path: Path, size: int, modified_ns: int) -> str:
    file = SafetensorsFile(path)
    first = min((entry.start for entry in file.entries.values()), default=size)
    digest = hashlib.sha256(struct.pack("<Q", size))
    with path.open("rb") as data:
        digest.update(data.read(first))
        for entry in sorted(file.entries.values(), key=lambda entry: entry.start):
            data.seek(entry.start + max(0, entry.end - entry.start - _SAMPLE) // 2)
            digest.update(data.read(min(_SAMPLE, entry.end - entry.start)))
    return digest.hexdigest()
