"""The wheel alone, without the checkout: it has the package, the bundled model and the suites."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
SOURCES = ("runtime", "kernels", "export", "engines", "bench")


@pytest.mark.long
def test_the_wheel_makes_the_same_picture_and_judges_it(tmp_path: Path) -> None:
    source, package, out = tmp_path / "source", tmp_path / "package", tmp_path / "out"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in SOURCES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps")
    subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(package)

    def fluxkiln(*arguments: str, path: Path | None = None) -> str:
        found = "" if path is None else f"sys.path.insert(0, {str(path)!r}); "
        program = f"import sys; {found}import fluxkiln.cli; print(fluxkiln.cli.__file__); fluxkiln.cli.process()"
        command = [sys.executable, "-c", program, *arguments]
        done = subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.PIPE, text=True)
        assert path is None or done.stdout.startswith(str(path)), "the checkout's package ran instead"
        return done.stdout

    fluxkiln("bench", "image", "--suite", "shapes", "--limit", "1", "--out", str(out), path=package)
    fluxkiln("bench", "image", "--suite", "shapes", "--limit", "1", "--out", str(tmp_path / "checkout"))
    pictures = sorted((out / "images").iterdir())
    assert len(pictures) > 10
    for picture in pictures:
        same = tmp_path / "checkout" / "images" / picture.name
        np.testing.assert_array_equal(np.asarray(Image.open(picture)), np.asarray(Image.open(same)))
