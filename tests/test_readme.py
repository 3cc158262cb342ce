"""What the README says of the code is what the code says."""

from __future__ import annotations

import re
from pathlib import Path

from fluxkiln.cli import COMMANDS
from fluxkiln.kernels import registry

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_kernel_matrix_is_current() -> None:
    _, table, _ = README.replace("<!-- /kernels -->", "<!-- kernels -->").split("<!-- kernels -->")
    assert table.strip() == registry.markdown()


def test_every_command_it_names_exists() -> None:
    blocks = "".join(re.findall(r"^```\n(.*?)^```", README, re.MULTILINE | re.DOTALL))
    named = re.findall(r"^(?:\.venv/bin/)?fluxkiln (\w+)", blocks, re.MULTILINE)
    assert named
    assert set(named) <= set(COMMANDS)
