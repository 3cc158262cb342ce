"""The tensors of a model part, read lazily from one file or several, quantised weights understood.

A quantised weight is several tensors in a file: its data and, beside it, its scales. Here it is one. The dialects:

    X.weight fp8                                         a plain cast, scale 1
    X.weight fp8,   X.scale_weight                       ComfyUI, first generation (with a `scaled_fp8` sentinel)
    X.weight fp8,   X.weight_scale                       ComfyUI, ModelOpt, the original releases: a scalar;
                                                         diffusers' fp8r and fluxkiln: one scale per row
    X.weight uint8, X.weight_scale, X.weight_scale_2     NVFP4: low nibble first and linear block scales (ModelOpt,
                                                         fluxkiln), or high nibble first and swizzled (ComfyUI)

`X.comfy_quant` or the header's `_quantization_metadata` say the format by name. `X.input_scale` (or `X.scale_input`)
is a calibrated scale of the layer's input, `X.pre_quant_scale [K]` multiplies that input before it is quantised.
`X.low_rank_down [R, K]` and `X.low_rank_up [N, R]` (fluxkiln) are a branch beside the weight that reads the same input.
What is none of these is refused by name, never guessed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fluxkiln.safetensors_file import CheckpointError, SafetensorsFile

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fluxkiln.kernels.formats import Fp8, Nvfp4

    Stored = Tensor | Fp8 | Nvfp4

_BLOCK = 16  # as in kernels.formats, which is not imported for it: that brings PyTorch
LINEAR_LAYOUT = {"fluxkiln.nvfp4": "low nibble first, linear block scales"}  # header entry of files written here
_COMPANIONS = (
    *(".weight_scale", ".scale_weight", ".weight_scale_2"),
    *(".input_scale", ".scale_input", ".pre_quant_scale", ".comfy_quant"),
    *(".low_rank_down", ".low_rank_up"),
)
_SENTINEL = "scaled_fp8"
_READABLE = "use a bf16, fp8 or nvfp4 safetensors file of the model"
_CHUNK_ROWS = 512  # rows dequantised at a time: the temporaries stay small beside the weight


@dataclass(frozen=True)
class Layout:
    """How one parameter lies in its file.

    Attributes:
        format: `plain`; `fp8` (e4m3) or `e5m2`, with a scale; `nvfp4` (linear) or `nvfp4-comfyui` (swizzled).
        shape: of the parameter, not of its packed data.
        scale: name of the tensor with its scales, None for scale 1.
    """

    format: Literal["plain", "fp8", "e5m2", "nvfp4", "nvfp4-comfyui"]
    shape: tuple[int, ...]
    scale: str | None = None


class Tensors(Mapping[str, "Tensor"]):
    """Parameter name -> dense tensor, read when asked for.

    Args:
        files: where the tensors are; together they form one model.
        prefix: only names that begin with it count, and are given without it.
        exclude: prefixes of names that belong to other parts.
        dtype: of every tensor; None keeps the stored one (bf16 for quantised weights).
        linear_nvfp4: NVFP4 weights are in ModelOpt's layout, not ComfyUI's (the header may say so as well).
        config: the `config.json` that belongs to them, {} when there is none.

    Raises:
        CheckpointError: two files hold one name, or a weight is quantised in a way that is not read.
    """

    def __init__(
        self,
        files: Sequence[SafetensorsFile],
        prefix: str = "",
        *,
        exclude: tuple[str, ...] = (),
        dtype: torch.dtype | None = None,
        linear_nvfp4: bool = False,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.files, self.prefix, self.config = tuple(files), prefix, dict(config or {})
        self._dtype = dtype
        self._linear = linear_nvfp4 or any(LINEAR_LAYOUT.items() <= file.metadata.items() for file in files)
        self._home: dict[str, SafetensorsFile] = {}
        for file in files:
            for name in file.entries:
                if not name.startswith(prefix) or (exclude and name.startswith(exclude)):
                    continue
                if self._home.setdefault(name[len(prefix) :], file) is not file:
                    raise CheckpointError(f"{file.path} and {self._home[name].path} both hold {name}")
        declared = self._declared_formats()
        self._layouts = {name: self._layout(name, declared) for name in self._home if not self._is_companion(name)}

    def __getitem__(self, name: str) -> Tensor:
        return self.dense(name, self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layouts)

    def __len__(self) -> int:
        return len(self._layouts)

    def __contains__(self, name: object) -> bool:
        return name in self._layouts

    def layout(self, name: str) -> Layout:
        return self._layouts[name]

    def format(self, name: str) -> str:
        """`fp8`, `e5m2` or `nvfp4`, or, for what is not quantised, safetensors' dtype code in small letters."""
        format = self._layouts[name].format
        return self.dtype_code(name).lower() if format == "plain" else format.removesuffix("-comfyui")

    def shape(self, name: str) -> tuple[int, ...]:
        return self._layouts[name].shape

    def dtype_code(self, name: str) -> str:
        """safetensors' code of the dtype in which the data is stored."""
        return self._home[name].entries[self.prefix + name].dtype

    def nbytes(self, name: str) -> int:
        """Bytes on disk, scales included."""
        names = [name, *(name.removesuffix(".weight") + suffix for suffix in _COMPANIONS if name.endswith(".weight"))]
        entries = [self._home[part].entries[self.prefix + part] for part in names if part in self._home]
        return sum(entry.end - entry.start for entry in entries)

    def stored(self, name: str) -> Stored:
        """The parameter as it is stored: a view of the file, or `Fp8` or `Nvfp4` in canonical layout.

        e5m2 weights, and biases and norm weights in fp8, are no weight format of fluxkiln: they come back in bf16,
        which holds their values exactly.
        """
        import torch

        from fluxkiln.kernels.formats import Fp8, Nvfp4, unswizzle

        layout = self._layouts[name]
        if layout.format == "plain":
            return self._raw(name)
        if layout.format == "e5m2" or len(layout.shape) != 2:
            return self.dense(name, torch.bfloat16)
        if layout.format == "fp8":
            return Fp8(self._raw(name), self._row_scale(layout))
        rows, columns = layout.shape
        assert layout.scale is not None
        data, scale = self._raw(name), self._raw(layout.scale).view(torch.float8_e4m3fn)
        if layout.format == "nvfp4-comfyui":
            data, scale = data << 4 | data >> 4, unswizzle(scale, rows, columns // _BLOCK)
        global_scale = self._raw(f"{layout.scale}_2").float().reshape(-1)
        return Nvfp4(
            data,
            scale.reshape(rows, columns // _BLOCK),
            global_scale.reshape(()) if len(global_scale) == 1 else global_scale,
        )

    def dense(self, name: str, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Tensor:
        """The parameter dequantised, in `dtype` (None: the stored one, bf16 for quantised weights) on `device`.

        A low-rank branch is added in, a `pre_quant_scale` multiplied into the weight's columns. Where neither dtype
        nor device changes, the result is a view of the file; otherwise a copy, and the memory behind the original is
        released.
        """
        import torch

        plain = self._layouts[name].format == "plain"
        dtype = dtype or (self._raw(name).dtype if plain else torch.bfloat16)
        if plain and dtype == self._raw(name).dtype and (device is None or torch.device(device).type == "cpu"):
            return self._raw(name)
        out = torch.empty(self.shape(name), dtype=dtype, device=device)
        self.read_into(out, name)
        return out

    def read_into(self, out: Tensor, name: str) -> None:
        """Write the parameter, dequantised and rounded once, into `out`, a tensor of its shape."""
        layout = self._layouts[name]
        if layout.format == "plain":
            out.copy_(self._raw(name).to(out.device))  # to a GPU as it is stored, and converted there
        else:
            self._dequantize_into(out, name, layout)
        self._home[name].release(self.prefix + name)

    def input_scale(self, name: str) -> Tensor | None:
        """The calibrated per-tensor scale (fp32 scalar) of the input of the weight `name`, if the file has one."""
        for suffix in (".input_scale", ".scale_input"):
            if (key := name.removesuffix(".weight") + suffix) in self._home:
                if (scale := self._raw(key)).numel() != 1:
                    raise CheckpointError(f"{self._home[key].path}: {key} is {list(scale.shape)}, expected one number")
                return scale.float().reshape(())
        return None

    def pre_quant_scale(self, name: str) -> Tensor | None:
        """`[K]` fp32: what the input of the weight `name` is multiplied by before it is quantised, if anything."""
        key = name.removesuffix(".weight") + ".pre_quant_scale"
        return self._raw(key).float() if key in self._home else None

    def low_rank(self, name: str) -> tuple[Tensor, Tensor] | None:
        """`(down [R, K], up [N, R])` of the branch beside the weight `name`, if it has one."""
        down, up = (name.removesuffix(".weight") + suffix for suffix in (".low_rank_down", ".low_rank_up"))
        return (self._raw(down), self._raw(up)) if down in self._home and up in self._home else None

    def _raw(self, name: str) -> Tensor:
        return self._home[name].tensor(self.prefix + name)

    def _row_scale(self, layout: Layout) -> Tensor:
        import torch

        if layout.scale is None:
            return torch.ones(layout.shape[:1])
        return self._raw(layout.scale).float().reshape(-1).expand(layout.shape[0]).contiguous()

    def _dequantize_into(self, out: Tensor, name: str, layout: Layout) -> None:
        import torch

        from fluxkiln.kernels.formats import Fp8, dequantize

        compute = torch.float64 if out.dtype == torch.float64 else torch.float32
        if len(layout.shape) != 2:
            out.copy_(self._raw(name).to(compute))
            return
        e5m2 = layout.format == "e5m2"
        stored: Any = Fp8(self._raw(name), self._row_scale(layout)) if e5m2 else self.stored(name)
        columns, branch = self.pre_quant_scale(name), self.low_rank(name)
        for i in range(0, len(out), _CHUNK_ROWS):
            values = dequantize(stored[i : i + _CHUNK_ROWS], compute)
            if branch is not None:
                down, up = branch
                values += up[i : i + _CHUNK_ROWS].to(compute) @ down.to(compute)
            out[i : i + _CHUNK_ROWS] = values if columns is None else values * columns.to(compute)

    def _is_companion(self, name: str) -> bool:
        if name == _SENTINEL:
            return True
        module, dot, suffix = name.rpartition(".")
        return dot + suffix in _COMPANIONS and f"{module}.weight" in self._home

    def _declared_formats(self) -> dict[str, str]:
        """Layer -> format, as far as the files say it by name (ComfyUI's two carriers)."""
        formats: dict[str, str] = {}
        for file in self.files:
            try:
                layers = json.loads(file.metadata.get("_quantization_metadata", "{}")).get("layers", {})
                layers |= {
                    name.removesuffix(".comfy_quant"): json.loads(file.read(name))
                    for name in file.entries
                    if name.startswith(self.prefix) and name.endswith(".comfy_quant")
                }
                formats.update(
                    (layer.removeprefix(self.prefix), str(says["format"]))
                    for layer, says in layers.items()
                    if layer.startswith(self.prefix)
                )
            except (ValueError, TypeError, AttributeError, KeyError):
                raise CheckpointError(f"{file.path} is corrupt: its quantisation metadata is not valid") from None
        return formats

    def _layout(self, name: str, declared: Mapping[str, str]) -> Layout:
        code, shape = self.dtype_code(name), self._home[name].entries[self.prefix + name].shape
        module = name.removesuffix(".weight")
        branch = [key for key in (f"{module}.low_rank_down", f"{module}.low_rank_up") if key in self._home]
        if name != module and len(branch) == 1:
            raise CheckpointError(
                f"{self._home[name].path}: {branch[0]} is half of a low-rank branch, without the rest"
            )
        says = declared.get(module) if name != module else None
        if says not in (None, "float8_e4m3fn", "float8_e5m2", "nvfp4"):
            raise self._refusal(name, says)
        scale = next((key for key in (f"{module}.weight_scale", f"{module}.scale_weight") if key in self._home), None)
        if name == module:
            scale = None
        if len(shape) != 2 and scale:
            raise self._refusal(name, f"{code} {list(shape)} with scales")
        if code in ("F8_E4M3", "F8_E5M2") and says != "nvfp4":
            self._check_fp8_scale(name, shape, scale)
            return Layout("fp8" if code == "F8_E4M3" else "e5m2", shape, scale)
        if code == "U8" and len(shape) == 2 and f"{scale}_2" in self._home and says in (None, "nvfp4"):
            return self._nvfp4_layout(name, (shape[0], 2 * shape[1]), str(scale), says)
        if says or scale or (name != module and code not in ("F64", "F32", "F16", "BF16")):
            what = f"{says} with {code} data" if says else f"{code} data{' with scales' if scale else ''}"
            raise self._refusal(name, what)
        if name != module and (branch or f"{module}.pre_quant_scale" in self._home):
            raise self._refusal(name, f"{code} data with a {'low-rank branch' if branch else 'pre_quant_scale'}")
        return Layout("plain", shape)

    def _check_fp8_scale(self, name: str, shape: tuple[int, ...], scale: str | None) -> None:
        if scale is None:
            return
        entry = self._home[scale].entries[self.prefix + scale]
        if entry.dtype in ("F8_E8M0", "U8"):
            raise self._refusal(name, "mxfp8")
        if math.prod(entry.shape) != 1 and entry.shape not in ((shape[0],), (shape[0], 1)):
            raise self._refusal(name, f"fp8 with scales {list(entry.shape)} for a weight {list(shape)}")

    def _nvfp4_layout(self, name: str, shape: tuple[int, int], scale: str, says: str | None) -> Layout:
        """ComfyUI's layout where it is declared, and where nothing is: only a header or folder can say linear."""
        rows, blocks = shape[0], shape[1] // _BLOCK
        swizzled = says == "nvfp4" or not self._linear
        expected = _padded(rows, 128) * _padded(blocks, 4) if swizzled else rows * blocks
        entry = self._home[scale].entries[self.prefix + scale]
        global_scale = self._home[f"{scale}_2"].entries[f"{self.prefix}{scale}_2"]
        if math.prod(global_scale.shape) not in (1, rows):
            raise self._refusal(name, f"nvfp4 with global scales {list(global_scale.shape)}")
        if shape[1] % _BLOCK or entry.dtype not in ("F8_E4M3", "U8") or math.prod(entry.shape) != expected:
            raise CheckpointError(
                f"{self._home[name].path}: {scale} is {entry.dtype} {list(entry.shape)}, but NVFP4 with "
                f"{'swizzled' if swizzled else 'linear'} block scales needs {expected:,} of them in F8_E4M3"
            )
        return Layout("nvfp4-comfyui" if swizzled else "nvfp4", shape, scale)

    def _refusal(self, name: str, found: str | None) -> CheckpointError:
        return CheckpointError(
            f"{self._home[name].path}: {name} is quantised as {found}, which is not read; {_READABLE}"
        )


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
