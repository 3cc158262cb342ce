"""Running an engine on torch tensors, on torch's stream, without copies.

Not verified on hardware here: nothing in this file can run without an NVIDIA GPU that the engine was built for.
`fluxkiln verify --engines` runs it against eager on a machine that has one.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluxkiln.engines.flavour import Flavour, FlavourName, flavour, log
from fluxkiln.engines.store import refit_name

ALIGNMENT = 256  # bytes, of device memory handed to TensorRT


class SessionError(RuntimeError):
    """TensorRT cannot load or run the engine; the message says what it said."""


class Scratch:
    """Device memory that engines which do not run at the same time share; it grows to the largest need."""

    def __init__(self, device: torch.device) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8, device=device)

    def get(self, nbytes: int) -> Tensor:
        if self._memory.numel() < nbytes:
            self._memory = torch.empty(
                -(-nbytes // ALIGNMENT) * ALIGNMENT, dtype=torch.uint8, device=self._memory.device
            )
        return self._memory


class Session:
    """One engine, loaded.

    Args:
        plan: the engine.
        name: flavour of TensorRT that built it.
        weights: (name, tensor) of every parameter, for an engine without weights; tensors on the CPU or the GPU.
        scratch: shared with other engines; None makes its own.
        cache: folder for kernels that the driver compiled for this GPU; None keeps none.
        capture: replay each shape's kernels as one CUDA graph, by the runtime's own strategy.

    Raises:
        SessionError: the engine is not for this machine, or its weights do not fit.
    """

    def __init__(
        self,
        plan: bytes | memoryview,
        name: FlavourName = "tensorrt_rtx",
        *,
        weights: Iterable[tuple[str, Tensor]] | None = None,
        scratch: Scratch | None = None,
        cache: Path | None = None,
        capture: bool = True,
        device: torch.device | str = "cuda",
    ) -> None:
        self._flavour = flavour(name)
        self._device = torch.device(device)
        self._scratch = scratch or Scratch(self._device)
        self._heard: list[str] = []
        trt, speaker = self._flavour.api, log(name)
        speaker.listeners.append(self._listen)
        self._runtime = trt.Runtime(speaker.logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise SessionError(f"{name} {self._flavour.version} does not load this engine: {self._last()}")
        if weights is not None:
            self._refit(trt, speaker.logger, weights)
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        self._cache = None
        if self._flavour.ahead_of_time:
            # Kernels for a shape are compiled before its first run, so that the second run equals the first.
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            if capture:
                config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            if cache is not None:
                self._cache = _RuntimeCache(config, cache / f"{_machine(self._flavour, plan, self._device)}.cache")
        self._context = self._engine.create_execution_context(config)
        if self._context is None:
            raise SessionError(f"{name} makes no execution context: {self._last()}")
        modes = {
            tensor: self._engine.get_tensor_mode(tensor)
            for tensor in (self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors))
        }
        self.inputs = tuple(tensor for tensor, mode in modes.items() if mode == trt.TensorIOMode.INPUT)
        self.outputs = tuple(tensor for tensor, mode in modes.items() if mode == trt.TensorIOMode.OUTPUT)

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run once; the results belong to the caller.

        Raises:
            ValueError: an input is missing, has another dtype, or a shape outside the engine's profile.
            SessionError: TensorRT refused.
        """
        for name in self.inputs:
            self._check(name, inputs)
            self._context.set_input_shape(name, tuple(inputs[name].shape))
            self._context.set_tensor_address(name, inputs[name].data_ptr())
        results = {}
        for name in self.outputs:
            shape = tuple(self._context.get_tensor_shape(name))
            results[name] = torch.empty(shape, dtype=self._dtype(name), device=self._device)
            self._context.set_tensor_address(name, results[name].data_ptr())
        memory = self._scratch.get(self._context.update_device_memory_size_for_shapes())
        self._context.set_device_memory(memory.data_ptr(), memory.nbytes)
        if not self._context.execute_async_v3(torch.cuda.current_stream(self._device).cuda_stream):
            raise SessionError(f"the engine did not run: {self._last()}")
        return results

    def save_cache(self) -> None:
        """Write the kernels compiled since loading, for the next process."""
        if self._cache is not None:
            self._cache.save()

    def _refit(self, trt: Any, logger: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
        refitter = trt.Refitter(self._engine, logger)
        held = []
        for name, tensor in weights:
            dtype = refitter.get_weights_prototype(refit_name(name)).dtype
            count = tensor.numel() * (2 if tensor.dtype == torch.uint8 else 1)  # uint8 holds pairs of FP4
            location = trt.TensorLocation.DEVICE if tensor.is_cuda else trt.TensorLocation.HOST
            value = trt.Weights(dtype, tensor.data_ptr(), count)
            if not refitter.set_named_weights(refit_name(name), value, location):
                raise SessionError(f"the engine does not take the weight {name} {list(tensor.shape)}: {self._last()}")
            held.append(tensor)
        if missing := refitter.get_missing_weights():
            raise SessionError(f"the engine still lacks {len(missing)} weights: {', '.join(missing[:3])}")
        if not refitter.refit_cuda_engine():
            raise SessionError(f"the engine was not refitted: {self._last()}")

    def _check(self, name: str, inputs: Mapping[str, Tensor]) -> None:
        if name not in inputs:
            raise ValueError(f"the engine reads {', '.join(self.inputs)}; {name} was not given")
        tensor = inputs[name]
        if tensor.dtype != self._dtype(name) or not tensor.is_contiguous() or tensor.device != self._device:
            want = f"contiguous {self._dtype(name)} on {self._device}"
            raise ValueError(f"{name} must be {want}, got {tensor.dtype} on {tensor.device}")
        least, _, most = self._engine.get_tensor_profile_shape(name, 0)
        if len(least) != tensor.ndim or any(not a <= n <= b for a, n, b in zip(least, tensor.shape, most, strict=True)):
            raise ValueError(
                f"{name} {list(tensor.shape)} is outside what the engine was built for, {list(least)} to {list(most)}: "
                "build one that fits with `fluxkiln build --max-size WIDTHxHEIGHT --references N`"
            )

    def _dtype(self, name: str) -> torch.dtype:
        return {"FLOAT": torch.float32, "BF16": torch.bfloat16, "HALF": torch.float16}[
            self._engine.get_tensor_dtype(name).name
        ]

    def _listen(self, severity: str, message: str) -> None:
        if severity in ("ERROR", "INTERNAL_ERROR"):
            self._heard.append(message)

    def _last(self) -> str:
        return self._heard[-1] if self._heard else "it did not say why"


class _RuntimeCache:
    """Kernels that TensorRT-RTX compiled on this machine, kept in a file between processes."""

    def __init__(self, config: Any, path: Path) -> None:
        self._path, self._cache = path, config.create_runtime_cache()
        if path.is_file():
            self._cache.deserialize(path.read_bytes())
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        scratch = self._path.with_suffix(".new")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_bytes(bytes(self._cache.serialize()))
        scratch.replace(self._path)


def _machine(flavour: Flavour, plan: bytes | memoryview, device: torch.device) -> str:
    """A cache serves one engine, one version of TensorRT, one kind of GPU, one driver and one operating system."""
    facts = (
        flavour.version,
        torch.cuda.get_device_name(device),
        str(torch._C._cuda_getDriverVersion()),  # type: ignore[attr-defined]
        platform.system(),
        hashlib.sha256(plan).hexdigest(),
    )
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:24]
