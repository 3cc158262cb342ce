"""What a newcomer sees first: the demo's pictures, held to what they were asked for."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fluxkiln.bench.shapes_judge import judge, judge_edit
from fluxkiln.bench.shapes_scene import Background, Scene, Thing


def test_the_demo_makes_a_picture_an_edit_and_a_masked_edit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        runpy.run_path(str(Path(__file__).parents[1] / "tools" / "demo.py"))["main"](tmp_path)
    finally:
        torch.set_num_threads(threads)
    scene = Scene(Background("plain", "blue"), (Thing.of("star", "white", cell="left"),))
    moved = scene.replace(things=(scene.things[0].replace(x=1 - scene.things[0].x),))
    more = scene.replace(things=(*scene.things, Thing.of("circle", "black", "small", "top right")))
    first, edit, masked = (
        np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("prompt", "edit", "masked-edit")
    )
    assert judge(first, scene).ok
    assert judge_edit(first, edit, scene, moved).ok
    assert judge_edit(first, masked, scene, more).ok
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 4 * 256
        assert sheet.height > 256
    assert f"look at {tmp_path / 'sheet.png'}" in capsys.readouterr().out
