"""A budget becomes a recipe that meets it, with the least sum of the layers' errors."""

from __future__ import annotations

import math

import pytest
import torch
from networks import awkward, images
from torch import nn

import lowprec
from lowprec.assign import assign, expected_signal_to_noise
from lowprec.cost import Costs
from lowprec.models.cifar_resnet import CifarResNet
from lowprec.recipe import Recipe, RecipeError, Rule

BATCHES = [images(1, 6, (1, 12, 12))]


def resnet() -> nn.Module:
    return awkward(CifarResNet(8, num_classes=10, in_channels=1, width=6), seed=3, dead_channels=False)


def analysed(recipe: Recipe | str = "w2a8_n4") -> lowprec.Sensitivity:
    return lowprec.sensitivity(resnet(), recipe, BATCHES)


@pytest.fixture(scope="module")
def found() -> lowprec.Sensitivity:
    return analysed()


def costs(recipe: Recipe) -> Costs:
    example = torch.empty(2, 1, 12, 12, device="meta")
    return lowprec.cost(lowprec.prepare(resnet().to("meta"), recipe, example), example)


def bits(recipe: Recipe) -> dict[str, int]:
    return {layer.name: layer.bits for layer in costs(recipe).layers}


@pytest.mark.parametrize("budget", [2.9, 3.0, 3.7, 4.5, 6.0, 8.0])
def test_the_measured_bits_per_weight_meet_the_budget(budget: float, found: lowprec.Sensitivity) -> None:
    recipe = assign(found, weight_bits=budget)
    assert costs(recipe).weight_bits <= budget
    assert recipe.name == f"w2a8_n4_weight_bits_{budget:g}"
    assert bits(recipe)["conv1"] == 8


@pytest.mark.parametrize("budget", [0.0, 0.3, 0.62, 0.85])
def test_the_measured_multiplications_meet_the_budget(budget: float, found: lowprec.Sensitivity) -> None:
    recipe = assign(found, multiplications_replaced=budget)
    assert costs(recipe).multiplications_replaced >= budget


def test_a_budget_of_exactly_what_a_recipe_costs_is_met_by_it(found: lowprec.Sensitivity) -> None:
    recipe = assign(found, weight_bits=3.7)
    total = costs(recipe)
    assert bits(assign(found, weight_bits=total.weight_bits)) == bits(recipe)
    replaced = assign(found, multiplications_replaced=total.multiplications_replaced)
    assert costs(replaced).multiplications_replaced >= total.multiplications_replaced


def test_no_other_assignment_within_the_budget_has_less_error(found: lowprec.Sensitivity) -> None:
    """All 4^9 assignments of the layers that are not fixed, residual planes among them."""
    budget, open_to = 4.0, [found.choices.open_to(layer) for layer in found.choices.options]
    rows = [[row for row in found.rows if row.option in options] for options in open_to]
    assert [len(layer) for layer in rows] == [1] + 9 * [4]
    storage, noise = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    for layer in rows:
        bits_of = torch.tensor([row.option.cost.weight_storage_bits for row in layer])
        noise_of = torch.tensor([row.error.mean_squared_error for row in layer], dtype=torch.float64)
        storage, noise = (storage[:, None] + bits_of).flatten(), (noise[:, None] + noise_of).flatten()
    assert len(noise) == 4**9
    least = noise[storage <= budget * sum(layer[0].option.cost.weights for layer in rows)].min()
    ratio = expected_signal_to_noise(found, assign(found, weight_bits=budget))
    assert ratio == pytest.approx(10 * math.log10(found.signal_power / float(least)), rel=1e-12)


def test_more_bits_leave_less_noise(found: lowprec.Sensitivity) -> None:
    ratios = [expected_signal_to_noise(found, assign(found, weight_bits=budget)) for budget in (3.0, 4.0, 6.0, 8.0)]
    assert ratios == sorted(ratios)
    assert ratios[0] < ratios[-1]


def test_rules_fix_layers_and_only_what_differs_gets_one() -> None:
    recipe = Recipe.load("w4a8_n4")
    recipe.rules = [Rule("@classifier", bits=8), Rule("stage1.*", cluster_size=2)]
    found = analysed(recipe)
    assert found.choices.fixed == {"conv1", "classifier"}
    mixed = assign(found, weight_bits=4.0)
    assert mixed.rules[:2] == recipe.rules
    patterns = [rule.pattern for rule in mixed.rules[2:]]
    assert len(set(patterns)) == len(patterns)
    assert all(rule.bits in (2, 8) and rule.cluster_size is None for rule in mixed.rules[2:])
    by_name = {layer.name: layer for layer in costs(mixed).layers}
    assert by_name["classifier"].bits == 8
    assert by_name["stage1.0.conv1"].cluster_size == (1 if by_name["stage1.0.conv1"].bits == 8 else 2)
    # The recipe that was given stays as it was, and a rule of its own may free nothing but can say otherwise of conv1.
    assert len(recipe.rules) == 2
    assert analysed(Recipe(rules=[Rule("conv1", bits=4)])).choices.fixed == {"conv1"}


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (
            {"weight_bits": 1.0},
            r"budget.weight_bits=1: .* reaches \d\.\d+ to \d\.\d+ bits per weight while rules fix 1 of",
        ),
        (
            {"multiplications_replaced": 0.99},
            r"budget.multiplications_replaced=0.99: .* reaches shares from 0\.0000 to 0\.\d+",
        ),
        ({"weight_bits": 0.0}, "budget.weight_bits=0.0: give bits"),
        ({"weight_bits": float("nan")}, "budget.weight_bits=nan"),
        ({"multiplications_replaced": 1.0}, "give a share in"),
        ({"weight_bits": 3.0, "multiplications_replaced": 0.5}, "give one of the two"),
        ({}, "no budget: give weight_bits or multiplications_replaced"),
    ],
)
def test_impossible_budgets(budget: dict[str, float], message: str, found: lowprec.Sensitivity) -> None:
    with pytest.raises(RecipeError, match=message):
        assign(found, **budget)


def test_the_named_end_of_the_range_can_be_had(found: lowprec.Sensitivity) -> None:
    for name, low in (("weight_bits", 1.0), ("multiplications_replaced", 0.999)):
        with pytest.raises(RecipeError) as caught:
            assign(found, **{name: low})
        words = str(caught.value).split("reaches ")[1].split()
        assign(found, **{name: float(words[0] if name == "weight_bits" else words[4])})
