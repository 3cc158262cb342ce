"""Running an engine on torch tensors and torch's stream.

Not verified on hardware here: nothing in this file can run without an NVIDIA GPU that the engine was built for.
`fluxkiln verify --engines` runs it against eager on a machine that has one.
"""

from __future__ import annotations

import contextlib
import hashlib
import platform
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluxkiln.engines.flavour import FLAVOURS, Flavour, FlavourName, Log, flavour, log
from fluxkiln.engines.store import Stored, StoreError, refit_name

ALIGNMENT = 256  # bytes, of device memory handed to TensorRT


class SessionError(RuntimeError):
    """TensorRT cannot load or run the engine; the message says what it said."""


class Scratch:
    """Device memory that engines which do not run at the same time share; it grows to the largest need."""

    def __init__(self, device: torch.device) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8, device=device)

    def get(self, nbytes: int) -> Tensor:
        if self._memory.numel() < nbytes:
            self._memory = self._memory.new_empty(-(-nbytes // ALIGNMENT) * ALIGNMENT)
        return self._memory


class Session:
    """One engine, loaded.

    Args:
        stored: the engine; all of it is compared with its manifest first.
        weights: (name, tensor) of every parameter, for an engine without weights; on the CPU, or on the GPU beside the
            copy that the engine makes. All are held until the engine has them.
        scratch: shared with other engines; None makes its own.
        cache: folder for kernels that were compiled for this GPU; None keeps none.
        device: the GPU.

    Raises:
        StoreError: the engine's file is damaged.
        SessionError: the engine is not for this machine, or its weights do not fit.
    """

    def __init__(
        self,
        stored: Stored,
        *,
        weights: Iterable[tuple[str, Tensor]] | None = None,
        scratch: Scratch | None = None,
        cache: Path | None = None,
        device: torch.device | str = "cuda",
    ) -> None:
        if not torch.cuda.is_available():
            raise SessionError("an engine runs on an NVIDIA GPU, and torch finds none here")
        name = flavour_of(stored)
        self._flavour, self._log, self._device = flavour(name), log(name), torch.device(device)
        trt = self._flavour.api
        with torch.cuda.device(self._device):
            self._runtime, self._engine = load(stored)
            if weights is not None:
                self._refit(weights)
            with saying(self._log, f"{name} makes no execution context"):
                config = _some(self._engine.create_runtime_config())
                config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
                compiled = self._specialise(config, stored, cache) if self._flavour.ahead_of_time else None
                self._context = _some(self._engine.create_execution_context(config))
        # After the context, which uses it: CPython releases attributes in the order in which they were first set.
        self._compiled = compiled
        self._saved: set[tuple[torch.Size, ...]] = set()  # shapes whose kernels are in its file
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        read = {tensor: self._engine.get_tensor_mode(tensor) == trt.TensorIOMode.INPUT for tensor in names}
        self.inputs = tuple(tensor for tensor in names if read[tensor])
        self.outputs = tuple(tensor for tensor in names if not read[tensor])
        # Not torch's current stream: that is the default one as a rule, on which nothing can be captured.
        self._stream = torch.cuda.Stream(self._device)
        self._scratch = scratch or Scratch(self._device)
        # TensorRT holds addresses, so memory is held here; and a captured graph reads and writes where it always did.
        self._bound: dict[str, Tensor] = {}
        self._memory: Tensor | None = None

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run once, in the order of torch's current stream; the results are overwritten by the next call.

        Raises:
            ValueError: an input is missing, has another dtype, or a shape outside the engine's profile.
            SessionError: TensorRT refused.
        """
        for name in self.inputs:
            self._check(name, inputs)
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with (
            torch.cuda.device(self._device),
            torch.cuda.stream(self._stream),
            saying(self._log, "the engine did not run"),
        ):
            shapes = {name: inputs[name].shape for name in self.inputs}
            if any(name not in self._bound or self._bound[name].shape != shapes[name] for name in self.inputs):
                self._bind(shapes)
            for name in self.inputs:
                self._bound[name].copy_(inputs[name])
            _some(self._context.execute_async_v3(self._stream.cuda_stream))
            if self._compiled is not None and tuple(shapes.values()) not in self._saved:
                self._compiled.save()
                self._saved.add(tuple(shapes.values()))
        current.wait_stream(self._stream)
        return {name: self._bound[name] for name in self.outputs}

    @torch.inference_mode(False)  # inference tensors cannot be written to outside of inference mode
    def _bind(self, shapes: Mapping[str, torch.Size]) -> None:
        """Memory for inputs, outputs and scratch of these sizes; where it fails, nothing is bound."""
        self._bound, bound = {}, {}
        for name in self.inputs:
            _some(self._context.set_input_shape(name, tuple(shapes[name])))
        for name in (*self.inputs, *self.outputs):
            shape = tuple(self._context.get_tensor_shape(name))
            bound[name] = torch.empty(shape, dtype=self._dtype(name), device=self._device)
            _some(self._context.set_tensor_address(name, bound[name].data_ptr()))
        with self._log.errors() as said:
            nbytes = self._context.update_device_memory_size_for_shapes()
        _some(nbytes > 0 or not said)  # 0 bytes are a failure, or all that the engine needs
        self._memory = self._scratch.get(nbytes)
        self._context.set_device_memory(self._memory.data_ptr(), self._memory.nbytes)
        self._bound = bound

    def _specialise(self, config: Any, stored: Stored, cache: Path | None) -> _RuntimeCache | None:
        """What only TensorRT-RTX has: kernels compiled for each shape before its first run, so that the second run
        equals the first; their cache; and each shape's kernels as one CUDA graph, by the runtime's own strategy."""
        trt = self._flavour.api
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if cache is None:
            return None
        return _RuntimeCache(config, cache / f"{_cache_key(self._flavour, stored, self._device)}.cache")

    def _refit(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        trt, held = self._flavour.api, []
        with saying(self._log, "the engine was not refitted"):
            refitter = trt.Refitter(self._engine, self._log.logger)
            for name, tensor in weights:
                like = refitter.get_weights_prototype(refit_name(name))
                count = tensor.numel() * (2 if tensor.dtype == torch.uint8 else 1)  # uint8 holds pairs of FP4
                if like.size != count:
                    wants = f"{like.size} values" if like.size >= 0 else "no such weight"
                    raise SessionError(f"the engine takes {wants} for {name}, the model has {list(tensor.shape)}")
                location = trt.TensorLocation.DEVICE if tensor.is_cuda else trt.TensorLocation.HOST
                value = trt.Weights(like.dtype, tensor.data_ptr(), count)
                _some(refitter.set_named_weights(refit_name(name), value, location))
                held.append(tensor)
            if missing := refitter.get_missing_weights():
                raise SessionError(f"the engine lacks {len(missing)} weights still: {', '.join(missing[:3])}")
            _some(refitter.refit_cuda_engine())

    def _check(self, name: str, inputs: Mapping[str, Tensor]) -> None:
        if name not in inputs:
            raise ValueError(f"the engine reads {', '.join(self.inputs)}; {name} was not given")
        tensor = inputs[name]
        if tensor.dtype != self._dtype(name):
            raise ValueError(f"{name} must be {self._dtype(name)}, got {tensor.dtype}")
        least, _, most = self._engine.get_tensor_profile_shape(name, 0)
        if len(least) != tensor.ndim or any(not a <= n <= b for a, n, b in zip(least, tensor.shape, most, strict=True)):
            raise ValueError(
                f"{name} {list(tensor.shape)} is outside what the engine was built for, {list(least)} to {list(most)}: "
                "build one that fits with `fluxkiln build --max-size WIDTHxHEIGHT --references N`"
            )

    def _dtype(self, name: str) -> torch.dtype:
        return {"FLOAT": torch.float32, "BF16": torch.bfloat16, "HALF": torch.float16, "INT64": torch.int64}[
            self._engine.get_tensor_dtype(name).name
        ]


def load(stored: Stored) -> tuple[Any, Any]:
    """TensorRT's runtime and engine; the runtime has to outlive the engine.

    Raises:
        StoreError: the engine's file is damaged.
        SessionError: TensorRT does not load it.
    """
    name = flavour_of(stored)
    with saying(log(name), f"{name} {flavour(name).version} does not load the engine {stored.folder}"):
        runtime = flavour(name).api.Runtime(log(name).logger)
        with contextlib.closing(stored.read()) as plan:
            return runtime, _some(runtime.deserialize_cuda_engine(plan))


def flavour_of(stored: Stored) -> FlavourName:
    """Raises StoreError for one that this version does not know."""
    for name in FLAVOURS:
        if name == stored.subject.flavour:
            return name
    raise StoreError(f"{stored.folder} is for {stored.subject.flavour}, fluxkiln knows {' and '.join(FLAVOURS)}")


@contextlib.contextmanager
def saying(log: Log, what: str) -> Iterator[None]:
    """A refusal inside (None or False) becomes an error that says what TensorRT said."""
    with log.errors() as said:
        try:
            yield
        except _Refused:
            raise SessionError(f"{what}: {said[-1] if said else 'TensorRT did not say why'}") from None


class _Refused(Exception):
    """TensorRT returned None or False."""


def _some(result: Any) -> Any:
    if result is None or result is False:
        raise _Refused
    return result


class _RuntimeCache:
    """Kernels that TensorRT-RTX compiled on this machine, kept in a file between processes."""

    def __init__(self, config: Any, path: Path) -> None:
        self._path, self._cache = path, config.create_runtime_cache()
        try:
            self._cache.deserialize(path.read_bytes())  # refuses by itself what does not fit or is damaged
        except FileNotFoundError:
            pass  # nothing was compiled yet
        except OSError as error:
            warnings.warn(f"compiled kernels are not read: {path}: {error.strerror}", stacklevel=1)
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Keep what was compiled; where that fails the next process compiles again, and this one goes on."""
        blob = self._cache.serialize()
        if blob is None:
            return
        scratch = self._path.with_name(f".{self._path.name}.{uuid.uuid4().hex[:8]}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            try:
                scratch.write_bytes(bytes(blob))
                scratch.replace(self._path)
            finally:
                scratch.unlink(missing_ok=True)
        except OSError as error:
            # Always the same text, without the temporary name, so that Python shows it once.
            warnings.warn(f"compiled kernels are not kept: {self._path}: {error.strerror}", stacklevel=1)


def _cache_key(flavour: Flavour, stored: Stored, device: torch.device) -> str:
    """A cache serves one engine, one version of TensorRT, one kind of GPU, one driver and one operating system."""
    assert stored.manifest is not None
    facts = (
        flavour.version,
        torch.cuda.get_device_name(device),
        str(torch._C._cuda_getDriverVersion()),  # type: ignore[attr-defined]
        platform.system(),
        stored.manifest.sha256,
    )
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:24]
