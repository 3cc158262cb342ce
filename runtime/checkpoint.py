"""FLUX.1 checkpoints of every common kind, as tensors in native names, read lazily from the memory-mapped files.

    open_checkpoint     a transformer: the original single file, a diffusers folder, ComfyUI's files
    open_vae, open_clip, open_t5      the other parts, from their folder, their file or an all-in-one file
    save_checkpoint     a transformer, streamed to a file

A quantised weight comes back as it is stored, as `Fp8` or `Nvfp4` in canonical layout, never requantised: where
several of diffusers' tensors are one native tensor, their scales become one per row. `dense` dequantises instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fluxkiln.kernels.formats import Fp8, Nvfp4, Weight
from fluxkiln.locate import Located, locate
from fluxkiln.names import SWAPPED, to_diffusers
from fluxkiln.native import Native
from fluxkiln.safetensors_file import CheckpointError, SafetensorsFile, save_file
from fluxkiln.tensors import LINEAR_LAYOUT, Tensors

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "SafetensorsFile",
    "Tensors",
    "open_checkpoint",
    "open_clip",
    "open_t5",
    "open_vae",
    "save_checkpoint",
]


class Checkpoint:
    """A transformer's tensors in native names; `open_checkpoint` makes one.

    Attributes:
        path: what was opened.
        kind: `bfl`, `diffusers`, `comfyui` or `all-in-one`.
        variant: `dev`, `schnell`, `kontext`, `fill`, `canny`, `depth`, `control` or `custom`.
        config: the sizes.
        names: of all tensors, in the order of the forward pass.
    """

    def __init__(self, located: Located) -> None:
        self._native = native = Native(located)
        native.check(native.config)
        self.path, self.files, self.kind = located.path, located.files, located.kind.name
        self.variant, self.config = native.variant, native.config
        self.names = tuple(self.config.tensor_shapes())
        self._source = native.source
        self._located = located

    def shape(self, name: str) -> tuple[int, ...]:
        return self._native.shape(name)

    def format(self, name: str) -> str:
        """How the tensor is stored: safetensors' dtype code in small letters (`bf16`), or `fp8`, `e5m2`, `nvfp4`."""
        return self._native.format(name)

    def tensor(self, name: str, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Weight:
        """The tensor as it is stored, or, given a `dtype`, dequantised to it.

        e5m2 weights are handed out in bf16: e5m2 is no weight format of the kernels. So is a weight of which the
        parts are stored in different formats, or have low-rank branches of their own.
        """
        if dtype is not None:
            return self.dense(name, dtype, device)
        parts = self._native.parts(name)
        layouts = {self._source.layout(part).format for part in parts}
        if len(layouts) > 1 or not self._stacks(name):
            return self.dense(name, torch.bfloat16, device)
        weight = _stack([self._source.stored(part) for part in parts])
        weight = _swap_halves(weight) if self._native.swapped(name) else weight
        return weight if device is None else _to_device(weight, device)

    def dense(self, name: str, dtype: torch.dtype, device: torch.device | str | None = None) -> Tensor:
        """The tensor dequantised, computed in at least fp32 and rounded to `dtype` once.

        In the dtype and place in which it is stored it is a view of the file: treat it as read-only.
        """
        parts = self._native.parts(name)
        if len(parts) == 1:
            weight = self._source.dense(parts[0], dtype, device)
            return torch.cat(weight.chunk(2)[::-1]) if self._native.swapped(name) else weight
        out = torch.empty(self.shape(name), dtype=dtype, device=device)
        for rows, part in zip(out.split([self._source.shape(part)[0] for part in parts]), parts, strict=True):
            self._source.read_into(rows, part)
        return out

    def input_scale(self, name: str) -> Tensor | None:
        """The calibrated scale (fp32 scalar) of the input of the weight `name`, if the file has one.

        Of several parts it is the largest: they read one input, which then saturates for none of them.
        """
        scales = [self._source.input_scale(part) for part in self._native.parts(name)]
        found = [scale for scale in scales if scale is not None]
        return torch.stack(found).amax() if found and len(found) == len(scales) else None

    def pre_quant_scale(self, name: str) -> Tensor | None:
        """`[K]` fp32: what the input of the weight `name` (as `tensor` gives it) is to be multiplied by, if anything.

        Weights from `dense` have it multiplied in already.
        """
        kept = self._native.format(name) in ("fp8", "nvfp4") and self._stacks(name)
        return self._source.pre_quant_scale(self._native.parts(name)[0]) if kept else None

    def low_rank(self, name: str) -> tuple[Tensor, Tensor] | None:
        """`(down [R, K], up [N, R])` of the branch beside the weight `name` (as `tensor` gives it), if it has one.

        Weights from `dense` have it added in already.
        """
        parts = self._native.parts(name)
        return self._source.low_rank(parts[0]) if len(parts) == 1 else None

    @property
    def metadata(self) -> dict[str, str]:
        """The text entries of all headers."""
        return {key: text for file in self.files for key, text in file.metadata.items()}

    @property
    def identity(self) -> str:
        """See `Located.identity`; `sha256` reads every byte."""
        return self._located.identity

    def sha256(self) -> dict[str, str]:
        """File name -> sha256 (hex) of the whole file, as publishers list it."""
        return {file.path.name: file.sha256() for file in self.files}

    def _stacks(self, name: str) -> bool:
        """Whether the parts of a weight are one when stacked: all see the same scaled input and have no branches."""
        parts = self._native.parts(name)
        if len(parts) > 1 and any(self._source.low_rank(part) is not None for part in parts):
            return False
        first, *rest = (self._source.pre_quant_scale(part) for part in parts)
        return all(
            other is first or (other is not None and first is not None and torch.equal(first, other)) for other in rest
        )


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a FLUX.1 transformer: nothing but headers is read until a tensor is asked for.

    Args:
        path: a single file in the original, diffusers' or ComfyUI's names (bf16, fp8 or nvfp4, all-in-one too),
            a folder of shards, or the folder of a diffusers pipeline. A `config.json` of diffusers beside a file wins
            over what its shapes tell.

    Raises:
        CheckpointError: it is something else, or damaged; the message says what, and what to use instead.
        FileNotFoundError: nothing is there.
    """
    return Checkpoint(locate(path, "transformer"))


def open_vae(path: str | Path, dtype: torch.dtype | None = None) -> Tensors:
    """The tensors of an autoencoder, in the names of its file (the original release's or diffusers').

    Args:
        path: a diffusers pipeline or its `vae/`, a single file, or an all-in-one file.
        dtype: of all tensors; None keeps the stored one.

    Returns:
        A mapping from name to lazily read tensor; its `config` is the `config.json` of a diffusers folder, or {}.

    Raises:
        CheckpointError, FileNotFoundError: as `open_checkpoint`.
    """
    return locate(path, "vae").tensors("vae", dtype)


def open_clip(path: str | Path, dtype: torch.dtype | None = None) -> Tensors:
    """The tensors of a CLIP text encoder, in transformers' names without `text_model.`; otherwise as `open_vae`."""
    return locate(path, "clip").tensors("clip", dtype)


def open_t5(path: str | Path, dtype: torch.dtype | None = None) -> Tensors:
    """The tensors of a T5 text encoder, in transformers' names; otherwise as `open_vae`."""
    return locate(path, "t5").tensors("t5", dtype)


def save_checkpoint(
    path: str | Path,
    tensors: Iterable[tuple[str, Weight]],
    metadata: Mapping[str, str] | None = None,
    naming: Literal["bfl", "diffusers"] = "bfl",
) -> None:
    """Write a transformer, tensor by tensor as they come: memory holds one, and a partial file never has the name.

    FP8 weights are written with one scale per row (`X.weight_scale`, diffusers' fp8r), NVFP4 in canonical layout,
    which the header says.

    Args:
        path: the file to write or replace.
        tensors: (native name, tensor or quantised weight); `X.input_scale` may stand beside a weight.
        metadata: for the header.
        naming: of the file; `diffusers` takes fused tensors apart and swaps the final modulation's halves.

    Raises:
        ValueError: two tensors have one name, or a low-rank branch is to be named as in diffusers, which has none.
        KeyError: a name that diffusers' naming does not know.
    """
    rename = diffusers_tensors if naming == "diffusers" else lambda name, weight: [(name, weight)]
    stored = (
        entry for name, weight in tensors for part, rows in rename(name, weight) for entry in _entries(part, rows)
    )
    save_file(path, stored, {"format": "pt", **LINEAR_LAYOUT, **(metadata or {})})


def _entries(name: str, weight: Weight) -> Iterator[tuple[str, Tensor]]:
    """The tensors that stand for one weight in a file."""
    module = name.removesuffix(".weight")
    if isinstance(weight, Tensor):
        yield name, weight
        return
    yield name, weight.data
    if isinstance(weight, Fp8):
        yield f"{module}.weight_scale", weight.row_scale
    else:
        yield f"{module}.weight_scale", weight.block_scale
        yield f"{module}.weight_scale_2", weight.global_scale


def diffusers_tensors(name: str, weight: Weight) -> Iterator[tuple[str, Weight]]:
    """What diffusers has in place of a native tensor: (name, views of its rows)."""
    module, _, leaf = name.rpartition(".")
    if leaf in ("input_scale", "pre_quant_scale"):
        for part in to_diffusers(f"{module}.weight"):
            yield f"{part.removesuffix('.weight')}.{leaf}", weight
        return
    if leaf in ("low_rank_down", "low_rank_up"):
        raise ValueError(f"{name}: diffusers has no low-rank branches; save with naming='bfl'")
    parts = to_diffusers(name)
    weight = _swap_halves(weight) if name in SWAPPED else weight
    # diffusers' MLP is always four times as wide as the model: linear1 is 3 + 4 of its widths
    shares = {1: (1,), 3: (1, 1, 1), 4: (1, 1, 1, 4)}[len(parts)]
    unit, start = weight.shape[0] // sum(shares), 0
    for part, share in zip(parts, shares, strict=True):
        yield part, weight[start : start + share * unit]
        start += share * unit


def _stack(weights: Sequence[Weight]) -> Weight:
    """Weights of one format on top of each other; scales of a whole weight become scales of its rows."""
    first = weights[0]
    if len(weights) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat([weight for weight in weights if isinstance(weight, Tensor)])
    if isinstance(first, Fp8):
        fp8 = [weight for weight in weights if isinstance(weight, Fp8)]
        return Fp8(torch.cat([each.data for each in fp8]), torch.cat([each.row_scale for each in fp8]))
    nvfp4 = [weight for weight in weights if isinstance(weight, Nvfp4)]
    return Nvfp4(
        torch.cat([each.data for each in nvfp4]),
        torch.cat([each.block_scale for each in nvfp4]),
        torch.cat([each.global_scale.expand(each.shape[0]) for each in nvfp4]),
    )


def _swap_halves(weight: Weight) -> Weight:
    half = weight.shape[0] // 2
    return _stack([weight[half:], weight[:half]])


def _to_device(weight: Weight, device: torch.device | str) -> Weight:
    if isinstance(weight, Tensor):
        return weight.to(device)
    return replace(weight, **{name: part.to(device) for name, part in vars(weight).items() if part is not None})
