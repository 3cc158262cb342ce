"""What timed steps say about backends: only comparable ones count, and close calls fall to the fixed order."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from fluxkiln import measurements
from fluxkiln.config import DEV, SCHNELL, FluxConfig
from fluxkiln.measurements import Pick, choose, keep, of_result, read
from fluxkiln.workload import Tokens

H100 = "NVIDIA H100 80GB HBM3 (sm_90)"
ORDER = ("trt", "triton", "eager")


def result(backend: str, seconds: float, **changes: Any) -> dict[str, Any]:
    config: FluxConfig = changes.pop("config", DEV)
    tokens: Tokens = changes.pop("tokens", Tokens(512, 4096))
    return {
        "benchmark": "step",
        "config": asdict(config),
        "tokens": asdict(tokens),
        "dtype": "bf16",
        "precision": "fp8",
        "backend": backend,
        "versions": {"gpu": changes.pop("gpu", H100)},
        "contestants": {"fluxkiln": {"seconds": 99.0}, "fluxkiln step": {"seconds": seconds}},
    } | changes


def picked(*results: dict[str, Any], order: tuple[str, ...] = ORDER) -> Pick:
    return choose(order, DEV, "fp8", "bf16", H100, map(of_result, results))


def test_the_fastest_is_picked_and_the_reasons_said() -> None:
    pick = picked(result("trt", 1.0), result("triton", 0.8), result("eager", 2.0))
    assert pick == Pick(
        "triton",
        f"its step was timed on {H100}: trt's takes 1.25 times as long, eager's takes 2.50 times as long",
        {
            "trt": f"its step takes 1.25 times as long as triton's on {H100} (1 s against 0.8 s)",
            "eager": f"its step takes 2.50 times as long as triton's on {H100} (2 s against 0.8 s)",
        },
        {"trt": 1.25, "eager": 2.5},
    )
    assert picked(result("trt", 1.0), result("triton", 1.25)).backend == "trt"


def test_close_calls_and_no_measurements_fall_to_the_order() -> None:
    for results in ([], [result("triton", 0.1)]):
        pick = picked(*results)
        assert pick.backend == "trt"
        assert pick.why.startswith("first in the fixed order, as none was timed beside it")
        assert pick.reasons["triton"] == f"it was not timed beside trt on {H100}"
        assert pick.measured == {}
    pick = picked(result("trt", 1.0), result("triton", 0.96))
    assert pick.backend == "trt"
    assert pick.reasons["triton"] == (
        f"its step takes 0.96 times as long as trt's on {H100} (0.96 s against 1 s), too close to decide: the fixed "
        "order does"
    )
    assert picked(order=("eager",)).why == "the only one that can run this here"


@pytest.mark.parametrize(
    "change",
    [
        {"gpu": "NVIDIA L4 (sm_89)"},
        {"config": SCHNELL},
        {"precision": "bf16"},
        {"dtype": "fp32"},
        {"tokens": Tokens(1, 2)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_only_comparable_measurements_count(change: dict[str, Any]) -> None:
    assert picked(result("trt", 1.0), result("triton", 0.1, **change)).backend == "trt"


def test_sizes_are_compared_one_by_one() -> None:
    results = []
    for tokens, trt, triton in (
        (Tokens(512, 1024), 1.0, 0.5),
        (Tokens(512, 4096), 4.0, 3.2),
        (Tokens(512, 9216), 9.0, 10.0),
    ):
        results += [result("trt", trt, tokens=tokens), result("triton", triton, tokens=tokens)]
    assert picked(*results).measured == {"trt": 1.25}


def test_kept_results_are_read_again_and_replaced(tmp_path: Path) -> None:
    release, own = tmp_path / "release", tmp_path / "own"
    keep(result("triton", 1.0), release)
    keep(result("trt", 1.0), release)
    assert keep(result("triton", 0.5), own) == keep(result("triton", 0.25), own)
    (own / "step-damaged.json").write_text("{")
    (own / "step-other.json").write_text('{"backend": "trt"}')
    (own / "notes.json").write_text("{}")
    found = list(read([release, own, tmp_path / "absent"]))
    assert [(m.backend, m.seconds) for m in found] == [("triton", 1.0), ("trt", 1.0), ("triton", 0.25)]
    assert choose(ORDER, DEV, "fp8", "bf16", H100, found).backend == "triton"  # the user's own, 0.25 of trt
    assert sorted(p.name for p in own.iterdir() if p.suffix == ".part") == []


def test_the_users_folder_is_read_after_the_releases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep(result("triton", 0.125), measurements.local_folder())
    assert [m.seconds for m in read()][-1] == 0.125
