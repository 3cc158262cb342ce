"""From a checkpoint to a transformer that runs: where, on which backend, in which precision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fluxkiln.checkpoint import Checkpoint, open_checkpoint
from fluxkiln.transformer import Transformer

PRECISIONS = ("fp32", "bf16")


class LazyTensors(Mapping[str, Tensor]):
    """A checkpoint's tensors on their device in their dtype, each read when it is asked for and not kept.

    The graph asks for each once, so memory holds the model and one tensor.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self._checkpoint, self._device, self._dtype = checkpoint, device, dtype

    def __getitem__(self, name: str) -> Tensor:
        return self._checkpoint.dense(name, self._dtype, self._device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._checkpoint.names)

    def __len__(self) -> int:
        return len(self._checkpoint.names)


def load_transformer(
    path: str | Path,
    *,
    precision: str = "bf16",
    backend: str = "auto",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Transformer:
    """Open a FLUX.1 transformer of any common kind and make it ready to run.

    Args:
        path: a single file, a diffusers folder (the transformer's or the pipeline's), ComfyUI's files.
        precision: of the block linears: `fp32` or `bf16`.
        backend: `eager`, or `auto`.
        device: where it runs; None is the GPU if there is one.
        dtype: of everything else; None follows the precision.

    Raises:
        CheckpointError: the path holds something else, or is damaged.
        FileNotFoundError: nothing is there.
        ValueError: an unknown precision or backend, or float16, which FLUX.1's activations overflow.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if backend not in ("auto", "eager"):
        raise ValueError(f"backend must be auto or eager, got {backend!r}")
    dtype = dtype or (torch.float32 if precision == "fp32" else torch.bfloat16)
    if dtype == torch.float16:
        raise ValueError("FLUX.1 overflows float16: use dtype=torch.bfloat16 or torch.float32")
    checkpoint = open_checkpoint(path)
    return Transformer(checkpoint.config, LazyTensors(checkpoint, default_device(device), dtype))


def default_device(device: torch.device | str | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
