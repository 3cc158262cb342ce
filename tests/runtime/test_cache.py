"""The image cache: what went in comes out, what is damaged never does, and it keeps to its folder and its limit."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fluxkiln.cache import ImageCache
from fluxkiln.record import Record, Request, Timings


def key(n: int) -> str:
    return hashlib.sha256(str(n).encode()).hexdigest()


def noise(seed: int, side: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


RECORD = Record(
    request=Request("text-to-image", ("a\n狐", "b"), (1, 2), 16, 16, 1, (1.0, 0.0)),
    parts=(),
    backend="eager",
    precision="bf16",
    dtype="bfloat16",
    device="cpu",
    plan=(),
    determinism="repeatable",
    versions={},
    timings=Timings(total=3.0),
    peak_memory=7,
)


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.mode == b.mode and np.array_equal(np.asarray(a), np.asarray(b))


def entry_of(cache: ImageCache, n: int) -> Path:
    return cache.folder / key(n)[:2] / key(n)


@pytest.fixture
def cache(tmp_path: Path) -> ImageCache:
    return ImageCache(tmp_path / "deep" / "cache", limit=1_000_000)


def test_what_went_in_comes_out(cache: ImageCache) -> None:
    assert cache.get(key(0)) is None
    assert not cache.folder.exists()
    cache.put(key(0), [noise(0), noise(1).convert("L")], RECORD)
    found = cache.get(key(0))
    assert found is not None
    assert same(found[0][0], noise(0))
    assert same(found[0][1], noise(1).convert("L"))
    assert found[1] == RECORD
    assert cache.get(key(1)) is None


@pytest.mark.parametrize("victim", ["0.png", "entry.json"])
@pytest.mark.parametrize("harm", ["cut", "empty", "swapped", "other JSON", "gone"])
def test_damage_is_a_miss_and_heals(cache: ImageCache, victim: str, harm: str) -> None:
    cache.put(key(0), [noise(0)], RECORD)
    file = entry_of(cache, 0) / victim
    if harm == "gone":
        file.unlink()
    elif harm == "other JSON":
        file.write_text("[]")
    elif harm == "swapped":
        noise(5).save(entry_of(cache, 0) / "x.png")
        file.write_bytes((entry_of(cache, 0) / "x.png").read_bytes())
    else:
        file.write_bytes(file.read_bytes()[: 60 if harm == "cut" else 0])
    assert cache.get(key(0)) is None
    assert not entry_of(cache, 0).exists()
    cache.put(key(0), [noise(0)], RECORD)
    assert cache.get(key(0)) is not None


def test_the_entries_used_longest_ago_go_first(cache: ImageCache) -> None:
    cache.put(key(0), [noise(0)], RECORD)
    small = ImageCache(cache.folder, limit=int(3.5 * cache.size()))
    for n in range(3):
        small.put(key(n), [noise(n)], RECORD)
        os.utime(entry_of(small, n), (n, n))  # clocks may be coarser than this test is quick
    assert small.get(key(0)) is not None
    small.put(key(3), [noise(3)], RECORD)
    assert [n for n in range(4) if small.get(key(n))] == [0, 2, 3]
    assert small.size() <= small.limit


def test_an_entry_above_the_limit_is_not_kept(cache: ImageCache) -> None:
    cache.put(key(1), [noise(1)], RECORD)
    small = ImageCache(cache.folder, limit=2 * cache.size())
    small.put(key(0), [noise(0, side=64)], RECORD)
    assert small.get(key(0)) is None
    assert small.get(key(1)) is not None


def test_other_files_in_the_folder_are_left_alone(cache: ImageCache) -> None:
    strangers = [
        cache.folder / "notes.txt",
        cache.folder / "ab" / "ab.png" / "0.png",
        cache.folder / "ab" / key(9) / "0.png",
    ]
    for path in strangers:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 10_000)
    ImageCache(cache.folder, limit=5_000).put(key(0), [noise(0)], RECORD)
    assert all(path.exists() for path in strangers)


def test_what_a_dead_writer_left_is_cleared_and_never_read(cache: ImageCache) -> None:
    old, fresh = cache.folder / ".old.part", cache.folder / ".new.part"
    for folder in (old, fresh):
        folder.mkdir(parents=True)
        (folder / "0.png").write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    cache.put(key(0), [noise(0)], RECORD)
    assert not old.exists()
    assert fresh.exists()


def test_many_writers_and_readers(cache: ImageCache) -> None:
    cache.put(key(99), [noise(99)], RECORD)
    tight = ImageCache(cache.folder, limit=3 * cache.size())
    wrong: list[str] = []

    def work(worker: int) -> None:
        try:
            for i in range(15):
                n = (i + worker) % 5
                found = tight.get(key(n))
                if found and not same(found[0][0], noise(n)):
                    wrong.append(f"{n} is not itself")
                tight.put(key(n), [noise(n)], RECORD)
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(w,)) for w in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert list(cache.folder.glob(".*")) == []


def test_a_key_cannot_leave_the_folder(cache: ImageCache) -> None:
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        cache.get("../../etc")


def test_an_unwritable_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        ImageCache(tmp_path / "file", 1000).put(key(0), [noise(0)], RECORD)
