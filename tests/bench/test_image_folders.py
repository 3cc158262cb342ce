"""What is said of folders of pictures: compared, held to a noise floor, judged, shown on a sheet."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from painter import ITEMS, SCENE, TURNS, Painter, suite_file
from PIL import Image

from fluxkiln.bench import fidelity, image, learned, suite
from fluxkiln.bench.shapes_scene import draw
from fluxkiln.cli import main

BENCH = ["bench", "image"]


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
    assert main([*BENCH, "compare", str(folders[0]), str(tmp_path / "nowhere")]) == 1
    assert capsys.readouterr().err == f"fluxkiln: no folder {tmp_path / 'nowhere'}\n"
    Image.new("RGB", (16, 32)).save(tmp_path / "empty" / "single-0.JPEG")
    assert main([*BENCH, "compare", str(folders[0]), str(tmp_path / "empty")]) == 1
    assert "single-0: the pictures have different sizes, 64 x 64 and 16 x 32" in capsys.readouterr().err


@pytest.mark.parametrize("items", [ITEMS, TURNS])
def test_a_sheet_of_two_folders_shows_what_was_asked_for(
    tmp_path: Path, items: list[suite.Item], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the suite: the instruction, and the picture that was to be edited."""
    folders = [str(tmp_path / name) for name in "ab"]
    for folder in folders:
        image.make(Painter(), items, Path(folder), image.Settings(steps=4), progress=False)
    shown: list[tuple[str, list[Image.Image]]] = []
    monkeypatch.setattr(
        fidelity, "contact_sheet", lambda rows: shown.extend((c, [*p]) for c, p in rows) or Image.new("RGB", (8, 8))
    )
    sheet, more = ["--sheet", str(tmp_path / "s.png")], ["--suite", str(suite_file(tmp_path, items))]
    assert main([*BENCH, "compare", *folders, *more]) == 1
    assert "--suite says what a --sheet shows: give both" in capsys.readouterr().err
    assert main([*BENCH, "compare", *folders, *sheet]) == 0
    assert {len(row) for _, row in shown} == {2}
    shown.clear()
    assert main([*BENCH, "compare", *folders, *sheet, *more]) == 0
    by_prompt = {caption.removesuffix(": a | b"): row for caption, row in shown}
    assert by_prompt.keys() == {item.prompt for item in items}
    for item in items:
        *before, _, _ = by_prompt[item.prompt]
        source = item.source(made=tmp_path / "a" / "images")
        wanted = [] if source is None else [np.asarray(source).tolist()]
        assert [np.asarray(picture).tolist() for picture in before] == wanted


def test_what_was_judged_outlives_a_comparison_that_fails(
    painter: Painter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (16, 32)).save(other / "single-0.png")
    command = [*BENCH, "--suite", str(suite_file(tmp_path, ITEMS)), "--out", str(tmp_path / "run")]
    assert main([*command, "--reference", str(other)]) == 1
    assert "the pictures have different sizes" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "results.json").read_text())["summary"]["all"]["n"] == sum(
        item.scene is not None for item in ITEMS
    )
    (other / "results.json").write_text("{")
    assert main([*BENCH, "compare", str(tmp_path / "run"), str(other)]) == 1
    assert f"{other / 'results.json'} is no JSON" in capsys.readouterr().err
    for option in ("--guidance", "--true-cfg-scale"):
        assert main([*command, option, "nan"]) == 2
        assert f"{option}: must be a finite number, got 'nan'" in capsys.readouterr().err
    for path in (tmp_path, tmp_path / "nowhere" / "a.json"):
        assert main([*BENCH, "ablate", "--out", str(path)]) == 2
        assert "must be a file in a folder that is there" in capsys.readouterr().err


def test_fidelity_is_of_this_runs_pictures(
    painter: Painter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--suite", str(suite_file(tmp_path, ITEMS)), "--out", str(tmp_path / "run")]
    assert main([*BENCH, *command]) == 0
    assert main([*BENCH, *command, "--floor", str(tmp_path / "run")]) == 1
    assert "give both" in capsys.readouterr().err
    one = [*command, "--category", "single", "--reference", str(tmp_path / "run"), "--floor", str(tmp_path / "run")]
    made = len(painter.calls)
    assert main([*BENCH, *one]) == 1
    assert "run is the --reference or the --floor: these pictures would be made over it" in capsys.readouterr().err
    assert len(painter.calls) == made
    assert main([*BENCH, *one, "--out", str(tmp_path / "again")]) == 0
    results = json.loads((tmp_path / "again" / "results.json").read_text())
    assert results["fidelity"]["n"] == results["noise_floor"]["n"] == 1
    # A run of fewer items in the same folder leaves pictures there that its results are not about.
    assert main([*BENCH, *command, "--category", "single"]) == 0
    assert main([*BENCH, *command, "--out", str(tmp_path / "whole")]) == 0
    for results, n in ((None, 1), ('{"of": "somebody else"}', 3)):
        if results:
            (tmp_path / "run" / "results.json").write_text(results)
        capsys.readouterr()
        assert main([*BENCH, "compare", str(tmp_path / "whole"), str(tmp_path / "run"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["fidelity"]["n"] == n
    made = len(painter.calls)
    (tmp_path / "other").mkdir()
    nothing = {"typo": f"no folder {tmp_path / 'typo'}", "other": "have no picture of this run of the same name"}
    for other, message in nothing.items():  # said before anything is made
        options = ["--reference", str(tmp_path / "run"), "--floor", str(tmp_path / other)]
        assert main([*BENCH, "--suite", command[1], "--out", str(tmp_path / "new"), *options]) == 1
        assert message in capsys.readouterr().err
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
    for name, options in {"a": [], "b": ["--seed", "7"], "c": ["--precision", "fp8"], "d": []}.items():
        painter.weights = "other" if name == "d" else "mine"
        assert main([*BENCH, *command, *options, "--out", str(tmp_path / name)]) == 0
    a, b, c, d = (str(tmp_path / name) for name in "abcd")
    assert main([*BENCH, "compare", c, a, "--floor", a]) == 0
    made, out = len(painter.calls), ["--out", str(tmp_path / "new")]
    for floor, said in ((b, "seed 7, the reference {} 0"), (c, "precision fp8, the reference {} bf16")):
        for wrong in (["compare", d, a, "--floor", floor], [*command, *out, "--reference", a, "--floor", floor]):
            capsys.readouterr()
            assert main([*BENCH, *wrong]) == 1
            assert f"{floor} has {said.format(a)}" in capsys.readouterr().err
    assert main([*BENCH, "compare", c, a, "--floor", d]) == 1
    assert f"{d} has a transformer of sha256 other, the reference {a} mine" in capsys.readouterr().err
    assert len(painter.calls) == made
    # Of the suite, its lines count and not its name.
    (tmp_path / "suite.jsonl").rename(tmp_path / "moved.jsonl")
    painter.weights = "mine"
    for lines, status in ((ITEMS, 0), (ITEMS[:2], 1)):
        moved = suite_file(tmp_path, lines).rename(tmp_path / "moved.jsonl")
        assert main([*BENCH, "--suite", str(moved), "--out", str(tmp_path / "e")]) == 0
        assert main([*BENCH, "compare", c, a, "--floor", str(tmp_path / "e")]) == status
    assert "suite_sha256" in capsys.readouterr().err
    # Against another seed, or fewer steps, a run may be compared: that is no claim about chance.
    assert main([*BENCH, "compare", a, b]) == 0


def test_a_sheet_shows_the_worst_and_some_of_the_rest() -> None:
    assert fidelity.to_show([3, 1, 2], lambda i: i) == [1, 2, 3]
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
    assert [found[folder]["summary"]["all"]["right"] for folder in folders] == [2, 1]
    assert main([*BENCH, "judge", *folders, "--suite", str(path), "--category", "single"]) == 0
    said = capsys.readouterr().out
    assert f"{theirs}: 1 of 1 items" in said
    assert said.count("100.0%") == 6  # share and upper end in each table, and side by side
    (theirs / "single-0.webp").unlink()  # side by side are only items that both have
    assert main([*BENCH, "judge", *folders, "--suite", str(path), "--json"]) == 0
    assert [list(found["summary"]) for found in json.loads(capsys.readouterr().out).values()] == [["recolor"]] * 2
    (tmp_path / "empty").mkdir()
    assert main([*BENCH, "judge", str(tmp_path / "empty"), "--suite", str(path)]) == 1
    assert "have no picture of this run of the same name" in capsys.readouterr().err
    assert main([*BENCH, "judge", str(theirs), "--suite", str(path), "--category", "free"]) == 1
    assert "no item of" in capsys.readouterr().err


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


@pytest.mark.parametrize("size", [(96, 64), (64, 64)])
def test_the_judge_takes_any_size_and_any_kind_of_file(
    tmp_path: Path, size: tuple[int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    """A drawn picture to edit has the size of what was made of it, a turn follows whatever file there is."""
    path, folder = suite_file(tmp_path, [*ITEMS[:2], *TURNS]), tmp_path / "theirs"
    folder.mkdir()
    for item in (*ITEMS[:2], *TURNS):
        draw(item.scene, *size).save(folder / f"{item.id}.webp", lossless=True)
    assert main([*BENCH, "judge", str(folder), "--suite", str(path), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)[str(folder)]["summary"]
    assert summary["all"]["right"] == 4
    draw(TURNS[0].scene, 128, 64).save(folder / "t-1.webp", lossless=True)
    assert main([*BENCH, "judge", str(folder), "--suite", str(path)]) == 1
    assert "fluxkiln: t-2: expected two pictures of one size" in capsys.readouterr().err
    draw(TURNS[0].scene, *size).save(folder / "t-1.png")
    assert main([*BENCH, "judge", str(folder), "--suite", str(path)]) == 1
    assert f"{folder} has two pictures of one name, t-1.png and t-1.webp" in capsys.readouterr().err


def test_whoever_reads_or_prefers_judges_anybodys_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    items = [
        suite.Item("a", "sign", 'a sign that says "OPEN"', text="OPEN"),
        suite.Item("b", "sign", 'a sign that says "SHUT"', text="SHUT"),
        suite.Item("c", "fox", "a fox"),
    ]
    command = [*BENCH, "judge", str(tmp_path), "--suite", str(suite_file(tmp_path, items))]
    for item in items:
        Image.new("RGB", (16, 16)).save(tmp_path / f"{item.id}.png")
    assert main(command) == 1
    assert "no item of" in capsys.readouterr().err
    monkeypatch.setattr(learned, "tesseract", lambda: lambda pixels: "OPEN")
    monkeypatch.setattr(learned, "image_reward", lambda folder: lambda prompt, pixels: float(len(prompt)))
    assert main([*command, "--image-reward", str(tmp_path), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out).values()
    assert found == {"summary": {}, "image_reward": {"sign": 23.0, "all": 17.0, "fox": 5.0}}
    assert main([*command, "--image-reward", str(tmp_path), "--ocr", "tesseract"]) == 0
    printed = capsys.readouterr().out
    assert "sign             2   50.0%" in printed
    assert "image_reward: sign 23, all 17, fox 5" in printed


def test_a_sheet_has_the_wrong_pictures_first_and_says_so(
    painter: Painter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    whole = fidelity.contact_sheet

    def watched(pictures: Iterable[tuple[str, Iterable[Image.Image]]], side: int = 128) -> Image.Image:
        rows = [(caption, list(several)) for caption, several in pictures]
        said.extend(caption for caption, _ in rows)
        return whole(rows, side)

    for module in (fidelity, image):
        monkeypatch.setattr(module, "contact_sheet", watched)
    painter.wrong, sheet = ITEMS[1].prompt, tmp_path / "sheet.png"
    command = [*BENCH, "--suite", str(suite_file(tmp_path, ITEMS))]
    assert main([*command, "--out", str(tmp_path / "a"), "--sheet", str(sheet)]) == 0
    assert said == ["WRONG make the star white", ITEMS[0].prompt, ITEMS[2].prompt]
    shown, top = np.asarray(Image.open(sheet)), 2 * fidelity.LINE + 4
    edited = draw(SCENE).resize((128, 128), Image.Resampling.NEAREST)
    assert np.array_equal(shown[top : top + 128, 2:130], np.asarray(edited))  # left of what was made of it
    assert (shown[top : top + 128, 132:260] == Image.new("RGB", (1, 1), "green").getpixel((0, 0))).all()
    painter.wrong, painter.version = "", "2"
    assert main([*command, "--out", str(tmp_path / "b")]) == 0
    said.clear()
    assert main([*BENCH, "compare", str(tmp_path / "a"), str(tmp_path / "b"), "--sheet", str(sheet)]) == 0
    assert said[0] == "recolor-0: a | b"
    assert len(said) == 3


@pytest.mark.parametrize(("name", "message"), [("s.txt", "must end with .png"), ("no/s.png", "in a folder that is")])
def test_a_sheet_that_cannot_be_written_is_said_at_once(
    painter: Painter, tmp_path: Path, name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ([*BENCH], [*BENCH, "compare", "a", "b"]):
        assert main([*command, "--sheet", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err
    assert painter.calls == []


@pytest.mark.parametrize("command", [["judge", "a"], ["compare", "a", "b"], ["ablate"]])
def test_options_of_a_command_stand_after_it(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BENCH, "--suite", "other", *command]) == 2
    assert f"--suite stands before {command[0]}: give options after the command" in capsys.readouterr().err
