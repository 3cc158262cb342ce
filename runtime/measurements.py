"""Denoise steps that `fluxkiln bench step` timed, here or for the release, and what they say about backends.

A measurement counts for a choice if it was made on the same device with the same sizes of the model, precision and
dtype. Two backends are compared at the token counts at which both were timed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from fluxkiln.config import FluxConfig
from fluxkiln.engines.store import default_root
from fluxkiln.files import write_text

MARGIN = 0.05  # of the slower one's time: closer calls fall to the fixed order
TIMED = "fluxkiln step"  # the contestant of `bench step` that counts: what a pipeline repeats


@dataclass(frozen=True)
class Measurement:
    """Seconds of one step.

    Attributes:
        backend: what ran.
        device: name of the GPU or CPU, as in the versions of a record.
        model: sizes, precision and dtype, as text that is equal where they are.
        tokens: text, image and reference tokens and batch, as text.
        seconds: median.
    """

    backend: str
    device: str
    model: str
    tokens: str
    seconds: float


def local_folder() -> Path:
    """Where this user's measurements are kept."""
    return default_root().parent / "steps"


def read(folders: Iterable[Path] | None = None) -> Iterator[Measurement]:
    """Measurements in files `step-*.json`; by default the release's, then this user's, so that a later one wins."""
    for folder in (Path(str(files("fluxkiln.bench"))) / "results", local_folder()) if folders is None else folders:
        for file in sorted(folder.glob("step-*.json")):
            try:
                yield of_result(json.loads(file.read_text("utf-8")))
            except (OSError, ValueError, KeyError, TypeError):
                continue  # half a file, or one of another version: as if it were not there


def of_result(result: Mapping[str, Any]) -> Measurement:
    """The measurement in a result of `fluxkiln.bench.step.measure`."""
    return Measurement(
        backend=result["backend"],
        device=device_name(result["versions"]),
        model=_text([result["config"], result["precision"], result["dtype"]]),
        tokens=_text(result["tokens"]),
        seconds=float(result["contestants"][TIMED]["seconds"]),
    )


def keep(result: Mapping[str, Any], folder: Path) -> Path:
    """Write a result under a name of its own; the same measurement made again replaces it."""
    measurement = of_result(result)
    config, tokens = result["config"], result["tokens"]
    parts = [
        measurement.device.split(" (")[0],
        measurement.backend,
        result["precision"],
        result["dtype"],
        f"{config['hidden_size']}x{config['depth']}+{config['depth_single_blocks']}",
        f"{tokens['text']}+{tokens['image']}+{tokens['reference']}x{tokens['batch']}",
    ]
    name = "-".join("".join(c if c.isalnum() or c in "+." else "_" for c in part) for part in parts)
    path = folder / f"step-{name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(result, indent=1) + "\n")
    return path


@dataclass(frozen=True)
class Pick:
    """The fastest of some backends.

    Attributes:
        backend: its name.
        why: a sentence.
        reasons: every other one -> why it is not the one.
        measured: every other one that was timed beside it -> its time, as a multiple of the fastest's.
    """

    backend: str
    why: str
    reasons: dict[str, str]
    measured: dict[str, float]


def choose(
    backends: Sequence[str], config: FluxConfig, precision: str, dtype: str, device: str, known: Iterable[Measurement]
) -> Pick:
    """The fastest of `backends`, which stand in the order that decides where measurements do not."""
    model = _text([asdict(config), precision, dtype])
    times: dict[str, dict[str, float]] = {}
    for m in known:
        if (m.device, m.model) == (device, model):
            times.setdefault(m.backend, {})[m.tokens] = m.seconds

    def seconds(one: str, other: str) -> tuple[float, float] | None:
        """Of both, at the size whose ratio is the median of all ratios."""
        mine, theirs = times.get(one, {}), times.get(other, {})
        both = sorted(((mine[at], theirs[at]) for at in mine.keys() & theirs.keys()), key=lambda t: t[0] / t[1])
        return both[len(both) // 2] if both else None

    best = backends[0]
    for other in backends[1:]:
        if (pair := seconds(other, best)) and pair[0] / pair[1] < 1 - MARGIN:
            best = other
    others = [other for other in backends if other != best]
    reasons, measured = dict.fromkeys(others, f"it was not timed beside {best} on {device}"), {}
    for other in others:
        if pair := seconds(other, best):
            own, least = pair
            measured[other] = r = own / least
            close = "" if 1 / r < 1 - MARGIN else ", too close to decide: the fixed order does"
            took = f"{r:.2f} times as long as {best}'s on {device} ({own:.3g} s against {least:.3g} s)"
            reasons[other] = f"its step takes {took}{close}"
    if not others:
        why = "the only one that can run this here"
    elif measured:
        times_of = ", ".join(f"{other}'s takes {r:.2f} times as long" for other, r in measured.items())
        why = f"its step was timed on {device}: {times_of}"
    else:
        why = "first in the fixed order, as none was timed beside it (`fluxkiln bench step` does)"
    return Pick(best, why, reasons, measured)


def device_name(versions: Mapping[str, str]) -> str:
    return versions.get("gpu") or versions["cpu"]


def _text(data: Any) -> str:
    return json.dumps(data, sort_keys=True)
