"""The image benchmark around a pipeline that draws: suites, resume, tables, comparison."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fluxkiln.bench import image, suite
from fluxkiln.bench.shapes_scene import Background, Scene, Thing, draw

SCENE = Scene(Background("plain", "blue"), (Thing.of("star", "red", "large"),))
AFTER = SCENE.replace(things=(SCENE.things[0].replace(color="white"),))
ITEMS = [
    suite.Item("single-0", "single", "a large red star on a blue background", scene=SCENE),
    suite.Item("recolor-0", "recolor", "make the star white", scene=AFTER, before=SCENE),
    suite.Item("free-0", "free", "a fox", width=32, height=48),
]


class Painter:
    """Stands in for a pipeline: makes what the suite asks for, or something else where `wrong` names the prompt."""

    side = 64

    def __init__(self, wrong: str = "") -> None:
        self.wrong, self.calls = wrong, 0

    def __call__(self, prompt: str, **options: Any) -> Any:
        self.calls += 1
        scenes = {item.prompt: item.scene for item in ITEMS}
        scene = None if prompt == self.wrong else scenes[prompt]
        size = (options["width"] or 64, options["height"] or 64)
        picture = Image.new("RGB", size, "green") if scene is None else draw(scene, *size)
        timings = {"text": 0.1, "encode": 0.0, "modulate": 0.1, "steps": [0.2, 0.3], "decode": 0.1, "total": 1.0}
        record = SimpleNamespace(to_json=lambda: json.dumps({"timings": timings}))
        return SimpleNamespace(images=[picture], record=record)


def test_makes_measures_and_resumes(tmp_path: Path) -> None:
    settings = image.Settings(4, None, 0)
    painter = Painter()
    made = image.make(painter, ITEMS, tmp_path, settings, progress=False)
    assert painter.calls == 3
    assert image.make(painter, ITEMS, tmp_path, settings, progress=False) == made
    assert painter.calls == 3  # nothing left to make
    image.make(painter, ITEMS, tmp_path, image.Settings(5, None, 0), progress=False)
    assert painter.calls == 6  # another request
    summary = image.summarize(image.measure(ITEMS, tmp_path))
    assert summary["all"]["n"] == summary["all"]["right"] == 2  # the free prompt has no scene to judge by
    assert "recolor" in image.table(summary)
    costs = image.latency(made, gpu_hour_price=3600.0)
    assert costs == pytest.approx(
        {"text": 0.1, "encode": 0, "modulate": 0.1, "denoise": 0.5, "decode": 0.1, "total": 1, "cost_per_image": 1}
    )


def test_a_wrong_picture_counts_as_wrong(tmp_path: Path) -> None:
    image.make(Painter(wrong=ITEMS[1].prompt), ITEMS, tmp_path, image.Settings(4, None, 0), progress=False)
    rows = {row["id"]: row for row in image.measure(ITEMS, tmp_path)}
    assert rows["single-0"]["ok"]
    assert not rows["recolor-0"]["ok"]
    assert image.summarize(rows.values())["all"]["right"] == 1


def test_compare_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [tmp_path / name for name in "ab"]
    for folder, wrong in zip(folders, ("", ITEMS[0].prompt), strict=True):
        image.make(Painter(wrong), ITEMS, folder, image.Settings(4, None, 0), progress=False)
    sheet = tmp_path / "sheet.png"
    assert image.main(["compare", *map(str, folders), "--sheet", str(sheet), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)["fidelity"]
    assert scores["n"] == 3
    assert scores["equal"] == 2
    assert scores["ssim"] < 1
    with Image.open(sheet) as picture:
        assert np.asarray(picture).std() > 10
    (tmp_path / "empty").mkdir()
    assert image.main(["compare", str(folders[0]), str(tmp_path / "empty")]) == 2
    assert "no picture of the same name" in capsys.readouterr().err


def test_kontextbench_folder(tmp_path: Path) -> None:
    draw(SCENE).save(tmp_path / "0001.png")
    line = {"file_name": "0001.png", "instruction": "make it white", "category": "Local Instruction", "key": 7}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    (item,) = suite.load(tmp_path)
    assert (item.id, item.prompt, item.category) == ("7", "make it white", "Local Instruction")
    source = item.source()
    assert source is not None
    assert source.size == (64, 64)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1"),
        ('{"id": 1, "category": "a"}', "'prompt' is missing"),
        ('{"id": 1, "category": "a", "prompt": "x"}\n{"id": 1, "category": "a", "prompt": "y"}', "same id"),
    ],
)
def test_broken_suites_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        suite.load(path)


def test_unknown_suite_names_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert image.main(["--suite", "nothing"]) == 2
    assert "expected one of shapes" in capsys.readouterr().err
