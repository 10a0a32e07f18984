"""Recipes: the shipped ones, rules in order, and an error for each value that no recipe can have."""

from pathlib import Path
from typing import Any

import pytest

from lowprec.recipe import LayerTraits, Recipe, RecipeError, Rule, WeightScheme

LAYERS = [
    LayerTraits("conv1", frozenset({"first_convolution"})),
    LayerTraits("layer1.0.conv1"),
    LayerTraits("layer1.0.depthwise", frozenset({"depthwise"})),
    LayerTraits("fc", frozenset({"classifier"})),
]


def schemes(*rules: Rule) -> dict[str, tuple[int, int, tuple[str, ...]]]:
    found = Recipe(rules=list(rules)).assign(LAYERS)
    return {item.name: (item.scheme.bits, item.scheme.cluster_size, item.rules) for item in found}


@pytest.mark.parametrize(
    ("name", "bits", "size"), [("w2a8_n4", 2, 4), ("w2a8_n64", 2, 64), ("w4a8_n4", 4, 4), ("w8a8", 8, 4)]
)
def test_shipped_recipes(name: str, bits: int, size: int) -> None:
    recipe = Recipe.load(name)
    assert recipe.name == name
    assert recipe.weights == WeightScheme(bits, size, "kernel", "exact")
    assert (recipe.activations.bits, recipe.activations.calibrator) == (8, "mse")
    assigned = {item.name: item.scheme.bits for item in recipe.assign(LAYERS)}
    assert assigned == {"conv1": 8, "layer1.0.conv1": bits, "layer1.0.depthwise": bits, "fc": bits}
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_all_shipped_recipes_are_known_here() -> None:
    assert Recipe.names() == ["w2a8_n4", "w2a8_n64", "w4a8_n4", "w8a8"]


def test_the_last_rule_has_the_last_word() -> None:
    found = schemes(Rule("layer1.*", bits=4), Rule("@depthwise", bits=8), Rule("layer1.0.conv?", cluster_size=16))
    assert found["layer1.0.conv1"] == (4, 16, ("layer1.*", "layer1.0.conv?"))
    assert found["layer1.0.depthwise"] == (8, 4, ("layer1.*", "@depthwise"))
    assert found["fc"] == (2, 4, ())
    assert found["conv1"] == (8, 4, ("@first_convolution",))
    assert schemes(Rule("@depthwise", bits=8), Rule("layer1.*", bits=4))["layer1.0.depthwise"][0] == 4


def test_a_rule_overrules_the_first_convolution() -> None:
    assert schemes(Rule("conv1", bits=2))["conv1"] == (2, 4, ("@first_convolution", "conv1"))


@pytest.mark.parametrize(("pattern", "near"), [("layer9.*", "layer1.0.conv1"), ("Fc", "fc"), ("conv", "conv1")])
def test_a_pattern_that_matches_nothing_is_an_error(pattern: str, near: str) -> None:
    with pytest.raises(RecipeError) as caught:
        schemes(Rule(pattern, bits=4))
    assert repr(pattern) in str(caught.value)
    assert near in str(caught.value)


def test_a_role_that_no_layer_plays_is_an_error() -> None:
    with pytest.raises(RecipeError, match="@depthwise"):
        Recipe(rules=[Rule("@depthwise", bits=8)]).assign(LAYERS[:2])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"weights": {"bits": 3}}, ["quant.weights.bits=3", "2, 4, 8"]),
        ({"weights": {"bits": "2"}}, ["quant.weights.bits='2'", "2, 4, 8"]),
        ({"weights": {"bits": 2.0}}, ["quant.weights.bits=2.0", "2, 4, 8"]),
        ({"weights": {"bits": True}}, ["quant.weights.bits=True"]),
        ({"weights": {"cluster_size": 0}}, ["quant.weights.cluster_size=0", "at least 1"]),
        ({"weights": {"cluster_size": 2.5}}, ["quant.weights.cluster_size=2.5"]),
        ({"weights": {"layout": "row"}}, ["quant.weights.layout='row'", "kernel, element"]),
        ({"weights": {"solver": "best"}}, ["quant.weights.solver='best'", "exact, rms, paper, twn"]),
        ({"weights": {"cluster_sise": 4}}, ["quant.weights.cluster_sise", "did you mean cluster_size"]),
        ({"weight": {}}, ["quant.weight", "did you mean weights"]),
        ({"weights": 2}, ["quant.weights=2"]),
        ({"activations": {"bits": 4}}, ["quant.activations.bits=4", "8"]),
        ({"activations": {"calibrator": "kl"}}, ["quant.activations.calibrator='kl'", "mse, max, percentile"]),
        ({"activations": {"percentile": 0.99}}, ["quant.activations.percentile=0.99"]),
        ({"activations": {"percentile": 101}}, ["quant.activations.percentile=101"]),
        ({"activations": {"percentile": "most"}}, ["quant.activations.percentile='most'"]),
        ({"rules": [{"pattern": "@last", "bits": 8}]}, ["quant.rules[0].pattern='@last'", "@classifier"]),
        ({"rules": [{"pattern": "", "bits": 8}]}, ["quant.rules[0].pattern=''"]),
        ({"rules": [{"pattern": 5, "bits": 8}]}, ["quant.rules[0].pattern=5"]),
        ({"rules": [{"pattern": "fc"}]}, ["quant.rules[0]", "changes nothing"]),
        ({"rules": [{"pattern": "a", "bits": 8}, {"pattern": "b", "bits": 5}]}, ["quant.rules[1].bits=5"]),
        ({"rules": [{"pattern": "fc", "bit": 8}]}, ["quant.rules[0].bit", "did you mean bits"]),
        ({"rules": 5}, ["quant.rules=5"]),
        ({"rules": {"pattern": "fc", "bits": 8}}, ["quant.rules="]),
    ],
)
def test_impossible_values_name_the_key_and_the_choices(content: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(content)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"weights": {"planes": 3}}, ["quant.weights.planes=3", "1, 2"]),
        ({"weights": {"planes": True}}, ["quant.weights.planes=True"]),
        ({"weights": {"bits": 4, "planes": 2}}, ["quant.weights.planes=2", "bits=2", "bits=4"]),
        ({"rules": [{"pattern": "fc", "bits": 8, "planes": 2}]}, ["quant.rules[0].planes=2", "bits=2", "bits=8"]),
        ({"rules": [{"pattern": "fc", "planes": 0}]}, ["quant.rules[0].planes=0", "1, 2"]),
    ],
)
def test_a_second_plane_is_for_ternary_weights(content: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(content)
    for word in words:
        assert word in str(caught.value)


def planes(recipe: Recipe) -> dict[str, tuple[int, int]]:
    return {item.name: (item.scheme.bits, item.scheme.planes) for item in recipe.assign(LAYERS)}


def test_rules_that_give_more_bits_take_the_second_plane_away() -> None:
    two = WeightScheme(planes=2)
    assert planes(Recipe(weights=two)) == {
        "conv1": (8, 1),
        "layer1.0.conv1": (2, 2),
        "layer1.0.depthwise": (2, 2),
        "fc": (2, 2),
    }
    rules = [Rule("fc", bits=4), Rule("@depthwise", planes=1), Rule("conv1", bits=2, planes=2)]
    found = planes(Recipe(weights=two, rules=rules))
    assert found == {"conv1": (2, 2), "layer1.0.conv1": (2, 2), "layer1.0.depthwise": (2, 1), "fc": (4, 1)}
    # In order: planes that a rule has taken away do not come back with the bits.
    assert planes(Recipe(weights=two, rules=[Rule("fc", bits=4), Rule("fc", bits=2)]))["fc"] == (2, 1)
    assert planes(Recipe(weights=WeightScheme(bits=4), rules=[Rule("fc", bits=2, planes=2)]))["fc"] == (2, 2)
    assert planes(Recipe(rules=[Rule("layer1.*", planes=2)]))["layer1.0.conv1"] == (2, 2)


def test_a_second_plane_for_a_layer_of_more_bits_names_the_layer_and_the_rules() -> None:
    with pytest.raises(RecipeError, match=r"layer conv1 got planes=2 and bits=8 from the rules @first_convolution, \*"):
        Recipe(rules=[Rule("*", planes=2)]).assign(LAYERS)
    with pytest.raises(RecipeError, match="layer fc got planes=2 and bits=4 from the rules fc, fc"):
        Recipe(rules=[Rule("fc", bits=4), Rule("fc", planes=2)]).assign(LAYERS)


def test_one_plane_is_not_written_down() -> None:
    """So recipes in files and checkpoints from before there were planes equal those of today."""
    plain = Recipe(rules=[Rule("fc", bits=8)])
    assert "planes" not in str(plain.to_dict())
    assert Recipe.from_dict(plain.to_dict()) == plain
    two = Recipe(weights=WeightScheme(planes=2), rules=[Rule("fc", planes=1)])
    assert Recipe.from_dict(two.to_dict()) == two


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nweights: {bits: 4}\nrules:\n- {pattern: fc, bits: 8}\n")
    assert Recipe.load(path) == Recipe("mine", WeightScheme(bits=4), rules=[Rule("fc", bits=8)])
    path.write_text("- a list")
    with pytest.raises(RecipeError, match=r"mine\.yaml: a recipe is a mapping"):
        Recipe.load(path)
    path.write_text("weights: {bits: 4")
    with pytest.raises(RecipeError, match=r"mine\.yaml"):
        Recipe.load(path)
    for missing in ("w3a8", tmp_path / "none.yaml"):
        with pytest.raises(RecipeError, match=r"no recipe .*w2a8_n4, w2a8_n64, w4a8_n4, w8a8"):
            Recipe.load(missing)


def test_a_recipe_is_written_as_a_file_that_loads(tmp_path: Path) -> None:
    recipe = Recipe("mine", WeightScheme(bits=4), rules=[Rule("fc", bits=8), Rule("layer1.*", cluster_size=16)])
    path = tmp_path / "mine.yaml"
    path.write_text(recipe.to_yaml())
    assert Recipe.load(path) == recipe
    assert "null" not in path.read_text()


def test_a_rule_without_a_pattern_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"quant.rules\[0\] has no pattern"):
        Recipe.from_dict({"rules": [{"bits": 8}]})
