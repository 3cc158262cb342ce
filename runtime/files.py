"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write `text` under a temporary name beside `path`, then rename it; what was there stays until then.

    Raises:
        OSError: the file cannot be written; it names `path`.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_text(text, "utf-8")
        partial.replace(path)
    except OSError as error:
        error.filename, error.filename2 = str(path), None  # not the temporary name, and a full disk has none
        raise
    finally:
        partial.unlink(missing_ok=True)
