"""A checkpoint by a recipe: layers quantised as they are loaded, or once and for all into a file.

    Layers       what `Transformer` reads: the checkpoint's tensors, and the quantised layers whole
    quantize_file       the same layers into a file, which loads back to the same bits
    calibrate           how large the inputs of every layer get, from a few images

A weight that is stored in the format its rule wants is used as it is. Any other is read in full precision, one layer
at a time, and quantised on the device: memory never holds two copies of the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluxkiln.checkpoint import Checkpoint, open_checkpoint, save_checkpoint
from fluxkiln.kernels import Ops, recipe
from fluxkiln.kernels.formats import FP8_MAX, NVFP4_MAX, Fp8, Weight, dense
from fluxkiln.kernels.layers import Linear, LowRank
from fluxkiln.kernels.recipe import Recipe

RECIPE_KEY = "fluxkiln.recipe"  # header entry of a quantised file
SMOOTHING = 0.5  # how much of the activations' spread over channels moves into the weights (SmoothQuant's alpha)

# Layer that LayerNorm and modulation feed -> its modulation, and which half of it.
_MODULATION = (
    (re.compile(r"(double_blocks\.\d+\.(?:img|txt))_attn\.qkv"), "{}_mod.lin", 0),
    (re.compile(r"(double_blocks\.\d+\.(?:img|txt))_mlp\.0"), "{}_mod.lin", 1),
    (re.compile(r"(single_blocks\.\d+)\.linear1"), "{}.modulation.lin", 0),
)


class Layers(Mapping[str, Any]):
    """A checkpoint as a recipe wants it: native name -> tensor, and name of a quantised layer -> `Linear`.

    Each is read when it is asked for and not kept.

    Args:
        checkpoint: where from.
        recipe: which layers become what; `Recipe("bf16")` quantises none.
        device, dtype: of everything that is not quantised.
        inverses: calibrated smoothing, layer -> `[K]` that its input is to be multiplied by.
        input_scales: calibrated, layer -> fp32 scalar; what the checkpoint holds counts where this has none.

    Raises:
        ValueError: the recipe does not fit the model.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: Recipe,
        device: torch.device | str,
        dtype: torch.dtype,
        inverses: Mapping[str, Tensor] | None = None,
        input_scales: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.checkpoint, self.recipe = checkpoint, recipe
        self._device, self._dtype = torch.device(device), dtype
        self._inverses, self._scales = dict(inverses or {}), dict(input_scales or {})
        layers = [name.removesuffix(".weight") for name in checkpoint.names if name.endswith(".weight")]
        recipe.check(layers)
        self._quantised = [layer for layer in layers if recipe.rule(layer).format != "dense"]
        self._folded: dict[str, dict[int, Tensor]] = {}  # modulation -> half -> inverse
        for layer in self._quantised:
            if (inverse := self.inverse(layer)) is not None and (place := modulation_of(layer)):
                self._folded.setdefault(place[0], {})[place[1]] = inverse

    def __contains__(self, name: object) -> bool:
        return name in self._quantised or name in self._folded or name in self.checkpoint.names

    def __iter__(self) -> Iterator[str]:
        return iter((*self.checkpoint.names, *self._quantised, *self._folded))

    def __len__(self) -> int:
        return len(self.checkpoint.names) + len(self._quantised) + len(self._folded)

    def __getitem__(self, name: str) -> Any:
        if name in self._folded:
            inverses = {half: inverse.to(self._device) for half, inverse in self._folded[name].items()}
            return recipe.fold(self._plain(name), inverses)
        if name in self._quantised:
            return self.layer(name)
        return self.checkpoint.dense(name, self._dtype, self._device)

    def layer(self, name: str) -> Linear:
        """The layer by its rule."""
        rule, weight = self.recipe.rule(name), f"{name}.weight"
        bias = self.checkpoint.dense(f"{name}.bias", self._dtype, self._device)
        if self.as_stored(name):
            branch = self.checkpoint.low_rank(weight)
            low_rank = branch and LowRank(*(part.to(self._device, self._dtype) for part in branch))
            linear = Linear(self.checkpoint.tensor(weight, device=self._device), bias, low_rank=low_rank, name=name)
        else:
            full = self.checkpoint.dense(weight, torch.float32, self._device)
            inverse = self.inverse(name)
            linear = Linear(full if inverse is None else recipe.smooth(full, inverse.to(self._device)), bias, name=name)
        return recipe.quantize(linear, rule, self.input_scale(name))

    def as_stored(self, layer: str) -> bool:
        """Whether the layer's weight is used as the checkpoint holds it."""
        rule, weight = self.recipe.rule(layer), f"{layer}.weight"
        if layer in self._inverses or self.checkpoint.format(weight) != rule.format:
            return False
        if rule.rank and self.checkpoint.low_rank(weight) is None:
            return False
        if rule.accumulate == "f16":  # codes up to 448 would overflow fp16 sums
            return str(self.checkpoint.metadata.get(RECIPE_KEY)) == self.recipe.to_json()
        return self.checkpoint.pre_quant_scale(weight) is None or modulation_of(layer) is not None

    def inverse(self, layer: str) -> Tensor | None:
        """What the layer's input is multiplied by before it is quantised."""
        if layer in self._inverses:
            return self._inverses[layer]
        return self.checkpoint.pre_quant_scale(f"{layer}.weight") if self.as_stored(layer) else None

    def input_scale(self, layer: str) -> Tensor | None:
        """The calibrated scale of the layer's input."""
        scale = self._scales.get(layer)
        scale = self.checkpoint.input_scale(f"{layer}.weight") if scale is None else scale
        return None if scale is None else scale.to(self._device)

    def stored(self) -> Iterator[tuple[str, Weight]]:
        """(name, tensor or quantised weight) of a file that loads back to the same layers."""
        for name in self.checkpoint.names:
            layer = name.removesuffix(".weight")
            if layer == name or layer not in self._quantised:
                yield name, self.checkpoint.tensor(name)
                continue
            linear = self.layer(layer)
            yield name, linear.weight
            if linear.low_rank is not None:
                yield f"{layer}.low_rank_down", linear.low_rank.down
                yield f"{layer}.low_rank_up", linear.low_rank.up
            if (inverse := self.inverse(layer)) is not None:
                yield f"{layer}.pre_quant_scale", inverse.float()
            if (scale := self.input_scale(layer)) is not None:
                yield f"{layer}.input_scale", scale.float()

    def _plain(self, name: str) -> Linear:
        weight, bias = (
            self.checkpoint.dense(f"{name}.{leaf}", self._dtype, self._device) for leaf in ("weight", "bias")
        )
        return Linear(weight, bias, name=name)


def modulation_of(layer: str) -> tuple[str, int] | None:
    """(modulation, half) that makes the layer's input; None where attention or another layer does."""
    for pattern, modulation, half in _MODULATION:
        if match := pattern.fullmatch(layer):
            return modulation.format(match[1]), half
    return None


def choose_recipe(precision: str, checkpoint: Checkpoint) -> Recipe:
    """The recipe with which a file was quantised, if it has that precision; else the shipped one."""
    text = checkpoint.metadata.get(RECIPE_KEY)
    stored = Recipe.from_json(text) if text else None
    return stored if stored is not None and stored.name == precision else recipe.RECIPES[precision]


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in a JSON file.

    Raises:
        ValueError: it holds none; says which file.
        OSError: it cannot be read.
    """
    try:
        return Recipe.from_json(Path(path).read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def quantize_file(
    source: str | Path,
    target: str | Path,
    chosen: Recipe,
    device: torch.device | str = "cpu",
    statistics: Mapping[str, Tensor] | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> dict[str, int]:
    """Write `source` by a recipe, in native names; layers without a rule stay as they are stored.

    Args:
        source: any transformer that `open_checkpoint` takes.
        target: the file to write or replace.
        chosen: the recipe, which the file remembers.
        device: where to quantise.
        statistics: of `calibrate`; they smooth NVFP4 layers and give every layer a static input scale.
        progress: told every tensor's name.

    Returns:
        format -> number of layers in it.

    Raises:
        CheckpointError, FileNotFoundError: as `open_checkpoint`.
        ValueError: the recipe does not fit the model, or wants static scales and there are no statistics.
    """
    checkpoint = open_checkpoint(source)
    inverses, scales = calibrated(checkpoint, chosen, statistics or {})
    tensors = Layers(checkpoint, chosen, device, torch.bfloat16, inverses, scales)
    counts: dict[str, int] = {}

    def entries() -> Iterator[tuple[str, Weight]]:
        for name, weight in tensors.stored():
            progress(name)
            if name.endswith(".weight"):
                format = "dense" if isinstance(weight, Tensor) else "fp8" if isinstance(weight, Fp8) else "nvfp4"
                counts[format] = counts.get(format, 0) + 1
            yield name, weight if str(device) == "cpu" else _to_cpu(weight)

    save_checkpoint(target, entries(), {**checkpoint.metadata, RECIPE_KEY: chosen.to_json()})
    return counts


# --- calibration ------------------------------------------------------------------------------


@dataclass
class Observed:
    """Eager operations that note the largest magnitude of each channel of every layer's input."""

    channels: dict[str, Tensor]

    def watch(self, ops: Ops) -> Ops:
        def note(xs: Sequence[Any], layer: Any, split: int) -> None:
            streams = getattr(layer, "streams", layer)
            x = torch.cat([dense(x) for x in xs], dim=-1)
            for linear, rows in zip(streams, (x,) if len(streams) == 1 else (x[:, :split], x[:, split:]), strict=True):
                largest = rows.float().abs().amax((0, 1))
                seen = self.channels.get(linear.name)
                self.channels[linear.name] = largest if seen is None else torch.maximum(seen, largest)

        def qkv_rope(x: Any, layer: Any, rope: Tensor, split: int) -> Any:
            note((x,), layer, split)
            return ops.qkv_rope(x, layer, rope, split)

        def linear_gelu(x: Any, layer: Any, split: int, out: Any = None) -> Any:
            note((x,), layer, split)
            return ops.linear_gelu(x, layer, split, out=out)

        def linear_gate_residual(xs: Any, layer: Any, gate: Tensor, residual: Tensor, split: int) -> Any:
            note(xs, layer, split)
            return ops.linear_gate_residual(xs, layer, gate, residual, split)

        return replace(ops, qkv_rope=qkv_rope, linear_gelu=linear_gelu, linear_gate_residual=linear_gate_residual)


def calibrate(transformer: Any, run: Callable[[], object]) -> dict[str, Tensor]:
    """Largest magnitudes `[K]` of every block linear's input while `run` makes images with `transformer`.

    Args:
        transformer: an unquantised one on the eager backend.
        run: for example `lambda: pipe(prompts, num_inference_steps=4)`.
    """
    observed, before = Observed({}), transformer.ops
    transformer.ops = observed.watch(before)
    try:
        run()
    finally:
        transformer.ops = before
    return {name: largest.cpu() for name, largest in observed.channels.items()}


def calibrated(
    checkpoint: Checkpoint, chosen: Recipe, statistics: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Smoothing (layer -> `[K]` for its input) and static input scales (layer -> scalar) from statistics."""
    inverses, scales = {}, {}
    for layer, largest in statistics.items():
        rule = chosen.rule(layer)
        if rule.format == "dense":
            continue
        if rule.format == "nvfp4" and modulation_of(layer):
            weight = checkpoint.dense(f"{layer}.weight", torch.float32).abs().amax(0)
            inverse = (weight.clamp_min(1e-5) ** (1 - SMOOTHING) / largest.clamp_min(1e-5) ** SMOOTHING).clamp(
                1e-3, 1e3
            )
            inverses[layer] = inverse.bfloat16().float()  # short in the file, exact wherever it is read
            largest = largest * inverses[layer]
        scales[layer] = largest.amax() / (NVFP4_MAX if rule.format == "nvfp4" else FP8_MAX)
    return inverses, scales


def _to_cpu(weight: Weight) -> Weight:
    if isinstance(weight, Tensor):
        return weight.cpu()
    return replace(weight, **{name: part.cpu() for name, part in vars(weight).items() if part is not None})
