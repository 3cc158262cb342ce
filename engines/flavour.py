"""TensorRT and TensorRT-RTX behind one name: the common API, and what only one of them has.

TensorRT-RTX builds engines for GeForce and RTX cards (sm_75 to sm_121), on a machine without a GPU too. TensorRT builds
on the GPU that will run the engine, data centre cards included.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

FlavourName = Literal["tensorrt_rtx", "tensorrt"]

FLAVOURS: tuple[FlavourName, ...] = ("tensorrt_rtx", "tensorrt")
PACKAGE = {"tensorrt_rtx": "pip install 'tensorrt-rtx>=1.7'", "tensorrt": "pip install 'tensorrt>=10.13'"}
# What TensorRT-RTX can be told to build for: sm -> member of its ComputeCapability.
RTX_TARGETS = {"sm_75": "SM75", "sm_80": "SM80", "sm_86": "SM86", "sm_89": "SM89", "sm_120": "SM120", "sm_121": "SM121"}


class MissingFlavourError(ImportError):
    """The Python package of a TensorRT flavour is not installed."""


@dataclass(frozen=True)
class Flavour:
    """One installed TensorRT.

    Attributes:
        name: of the import package.
        api: the package.
        version: of the package; an engine of TensorRT-RTX runs with exactly this one.
    """

    name: FlavourName
    api: Any
    version: str

    @property
    def ahead_of_time(self) -> bool:
        """Whether it builds for a named architecture without that GPU."""
        return hasattr(self.api, "ComputeCapability")


@functools.cache
def flavour(name: FlavourName = "tensorrt_rtx") -> Flavour:
    """The installed flavour of that name.

    Raises:
        MissingFlavourError: it is not installed; the message says how to.
    """
    try:
        api = importlib.import_module(name)
    except ImportError as error:
        raise MissingFlavourError(f"{name} is not installed ({error}): {PACKAGE[name]}") from error
    return Flavour(name, api, api.__version__)


def installed() -> dict[str, str]:
    """Installed flavour -> version."""
    versions: dict[str, str] = {}
    for name in FLAVOURS:
        try:
            versions[name] = flavour(name).version
        except MissingFlavourError:
            continue
    return versions


class Log:
    """The one logger that TensorRT keeps for a process, and who listens to it.

    The first logger a process makes is the one that speaks ever after: so there is one, and listeners come and go.
    """

    def __init__(self, api: Any) -> None:
        outer = self

        class Logger(api.ILogger):
            def __init__(self) -> None:
                api.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                for listener in outer.listeners:
                    listener(severity.name, message)

        self.listeners: list[Callable[[str, str], None]] = []
        self.logger = Logger()

    @contextlib.contextmanager
    def errors(self) -> Iterator[list[str]]:
        """The errors that are said inside, in order."""
        said: list[str] = []

        def listen(severity: str, message: str) -> None:
            if severity in ("ERROR", "INTERNAL_ERROR"):
                said.append(message)

        self.listeners.append(listen)
        try:
            yield said
        finally:
            self.listeners.remove(listen)


@functools.cache
def log(name: FlavourName = "tensorrt_rtx") -> Log:
    return Log(flavour(name).api)
