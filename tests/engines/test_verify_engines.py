"""`fluxkiln verify --engines` where something goes wrong: one row is lost, the report is not."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fluxkiln import hub, record, verify_engines
from fluxkiln.cli import main
from fluxkiln.engines import flavour
from fluxkiln.engines.session import SessionError
from fluxkiln.engines.store import Store, Subject
from fluxkiln.kernels import RefusedError
from fluxkiln.kernels.recipe import RECIPES
from fluxkiln.verify import TINY, tiny_model
from fluxkiln.verify_engines import EngineVerdict, Inputs, Prepared

CPU = torch.device("cpu")
ROW = EngineVerdict("m", "bf16", "inside")
PROFILE = {"hidden_states": [[1, 16, 4], [1, 64, 4], [1, 64, 4]], "encoder_hidden_states": [[1, 8, 4]] * 3}
SCRATCH: Any = None


def failing(error: BaseException) -> Any:
    def fail(*args: Any, **options: Any) -> Any:
        raise error

    return fail


def rows(prepare: Any) -> list[EngineVerdict]:
    return list(verify_engines.check(ROW, prepare, SCRATCH))


@pytest.mark.parametrize(
    ("error", "row"),
    [
        (RefusedError("for sm_120"), replace(ROW, refused="for sm_120")),
        (SessionError("not for this driver"), replace(ROW, failed="not for this driver")),
        (torch.OutOfMemoryError("full"), replace(ROW, failed="OutOfMemoryError: full")),
        (TypeError("None"), replace(ROW, failed="TypeError: None")),
    ],
)
def test_a_failure_of_any_kind_is_one_row(error: Exception, row: EngineVerdict, monkeypatch: Any) -> None:
    assert rows(failing(error)) == [row]
    prepared = Prepared(SimpleNamespace(key="k"), TINY, {}, [])  # type: ignore[arg-type]
    monkeypatch.setattr(verify_engines, "supply", lambda *args: None)
    monkeypatch.setattr(verify_engines, "open_session", failing(error))
    assert rows(lambda: prepared) == [replace(row, key="k")]


def test_an_interrupt_is_no_row() -> None:
    with pytest.raises(KeyboardInterrupt):
        rows(failing(KeyboardInterrupt()))


def test_every_trial_has_a_row_where_none_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_engines, "build_trial", failing(TypeError("no such argument")))
    verdicts = list(verify_engines.trials(Store(tmp_path), "sm_120", CPU, SCRATCH))
    assert [v.failed for v in verdicts] == ["TypeError: no such argument"] * 6


def add(store: Store, **facts: Any) -> None:
    asked = {"part": "transformer", "recipe": RECIPES["bf16"].to_json(), "arch": "sm_90", "model": "m", "graph": "g"}
    asked |= {"precision": "bf16", "profile": PROFILE, "flavour": "tensorrt", "version": "10", "weights": "inside"}
    store.add(Subject(**(asked | facts)), b"plan", model_name="owner/name", structure={}, parameters={}, seconds=1.0)


def test_a_model_is_not_fetched_for_an_engine_that_cannot_run_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[Any] = []
    monkeypatch.setattr(hub, "resolve", lambda *model: fetched.append(model) or failing(KeyError("x"))())
    monkeypatch.setattr(flavour, "installed", lambda: {"tensorrt": "10"})
    store = Store(tmp_path)
    add(store, arch="sm_80")
    assert [v.refused for v in verify_engines.stored(store, "sm_90", CPU, SCRATCH, None)] == [
        "it was built for sm_80, this GPU is sm_90"
    ]
    assert fetched == []
    add(store)
    assert {(v.refused is None, v.failed) for v in verify_engines.stored(store, "sm_90", CPU, SCRATCH, None)} == {
        (False, None),
        (True, "KeyError: 'x'"),
    }
    assert len(fetched) == 1


@pytest.mark.parametrize("room", [0, 1])
def test_where_eager_has_no_room_its_weights_are_gone_before_the_next_are_read(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Any]] = []
    transformer, network, denoise = verify_engines.Transformer, verify_engines.Network, Inputs.denoise

    def eager(*args: Any) -> Any:
        made = transformer(*args)
        alive.append(weakref.ref(made))
        return made

    def alone(*args: Any) -> Any:
        assert [made() for made in alive] == [None]
        return network(*args)

    left = iter([True] * room)

    def run(self: Inputs, model: Any) -> torch.Tensor:
        if not next(left, False):
            raise torch.OutOfMemoryError("full")
        return denoise(self, model)

    monkeypatch.setattr(verify_engines, "Transformer", eager)
    monkeypatch.setattr(verify_engines, "Network", alone)
    monkeypatch.setattr(Inputs, "denoise", run)
    engine: Any = SimpleNamespace(subject=SimpleNamespace(profile=PROFILE, precision="bf16"))
    cases = verify_engines.of_eager(TINY, RECIPES["bf16"], tiny_model(RECIPES["bf16"]), engine)
    assert [case.want is None for case in cases] == [i >= room for i in range(2)]
    assert [case.inputs.img.shape[1] for case in cases] == [16, 64]


def test_torchs_memory_is_given_back_before_the_engine_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    prepared = Prepared(SimpleNamespace(key="k"), TINY, {}, [])  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: order.append("given back"))
    monkeypatch.setattr(verify_engines, "supply", lambda *args: order.append("opened"))
    monkeypatch.setattr(verify_engines, "open_session", failing(SessionError("")))
    rows(lambda: order.append("prepared") or prepared)
    assert order == ["prepared", "given back", "opened"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("the store is gone")])
def test_the_report_is_printed_whatever_ends_the_run(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def verify(store: Store, model: str | None, progress: Any) -> list[EngineVerdict]:
        progress(replace(ROW, key="k", failed="TypeError: None"))
        raise error

    monkeypatch.setattr(verify_engines, "verify_engines", verify)
    monkeypatch.setattr(record, "versions", lambda device: {"gpu": "x"})
    assert main(["verify", "--engines"]) in (1, 130)
    assert "| k m | bf16 | inside | **FAILED**: TypeError: None |" in capsys.readouterr().out
