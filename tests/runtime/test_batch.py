"""Requests from files and the list of results by which a run goes on where it broke off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fluxkiln.batch import Job, Results, read_jobs


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines), "utf-8")
    return path


def test_a_text_file_has_a_prompt_on_each_line(tmp_path: Path) -> None:
    path = write(tmp_path / "p.txt", "\ufeff a fox ", "", "  ", '{"prompt": "no JSON here"}', "# kein Kommentar – 狐")
    assert [request["prompt"] for request in read_jobs(path)] == [
        "a fox",
        '{"prompt": "no JSON here"}',
        "# kein Kommentar – 狐",
    ]


def test_a_jsonl_file_has_a_request_on_each_line(tmp_path: Path) -> None:
    requests = [{"id": 7, "prompt": "a\nb", "seed": 1, "guidance_scale": [3, 2.5]}, {"prompt": ""}]
    assert read_jobs(write(tmp_path / "p.jsonl", *map(json.dumps, requests))) == requests
    separated = {"prompt": "a line\u2028and\u0085another\U0001f98a"}
    for ascii_only in (True, False):
        path = write(tmp_path / "p.jsonl", json.dumps(separated, ensure_ascii=ascii_only))
        assert read_jobs(path) == [separated]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: expected an object with a prompt"),
        ('{"seed": 1}', "line 2: expected an object with a prompt"),
        ('{"prompt": "a", "steps": 3}', "line 2: unknown field 'steps'; known are id, prompt"),
        ('{"prompt": "a", "seed": "7"}', "line 2: seed must be int, got '7'"),
        ('{"prompt": "a", "seed": true}', "line 2: seed must be int, got True"),
        ('{"prompt": ["a"]}', "line 2: prompt must be str"),
        ('{"prompt": "a", "sigmas": [1, null]}', "line 2: sigmas must be a list of numbers"),
        ('{"prompt": "a", "guidance_scale": ["a"]}', "line 2: guidance_scale must be a list of numbers"),
        ('{"prompt": "a", "image": [1]}', "line 2: image must be a list of file names"),
        ('{"prompt": "a\\ud800"}', "line 2: not text"),
        pytest.param('{"prompt": "a", "seed": ' + "9" * 5000 + "}", "line 2: not JSON", id="long"),
        pytest.param('{"prompt": ' + "[" * 100_000, "line 2: not JSON", id="deep"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"p\.jsonl") as refusal:
        read_jobs(write(tmp_path / "p.jsonl", '{"prompt": "a"}', line))
    assert message in str(refusal.value)


def test_files_without_prompts_or_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no prompts"):
        read_jobs(write(tmp_path / "p.txt", "", " "))
    (tmp_path / "b.txt").write_bytes(b"a\xff")
    with pytest.raises(ValueError, match="not UTF-8 text"):
        read_jobs(tmp_path / "b.txt")
    with pytest.raises(FileNotFoundError):
        read_jobs(tmp_path / "absent.txt")


def jobs(requests: list[dict], shared: dict | None = None, images: int = 1, model: dict | None = None) -> list[Job]:
    return list(Job.expand(requests, shared or {}, images, model or {}))


def test_requests_become_jobs() -> None:
    made = jobs([{"prompt": "a", "seed": 5, "id": "fox"}, {"prompt": "b", "width": 64}], {"width": 32, "seed": 1}, 2)
    assert [(job.name, job.index, job.arguments) for job in made] == [
        ("fox/1", 0, {"prompt": "a", "width": 32, "seed": 5}),
        ("fox/2", 1, {"prompt": "a", "width": 32, "seed": 6}),
        ("2/1", 2, {"prompt": "b", "width": 64, "seed": 1}),
        ("2/2", 3, {"prompt": "b", "width": 64, "seed": 2}),
    ]


def test_digests_tell_jobs_apart_by_what_is_asked_for() -> None:
    same = jobs([{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}], images=2)
    assert len({job.digest for job in same}) == 6
    # a line more at the top changes no other job
    assert {job.digest for job in same} < {job.digest for job in jobs([{"prompt": p} for p in "caba"], images=2)}
    (one,) = jobs([{"prompt": "a"}])
    for other in (jobs([{"prompt": "a"}], {"seed": 1}), jobs([{"prompt": "a"}], model={"precision": "fp8"})):
        assert other[0].digest != one.digest


def test_a_run_goes_on_where_it_broke_off(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    first, second, third, fourth = jobs([{"prompt": p} for p in ("a\u2028", "b", "c", "d")])
    results = Results(path)
    for job in (first, second):
        image = tmp_path / f"{job.name}.png"
        image.write_bytes(b"x")
        results.add(job, image, seed=7)
    results.add(third, error="no")
    with path.open("a") as file:
        file.write('[1]\n{"path": "1.png"}\n{"job": "x", "path": 5}\n')  # not ours
        file.write('{"job": "' + fourth.digest)  # killed within the line
    (tmp_path / "2.png").unlink()

    again = Results(path)
    assert [job in again for job in (first, second, third, fourth)] == [True, False, False, False]
    (tmp_path / "4.png").write_bytes(b"x")
    again.add(fourth, tmp_path / "4.png", seed=7)
    assert fourth in Results(path)
    assert json.loads(path.read_text("utf-8").split("\n")[0]) == {
        "job": first.digest, "name": "1", "prompt": "a\u2028", "seed": 7, "path": "1.png"
    }  # fmt: skip
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert first in Results(moved / "results.jsonl")
