"""The first 64 bytes of a TensorRT-RTX engine: which architectures and which version it was built for.

The layout is not documented by NVIDIA; it was read off engines of known target and version, and the test-suite builds
such engines and reads them back.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

SIZE = 64
MAGIC = b"vtrt"
_ARCH_BITS = {0: "sm_75", 1: "sm_80", 2: "sm_86", 3: "sm_89", 4: "sm_120", 5: "sm_121", 6: "newer"}


class HeaderError(ValueError):
    """The bytes are not the beginning of a TensorRT-RTX engine."""


@dataclass(frozen=True)
class Header:
    """What an engine says of itself.

    Attributes:
        nbytes: length of the engine.
        version: of the TensorRT-RTX that built it, `1.7.1.116`.
        archs: that it runs on; `newer` stands for architectures after sm_121.
        weight_bytes: of the weights inside.
    """

    nbytes: int
    version: str
    archs: tuple[str, ...]
    weight_bytes: int


def decode(data: bytes) -> Header:
    """Read the header of an engine from its first 64 bytes.

    Raises:
        HeaderError: they are not one.
    """
    if len(data) < SIZE or MAGIC not in data[:16]:
        raise HeaderError(f"not a TensorRT-RTX engine: it begins with {data[:16]!r}")
    (nbytes,) = struct.unpack_from("<Q", data, 0x10)
    major, minor, patch, build = data[0x18:0x1C]
    mask, weight_bytes = struct.unpack_from("<Q", data, 0x20)[0], struct.unpack_from("<Q", data, 0x38)[0]
    archs = tuple(arch for bit, arch in _ARCH_BITS.items() if mask >> bit & 1)
    return Header(nbytes, f"{major}.{minor}.{patch}.{build}", archs, weight_bytes)
