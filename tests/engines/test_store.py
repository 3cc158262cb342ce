"""The store never hands out a wrong engine: damaged, renamed, half-written or foreign ones are named in a sentence."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from fluxkiln.cli import main, sentence
from fluxkiln.engines.header import HeaderError, decode
from fluxkiln.engines.store import MANIFEST, PLAN, Manifest, Store, StoreError, Subject, refuse_here

SUBJECT = Subject(
    part="transformer", graph="ab" * 32, model="cd" * 32, precision="fp8", recipe="{}",
    profile={"hidden_states": [[1, 256, 64], [1, 4096, 64], [1, 8192, 64]]}, arch="sm_89",
    flavour="tensorrt_rtx", version="1.7.1.116", weights="refit",
)  # fmt: skip


def plan(nbytes: int = 4096, arch_bit: int = 3, build: int = 116) -> bytes:
    """Bytes with the header of an engine, as the builder writes it."""
    header = bytearray(64)
    header[:4] = b"vtrt"
    struct.pack_into("<Q", header, 0x10, nbytes)
    header[0x18:0x1C] = bytes((1, 7, 1, build))
    struct.pack_into("<Q", header, 0x20, 1 << arch_bit)
    struct.pack_into("<Q", header, 0x38, 1234)
    return bytes(header) + os.urandom(nbytes - 64)


def facts() -> dict:
    return {"model_name": "flux1-dev", "structure": {"products": {"fp8": 418}}}


def test_what_is_added_is_found(tmp_path: Path) -> None:
    store, data = Store(tmp_path / "engines"), plan()
    folder = store.add(SUBJECT, data, **facts())
    found = store.find(SUBJECT)
    assert found is not None
    assert found.refusal is None
    assert found.plan.read_bytes() == data
    assert store.verify(found) is None
    assert [stored.folder for stored in store] == [folder]
    assert Manifest.from_json(found.manifest.to_json()) == found.manifest


@pytest.mark.parametrize(
    "change",
    [
        {"graph": "00"}, {"model": "00"}, {"precision": "bf16"}, {"recipe": "[]"}, {"profile": {}}, {"arch": "sm_120"},
        {"flavour": "tensorrt"}, {"version": "1.7.1.117"}, {"weights": "inside"}, {"part": "vae_decoder"},
        {"options": {"aux_streams": 0}},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_everything_that_makes_an_engine_is_in_its_key(tmp_path: Path, change: dict) -> None:
    store = Store(tmp_path)
    store.add(SUBJECT, plan(), **facts())
    assert store.find(replace(SUBJECT, **change)) is None


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (lambda folder: (folder / PLAN).write_bytes(plan()[:100]), "is not whole: 100 bytes of 4096"),
        (lambda folder: (folder / PLAN).unlink(), "is not whole: 0 bytes of 4096"),
        (lambda folder: (folder / PLAN).write_bytes(b"\0" * 4096), "not a TensorRT-RTX engine"),
        (lambda folder: (folder / PLAN).write_bytes(plan(arch_bit=4)), "is an engine for sm_120"),
        (lambda folder: (folder / PLAN).write_bytes(plan(build=117)), "of version 1.7.1.117"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "has no readable manifest"),
        (lambda folder: (folder / MANIFEST).write_text("[]"), "has no readable manifest: it is no JSON object"),
        (lambda folder: (folder / MANIFEST).unlink(), "has no readable manifest"),
        (lambda folder: _edit(folder, precision="bf16"), "it was renamed or its manifest was changed"),
    ],
    ids=[
        "truncated", "gone", "not an engine", "other target", "other version", "bad manifest", "other JSON",
        "no manifest", "edited manifest",
    ],
)  # fmt: skip
def test_damage_is_named(tmp_path: Path, harm, sentence: str) -> None:
    store = Store(tmp_path)
    harm(store.add(SUBJECT, plan(), **facts()))
    (stored,) = store
    assert sentence in (stored.refusal or "")


def _edit(folder: Path, **change: str) -> None:
    data = json.loads((folder / MANIFEST).read_text())
    data["subject"] |= change
    (folder / MANIFEST).write_text(json.dumps(data))


def test_a_changed_byte_is_found_by_reading_it_whole(tmp_path: Path) -> None:
    store = Store(tmp_path)
    folder = store.add(SUBJECT, plan(), **facts())
    swap(folder)
    (stored,) = store
    assert stored.refusal is None
    assert "was changed after it was built" in (store.verify(stored) or "")


def test_a_full_disk_leaves_the_store_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, first = Store(tmp_path), plan()
    store.add(SUBJECT, first, **facts())

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as refusal:
        store.add(SUBJECT, plan(8192), **facts())
    assert sentence(refusal.value) == f"{tmp_path}: No space left on device"
    monkeypatch.undo()
    found = store.find(SUBJECT)
    assert found is not None
    assert found.plan.read_bytes() == first
    assert store.leftovers() == []

    def full_copy(source: Path, target: Path) -> None:  # as shutil's own: it names what it reads first
        raise OSError(errno.ENOSPC, "No space left on device", str(source), None, str(target))

    monkeypatch.setattr(shutil, "copyfile", full_copy)
    stick = tmp_path / "stick"
    with pytest.raises(OSError, match="No space left") as refusal:
        store.export(found, stick)
    assert sentence(refusal.value) == f"{stick}: No space left on device"
    assert list(stick.iterdir()) == []


def test_a_killed_build_is_no_engine_and_is_pruned(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (tmp_path / f".{SUBJECT.key}.dead").mkdir()
    (tmp_path / f".{SUBJECT.key}.dead" / PLAN).write_bytes(plan())
    assert list(store) == []
    assert store.find(SUBJECT) is None
    assert store.prune(older_than=3600) == 0
    assert store.prune(older_than=-1) == 1
    assert store.leftovers() == []


def test_two_builders_at_once_leave_one_whole_engine(tmp_path: Path) -> None:
    store, data = Store(tmp_path), plan(2**20)
    failures: list[BaseException] = []

    def add() -> None:
        try:
            for _ in range(5):
                store.add(SUBJECT, data, **facts())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=add) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    (stored,) = store
    assert store.verify(stored) is None
    assert store.leftovers() == []


def test_engines_travel_with_their_manifest(tmp_path: Path) -> None:
    here, there = Store(tmp_path / "here"), Store(tmp_path / "there")
    here.add(SUBJECT, plan(), **facts())
    (stored,) = here
    moved = here.export(stored, tmp_path / "stick")
    taken = there.take(moved)
    assert taken.refusal is None
    assert there.find(SUBJECT) is not None
    with pytest.raises(StoreError, match="exists already"):
        here.export(stored, tmp_path / "stick")


def test_a_damaged_engine_does_not_travel(tmp_path: Path) -> None:
    here, there = Store(tmp_path / "here"), Store(tmp_path / "there")
    here.add(SUBJECT, plan(), **facts())
    (stored,) = here
    moved = here.export(stored, tmp_path / "stick")
    swap(moved)
    with pytest.raises(StoreError, match="was changed after it was built"):
        there.take(moved)
    (moved / PLAN).write_bytes(plan()[:10])
    with pytest.raises(StoreError, match="is not whole"):
        there.take(moved)
    with pytest.raises(StoreError, match="has no readable manifest"):
        there.take(tmp_path)
    swap(stored.folder)
    with pytest.raises(StoreError, match="was changed after it was built"):
        here.export(stored, tmp_path / "other")
    assert list(there) == there.leftovers() == []
    assert list((tmp_path / "other").iterdir()) == []


def swap(folder: Path) -> None:
    """Another content behind the same header."""
    data = bytearray((folder / PLAN).read_bytes())
    data[2000] ^= 1
    (folder / PLAN).write_bytes(data)


def test_a_system_that_renames_over_nothing_replaces_engines_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows: a folder never takes a name that is taken, and which error says so varies."""
    real, errors = Path.rename, [FileExistsError(errno.EEXIST, "exists"), PermissionError(errno.EACCES, "denied")]

    def rename(self: Path, target: Path) -> Path:
        if Path(target).exists():
            raise errors[0]
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    store = Store(tmp_path)
    for _ in range(2):
        store.add(SUBJECT, data := plan(), **facts())
        errors.reverse()
        (stored,) = store
        assert stored.plan.read_bytes() == data
        store.add(SUBJECT, data := plan(), **facts())
        (stored,) = store
        assert stored.plan.read_bytes() == data
    assert store.leftovers() == []


def test_the_command_lists_checks_moves_and_deletes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here, there = tmp_path / "here", tmp_path / "there"

    def command(*arguments: str, store: Path = here) -> str:
        assert main(["engines", "--store", str(store), *arguments]) == 0
        return capsys.readouterr().out

    assert "no engines in" in command()
    folder = Store(here).add(SUBJECT, plan(), seconds=64.0, **facts())
    assert "flux1-dev fp8 sm_89, weights refit" in (listed := command())
    assert "built in 64 s" in listed
    assert "not here: " in listed  # neither this version of TensorRT-RTX, nor this GPU
    (row,) = json.loads(command("--json"))
    assert (row["header"]["archs"], row["header"]["weight_bytes"]) == (["sm_89"], 1234)
    assert "wrote" in command("--export", SUBJECT.key[:6], str(tmp_path / "stick"))
    assert "added" in command("--import", str(tmp_path / "stick" / SUBJECT.key), store=there)
    swap(folder)
    assert "was changed" not in command()
    assert "was changed" in command("--verify")
    assert command("--prune") == "removed 1 damaged engines and 0 leftovers\n"
    assert command("--remove", SUBJECT.key[:6], store=there).startswith("removed")
    assert main(["engines", "--store", str(there), "--remove", "ab"]) == 1
    assert "0 engines in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arch", "versions", "sentence"),
    [
        ("sm_89", {"tensorrt_rtx": "1.7.1.116"}, None),
        ("sm_120", {"tensorrt_rtx": "1.7.1.116"}, "it was built for sm_89, this GPU is sm_120"),
        (None, {"tensorrt_rtx": "1.7.1.116"}, "this machine has no NVIDIA GPU"),
        ("sm_89", {"tensorrt_rtx": "1.8.0.1"}, "it was built with tensorrt_rtx 1.7.1.116, installed is 1.8.0.1"),
        ("sm_89", {}, "it needs tensorrt_rtx 1.7.1.116, which is not installed"),
    ],
)
def test_an_engine_says_why_it_does_not_run_here(
    arch: str | None, versions: dict[str, str], sentence: str | None
) -> None:
    reason = refuse_here(Manifest(SUBJECT, "m", 1, "x", {}), arch, versions)
    assert (reason is None) if sentence is None else sentence in (reason or "")


def test_what_is_no_header_is_refused() -> None:
    with pytest.raises(HeaderError, match="not a TensorRT-RTX engine"):
        decode(b"GGUF" + bytes(60))
    with pytest.raises(HeaderError):
        decode(plan()[:10])
