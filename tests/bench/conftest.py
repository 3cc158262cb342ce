from __future__ import annotations

import pytest
from painter import Painter

import fluxkiln


@pytest.fixture
def painter(monkeypatch: pytest.MonkeyPatch) -> Painter:
    """What the command line opens, whatever it is asked for."""
    painter = Painter()
    monkeypatch.setattr(fluxkiln.Pipeline, "from_files", lambda **options: painter)
    return painter
