"""One command measures all that is published of the bundled model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from shapes import measure

from fluxkiln.cli import _parse

ITEMS = [
    {"id": "free-0"},
    {"id": "single-0", "ok": True, "checks": {"shape": True}},
    {"id": "single-1", "ok": False, "checks": {"shape": True, "color": False, "size": False}},
]
PUBLISHED = Path(__file__).parents[2] / "bench" / "results" / "image"


def _run(monkeypatch: pytest.MonkeyPatch, folder: Path, fails: str = "") -> list[list[str]]:
    """Every call of `fluxkiln`, none of which is made: each only says what it was asked for."""
    calls: list[list[str]] = []

    def fluxkiln(argv: list[str]) -> int:
        calls.append(argv)
        args = _parse(argv)  # every option is one that there is
        if argv[2] == "ablate":
            args.out.write_text("{}")
            return 0
        if fails and fails in str(args.out):
            return 3
        sweep = [args.out]
        if args.guidance and len(args.guidance) > 1:
            sweep = [args.out / f"guidance-{g:g}" for g in args.guidance]
        elif args.true_cfg_scale and len(args.true_cfg_scale) > 1:
            sweep = [args.out / f"cfg-{scale:g}" for scale in args.true_cfg_scale]
        for one in sweep:
            one.mkdir(parents=True, exist_ok=True)
            (one / "results.json").write_text(json.dumps({"items": ITEMS, "suite": args.suite, "size": str(args.size)}))
        return 0

    monkeypatch.setattr(measure, "fluxkiln", fluxkiln)
    items = [item for item in measure.suite.load("shapes") if item.id in ("single-000", "add-000")]
    monkeypatch.setattr(measure.suite, "load", lambda name: items)
    monkeypatch.setattr(sys, "argv", ["measure", "--runs", str(folder / "runs"), "--out", str(folder)])
    measure.main()
    return calls


def test_it_writes_what_is_published_and_nothing_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = _run(monkeypatch, tmp_path)
    assert {path.name for path in tmp_path.glob("*.json")} == {path.name for path in PUBLISHED.glob("*.json")}
    for name in ("shapes-guidance", "shapes-sizes"):
        found, before = (json.loads((folder / f"{name}.json").read_text()) for folder in (tmp_path, PUBLISHED))
        assert found.keys() == before.keys()
    sizes = json.loads((tmp_path / "shapes-sizes.json").read_text())
    assert len({entry["size"] for entry in sizes.values()}) == len(measure.SIZES)
    assert "items" not in sizes["64x128"]
    assert sizes["64x128"]["wrong"] == {"single-1": ["color", "size"]}
    true = json.loads((tmp_path / "shapes-autoencoder.json").read_text())
    assert {name: entry["right"] for name, entry in true["summary"].items()} == dict.fromkeys(true["summary"], 1) | {
        "all": 2
    }
    assert true["wrong"] == {}
    assert json.loads((tmp_path / "shapes-turns.json").read_text())["suite"] == "shapes-turns"
    asked = [argv[argv.index("--out") + 1] for argv in calls]
    for argv in calls:
        for option in ("--reference", "--floor"):  # made before
            assert option not in argv or argv[argv.index(option) + 1] in asked[: calls.index(argv)]


def test_a_run_that_fails_publishes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="3"):
        _run(monkeypatch, tmp_path, fails="128x128")
    assert not list(tmp_path.glob("*.json"))
