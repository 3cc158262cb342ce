"""The operations in Triton, as an object that one transformer owns: its memory, its packed weights, its plan.

    ops = triton_ops(device, attention="bf16")           what the graph is given
    compile_step(transformer, batch, text, image)        compile, in parallel, all that a step will launch
    CapturedStep(transformer, img, txt, mods, rope)      the same step as one CUDA graph

A transformer runs one step at a time: outputs live in an arena, one buffer for each output of each operation, and a
buffer is overwritten the next time its operation runs. Only the velocity is memory of its own. Nothing is allocated
once a shape has been seen, nothing waits for the device, nothing is copied from the host.

Row i of a batch equals the request run alone, bit for bit: the batch is an axis of every kernel's grid, and what
goes to a library goes there image by image.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fluxkiln.kernels import (
    Binding,
    Ops,
    attention,
    library,
    linear,
    linear_gate_residual,
    linear_gelu,
    norm_modulate,
    packed,
    qkv_rope,
)
from fluxkiln.kernels.arch import RELATIVE
from fluxkiln.kernels.formats import Activation, Quant
from fluxkiln.kernels.language import Launch
from fluxkiln.kernels.layers import Projection, QKNorm, Streams
from fluxkiln.kernels.packed import Packed, PackedProjection
from fluxkiln.kernels.quantize import Empty

INTERPRETED = 120  # on a CPU: the kernels of an architecture that has every format


class Arena:
    """Memory for the outputs of operations, kept from step to step.

    A buffer is as large as its largest output so far, so that sizes may alternate without growing the arena.
    """

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, str], Tensor] = {}
        self._views: dict[tuple[Any, ...], Tensor] = {}

    def of(self, op: str, device: torch.device) -> Empty:
        """Gives the output buffers of an operation: `(name, shape, dtype) -> tensor`."""

        def empty(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            key = (op, name, *shape, dtype)
            if key not in self._views:
                self._views[key] = (
                    self._grown(op, name, math.prod(shape) * dtype.itemsize, device).view(dtype).view(shape)
                )
            return self._views[key]

        return empty

    def _grown(self, op: str, name: str, nbytes: int, device: torch.device) -> Tensor:
        buffer = self.buffers.get((op, name))
        if buffer is None or buffer.numel() < nbytes:
            self._views = {key: view for key, view in self._views.items() if key[:2] != (op, name)}
            self.buffers[op, name] = buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)
        return buffer[:nbytes]


class Triton:
    """The kernels, launched for one device; `ops` hands them out as the graph calls them.

    Args:
        device: where the tensors are.
        attention: what q, k and v are multiplied in.
        arch: whose kernels to launch; None is the device's own, on a CPU `INTERPRETED`.
    """

    def __init__(
        self, device: torch.device | str, attention: Literal["bf16", "fp8"] = "bf16", arch: int | None = None
    ) -> None:
        self.device, self.attention_format = torch.device(device), attention
        self.arch = native_arch(self.device) if arch is None else RELATIVE.get(arch, arch)
        self.arena = Arena()
        self._head_dim: int | None = None
        self._launchers: dict[tuple[Any, ...], Callable[..., Any]] = {}  # of calls that were checked
        self._collected: list[Callable[[], Any]] | None = None
        self._prepared: set[tuple[int, int]] = set()  # numbers of text and image tokens

    def ops(self) -> Ops:
        return Ops(
            pack=self.pack,
            pack_qkv=self.pack_qkv,
            norm_modulate=self.norm_modulate,
            qkv_rope=self.qkv_rope,
            attention=self.attention,
            linear_gelu=self.linear_gelu,
            linear_gate_residual=self.linear_gate_residual,
            linear=self.linear,
            describe=self.describe,
            prepare=self.prepare,
        )

    # --- layers

    def pack(self, streams: Streams) -> Packed | tuple[Packed, ...] | Streams:
        """Streams of one width stacked; of several, each on its own; what no kernel can take, as it is."""
        widths = [each.weight.shape[1] for each in streams]
        if any(size % 16 for each in streams for size in each.weight.shape):
            return streams
        return packed.pack(streams) if len(set(widths)) == 1 else linear.pack(streams)

    def pack_qkv(self, streams: Streams, norms: tuple[QKNorm, ...]) -> PackedProjection:
        self._head_dim = len(norms[0].query)
        return qkv_rope.pack(Projection(streams, norms, attention=self.attention_format))

    def describe(self, op: str, layer: Any = None) -> Binding:
        """Who runs an operation with a layer, in which format."""
        if op == "attention" and self.attention_format == "bf16" and self._head_dim is not None:
            by_library = library.faster(library.attention_kind(self.arch, self._head_dim))
            return Binding("torch" if by_library else "triton", "bf16")
        if layer is None:
            return Binding("triton", self.attention_format if op == "attention" else "bf16")
        parts = layer.layer if isinstance(layer, PackedProjection) else layer
        if isinstance(parts, Streams):
            return Binding("torch", "bf16", sum(each.weight.numel() for each in parts))
        parts = unstacked(parts) if op == "linear" else (parts,) if isinstance(parts, Packed) else parts
        weights = sum(part.streams * part.parts * part.n * part.k for part in parts)
        by_library = op == "linear" and library.launcher(op, (None, parts), self.arch) is not None
        return Binding("torch" if by_library else "triton", parts[0].format, weights)

    # --- operations

    def norm_modulate(
        self, x: Tensor, shift: Tensor, scale: Tensor, split: int, out: Quant | None = None
    ) -> Activation:
        return self._run("norm_modulate", norm_modulate, x, shift, scale, split, out)

    def qkv_rope(self, x: Activation, layer: PackedProjection, rope: Tensor, split: int) -> tuple[Any, Any, Any]:
        return self._run("qkv_rope", qkv_rope, x, layer, rope, split)

    def attention(self, q: Any, k: Any, v: Any, out: Quant | None = None) -> Activation:
        return self._run("attention", attention, q, k, v, out)

    def linear_gelu(self, x: Activation, layer: Packed, split: int, out: Quant | None = None) -> Activation:
        return self._run("linear_gelu", linear_gelu, x, layer, split, out)

    def linear_gate_residual(
        self, xs: Sequence[Activation], layer: Packed, gate: Tensor, residual: Tensor, split: int
    ) -> Tensor:
        return self._run("linear_gate_residual", linear_gate_residual, xs, layer, gate, residual, split)

    def linear(self, xs: Sequence[Tensor], layer: Packed | tuple[Packed, ...] | Streams) -> Tensor:
        if isinstance(layer, Streams):
            images = [linear.reference([x[i : i + 1] for x in xs], layer) for i in range(len(xs[0]))]
            return torch.cat(images)
        # From the caller: they may lie anywhere.
        y = self._run("linear", linear, list(map(attention.addressable, xs)), unstacked(layer))
        return y.clone() if len(xs) == 1 else y  # one stream is the end: the velocity belongs to the caller

    def _run(self, name: str, op: Any, *args: Any) -> Any:
        call = (name, *map(_signature, args))
        if call not in self._launchers:
            op.check(*args)
            launch = library.launcher(name, args, self.arch)
            if launch is None and (reason := refuse(op, args, self.arch)):
                raise ValueError(f"{name}: {reason}")
            self._launchers[call] = launch or op.launch
        output, launches = self._launchers[call](*args, arch=self.arch, empty=self.arena.of(name, self.device))
        if self._collected is not None:
            self._collected += launches
        else:
            for launch in launches:
                launch()
        return output

    def prepare(self, transformer: Any, batch: int, text: int, image: int) -> None:
        """`compile_step`, on a GPU, once for each size."""
        if self.device.type == "cuda" and (text, image) not in self._prepared:
            compile_step(transformer, batch, text, image)
            self._prepared.add((text, image))

    @contextlib.contextmanager
    def collected(self) -> Iterator[list[Callable[[], Any]]]:
        """Inside, operations only tell what they would launch, or call of a library."""
        self._collected = launches = []
        try:
            yield launches
        finally:
            self._collected = None


def triton_ops(
    device: torch.device | str = "cpu", attention: Literal["bf16", "fp8"] = "bf16", arch: int | None = None
) -> Ops:
    """Operations in Triton for a transformer of its own; see `Triton`."""
    return Triton(device, attention, arch).ops()


def native_arch(device: torch.device) -> int:
    """The architecture whose kernels a device runs: its own, its nearest relative's, on a CPU `INTERPRETED`."""
    if device.type != "cuda":
        return INTERPRETED
    major, minor = torch.cuda.get_device_capability(device)
    return RELATIVE.get(10 * major + minor, 10 * major + minor)


def refuse(op: Any, args: Sequence[Any], arch: int) -> str | None:
    """Why the Triton kernel of an operation cannot take a valid call, or None."""
    return op.refuse(*args, arch=arch) if "arch" in op.refuse.__annotations__ else op.refuse(*args)


def unstacked(layer: Packed | tuple[Packed, ...]) -> tuple[Packed, ...]:
    """Each stream of a layer on its own: views of the stacked weights."""
    if isinstance(layer, tuple):
        return layer
    if layer.streams == 1:
        return (layer,)
    parts = []
    for s in range(layer.streams):
        rows = slice(s * layer.n, (s + 1) * layer.n)
        views = {
            name: value[rows]
            for name in ("weight", "block_scale", "scale", "bias", "up")
            if (value := getattr(layer, name)) is not None
        }
        down = layer.down and unstacked(layer.down)[s]
        parts.append(replace(layer, **views, bound=layer.bound[s : s + 1], streams=1, down=down))
    return tuple(parts)


def _signature(x: Any) -> Any:
    """What the checks of a call depend on: shapes, strides and formats, not values."""
    if isinstance(x, Tensor):
        return x.dtype, x.shape, x.stride()
    if isinstance(x, PackedProjection):
        return _signature(x.layer), x.norm.shape, x.attention, x.query
    if isinstance(x, Packed):
        return x.weight.dtype, x.weight.shape, x.format, x.streams, x.parts, x.dtype, x.accumulate, x.up is None
    if isinstance(x, tuple | list):
        return tuple(map(_signature, x))
    if hasattr(x, "__dataclass_fields__"):
        return type(x), *(_signature(value) for value in vars(x).values())
    return x


# --- a whole step -----------------------------------------------------------------------------


def compile_step(
    transformer: Any,
    batch: int,
    text: int,
    image: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Compile all that a step of these sizes will launch, in parallel; nothing is computed. For a GPU.

    Args:
        transformer: one whose operations are `triton_ops`.
        batch, text, image: numbers of images and tokens.
        progress: told how many kernels are compiled, of how many.

    Returns:
        number of different kernels.

    Raises:
        Exception: Triton's or ptxas', of the first kernel that does not compile.
    """
    from triton import AsyncCompileMode

    triton: Triton = transformer.ops.pack.__self__
    config, like = transformer.config, {"dtype": transformer.dtype, "device": transformer.device}
    rope = torch.empty(1, text + image, config.head_dim // 2, 2, dtype=torch.float32, device=transformer.device)
    rows = 12 * config.depth + 3 * config.depth_single_blocks + 2
    with triton.collected() as launches:
        transformer.step(
            torch.empty(batch, image, config.in_channels, **like),
            torch.empty(batch, text, config.context_in_dim, **like),
            torch.empty(batch, rows, config.hidden_size, **like),
            rope,
        )
    # Errors are raised below: raised where the mode ends, they would leave Triton 3.6 and 3.7 in it for good.
    with ThreadPoolExecutor(os.cpu_count()) as pool, AsyncCompileMode(pool, ignore_errors=True) as mode:
        for launch in launches:
            if not isinstance(launch, Launch):
                continue
            launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.options, enable_fp_fusion=True)
        futures = list(mode.raw_futures)
        for done, future in enumerate(futures, start=1):
            future.result()
            progress(done, len(futures))
    return len(futures)


@dataclass(frozen=True)
class Inputs:
    img: Tensor
    txt: Tensor
    mods: Tensor
    rope: Tensor


class CapturedStep:
    """A step of a transformer as a CUDA graph: the same bytes as `transformer.step`, at the cost of one launch.

    Args:
        transformer: on a CUDA device; its kernels are compiled and its arena has grown by the time of the capture.
        img, txt, mods, rope: as for `step`; later calls must have their shapes.
    """

    def __init__(self, transformer: Any, img: Tensor, txt: Tensor, mods: Tensor, rope: Tensor) -> None:
        self._inputs = Inputs(img.clone(), txt.clone(), mods.clone(), rope.clone())
        side = torch.cuda.Stream(img.device)
        side.wait_stream(torch.cuda.current_stream(img.device))
        with torch.cuda.stream(side):
            for _ in range(2):  # compiles, and lets the libraries choose and allocate
                transformer.step(**vars(self._inputs))
        torch.cuda.current_stream(img.device).wait_stream(side)
        # The graph writes to the arena's buffers: they must live as long as it does, whatever the arena does later.
        self._buffers = list(transformer.ops.pack.__self__.arena.buffers.values())
        self._transformer = transformer  # its weights are read at every replay
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=side):  # torch's own would be the first GPU's
            self._velocity = transformer.step(**vars(self._inputs))

    def __call__(self, img: Tensor, txt: Tensor, mods: Tensor, rope: Tensor) -> Tensor:
        """Velocity `[B, L_img, C_out]`, memory of its own.

        Raises:
            ValueError: shapes other than those captured.
        """
        for name, given in (("img", img), ("txt", txt), ("mods", mods), ("rope", rope)):
            captured = getattr(self._inputs, name)
            if given.shape != captured.shape:
                raise ValueError(f"the captured step takes {name} {list(captured.shape)}, got {list(given.shape)}")
            captured.copy_(given)
        self._graph.replay()
        return self._velocity.clone()
