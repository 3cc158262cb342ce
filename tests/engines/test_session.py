"""A session around a pretended TensorRT on the CPU: what it keeps, drops and says when something goes wrong.

That TensorRT does what it pretends here is for `fluxkiln verify --engines`, on a GPU.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fluxkiln.engines import session
from fluxkiln.engines.flavour import Flavour, Log
from fluxkiln.engines.session import Scratch, Session, SessionError

API = SimpleNamespace(
    ILogger=type("ILogger", (), {}),
    ComputeCapability=None,
    TensorIOMode=SimpleNamespace(INPUT="in"),
    ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED=None),
    DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER=None),
    CudaGraphStrategy=SimpleNamespace(WHOLE_GRAPH_CAPTURE=None),
)
STORED: Any = SimpleNamespace(subject=SimpleNamespace(flavour="tensorrt_rtx"), folder="engine")


class Cache:
    def __init__(self) -> None:
        self.loaded: bytes | None = None
        self.blob: bytes | None = b"kernels"
        self.serialized: list[int] = []  # how many device guards were around it

    def deserialize(self, blob: bytes) -> bool:
        self.loaded = blob
        return True

    def serialize(self) -> bytes | None:
        self.serialized.append(Gpu.guards)
        return self.blob


class Context:
    """Of an engine with one input x and one output y of its shape."""

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = ()
        self.binds, self.nbytes, self.memory, self.error = 0, 1000, 0, ""

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape, self.binds = shape, self.binds + 1
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape

    def set_tensor_address(self, name: str, address: int) -> bool:
        return True

    def update_device_memory_size_for_shapes(self) -> int:
        if self.error:
            Gpu.log.logger.log(SimpleNamespace(name="ERROR"), self.error)
        return self.nbytes

    def set_device_memory(self, address: int, nbytes: int) -> None:
        self.memory = nbytes

    def execute_async_v3(self, stream: int) -> bool:
        return True


class Config:
    def set_execution_context_allocation_strategy(self, strategy: Any) -> None: ...

    def create_runtime_cache(self) -> Cache:
        return Cache()

    def set_runtime_cache(self, cache: Cache) -> bool:
        return True


class Engine:
    num_io_tensors = 2
    get_tensor_name = staticmethod("xy".__getitem__)
    get_tensor_mode = staticmethod({"x": "in", "y": "out"}.__getitem__)
    create_runtime_config = staticmethod(Config)

    def create_execution_context(self, config: Config) -> Context:
        return Context()

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name="FLOAT")

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [(1, 4), (2, 4), (2, 4)]


class Gpu:
    guards = 0
    log = Log(API)

    @staticmethod
    @contextlib.contextmanager
    def device(device: Any) -> Iterator[None]:
        Gpu.guards += 1
        try:
            yield
        finally:
            Gpu.guards -= 1


@pytest.fixture(autouse=True)
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = SimpleNamespace(wait_stream=lambda other: None, cuda_stream=0)
    pretend = {"is_available": lambda: True, "device": Gpu.device, "Stream": lambda device: stream}
    pretend |= {"current_stream": lambda device: stream, "stream": lambda stream: contextlib.nullcontext()}
    for name, value in pretend.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(session, "flavour", lambda name: Flavour(name, API, "1"))
    monkeypatch.setattr(session, "log", lambda name: Gpu.log)
    monkeypatch.setattr(session, "load", lambda stored: (object(), Engine()))
    monkeypatch.setattr(session, "_cache_key", lambda *facts: "key")


def opened(cache: Path | None = None, scratch: Scratch | None = None) -> Any:
    return Session(STORED, scratch=scratch, cache=cache, device="cpu")


def images(batch: int) -> dict[str, torch.Tensor]:
    return {"x": torch.ones(batch, 4)}


# --- memory --------------------------------------------------------------------------------------


def test_after_a_failed_allocation_everything_is_bound_again(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, get = opened(), Scratch.get

    def full(self: Scratch, nbytes: int) -> torch.Tensor:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(Scratch, "get", full)
    with pytest.raises(torch.OutOfMemoryError):
        engine(images(1))
    monkeypatch.setattr(Scratch, "get", get)
    engine(images(1))
    assert (engine._context.binds, engine._context.memory) == (2, 1024)


def test_no_size_of_scratch_is_a_failure_only_where_tensorrt_says_so() -> None:
    engine = opened()
    engine._context.nbytes = 0
    assert engine(images(1))["y"].shape == (1, 4)
    engine._context.error = "shapes are wrong"
    with pytest.raises(SessionError, match="the engine did not run: shapes are wrong"):
        engine(images(2))


def test_what_inference_mode_bound_is_written_to_outside_of_it() -> None:
    scratch = Scratch(torch.device("cpu"))
    engine = opened(scratch=scratch)
    with torch.inference_mode():
        engine(images(1))
    engine(images(1))
    assert not scratch.get(1000).is_inference()


# --- compiled kernels ----------------------------------------------------------------------------


def test_kernels_are_saved_once_for_each_shape_on_the_engines_device(tmp_path: Path) -> None:
    """Three images through an engine that takes two at once alternate between two shapes at every step."""
    engine = opened(tmp_path / "compiled")
    for batch in (2, 1, 2, 1):
        engine(images(batch))
    assert engine._compiled._cache.serialized == [1, 1]
    assert [file.read_bytes() for file in (tmp_path / "compiled").iterdir()] == [b"kernels"]
    assert opened(tmp_path / "compiled")._compiled._cache.loaded == b"kernels"


def test_kernels_that_tensorrt_does_not_hand_out_are_not_kept(tmp_path: Path) -> None:
    engine = opened(tmp_path)
    engine._compiled._cache.blob = None
    engine(images(1))
    assert list(tmp_path.iterdir()) == []


def test_kernels_that_cannot_be_kept_are_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "replace", refuse)
    engine = opened(tmp_path)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for batch in (2, 1):
            assert engine(images(batch))["y"].shape == (batch, 4)
    (warning,) = said
    assert str(warning.message) == f"compiled kernels are not kept: {tmp_path / 'key.cache'}: Permission denied"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_for_kernels_that_is_none_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "home").touch()
    with pytest.warns(UserWarning, match="compiled kernels are not read: .*: Not a directory"):
        engine = opened(tmp_path / "home")
    with pytest.warns(UserWarning, match="compiled kernels are not kept: .*: "):
        engine(images(1))


def test_kernels_outlive_the_context_that_runs_them(tmp_path: Path) -> None:
    engine, gone = opened(tmp_path), []
    for what in ("_context", "_compiled"):
        weakref.finalize(getattr(engine, what), gone.append, what)
    del engine
    assert gone == ["_context", "_compiled"]
