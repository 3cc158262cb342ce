"""The image benchmark around a pipeline that draws: suites, resume, tables, comparison."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fluxkiln
from fluxkiln.bench import ablation, fidelity, image, learned, suite
from fluxkiln.bench.shapes_scene import Background, Scene, Thing, draw
from fluxkiln.cli import main
from fluxkiln.config import FluxConfig
from fluxkiln.kernels import backend, registry

BENCH = ["bench", "image"]
SCENE = Scene(Background("plain", "blue"), (Thing.of("star", "red", "large"),))
AFTER = SCENE.replace(things=(SCENE.things[0].replace(color="white"),))
LAST = AFTER.replace(background=Background("plain", "green"))
ITEMS = [
    suite.Item("single-0", "single", "a large red star on a blue background", scene=SCENE, number=1),
    suite.Item("recolor-0", "recolor", "make the star white", scene=AFTER, before=SCENE, number=2),
    suite.Item("free-0", "free", "a fox", width=32, height=48, number=3),
]
TURNS = [
    suite.Item("t-1", "turn 1", "make the star white", scene=AFTER, before=SCENE, number=1),
    suite.Item("t-2", "turn 2", "put it on green", scene=LAST, before=AFTER, follows="t-1", number=2),
]


class Painter:
    """Stands in for a pipeline: makes what the suite asks for, or something else where `wrong` names the prompt.

    At guidance 0 everything is wrong.
    """

    side = 64
    transformer: Any = None

    def __init__(self, wrong: str = "", version: str = "1") -> None:
        self.wrong, self.version, self.calls = wrong, version, list[dict[str, Any]]()

    def __call__(self, prompt: str, dry_run: bool = False, callback: object = None, **options: Any) -> Any:
        source = options.pop("image")
        seen = None if source is None else hashlib.sha256(source.tobytes()).hexdigest()
        key = json.dumps([self.version, self.wrong, prompt, seen, options], sort_keys=True, default=str)
        timings = {"text": 0.1, "encode": 0.0, "modulate": 0.1, "steps": [0.2, 0.3], "decode": 0.1, "total": 1.0}
        record = SimpleNamespace(key=key, to_json=lambda: json.dumps({"timings": timings, "backend": "painter"}))
        if dry_run:
            return SimpleNamespace(images=[], record=record)
        self.calls.append({"prompt": prompt, "image": source, **options})
        scenes = {item.prompt: item.scene for item in (*ITEMS, *TURNS)}
        wrong = prompt == self.wrong or options["guidance_scale"] == 0
        scene = None if wrong else scenes.get(prompt)
        size = (options["width"] or 64, options["height"] or 64)
        picture = Image.new("RGB", size, "green") if scene is None else draw(scene, *size)
        return SimpleNamespace(images=[picture], record=record)


@pytest.fixture
def painter(monkeypatch: pytest.MonkeyPatch) -> Painter:
    """What the command line opens, whatever it is asked for."""
    painter = Painter()
    monkeypatch.setattr(fluxkiln.Pipeline, "from_pretrained", lambda model, **options: painter)
    return painter


def suite_file(folder: Path, items: list[suite.Item]) -> Path:
    lines = []
    for item in items:
        data = {k: v for k, v in dataclasses.asdict(item).items() if v is not None and k != "number"}
        data |= {key: getattr(item, key).to_dict() for key in ("scene", "before") if getattr(item, key)}
        lines.append(json.dumps(data))
    (folder / "suite.jsonl").write_text("\n".join(lines))
    return folder / "suite.jsonl"


def test_makes_measures_and_resumes(tmp_path: Path) -> None:
    settings, painter = image.Settings(steps=4), Painter()
    made = image.make(painter, ITEMS, tmp_path, settings, progress=False)
    assert len(painter.calls) == 3
    assert [call["seed"] for call in painter.calls] == [1, 2, 3]
    assert image.make(painter, ITEMS, tmp_path, settings, progress=False) == made
    assert len(painter.calls) == 3  # nothing left to make
    log = tmp_path / "made.jsonl"
    log.write_text(log.read_text()[:-9])  # as a run leaves it that is killed there
    for _ in range(2):
        assert image.make(painter, ITEMS, tmp_path, settings, progress=False) == made
        assert len(painter.calls) == 4
    summary = image.summarize(image.measure(ITEMS, tmp_path))
    assert summary["all"]["n"] == summary["all"]["right"] == 2  # the free prompt has no scene to judge by
    assert (summary["prompts"]["n"], summary["edits"]["n"]) == (1, 1)
    assert "recolor" in image.table(summary)
    costs = image.latency(made, gpu_hour_price=3600.0)
    assert costs == pytest.approx(
        {"text": 0.1, "encode": 0, "modulate": 0.1, "denoise": 0.5, "decode": 0.1, "total": 1, "cost_per_image": 1}
    )


@pytest.mark.parametrize("change", ["steps", "model", "picture"])
def test_makes_again_what_would_come_out_differently(tmp_path: Path, change: str) -> None:
    image.make(Painter(), TURNS, tmp_path, image.Settings(steps=4), progress=False)
    painter = Painter(version="2" if change == "model" else "1")
    settings = image.Settings(steps=5 if change == "steps" else 4)
    if change == "picture":  # the first turn comes out differently, so the second has to follow
        Image.new("RGB", (64, 64)).save(tmp_path / "images" / "t-1.png")
    image.make(painter, TURNS, tmp_path, settings, progress=False)
    assert len(painter.calls) == (1 if change == "picture" else 2)


def test_an_item_has_the_same_seed_whatever_else_is_selected(painter: Painter, tmp_path: Path) -> None:
    path = suite_file(tmp_path, ITEMS)
    for extra in ([], ["--category", "free"]):
        assert main([*BENCH, "--suite", str(path), "--out", str(tmp_path / f"run{len(extra)}"), *extra]) == 0
    assert [call["seed"] for call in painter.calls] == [1, 2, 3, 3]


def test_turns_edit_what_the_turn_before_made(tmp_path: Path) -> None:
    painter = Painter()
    image.make(painter, TURNS, tmp_path, image.Settings(), progress=False)
    assert np.array_equal(painter.calls[0]["image"], draw(SCENE))
    assert np.array_equal(painter.calls[1]["image"], fidelity.read(tmp_path / "images" / "t-1.png"))
    rows = image.measure(TURNS, tmp_path)
    assert [row["ok"] for row in rows] == [True, True]
    assert rows[1]["checks"]["identity"]
    # An object that became another one in the first turn is still wrong, and not the same, in the second.
    for item, shape in zip(TURNS, ("circle", "circle"), strict=True):
        scene = item.scene.replace(things=(item.scene.things[0].replace(shape=shape),))
        draw(scene).save(tmp_path / "images" / f"{item.id}.png")
    rows = image.measure(TURNS, tmp_path)
    assert [row["checks"]["identity"] for row in rows] == [False, False]
    assert rows[1]["checks"]["unchanged"]


def test_a_turn_needs_the_one_before(painter: Painter, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = suite_file(tmp_path, TURNS)
    assert main([*BENCH, "--suite", str(path), "--category", "turn 2", "--out", str(tmp_path / "run")]) == 1
    assert "t-2 edits the picture of t-1, which is not made" in capsys.readouterr().err
    with pytest.raises(ValueError, match="t-2 edits the picture of t-1, which is not made"):
        TURNS[1].source()  # and never what its scene would look like


def test_a_wrong_picture_counts_as_wrong(tmp_path: Path) -> None:
    image.make(Painter(wrong=ITEMS[1].prompt), ITEMS, tmp_path, image.Settings(steps=4), progress=False)
    rows = {row["id"]: row for row in image.measure(ITEMS, tmp_path)}
    assert rows["single-0"]["ok"]
    assert not rows["recolor-0"]["ok"]
    assert image.summarize(rows.values())["all"]["right"] == 1


def test_a_sweep_makes_a_run_for_each_value(
    painter: Painter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = suite_file(tmp_path, ITEMS), tmp_path / "sweep"
    options = ["--guidance", "0", "3.5", "--true-cfg-scale", "1", "2", "--negative-prompt", "green"]
    assert main([*BENCH, "--suite", str(path), "--out", str(out), *options]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert table[0] == ["single", "recolor", "prompts", "edits", "all"]
    assert table[1] == ["guidance-0", "0.0%", "0.0%", "0.0%", "0.0%", "0.0%"]
    assert table[4] == ["guidance-3.5", "cfg-2", *["100.0%"] * 5]
    results = json.loads((out / "guidance-3.5 cfg-2" / "results.json").read_text())
    assert (results["guidance"], results["true_cfg_scale"], results["negative_prompt"]) == (3.5, 2.0, "green")
    negatives = [call.get("negative_prompt") for call in painter.calls]
    assert negatives == [None, None, None, "green", "green", "green"] * 2
    assert main([*BENCH, "--suite", str(path), "--guidance", "1", "2", "--floor", str(out)]) == 1
    assert "go with one --guidance" in capsys.readouterr().err
    right = {"n": 2, "right": 1}
    rows = image.sweep_table({"a": {"single": right, "pair": right}, "b": {"pair": right}}).splitlines()
    assert rows[2].split() == ["b", "-", "50.0%"]


def test_an_items_own_negative_prompt_counts_first() -> None:
    painter, items = Painter(), [dataclasses.replace(ITEMS[0], negative_prompt="a red background"), ITEMS[0]]
    for item in items:
        image.request(painter, item, image.Settings(true_cfg_scale=2.0))
    assert [call["negative_prompt"] for call in painter.calls] == ["a red background", ""]


@pytest.mark.parametrize(("background", "ok"), [("green", True), ("blue", False)])
def test_a_background_left_open_may_be_any_but_one(tmp_path: Path, background: str, ok: bool) -> None:
    item = suite.Item("n", "negative", "a large red star", scene=SCENE, without="blue")
    (tmp_path / "images").mkdir()
    draw(SCENE.replace(background=Background("gradient", "white", background))).save(tmp_path / "images" / "n.png")
    (row,) = image.measure([item], tmp_path)
    assert (row["ok"], row["checks"]["without"], row["checks"]["shape"]) == (ok, ok, True)


@pytest.mark.parametrize("size", [(96, 64), (64, 128)])
def test_other_sizes(painter: Painter, tmp_path: Path, size: tuple[int, int]) -> None:
    path, out = suite_file(tmp_path, ITEMS), tmp_path / "run"
    assert main([*BENCH, "--suite", str(path), "--size", f"{size[0]}x{size[1]}", "--out", str(out)]) == 0
    assert painter.calls[1]["image"].size == size
    assert [(call["width"], call["height"]) for call in painter.calls] == [size, size, (32, 48)]
    assert json.loads((out / "results.json").read_text())["summary"]["all"]["right"] == 2


def test_words_of_any_picture_are_read_by_whoever_can(tmp_path: Path) -> None:
    item = suite.Item("w", "sign", 'a sign that says "OPEN"', text="OPEN")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "images" / "w.png")
    assert "checks" not in image.measure([item], tmp_path)[0]
    (row,) = image.measure([item], tmp_path, image.Readers(words=lambda pixels: "OPEM", reward=lambda prompt, p: 0.5))
    assert (row["ok"], row["read"], row["edit_distance"], row["image_reward"]) == (False, "OPEM", 1, 0.5)


def test_compare_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [tmp_path / name for name in "ab"]
    for folder, wrong in zip(folders, ("", ITEMS[0].prompt), strict=True):
        image.make(Painter(wrong), ITEMS, folder, image.Settings(steps=4), progress=False)
    sheet = tmp_path / "sheet.png"
    options = ["--floor", str(folders[1]), "--sheet", str(sheet), "--json"]
    assert main([*BENCH, "compare", *map(str, folders), *options]) == 0
    results = json.loads(capsys.readouterr().out)
    scores = results["fidelity"]
    assert scores["n"] == 3
    assert scores["equal"] == 2
    assert scores["ssim"] < 1
    assert scores["low"] == scores["psnr"]  # of one pair
    assert results["noise_floor"]["equal"] == 3
    with Image.open(sheet) as picture:
        assert np.asarray(picture).std() > 10
    (tmp_path / "empty").mkdir()
    assert main([*BENCH, "compare", str(folders[0]), str(tmp_path / "empty")]) == 1
    said = f"fluxkiln: {folders[0]} and {tmp_path / 'empty'} have no picture of the same name\n"
    assert capsys.readouterr().err == said
    assert main([*BENCH, "compare", str(folders[0])]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    Image.new("RGB", (16, 32)).save(tmp_path / "empty" / "single-0.JPEG")
    assert main([*BENCH, "compare", str(folders[0]), str(tmp_path / "empty")]) == 1
    assert "single-0: the pictures have different sizes, 64 x 64 and 16 x 32" in capsys.readouterr().err


def test_fidelity_is_of_this_runs_pictures(
    painter: Painter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--suite", str(suite_file(tmp_path, ITEMS)), "--out", str(tmp_path / "run")]
    assert main([*BENCH, *command]) == 0
    assert main([*BENCH, *command, "--floor", str(tmp_path / "run")]) == 1
    assert "give both" in capsys.readouterr().err
    one = [*command, "--category", "single", "--reference", str(tmp_path / "run"), "--floor", str(tmp_path / "run")]
    assert main([*BENCH, *one]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["fidelity"]["n"] == results["noise_floor"]["n"] == 1
    made = len(painter.calls)
    (tmp_path / "other").mkdir()
    for other in ("typo", "other"):  # said before anything is made
        options = ["--reference", str(tmp_path / "run"), "--floor", str(tmp_path / other)]
        assert main([*BENCH, "--suite", command[1], "--out", str(tmp_path / "new"), *options]) == 1
        assert f"{tmp_path / other} have no picture of this run of the same name" in capsys.readouterr().err
    assert len(painter.calls) == made


def test_the_noise_floor_is_of_the_same_pictures(
    painter: Painter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, items in (("a", ITEMS[:1]), ("b", ITEMS), ("floor", ITEMS)):
        image.make(Painter(ITEMS[1].prompt if name == "floor" else ""), items, tmp_path / name, image.Settings())
    folders = [str(tmp_path / name) for name in ("a", "b")]
    capsys.readouterr()
    assert main([*BENCH, "compare", *folders, "--floor", str(tmp_path / "floor"), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    # The floor's wrong picture is not in a.
    assert results["fidelity"]["n"] == results["noise_floor"]["n"] == results["noise_floor"]["equal"] == 1


def test_a_floor_of_other_requests_is_none(
    painter: Painter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--suite", str(suite_file(tmp_path, ITEMS))]
    for name, options in {"a": [], "b": ["--seed", "7"], "c": ["--precision", "fp8"]}.items():
        assert main([*BENCH, *command, *options, "--out", str(tmp_path / name)]) == 0
    a, b, c = (str(tmp_path / name) for name in "abc")
    assert main([*BENCH, "compare", c, a, "--floor", a]) == 0
    made = len(painter.calls)
    for wrong in (["compare", c, a, "--floor", b], [*command, "--reference", a, "--floor", b]):
        capsys.readouterr()
        assert main([*BENCH, *wrong]) == 1
        assert f"{b} has seed 7, the reference {a} 0" in capsys.readouterr().err
    assert len(painter.calls) == made
    # Against another seed, or fewer steps, a run may be compared: that is no claim about chance.
    assert main([*BENCH, "compare", a, b]) == 0


def test_a_sheet_shows_the_worst_and_some_of_the_rest() -> None:
    assert fidelity.to_show([3, 1, 2], lambda i: i) == [3, 1, 2]
    rows = list(range(1000))
    shown = fidelity.to_show(rows, lambda i: i % 100)
    assert len(set(shown)) == len(shown) == 60
    assert {i for i in rows if i % 100 < 3} <= set(shown)
    assert max(i % 100 for i in shown) > 90


def test_the_judge_takes_pictures_of_anybody(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = suite_file(tmp_path, ITEMS)
    ours, theirs = tmp_path / "ours" / "images", tmp_path / "theirs"
    for folder in (ours, theirs):
        folder.mkdir(parents=True)
    for item in ITEMS[:2]:
        assert item.scene is not None
        draw(item.scene).save(ours / f"{item.id}.png")
    draw(SCENE).save(theirs / "single-0.webp", lossless=True)
    draw(SCENE).save(theirs / "recolor-0.png")  # not white
    folders = [str(ours.parent), str(theirs)]
    assert main([*BENCH, "judge", *folders, "--suite", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [found[folder]["all"]["right"] for folder in folders] == [2, 1]
    assert main([*BENCH, "judge", *folders, "--suite", str(path), "--category", "single"]) == 0
    said = capsys.readouterr().out
    assert f"{theirs}: 1 of 1 items" in said
    assert said.count("100.0%") == 6  # share and upper end in each table, and side by side
    (theirs / "single-0.webp").unlink()  # side by side are only items that both have
    assert main([*BENCH, "judge", *folders, "--suite", str(path), "--json"]) == 0
    assert [list(entry) for entry in json.loads(capsys.readouterr().out).values()] == [["recolor"]] * 2
    (tmp_path / "empty").mkdir()
    assert main([*BENCH, "judge", str(tmp_path / "empty"), "--suite", str(path)]) == 1
    assert "have no picture of this run of the same name" in capsys.readouterr().err
    assert main([*BENCH, "judge", str(theirs), "--suite", str(path), "--category", "free"]) == 1
    assert "no item of" in capsys.readouterr().err


def test_preference_is_told_by_category(
    painter: Painter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(learned, "image_reward", lambda folder: lambda prompt, pixels: float(len(prompt)))
    command = ["--suite", str(suite_file(tmp_path, ITEMS)), "--image-reward", str(tmp_path)]
    assert main([*BENCH, *command, "--out", str(tmp_path / "run")]) == 0
    single, recolor, free = (len(item.prompt) for item in ITEMS)
    rewards = {"single": single, "all": (single + recolor + free) / 3, "recolor": recolor, "free": free}
    assert json.loads((tmp_path / "run" / "results.json").read_text())["image_reward"] == rewards
    assert f"image_reward: single {single}, all" in capsys.readouterr().out


def test_what_an_edit_left_alone_is_in_the_summary() -> None:
    rows = [
        {"category": "move", "edit": True, "ok": True, "checks": {"unchanged": db != 20.0}, "unchanged_psnr": db}
        for db in (40.0, None, 20.0)
    ]
    summary = image.summarize(rows)
    assert summary["move"]["unchanged_psnr"] == {"median": 40.0, "low": 20.0}
    assert re.search(r"100.0%    43.8% – 100.0% .*\(unchanged: median 40.0 dB, lowest 20.0\)", image.table(summary))
    summary = image.summarize([rows[1]])
    assert summary["move"]["unchanged_psnr"] == {"median": None, "low": None}  # equal
    assert "median inf dB" in image.table(summary)


def test_results_are_json_where_nothing_else_changed(painter: Painter, tmp_path: Path) -> None:
    """The PSNR of equal pixels is infinite, which JSON does not know."""
    assert main([*BENCH, "--suite", str(suite_file(tmp_path, ITEMS)), "--out", str(tmp_path / "run")]) == 0

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    rows = json.loads((tmp_path / "run" / "results.json").read_text(), parse_constant=refuse)["items"]
    assert rows[1]["checks"]["unchanged"]
    assert rows[1]["unchanged_psnr"] is None


def test_pictures_are_read_as_the_pipeline_reads_them(tmp_path: Path) -> None:
    """Transparent parts over white, upright."""
    picture, exif = Image.new("RGBA", (4, 2), (0, 0, 0, 0)), Image.Exif()
    exif[0x0112] = 6  # lies on its side
    picture.save(tmp_path / "a.png", exif=exif)
    assert fidelity.read(tmp_path / "a.png").tolist() == np.full((4, 2, 3), 255).tolist()
    painter = Painter()
    item = suite.Item("a", "edit", "a fox", image=tmp_path / "a.png")
    image.request(painter, item, image.Settings())
    assert (painter.calls[0]["image"].mode, painter.calls[0]["image"].filename) == ("RGBA", str(tmp_path / "a.png"))
    sheet = np.asarray(fidelity.contact_sheet([("a", [painter.calls[0]["image"]])], side=64))
    assert (sheet[-60:] == 255).all()


def test_masks_and_control_pictures_reach_the_pipeline(painter: Painter, tmp_path: Path) -> None:
    for name in ("a", "m", "c"):
        draw(SCENE).save(tmp_path / f"{name}.png")
    lines = [
        {"id": 1, "category": "fill", "prompt": "a fox", "image": "a.png", "mask": "m.png"},
        {"id": 2, "category": "canny", "prompt": "a fox", "control": "c.png"},
    ]
    path = tmp_path / "suite.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    fill, canny = suite.load(path)
    for item in (fill, canny):
        image.request(painter, item, image.Settings())
    asked = [(call["mask_image"], call["control_image"], call["image"] is None) for call in painter.calls]
    assert asked == [(tmp_path / "m.png", None, False), (None, tmp_path / "c.png", True)]


def test_kontextbench_folder(painter: Painter, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(SCENE).save(tmp_path / "0001.png")
    prompt = "make it\u2028white"
    line = {"file_name": "0001.png", "instruction": prompt, "category": "Local Instruction", "key": 7}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")
    (item,) = suite.load(tmp_path)
    assert (item.id, item.prompt, item.category) == ("7", prompt, "Local Instruction")
    sheet = str(tmp_path / "s.png")
    assert main([*BENCH, "--suite", str(tmp_path), "--out", str(tmp_path / "run"), "--sheet", sheet]) == 0
    assert np.array_equal(painter.calls[0]["image"], draw(SCENE))
    assert (tmp_path / "run" / "images" / "7.png").is_file()
    assert json.loads((tmp_path / "run" / "results.json").read_text())["summary"] == {}
    assert capsys.readouterr().out.startswith("nothing to judge by")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1"),
        ('{"id": 1, "category": "a"}', "'prompt' is missing"),
        ('{"id": 1, "category": "a", "prompt": "x"}\n{"id": 1, "category": "a", "prompt": "y"}', "same id '1'"),
        ('{"id": 1, "category": "a", "prompt": "x", "follows": "0"}', "1 follows '0', which no earlier line has"),
        ('{"id": "../1", "category": "a", "prompt": "x"}', "the id '../1' is no name for a file"),
        ('{"id": 1, "category": "a", "prompt": "x", "image": "a.png"}', "1 needs .*a.png, which is not there"),
        ('{"id": 1, "category": "a", "prompt": "x", "mask": "m.png"}', "1 needs .*m.png, which is not there"),
        ("[1, 2]", "expected an object with the keys id, category, prompt, got"),
        ('{"id": "", "category": "a", "prompt": "x"}', "the id '' is no name for a file"),
        ('{"id": 1, "category": "a", "prompt": 7}', "prompt must be str, got 7"),
        ('{"id": 1, "category": "a", "prompt": "x", "seed": "y"}', "seed must be int, got 'y'"),
        ('{"id": 1, "category": "a", "prompt": "x", "txt": "y"}', "unknown key 'txt'; known are id, category"),
        ('{"id": 1, "category": "a", "prompt": "x", "without": "pink"}', "without must be one of red, .*'pink'"),
        ('{"key": 1, "category": "a", "instruction": "x", "file_name": null}', "file_name must be str, got None"),
        (
            '{"id": 1, "category": "a", "prompt": "x", "scene": {"background": {"kind": "plain", "color": "pink"}}}',
            "color must be one of red, .* got 'pink'",
        ),
    ],
)
def test_broken_suites_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        suite.load(path)


def test_a_folder_hides_no_bundled_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes" / "metadata.jsonl").write_text('{"id": 1, "category": "a", "prompt": "mine"}\n')
    assert len(suite.load("shapes")) > 1000
    assert [item.prompt for item in suite.load("./shapes")] == ["mine"]


def test_a_category_that_is_not_there_is_said(
    painter: Painter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*BENCH, "--suite", str(suite_file(tmp_path, ITEMS)), "--category", "single", "zebra"]) == 1
    assert "no category 'zebra': the suite has the categories single, recolor, free" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--dtype", "fp32"], ["--gpu-hour-price", "2"], ["--step-errors", "1"]])
def test_a_peer_refuses_what_it_would_ignore(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BENCH, "--peer", "diffusers", *options]) == 1
    assert "are of our own backends, not of a --peer" in capsys.readouterr().err


def test_a_peer_refuses_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(SCENE).save(tmp_path / "a.png")
    item = {"id": 1, "category": "fill", "prompt": "a fox", "image": "a.png", "mask": "a.png"}
    (tmp_path / "suite.jsonl").write_text(json.dumps(item))
    assert main([*BENCH, "--suite", str(tmp_path / "suite.jsonl"), "--peer", "diffusers"]) == 1
    assert "not from a mask or control picture" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--precision", "fp8"], "--precision must be fp32 or bf16, got 'fp8'"),
        (["--backend", "trt"], "an engine has one: take --backend eager or triton"),
        (["--suite", "shapes-turns"], "sequence-00-2 follows another, leave it out"),
    ],
)
def test_an_ablation_has_one_truth(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BENCH, "ablate", *options]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("format", "arch"), [("fp8", 89), ("fp8", 90), ("nvfp4", 100), ("nvfp4", 120)])
def test_triton_runs_what_an_ablation_quantises(monkeypatch: pytest.MonkeyPatch, format: str, arch: int) -> None:
    monkeypatch.setattr(registry, "unavailable", lambda device: None)
    monkeypatch.setattr(backend, "native_arch", lambda device: arch)
    for recipe in ablation.recipes([format]).values():
        assert registry.refuse_model(128, 3072, recipe, torch.device("cpu"), torch.bfloat16) is None


def test_an_ablation_that_cannot_end_does_not_begin(painter: Painter, capsys: pytest.CaptureFixture[str]) -> None:
    painter.transformer = SimpleNamespace(config=FluxConfig(), device=torch.device("cpu"), dtype=torch.float32)
    assert main([*BENCH, "ablate", "--backend", "triton", "--limit", "1"]) == 1
    assert "backend triton: the kernels compute in bfloat16" in capsys.readouterr().err
    assert painter.calls == []


def test_unknown_suite_names_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BENCH, "--suite", "nothing"]) == 1
    assert "expected one of shapes, shapes-negative, shapes-turns, a JSONL" in capsys.readouterr().err
