"""The image benchmark around a pipeline that draws: suites, resume, tables."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from painter import AFTER, ITEMS, SCENE, TURNS, Painter, suite_file
from PIL import Image

from fluxkiln.bench import ablation, fidelity, image, learned, scoring, suite
from fluxkiln.bench.shapes_scene import Background, draw
from fluxkiln.cli import main
from fluxkiln.config import FluxConfig
from fluxkiln.kernels import backend, registry

BENCH = ["bench", "image"]


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
    summary = scoring.summarize(scoring.measure(ITEMS, tmp_path))
    assert summary["all"]["n"] == summary["all"]["right"] == 2  # the free prompt has no scene to judge by
    assert (summary["prompts"]["n"], summary["edits"]["n"]) == (1, 1)
    assert "recolor" in scoring.table(summary)
    slow = {"record": {"timings": {**made[0]["record"]["timings"], "total": 4.0}}}
    assert image.latency([*made, slow], 3600.0)["cost_per_image"] == 1.75  # the mean: the sum is what is paid
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


def test_a_run_stopped_within_a_picture_mistakes_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of settings A, then of B, stopped at any moment between picture and log, then of A again."""
    old, new = (image.Settings(guidance=guidance) for guidance in (3.5, 0.0))
    image.make(Painter(), ITEMS[:1], tmp_path, old, progress=False)
    picture = tmp_path / "images" / "single-0.png"
    right = picture.read_bytes()

    def stop(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    for name in ("unlink", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, name, stop)
            with pytest.raises(KeyboardInterrupt):
                image.make(Painter(), ITEMS[:1], tmp_path, new, progress=False)
        for settings, same in ((old, True), (new, False), (old, True)):
            image.make(Painter(), ITEMS[:1], tmp_path, settings, progress=False)
            assert (picture.read_bytes() == right) is same


def test_step_errors_are_of_all_categories(
    painter: Painter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    items = [suite.Item(f"{kind}-{i}", kind, f"{kind} {i}") for kind in "abc" for i in range(4)]
    seen: list[str] = []
    monkeypatch.setattr(ablation, "step_errors", lambda pipe, model, some, *rest: seen.extend(i.id for i in some))
    command = [*BENCH, "--suite", str(suite_file(tmp_path, items)), "--out", str(tmp_path / "run"), "--step-errors"]
    assert main([*command, "3"]) == 0
    assert seen == ["a-0", "b-0", "c-0"]
    assert main([*command, "99"]) == 0
    assert len(seen) == 3 + 12
    assert main([*command, "0"]) == 2
    assert "--step-errors: must be at least 1, got '0'" in capsys.readouterr().err


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
    rows = scoring.measure(TURNS, tmp_path)
    assert [row["ok"] for row in rows] == [True, True]
    assert rows[1]["checks"]["identity"]
    # An object that became another one in the first turn is still wrong, and not the same, in the second.
    for item, shape in zip(TURNS, ("circle", "circle"), strict=True):
        scene = item.scene.replace(things=(item.scene.things[0].replace(shape=shape),))
        draw(scene).save(tmp_path / "images" / f"{item.id}.png")
    rows = scoring.measure(TURNS, tmp_path)
    assert [row["checks"]["identity"] for row in rows] == [False, False]
    assert rows[1]["checks"]["unchanged"]


def test_a_sequence_is_right_if_every_turn_of_it_is() -> None:
    def chain(name: str, *turns: bool) -> list[tuple[suite.Item, bool]]:
        before = [None, *(f"{name}{i}" for i in range(len(turns) - 1))]
        return [
            (suite.Item(f"{name}{i}", f"turn {i}", "", scene=AFTER, before=SCENE, follows=follows), ok)
            for i, (follows, ok) in enumerate(zip(before, turns, strict=True))
        ]

    judged = [*chain("a", True, True, True), *chain("b", True, False, True), *chain("c", True, True), *chain("d", True)]
    items = [item for item, _ in judged]
    rows = [{"id": item.id, "ok": ok} for item, ok in judged]
    found = scoring.sequences(items, rows)
    assert found is not None
    assert (found["n"], found["right"]) == (3, 2)  # a single edit is no sequence
    assert scoring.sequences(items[-1:], rows[-1:]) is None


@pytest.mark.parametrize(
    ("options", "steps"),
    [([], 12), (["--steps", "3"], 3), (["--model", "x"], 28), (["--transformer", "x"], 28)],
)
def test_steps_are_the_models_own(painter: Painter, tmp_path: Path, options: list[str], steps: int) -> None:
    """Twelve were enough for the bundled one; of any other, nobody wants the speed of another schedule."""
    assert (
        main(
            [
                *BENCH,
                "--category",
                "turn 1",
                "--suite",
                "shapes-turns",
                "--limit",
                "1",
                "--out",
                str(tmp_path),
                *options,
            ]
        )
        == 0
    )
    assert painter.calls[0]["num_inference_steps"] == (None if steps == 28 else steps)
    assert json.loads((tmp_path / "results.json").read_text())["steps"] == steps


def test_a_turn_needs_the_one_before(painter: Painter, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = suite_file(tmp_path, TURNS)
    assert main([*BENCH, "--suite", str(path), "--category", "turn 2", "--out", str(tmp_path / "run")]) == 1
    assert "t-2 edits the picture of t-1, which is not made" in capsys.readouterr().err
    with pytest.raises(ValueError, match="t-2 edits the picture of t-1, which is not made"):
        TURNS[1].source()  # and never what its scene would look like


def test_a_wrong_picture_counts_as_wrong(tmp_path: Path) -> None:
    image.make(Painter(wrong=ITEMS[1].prompt), ITEMS, tmp_path, image.Settings(steps=4), progress=False)
    rows = {row["id"]: row for row in scoring.measure(ITEMS, tmp_path)}
    assert rows["single-0"]["ok"]
    assert not rows["recolor-0"]["ok"]
    assert scoring.summarize(rows.values())["all"]["right"] == 1


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
    rows = scoring.sweep_table({"a": {"single": right, "pair": right}, "b": {"pair": right}}).splitlines()
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
    (row,) = scoring.measure([item], tmp_path)
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
    assert "checks" not in scoring.measure([item], tmp_path)[0]
    (row,) = scoring.measure(
        [item], tmp_path, scoring.Readers(words=lambda pixels: "OPEM", reward=lambda prompt, p: 0.5)
    )
    assert (row["ok"], row["read"], row["edit_distance"], row["image_reward"]) == (False, "OPEM", 1, 0.5)


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
    summary = scoring.summarize(rows)
    assert summary["move"]["unchanged_psnr"] == {"median": 40.0, "low": 20.0}
    assert re.search(r"100.0%    43.8% – 100.0% .*\(unchanged: median 40.0 dB, lowest 20.0\)", scoring.table(summary))
    summary = scoring.summarize([rows[1]])
    assert summary["move"]["unchanged_psnr"] == {"median": None, "low": None}  # equal
    assert "median inf dB" in scoring.table(summary)


def test_results_are_json_where_nothing_else_changed(painter: Painter, tmp_path: Path) -> None:
    """The PSNR of equal pixels is infinite, which JSON does not know."""
    assert main([*BENCH, "--suite", str(suite_file(tmp_path, ITEMS)), "--out", str(tmp_path / "run")]) == 0

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    rows = json.loads((tmp_path / "run" / "results.json").read_text(), parse_constant=refuse)["items"]
    assert rows[1]["checks"]["unchanged"]
    assert rows[1]["unchanged_psnr"] is None


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
        ('{"id": 1, "category": "all", "prompt": "x"}', "no category can be called 'all'"),
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


_THING = {"shape": "star", "color": "red", "radius": 0.2, "x": 0.5, "y": 0.5}


@pytest.mark.parametrize(
    ("scene", "message"),
    [
        ({"things": [_THING | {"radius": "big"}]}, "radius of a thing must be a number of 0 to 1, got 'big'"),
        ({"things": [_THING | {"x": 32}]}, "x of a thing must be a number of 0 to 1, got 32"),
        ({"background": {"kind": "striped", "color": "red"}}, "a striped background needs a color2"),
        ({"things": [_THING], "relation": "above"}, "a relation is of two things, got 1"),
        ({"word": "FOX"}, "a word needs a word_color"),
    ],
)
def test_scenes_that_cannot_be_drawn_are_refused(tmp_path: Path, scene: dict, message: str) -> None:
    item = {
        "id": 1,
        "category": "a",
        "prompt": "x",
        "scene": {"background": {"kind": "plain", "color": "blue"}} | scene,
    }
    (path := tmp_path / "broken.jsonl").write_text(json.dumps(item))
    with pytest.raises(ValueError, match=message):
        suite.load(path)


def test_a_suite_is_utf_8_with_or_without_a_mark(tmp_path: Path) -> None:
    line = '{"id": 1, "category": "a", "prompt": "caf\u00e9"}'
    (path := tmp_path / "suite.jsonl").write_text(line, encoding="utf-8-sig")
    assert suite.load(path)[0].prompt == "caf\u00e9"
    path.write_text(line, encoding="latin-1")
    with pytest.raises(ValueError, match="must be text in UTF-8"):
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
    for chosen, message in (("triton", "backend triton: the kernels compute in bfloat16"), ("trt", "has one: take")):
        painter.transformer.loaded = SimpleNamespace(choice=SimpleNamespace(backend=chosen))
        assert main([*BENCH, "ablate", "--backend", "auto", "--limit", "1"]) == 1
        assert message in capsys.readouterr().err
    assert painter.calls == []


def test_unknown_suite_names_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BENCH, "--suite", "nothing"]) == 1
    assert "expected one of shapes, shapes-negative, shapes-turns, a JSONL" in capsys.readouterr().err
