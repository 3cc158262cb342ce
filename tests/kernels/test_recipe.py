"""Recipes as data, and what they make of a layer: held to the layer they started from."""

import dataclasses

import pytest
import torch

from fluxkiln.config import DEV, FluxConfig
from fluxkiln.kernels import formats, norm_modulate, recipe
from fluxkiln.kernels.formats import F16_PEAK, Fp8, Nvfp4, Quant
from fluxkiln.kernels.layers import Linear, rows
from fluxkiln.kernels.recipe import RECIPES, Recipe, Rule


def layers(config: FluxConfig = DEV) -> list[str]:
    return [name.removesuffix(".weight") for name in config.tensor_shapes() if name.endswith(".weight")]


def random_linear(n: int = 96, k: int = 64, seed: int = 0) -> Linear:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=g) * 0.05
    weight[:, 3] *= 20  # an outlier channel
    return Linear(weight, torch.randn(n, generator=g), name="double_blocks.0.img_mlp.0")


@pytest.mark.parametrize("name", RECIPES)
def test_the_shipped_recipes_fit_every_model_and_survive_json(name):
    shipped = RECIPES[name]
    shipped.check(layers())
    assert Recipe.from_json(shipped.to_json()) == shipped
    assert name in str(shipped)


def test_fp8_covers_every_block_linear_and_nvfp4_leaves_the_attention_projection_alone():
    blocks = [name for name in layers() if name.startswith(("double", "single")) and "mod" not in name]
    assert len(blocks) == 19 * 8 + 38 * 2
    assert {RECIPES["fp8"].rule(name).format for name in blocks} == {"fp8"}
    formats_of = {name: RECIPES["nvfp4"].rule(name).format for name in blocks}
    assert {f for name, f in formats_of.items() if name.endswith("proj")} == {"dense"}
    assert {f for name, f in formats_of.items() if name.endswith("qkv")} == {"fp8"}
    assert {f for name, f in formats_of.items() if "mlp" in name or "linear" in name} == {"nvfp4"}
    assert {RECIPES["fp8"].rule(name) for name in layers() if name not in blocks} == {Rule()}


def test_the_last_matching_rule_counts():
    r = Recipe(
        "mix", (("double_blocks.*_mlp.*", Rule("fp8", "row")), ("double_blocks.0.*_mlp.*", Rule("nvfp4", rank=32)))
    )
    assert r.rule("double_blocks.0.txt_mlp.2") == Rule("nvfp4", rank=32)
    assert r.rule("double_blocks.10.txt_mlp.2") == Rule("fp8")
    assert r.rule("double_blocks.0.txt_attn.proj") == Rule()


@pytest.mark.parametrize(
    ("rules", "sentence"),
    [
        ({"double_block.*": Rule("fp8")}, "no layer of this model matches 'double_block."),
        ({"img_in": Rule("fp8")}, "img_in is not quantised"),
        ({"single_blocks.*.linear1": Rule("fp8", "bound")}, "has no bound"),
        ({"double_blocks.*.img_mlp.0": Rule("fp8")}, "run together and need the same rule"),
    ],
)
def test_a_recipe_that_does_not_fit_says_why(rules, sentence):
    with pytest.raises(ValueError, match=sentence):
        Recipe("bad", tuple(rules.items())).check(layers())


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "not a recipe"),
        ('{"name": "x", "rules": {"*": {"format": "int4"}}}', "format must be one of dense, fp8, nvfp4, got 'int4'"),
        ('{"name": "x", "rules": {"*": {"format": "nvfp4", "accumulate": "f16"}}}', "only FP8 products"),
        ('{"name": "x", "rules": {"*": {"rank": 32}}}', "makes up for no quantisation"),
        ('{"rules": {}}', "name"),
        ("[1]", "not a recipe: expected an object with a name and rules"),
        ('{"name": "x", "rules": [1]}', "an object of pattern to rule"),
    ],
)
def test_json_that_is_no_recipe_says_why(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        Recipe.from_json(text)


def error(linear: Linear, like: Linear) -> float:
    x = torch.randn(50, like.weight.shape[1], generator=torch.Generator().manual_seed(9))
    got, want = linear(formats.quantize(x, linear.input, torch.float32)), like(x)
    return ((got - want).norm() / want.norm()).item()


def test_quantised_layers_stay_near_the_layer_they_were():
    dense = random_linear()
    errors = {
        name: error(recipe.quantize(dense, rule), dense)
        for name, rule in {
            "fp8": Rule("fp8"),
            "f16": Rule("fp8", accumulate="f16"),
            "nvfp4": Rule("nvfp4"),
            "nvfp4 rank 16": Rule("nvfp4", rank=16),
        }.items()
    }
    assert errors["fp8"] < 0.04
    assert errors["f16"] < 0.05
    assert errors["nvfp4"] < 0.15
    assert errors["nvfp4 rank 16"] < 0.85 * errors["nvfp4"]


def test_fp16_sums_cannot_overflow():
    linear = recipe.quantize(random_linear(), Rule("fp8", accumulate="f16"))
    x = formats.quantize(torch.randn(8, 64) * 1e3, linear.input, torch.float32)
    assert linear.weight.data.float().abs().max() == x.data.float().abs().max() == F16_PEAK
    assert torch.finfo(torch.float16).max >= F16_PEAK**2 * 128


def test_a_branch_is_seeded_padded_and_split_with_the_rows_of_its_layer():
    dense = random_linear()
    one, two = (recipe.quantize(dense, Rule("nvfp4", rank=5)) for _ in range(2))
    assert torch.equal(one.low_rank.up, two.low_rank.up)
    assert one.low_rank.down.shape == (16, 64)
    assert one.input.keep
    x = formats.quantize(torch.randn(4, 64), one.input, torch.float32)
    torch.testing.assert_close(rows(one, slice(32, None))(x), one(x)[:, 32:])


def test_low_rank_is_the_best_approximation():
    g = torch.Generator().manual_seed(3)
    matrix = torch.randn(80, 60, generator=g, dtype=torch.float64)
    matrix *= torch.linspace(1, 0.05, 60, dtype=torch.float64)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    best = (matrix - (u[:, :16] * s[:16]) @ v[:16]).norm()
    branch = recipe.low_rank(matrix, 16)
    assert (matrix - branch.up.double() @ branch.down.double()).norm() < 1.01 * best


def test_stored_weights_are_used_as_they_are():
    dense = random_linear()
    stored = dataclasses.replace(dense, weight=formats.quantize_fp8(dense.weight))
    assert recipe.quantize(stored, Rule("fp8", "row")).weight is stored.weight
    with pytest.raises(ValueError, match=r"double_blocks.0.img_mlp.0 is stored as Fp8, the recipe wants nvfp4"):
        recipe.quantize(stored, Rule("nvfp4"))


def test_a_static_scale_is_needed_and_used():
    dense = random_linear()
    with pytest.raises(ValueError, match="no calibrated input scale"):
        recipe.quantize(dense, Rule("fp8", "static"))
    linear = recipe.quantize(dense, Rule("fp8", "static"), input_scale=torch.tensor(4.0 / 448))
    assert linear.input == Quant("fp8", "static", scale=linear.input.scale)
    x = formats.quantize(torch.full((1, 64), 9.0), linear.input, torch.float32)
    torch.testing.assert_close(formats.dequantize(x), torch.full((1, 64), 4.0))


@pytest.mark.parametrize("kind", [Fp8, Nvfp4])
def test_folded_smoothing_changes_nothing_but_the_rounding(kind):
    """norm_modulate with folded vectors into a smoothed weight equals the layer without smoothing."""
    g = torch.Generator().manual_seed(1)
    k, inverse = 32, torch.rand(32, generator=g) + 0.2
    modulation = Linear(torch.randn(6 * k, 24, generator=g), torch.randn(6 * k, generator=g))
    vec, x = torch.randn(1, 24, generator=g), torch.randn(1, 5, k, generator=g)
    linear = random_linear(k=k)
    smoothed = dataclasses.replace(linear, weight=recipe.smooth(linear.weight, inverse))
    for half in (0, 1):
        plain = modulation(vec).unflatten(-1, (2, 3, k))[:, half]
        folded = recipe.fold(modulation, {half: inverse})(vec).unflatten(-1, (2, 3, k))[:, half]
        h = norm_modulate.reference(x, plain[:, :1], plain[:, 1:2], 0)
        h_smooth = norm_modulate.reference(x, folded[:, :1], folded[:, 1:2], 0)
        torch.testing.assert_close(h_smooth, h * inverse, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(smoothed(h_smooth), linear(h), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(folded[:, 2], plain[:, 2])
