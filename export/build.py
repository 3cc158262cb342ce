"""From a traced graph and its weights to a TensorRT engine, on a machine without a GPU."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from onnx import TensorProto
from torch import Tensor

from fluxkiln.config import LATENT_SCALE, TOKEN_PIXELS
from fluxkiln.engines.flavour import RTX_TARGETS, Flavour, flavour, log
from fluxkiln.engines.store import refit_name
from fluxkiln.export.graph import Parameter, Traced
from fluxkiln.export.structure import HEADER, Structure, StructureError, check, read_listing

BITS = {TensorProto.FLOAT: 32, TensorProto.BFLOAT16: 16, TensorProto.FLOAT8E4M3FN: 8, TensorProto.FLOAT4E2M1: 4}
ALIGNMENT = 256  # bytes
SPARE = 5 * 2**29  # bytes a build takes beside the weights: graph, kernels, the builder itself


class BuildError(RuntimeError):
    """TensorRT did not build the engine; the message holds what it said."""


@dataclass(frozen=True)
class Profile:
    """Sizes an engine accepts: (least, best, most) of each.

    Attributes:
        batch: images, or prompts.
        image: image tokens, references too; text: text tokens.
        height, width: of the latents that an autoencoder takes or makes.
        rank: of a LoRA.
    """

    batch: tuple[int, int, int] = (1, 1, 1)
    image: tuple[int, int, int] = (256, 4096, 16384 + 2 * 4116)
    text: tuple[int, int, int] = (1, 512, 512)
    height: tuple[int, int, int] = (32, 128, 256)
    width: tuple[int, int, int] = (32, 128, 256)
    rank: tuple[int, int, int] = (1, 16, 128)

    @classmethod
    def of(
        cls, largest: tuple[int, int] = (2048, 2048), references: int = 2, batch: int = 1, text: int = 512
    ) -> Profile:
        """For images from 256 x 256 to `largest` pixels with up to so many references of Kontext's preferred sizes.

        A preferred size has at most 4,116 tokens (672 x 1568 pixels).

        Raises:
            ValueError: no image fits, or less than one of a batch, or fewer references than none.
        """
        if min(largest) < TOKEN_PIXELS or references < 0 or min(batch, text) < 1:
            width, height = largest
            raise ValueError(
                f"an engine takes images of at least {TOKEN_PIXELS} x {TOKEN_PIXELS} pixels, one or more, with 0 or "
                f"more references and 1 or more text tokens; got {width} x {height}, {batch}, {references} and {text}"
            )
        most = math.prod(side // TOKEN_PIXELS for side in largest) + references * 4116
        width, height = ((min(32, side), min(128, side), side) for side in (n // LATENT_SCALE for n in largest))
        return cls((1, 1, batch), (min(256, most), min(4096, most), most), (1, text, text), height, width)

    def shapes(self, inputs: Mapping[str, tuple[int | str, ...]]) -> dict[str, list[tuple[int, ...]]]:
        """Input name -> its three shapes."""
        sizes: dict[int | str, tuple[int, int, int]] = {"batch": self.batch, "img": self.image, "txt": self.text}
        for name in ("height", "width"):
            least, best, most = sizes[name] = getattr(self, name)
            sizes[f"pixel_{name}"] = (least * LATENT_SCALE, best * LATENT_SCALE, most * LATENT_SCALE)
        sizes["rank"] = self.rank
        return {
            name: [tuple(sizes[d][i] if d in sizes else int(d) for d in shape) for i in range(3)]
            for name, shape in inputs.items()
        }


@dataclass(frozen=True)
class Built:
    """An engine and what it is.

    Attributes:
        plan: the engine's bytes.
        structure: what it runs.
        seconds: the build took.
        messages: warnings and errors of the builder.
    """

    plan: memoryview
    structure: Structure
    seconds: float
    messages: tuple[str, ...]


def nbytes(parameters: Iterable[Parameter]) -> int:
    return sum(size(parameter) for parameter in parameters)


def size(parameter: Parameter) -> int:
    return math.prod(parameter.shape) * BITS[parameter.element] // 8


def memory_needed(traced: Traced, weights: Literal["inside", "refit"]) -> int:
    """Bytes of memory that a build takes at most: the weights and the engine that holds them, or neither.

    TensorRT makes one product of all modulations and lays out its weight, even for an engine without weights.
    """
    parameters = traced.parameters.values()
    merged = [p for p in parameters if p.layer.endswith(("mod.lin", "modulation.lin", "adaLN_modulation.1"))]
    return SPARE + (2 * nbytes(parameters) if weights == "inside" else nbytes(merged))


def refuse(precision: str, arch: str, name: Flavour) -> str | None:
    """Why an engine of this precision cannot be built for this architecture, or None."""
    if name.ahead_of_time and arch not in RTX_TARGETS:
        return (
            f"TensorRT-RTX builds for {', '.join(RTX_TARGETS)}, not {arch}: on a data centre GPU use backend triton, "
            "or build with --flavour tensorrt on that machine"
        )
    if not (number := arch.removeprefix("sm_")).isdecimal():
        return f"an architecture is sm_NN, for example sm_89 or sm_120, got {arch!r}"
    if precision == "nvfp4" and int(number) < 100:
        return f"NVFP4 needs Blackwell (sm_120); {arch} has no FP4 instructions: build fp8 for it"
    if precision == "fp8" and int(number) < 89:
        return f"FP8 needs Ada (sm_89) or newer; {arch} has no FP8 instructions: build bf16 for it"
    return None


def build(
    traced: Traced,
    arch: str,
    profile: Profile,
    values: Iterable[tuple[str, Tensor]] | None = None,
    *,
    name: Literal["tensorrt_rtx", "tensorrt"] = "tensorrt_rtx",
    progress: Callable[[str, int, int], None] | None = None,
    fallback: bool = False,
) -> Built:
    """Build an engine.

    Args:
        traced: the graph.
        arch: the GPU's architecture, `sm_89`, `sm_120`, ...
        profile: sizes it accepts.
        values: name and tensor of every parameter, built into the engine; None builds an engine without weights,
            which takes a fraction of the memory and is supplied with them when it is loaded.
        name: of the flavour.
        progress: called with (phase, step, steps).
        fallback: accept an engine in which products fell back to another format; its structure says which.

    Raises:
        BuildError: TensorRT refused; nothing is left behind.
        KeyboardInterrupt: it was interrupted.
        StructureError: it built something else than was asked for.
    """
    trt = flavour(name).api
    said: list[tuple[str, str]] = []
    speaker = log(name)
    speaker.listeners.append(lambda severity, message: said.append((severity, message)))
    start = time.perf_counter()
    try:
        builder = trt.Builder(speaker.logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, speaker.logger)
        held = _load(parser, traced, values)
        if not parser.parse_model_proto():
            raise BuildError(_errors(said, [str(parser.get_error(i)) for i in range(parser.num_errors)]))
        if values is None:
            _hollow(trt, network, traced.parameters)
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # lists the kernels with their types
        if values is None:
            config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)
            config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        optimization = builder.create_optimization_profile()
        for tensor, shapes in profile.shapes(traced.inputs).items():
            optimization.set_shape(tensor, *shapes)
        config.add_optimization_profile(optimization)
        if flavour(name).ahead_of_time:
            config.num_compute_capabilities = 1
            config.set_compute_capability(getattr(trt.ComputeCapability, RTX_TARGETS[arch]), 0)
        with _interrupts() as pressed:
            config.progress_monitor = _monitor(trt, progress or (lambda *step: None), pressed)
            plan = builder.build_serialized_network(network, config)
        del held
        if pressed:
            raise KeyboardInterrupt
        if plan is None:
            raise BuildError(_errors(said, []))
    finally:
        speaker.listeners.pop()
    listing = next((message for _, message in reversed(said) if message.startswith(HEADER)), "")
    structure = check(read_listing(listing), traced.products, traced.attentions, traced.attention)
    if structure.fallen and not fallback:
        first, (asked, found) = next(iter(structure.fallen.items()))
        raise StructureError(
            f"{len(structure.fallen)} products or attentions fell back: {first} was asked for in {asked} and was built "
            f"in {found}"
        )
    messages = tuple(f"{severity}: {message}" for severity, message in said if severity in ("WARNING", "ERROR"))
    return Built(memoryview(plan), structure, time.perf_counter() - start, messages)


def _load(parser: Any, traced: Traced, values: Iterable[tuple[str, Tensor]] | None) -> list[Any]:
    """Hand graph and weights to the parser; what it returns must outlive the build."""
    if not parser.load_model_proto(traced.proto.SerializeToString()):
        raise BuildError("TensorRT did not accept the graph")
    if values is None:
        values = _blank(traced.parameters)
    held = []
    for name, tensor in values:
        if not parser.load_initializer(name, tensor.data_ptr(), tensor.nbytes):
            raise BuildError(f"TensorRT did not take the weight {name} of {tensor.nbytes} bytes")
        held.append(tensor)
    return held


def _blank(parameters: Mapping[str, Parameter]) -> Iterator[tuple[str, Tensor]]:
    """Zeros for every parameter, at addresses of their own since TensorRT knows weights by address.

    Their values do not count, so they overlap: all of them take little more than the largest.
    """
    blank = torch.zeros(max(map(size, parameters.values())) + ALIGNMENT * len(parameters), dtype=torch.uint8)
    for i, (name, parameter) in enumerate(parameters.items()):
        yield name, blank[ALIGNMENT * i :][: size(parameter)]


def _hollow(trt: Any, network: Any, parameters: Mapping[str, Parameter]) -> None:
    """Replace the constant of every parameter by one without data, which a refit fills by the parameter's name."""
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    hollow = {}
    for layer in layers:
        if layer.type == trt.LayerType.CONSTANT and layer.name in parameters:
            old = layer.get_output(0)
            new = network.add_constant(
                tuple(old.shape), trt.Weights(old.dtype, 0, math.prod(parameters[layer.name].shape))
            )
            new.__class__ = trt.IConstantLayer
            network.set_weights_name(new.weights, refit_name(layer.name))
            network.mark_weights_refittable(refit_name(layer.name))
            hollow[old.name] = new.get_output(0)
    if len(hollow) != len(parameters):
        raise BuildError(
            f"{len(parameters) - len(hollow)} of {len(parameters)} weights are no constants of the network"
        )
    for layer in layers:
        for i in range(layer.num_inputs):
            tensor = layer.get_input(i)
            if tensor is not None and tensor.name in hollow:
                layer.set_input(i, hollow[tensor.name])


def _errors(said: Iterable[tuple[str, str]], parser: list[str]) -> str:
    """What TensorRT complained about, shortest form first."""
    errors = parser or [message for severity, message in said if severity in ("ERROR", "INTERNAL_ERROR")]
    return "TensorRT did not build the engine: " + ("; ".join(dict.fromkeys(errors[-3:])) or "it did not say why")


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Ctrl-C while TensorRT builds, to be read by its monitor: TensorRT swallows what is raised in a callback."""
    pressed: list[int] = []
    mine = threading.current_thread() is threading.main_thread()
    if not mine or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield pressed
        return
    signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _monitor(trt: Any, progress: Callable[[str, int, int], None], pressed: Sequence[int]) -> Any:
    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str, steps: int) -> None:
            self.steps[phase] = steps

        def phase_finish(self, phase: str) -> None:
            progress(phase, self.steps[phase], self.steps[phase])

        def step_complete(self, phase: str, step: int) -> bool:
            progress(phase, step, self.steps[phase])
            return not pressed  # False stops the build

    return Monitor()
