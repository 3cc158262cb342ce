"""Files that are there whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from fluxkiln.files import write_text


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    write_text(path, "old \u00d7\n")

    def full(self: Path, data: str, encoding: str) -> int:
        with open(self, "w") as file:
            file.write(data[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"No space left on device: .*results\.json"):
        write_text(path, "new")
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]
    assert path.read_text("utf-8") == "old \u00d7\n"


def test_a_missing_folder_is_named_not_the_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "table.json"
    with pytest.raises(FileNotFoundError) as error:
        write_text(path, "{}")
    assert error.value.filename == str(path)
