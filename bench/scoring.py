"""What is said of the pictures of a suite: each held to its item, shares with their intervals, tables."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fluxkiln.bench import fidelity, learned, metrics, shapes_judge
from fluxkiln.bench.fidelity import read
from fluxkiln.bench.suite import Item
from fluxkiln.images import rgb


@dataclass(frozen=True)
class Readers:
    """What judges pictures that are not of the bundled world, each where the user has it."""

    words: Callable[[np.ndarray], str] | None = None
    reward: Callable[[str, np.ndarray], float] | None = None


def add_reader_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image-reward", type=Path, metavar="FOLDER", help="also ImageReward, with its files there")
    parser.add_argument("--ocr", choices=("tesseract",), help="reads the words of items that have a text but no scene")


def readers(args: argparse.Namespace) -> Readers:
    """What `add_reader_arguments` asks for."""
    words = learned.tesseract() if args.ocr else None
    return Readers(words, learned.image_reward(args.image_reward) if args.image_reward else None)


def measure(items: Sequence[Item], folder: Path, readers: Readers | None = None) -> list[dict[str, Any]]:
    """A row for the picture of each item in `folder`, or in its `images`.

    It has what the judge says (`ok`, `checks`) where an item has a scene or a text that somebody can read, and what
    the readers say.

    Raises:
        ValueError: a picture to edit, drawn or made, has another size than what was made of it.
    """
    readers, files = readers or Readers(), fidelity.files(folder)
    rows = []
    for item in items:
        pixels = read(files[item.id])
        row: dict[str, Any] = {"id": item.id, "category": item.category, "edit": item.is_edit}
        if item.scene is not None:
            try:
                row |= _judged(item, pixels, files[item.id].parent)
            except ValueError as error:
                raise ValueError(f"{item.id}: {error}") from None
        elif item.text is not None and readers.words is not None:
            row |= _spelt(readers.words(pixels), item.text)
        if readers.reward is not None:
            row["image_reward"] = readers.reward(item.prompt, pixels)
        rows.append(row)
    return rows


def _judged(item: Item, pixels: np.ndarray, made: Path) -> dict[str, Any]:
    assert item.scene is not None
    row: dict[str, Any] = {}
    height, width = pixels.shape[:2]
    source = replace(item, width=item.width or width, height=item.height or height).source(made=made)
    if item.without is not None:
        verdict = shapes_judge.judge_without(pixels, item.scene, item.without)
    elif source is None or item.before is None:
        verdict = shapes_judge.judge(pixels, item.scene)
    else:
        verdict = shapes_judge.judge_edit(np.asarray(rgb(source)), pixels, item.before, item.scene)
        psnr = verdict.unchanged_psnr
        if psnr is not None:
            row["unchanged_psnr"] = psnr if math.isfinite(psnr) else None  # equal; JSON has no infinity
    if item.text is not None:
        row |= _spelt(verdict.word or "", item.text)
    return row | {"ok": verdict.ok, "checks": verdict.checks}


def _spelt(found: str, text: str) -> dict[str, Any]:
    distance = metrics.edit_distance(found, text)
    return {"read": found, "edit_distance": distance, "ok": not distance, "checks": {"word": not distance}}


def summarize(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """How many are all right, with the Wilson interval, and the share of each check.

    Returns:
        a summary for each category; where there are several, also for all `prompts`, all `edits`, and `all`.
    """
    judged = [row for row in rows if "checks" in row]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in judged:
        groups.setdefault(row["category"], []).append(row)
    if len(groups) > 1:
        edits, prompts = ([row for row in judged if row.get("edit", False) is kind] for kind in (True, False))
        if edits and prompts:
            groups |= {"prompts": prompts, "edits": edits}
        groups["all"] = judged
    return {category: _summary(group) for category, group in groups.items()}


def _summary(group: Sequence[dict[str, Any]]) -> dict[str, Any]:
    right = sum(row["ok"] for row in group)
    names = dict.fromkeys(name for row in group for name in row["checks"])
    entry: dict[str, Any] = {
        "n": len(group),
        "right": right,
        "interval": metrics.wilson(right, len(group)),
        "checks": {name: _share([row["checks"][name] for row in group if name in row["checks"]]) for name in names},
    }
    if distances := [row["edit_distance"] for row in group if "edit_distance" in row]:
        entry["edit_distance"] = statistics.mean(distances)
    if kept := [math.inf if (db := row["unchanged_psnr"]) is None else db for row in group if "unchanged_psnr" in row]:
        found = {"median": statistics.median(kept), "low": min(kept)}
        entry["unchanged_psnr"] = {name: db if math.isfinite(db) else None for name, db in found.items()}
    return entry


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


def sequences(items: Sequence[Item], rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Of chains of edits, each of the picture before it, how many are right in every turn; None without any."""
    right, whole = {row["id"]: row["ok"] for row in rows if "ok" in row}, dict[str, bool]()
    followed = {item.follows for item in items}
    for item in items:  # an item follows one of an earlier line
        if item.id in right:
            whole[item.id] = right[item.id] and whole.get(item.follows or "", True)
    ends = [whole[item.id] for item in items if item.follows and item.id not in followed and item.id in whole]
    if not ends:
        return None
    return {"n": len(ends), "right": sum(ends), "interval": metrics.wilson(sum(ends), len(ends))}


def rewards(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Mean ImageReward of each category and of all, where the rows have it."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        if "image_reward" in row:
            for group in (row["category"], "all"):
                groups.setdefault(group, []).append(row["image_reward"])
    return {group: statistics.mean(found) for group, found in groups.items()}


def table(summary: dict[str, dict[str, Any]]) -> str:
    """The summary as text."""
    lines = [f"{'category':12} {'n':>5} {'right':>7}   {'95 % interval':15} {'checks'}"]
    for category, entry in summary.items():
        low, high = entry["interval"]
        failing = " ".join(f"{name} {share:.1%}" for name, share in entry["checks"].items() if share < 1)
        extra = f" (mean edit distance {entry['edit_distance']:.2f})" if "edit_distance" in entry else ""
        if "unchanged_psnr" in entry:
            median, lowest = (math.inf if db is None else db for db in entry["unchanged_psnr"].values())
            extra += f" (unchanged: median {median:.1f} dB, lowest {lowest:.1f})"
        share = entry["right"] / entry["n"]
        lines.append(f"{category:12} {entry['n']:5} {share:7.1%}   {low:6.1%} – {high:6.1%} {failing}{extra}")
    return "\n".join(lines)


def sweep_table(summaries: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Shares that are all right: a row for each setting, a column for each category."""

    def cell(entry: dict[str, Any] | None) -> str:
        return f"{entry['right'] / entry['n']:10.1%}" if entry else f"{'-':>10}"

    categories = list(dict.fromkeys(category for summary in summaries.values() for category in summary))
    first = max(map(len, summaries), default=0)
    lines = [" ".join([" " * first, *(f"{category:>10}" for category in categories)])]
    for name, summary in summaries.items():
        lines.append(" ".join([f"{name:{first}}", *map(cell, map(summary.get, categories))]))
    return "\n".join(lines)
