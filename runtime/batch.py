"""Many requests from a file, and the list of results that lets a broken-off run go on."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What a line of a .jsonl file may hold, by the names of the pipeline's arguments: name -> types.
FIELDS: dict[str, tuple[type, ...]] = {
    "id": (str, int),
    "prompt": (str,),
    "prompt_2": (str,),
    "negative_prompt": (str,),
    "width": (int,),
    "height": (int,),
    "num_inference_steps": (int,),
    "guidance_scale": (int, float, list),
    "true_cfg_scale": (int, float),
    "seed": (int,),
    "strength": (int, float),
    "sigmas": (list,),
    "max_sequence_length": (int,),
    "image": (str, list),
    "mask_image": (str,),
    "control_image": (str,),
    "padding_mask_crop": (int,),
}


@dataclass(frozen=True)
class Job:
    """One image to make.

    Attributes:
        name: for people: the request's `id`, else the number of the job.
        index: number of the job in the run, from 0.
        digest: of everything that was asked for; equal requests in one file are told apart by a count.
        arguments: of the pipeline's call.
    """

    name: str
    index: int
    digest: str
    arguments: Mapping[str, Any]

    @classmethod
    def expand(
        cls, requests: Iterable[Mapping[str, Any]], shared: Mapping[str, Any], images: int, model: Mapping[str, Any]
    ) -> Iterator[Job]:
        """Jobs of requests: what a request leaves open comes from `shared`; each makes `images` images."""
        seen: Counter[str] = Counter()
        index = 0
        for number, request in enumerate(requests, start=1):
            arguments = {**shared, **request}
            name = str(arguments.pop("id", number))
            for i in range(images):
                own = dict(arguments)
                if "seed" in own:
                    own["seed"] += i
                text = json.dumps([own, model, i], sort_keys=True)
                seen[text] += 1
                digest = hashlib.sha256(f"{text} {seen[text]}".encode()).hexdigest()[:16]
                yield cls(name if images == 1 else f"{name}/{i + 1}", index, digest, own)
                index += 1


def read_jobs(path: Path) -> list[dict[str, Any]]:
    """Requests of a file: a prompt on each line, or, in a .jsonl file, an object on each line with `prompt` and any
    other of `FIELDS`. Blank lines are skipped.

    Raises:
        ValueError: a line is not a request; all lines are checked before anything runs.
        OSError: the file cannot be read.
    """
    try:
        lines = path.read_text("utf-8-sig").split("\n")  # not splitlines: a text may hold U+2028 and the like
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from None
    read = _request if path.suffix.lower() == ".jsonl" else lambda line, _: {"prompt": line.strip()}
    requests = [read(line, f"{path}, line {n}") for n, line in enumerate(lines, start=1) if line.strip()]
    if not requests:
        raise ValueError(f"{path} has no prompts")
    return requests


def _request(line: str, where: str) -> dict[str, Any]:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError) as error:  # a number too long, brackets too deep
        raise ValueError(f"{where}: not JSON: {error}") from None
    if not isinstance(request, dict) or "prompt" not in request:
        raise ValueError(f'{where}: expected an object with a prompt, like {{"prompt": "a fox", "seed": 7}}')
    for name, value in request.items():
        if name not in FIELDS:
            raise ValueError(f"{where}: unknown field {name!r}; known are {', '.join(FIELDS)}")
        if not isinstance(value, FIELDS[name]) or isinstance(value, bool):
            wanted = " or ".join(kind.__name__ for kind in FIELDS[name])
            raise ValueError(f"{where}: {name} must be {wanted}, got {value!r}")
        members = (str,) if name == "image" else (int, float)
        if isinstance(value, list) and not all(isinstance(v, members) and not isinstance(v, bool) for v in value):
            wanted = "file names" if name == "image" else "numbers"
            raise ValueError(f"{where}: {name} must be a list of {wanted}, got {value!r}")
    if re.search("[\ud800-\udfff]", json.dumps(request, ensure_ascii=False)):
        raise ValueError(f"{where}: not text: it holds half a character (a lone surrogate)")
    return request


class Results:
    """`results.jsonl`: a line for each finished job, written when its image is on disk.

    Args:
        path: of the file; it is appended to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._done: dict[str, Path] = {}
        text = path.read_text("utf-8", errors="replace") if path.exists() else ""
        for line in text.split("\n"):
            try:
                result = json.loads(line)
            except json.JSONDecodeError:  # the run was killed within this line
                continue
            if not isinstance(result, dict):
                continue
            job, image = result.get("job"), result.get("path")
            if isinstance(job, str) and isinstance(image, str) and (path.parent / image).exists():
                self._done[job] = (path.parent / image).resolve()
        self._unfinished_line = bool(text) and not text.endswith("\n")

    def __contains__(self, job: Job) -> bool:
        """The job has been done and its image is still there."""
        return job.digest in self._done

    def __getitem__(self, job: Job) -> Path:
        """The image of a job that has been done."""
        return self._done[job.digest]

    def add(self, job: Job, path: Path | None = None, seed: int | None = None, error: str | None = None) -> None:
        """Note what became of a job; `path` is kept relative to the list, so that the folder can be moved."""
        result: dict[str, Any] = {"job": job.digest, "name": job.name, "prompt": job.arguments.get("prompt")}
        if path is not None:
            result |= {"seed": seed, "path": _relative(path, self.path.parent)}
        if error is not None:
            result["error"] = error
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" * self._unfinished_line + json.dumps(result, ensure_ascii=False) + "\n")
        self._unfinished_line = False


def _relative(path: Path, folder: Path) -> str:
    path, folder = path.resolve(), folder.resolve()
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)
