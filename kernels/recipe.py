"""Recipes: data that says which layer runs in which format, and what becomes of a layer's weights by it.

A recipe is a list of rules for the linears of the blocks, by native name; the last rule that matches a layer counts,
a layer without a rule stays in the model's dtype. `RECIPES` has one for each precision.

    print(RECIPES["fp8"])               what it says
    Recipe.from_json(recipe.to_json())  equals recipe
    quantize(linear, rule)              the layer by the rule: weight, input, low-rank branch
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor

from fluxkiln.kernels.formats import (
    F16_PEAK,
    FP8_MAX,
    NVFP4_MAX,
    Fp8,
    Nvfp4,
    Quant,
    Weight,
    dequantize,
    quantize_fp8,
    quantize_nvfp4,
)
from fluxkiln.kernels.layers import Accumulate, Linear, LowRank

RANK_MULTIPLE = 16  # what one matrix instruction contracts

# The linears of the blocks, by what makes their input: LayerNorm and modulation hold whole rows, a fused matrix
# product or attention only a tile of them.
BY_NORM = ("double_blocks.*_attn.qkv", "double_blocks.*_mlp.0", "single_blocks.*.linear1")
BY_TILE = ("double_blocks.*_attn.proj", "double_blocks.*_mlp.2", "single_blocks.*.linear2")


@dataclass(frozen=True)
class Rule:
    """How a linear is quantised.

    Attributes:
        format: of weight and input; `dense` is the model's dtype.
        scale: where the input's scale comes from, see `Quant.rule`. Behind a fused matrix product or attention,
            `row` is known to the eager backend alone.
        accumulate: see `Linear.accumulate`.
        rank: of the branch that makes up for the weight's quantisation, 0 for none.
    """

    format: Literal["dense", "fp8", "nvfp4"] = "dense"
    scale: Literal["row", "bound", "static"] = "row"
    accumulate: Accumulate = "f32"
    rank: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("format", ("dense", "fp8", "nvfp4")),
            ("scale", ("row", "bound", "static")),
            ("accumulate", ("f32", "promote128", "f16")),
        ):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"a rule's {name} must be one of {', '.join(allowed)}, got {value!r}")
        if self.accumulate != "f32" and self.format != "fp8":
            raise ValueError(
                f"only FP8 products are accumulated by {self.accumulate}, the rule's format is {self.format}"
            )
        if self.rank < 0 or (self.rank and self.format == "dense"):
            raise ValueError(
                f"a low-rank branch of rank {self.rank} makes up for no quantisation in format {self.format}"
            )

    @property
    def peak(self) -> float:
        """The FP8 code that the largest magnitudes of weight and input become."""
        return F16_PEAK if self.accumulate == "f16" else FP8_MAX

    def __str__(self) -> str:
        if self.format == "dense":
            return self.format
        extras = [f"accumulate {self.accumulate}"] if self.accumulate != "f32" else []
        extras += [f"rank {self.rank}"] if self.rank else []
        return ", ".join((f"{self.format}, input by {self.scale}", *extras))


@dataclass(frozen=True)
class Recipe:
    """Rules for the linears of a model's blocks, and the format of its attention.

    Attributes:
        name: for people and records.
        rules: (pattern over native layer names with `*`, rule); the last match counts.
        attention: what q, k, v and the weights of softmax are multiplied in; `bf16` is the model's dtype.
    """

    name: str
    rules: tuple[tuple[str, Rule], ...] = ()
    attention: Literal["bf16", "fp8"] = "bf16"

    def __post_init__(self) -> None:
        if self.attention not in ("bf16", "fp8"):
            raise ValueError(f"a recipe's attention must be bf16 or fp8, got {self.attention!r}")

    def rule(self, layer: str) -> Rule:
        """The rule of a layer, for example of `double_blocks.3.img_mlp.0`."""
        return next((rule for pattern, rule in reversed(self.rules) if fnmatchcase(layer, pattern)), Rule())

    def check(self, layers: Iterable[str]) -> None:
        """Compare with the layers of a model.

        Raises:
            ValueError: a pattern matches no layer, or one that is not quantised; both streams of a double block,
                which run together, have different rules; a bound is asked for where there is none.
        """
        layers = list(layers)
        for pattern, rule in self.rules:
            matches = [layer for layer in layers if fnmatchcase(layer, pattern)]
            if not matches and pattern not in (*BY_NORM, *BY_TILE):  # a model may have no single blocks
                raise ValueError(f"recipe {self.name!r}: no layer of this model matches {pattern!r}")
            for layer in matches:
                by_norm = any(fnmatchcase(layer, each) for each in BY_NORM)
                if not by_norm and not any(fnmatchcase(layer, each) for each in BY_TILE):
                    raise ValueError(f"recipe {self.name!r}: {layer} is not quantised, only the linears of blocks are")
                if by_norm and rule.scale == "bound" and rule.format != "dense":
                    raise ValueError(f"recipe {self.name!r}: the input of {layer} has no bound, its scale is by row")
        for layer in layers:
            twin = layer.replace(".txt_", ".img_")
            if self.rule(layer) != self.rule(twin):
                raise ValueError(
                    f"recipe {self.name!r}: {layer} ({self.rule(layer)}) and {twin} ({self.rule(twin)}) run together "
                    "and need the same rule"
                )

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self) | {"rules": {p: dataclasses.asdict(r) for p, r in self.rules}})

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Read what `to_json` wrote; what a rule leaves out has its default.

        Raises:
            ValueError: not a recipe; the message names what is wrong.
        """
        try:
            data = json.loads(text)
            if not isinstance(data, dict) or not isinstance(data.get("rules", {}), dict):
                raise TypeError("expected an object with a name and rules, an object of pattern to rule")
            rules = tuple((pattern, Rule(**rule)) for pattern, rule in data.pop("rules", {}).items())
            return cls(rules=rules, **data)
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"not a recipe: {error}") from None

    def __str__(self) -> str:
        lines = [f"{pattern}: {rule}" for pattern, rule in self.rules]
        return "\n  ".join((f"recipe {self.name}: attention {self.attention}, others dense", *lines))


def rules(
    format: Literal["fp8", "nvfp4"], patterns: Iterable[str] = (*BY_NORM, *BY_TILE)
) -> Iterator[tuple[str, Rule]]:
    """Rules that quantise linears to a format, with scales that a kernel knows when it writes their inputs."""
    for pattern in patterns:
        yield pattern, Rule(format, "row" if pattern in BY_NORM else "bound")


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("fp32"),
        Recipe("bf16"),
        Recipe("fp8", tuple(rules("fp8"))),
        Recipe(
            "nvfp4",
            (
                *rules("nvfp4", (*BY_NORM[1:], *BY_TILE[1:])),
                *rules("fp8", BY_NORM[:1]),
            ),
        ),
    )
}


def quantize(linear: Linear, rule: Rule, input_scale: Tensor | None = None) -> Linear:
    """The linear by the rule: its weight quantised, unless it already is in the rule's format; its input's `Quant`.

    Args:
        linear: as loaded, with its low-rank branch if the checkpoint has one.
        rule: from `Recipe.rule`.
        input_scale: calibrated fp32 scalar, which the scale rule `static` needs.

    Raises:
        ValueError: the rule is `static` and there is no scale; or the weight is stored in another format.
    """
    if rule.format == "dense":
        return linear
    if rule.scale == "static" and input_scale is None:
        raise ValueError(
            f"{linear.name} has no calibrated input scale: run `fluxkiln quantize --calibrate`, or use another rule"
        )
    weight, low_rank = linear.weight, linear.low_rank
    if isinstance(weight, Tensor):
        seed = zlib.crc32(linear.name.encode())  # the same branch, in whatever order layers are loaded
        weight, branch = quantize_weight(weight, rule, seed)
        low_rank = branch and LowRank(branch.down.to(linear.dtype), branch.up.to(linear.dtype))
    elif not isinstance(weight, Fp8 if rule.format == "fp8" else Nvfp4):
        raise ValueError(f"{linear.name} is stored as {type(weight).__name__}, the recipe wants {rule.format}")
    scale = None
    if rule.scale == "static" and input_scale is not None:
        scale = input_scale.float() * (FP8_MAX / rule.peak)
    quant = Quant(rule.format, rule.scale, scale, keep=low_rank is not None, peak=rule.peak)
    return replace(linear, weight=weight, low_rank=low_rank, input=quant, accumulate=rule.accumulate)


def quantize_weight(weight: Tensor, rule: Rule, seed: int = 0) -> tuple[Fp8 | Nvfp4, LowRank | None]:
    """A weight `[N, K]` in the rule's format, and the branch, in bf16, that makes up for the difference.

    FP8 has a scale for each output, NVFP4 one global scale. With a branch, the part of the weight that it can hold is
    taken out before, so that outliers do not spoil the blocks' scales, and the branch is then fitted once more to
    all that is missing.
    """
    if not rule.rank:
        return _round(weight, rule), None
    branch = low_rank(weight, rule.rank, seed)
    quantised = _round(weight.float() - branch.up.float() @ branch.down.float(), rule)
    branch = low_rank(weight.float() - dequantize(quantised), rule.rank, seed)
    return quantised, LowRank(branch.down.bfloat16(), branch.up.bfloat16())


def low_rank(matrix: Tensor, rank: int, seed: int = 0) -> LowRank:
    """The best product `up [N, R] down [R, K]` of `rank`, padded with zeros to a multiple of 16, in fp32.

    A randomised singular value decomposition (Halko, Martinsson and Tropp, 2011) with two power iterations.
    """
    a = matrix.float()
    sketch = min(rank + 8, *a.shape)
    start = torch.randn(a.shape[1], sketch, generator=torch.Generator().manual_seed(seed)).to(a.device)
    basis = torch.linalg.qr(a @ start).Q
    for _ in range(2):
        basis = torch.linalg.qr(a @ torch.linalg.qr(a.T @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.T @ a, full_matrices=False)
    root = values[:rank].sqrt()  # shared by both, so that neither overflows or vanishes in bf16
    up, down = basis @ left[:, :rank] * root, root[:, None] * right[:rank]
    pad = -up.shape[1] % RANK_MULTIPLE
    return LowRank(torch.nn.functional.pad(down, (0, 0, 0, pad)), torch.nn.functional.pad(up, (0, pad)))


def smooth(weight: Weight, inverse: Tensor) -> Tensor:
    """`weight [N, K]` for an input that is multiplied by `inverse [K]`: their product stays what it was."""
    return (dequantize(weight) if not isinstance(weight, Tensor) else weight).float() / inverse.float()


def fold(modulation: Linear, inverses: dict[int, Tensor]) -> Linear:
    """A block's modulation whose LayerNorm outputs come out multiplied by `inverse [K]`, at no cost.

    Args:
        modulation: rows shift, scale, gate, of K each; twice in a double block (before attention, before the MLP).
        inverses: which half -> what to multiply with.
    """
    weight, bias = dequantize(modulation.weight).clone(), modulation.bias.float().clone()
    for half, inverse in inverses.items():
        k = inverse.shape[0]
        shift, scale = (slice((3 * half + i) * k, (3 * half + i + 1) * k) for i in (0, 1))
        bias[scale] += 1  # y = (1 + scale) * norm(x) + shift: the 1 is multiplied too
        for rows in (shift, scale):
            weight[rows] *= inverse[:, None]
            bias[rows] *= inverse
        bias[scale] -= 1
    return replace(modulation, weight=weight.to(modulation.dtype), bias=bias.to(modulation.dtype))


def _round(weight: Tensor, rule: Rule) -> Fp8 | Nvfp4:
    if rule.format == "fp8":
        return quantize_fp8(weight, peak=rule.peak)
    return quantize_nvfp4(weight, weight.abs().amax().float() / NVFP4_MAX)
