"""From each layer's sensitivity to a mixed recipe: the least output error that a budget allows."""

from __future__ import annotations

import copy
import math

from lowprec.budget import Budget
from lowprec.candidates import Choices
from lowprec.cost import LayerCost
from lowprec.numerics.knapsack import least_error_within
from lowprec.recipe import Recipe, RecipeError, Rule
from lowprec.sensitivity import Sensitivity


def assign(
    found: Sensitivity, weight_bits: float | None = None, multiplications_replaced: float | None = None
) -> Recipe:
    """The recipe of ``found`` with a rule more for each layer that gets another scheme, so that a budget is met.

    One of the two budgets: ``weight_bits`` at most, bits per weight with scales included, or ``multiplications_replaced``, a
    share, at least; both as :func:`lowprec.cost` counts them. Errors of layers are taken to be independent, so that their
    powers in the logits add up, and the sum is least of all assignments. Layers that the recipe's own rules fix stay.

    Raises:
        RecipeError: no budget, two of them, or one that no assignment meets; the reachable range is named.
    """
    budget = Budget(weight_bits, multiplications_replaced)
    if not budget.given:
        raise RecipeError("no budget: give weight_bits or multiplications_replaced")
    choices = found.choices
    check_reachable(choices, budget)
    open_rows = [[row for row in found.rows if row.option in choices.open_to(layer)] for layer in choices.options]
    taken = least_error_within(
        [[_counted(row.option.cost, budget) for row in rows] for rows in open_rows],
        [[row.error.mean_squared_error for row in rows] for rows in open_rows],
        _limit(choices, budget) - sum(_counted(other, budget) for other in choices.others),
    )
    options = [rows[index].option for rows, index in zip(open_rows, taken, strict=True)]
    recipe = copy.deepcopy(choices.recipe)
    recipe.name = f"{recipe.name}_{budget.name}_{budget.value:g}"
    recipe.rules += [Rule(option.layer, **option.changes) for option in options if option.changes]
    return recipe


def expected_signal_to_noise(found: Sensitivity, recipe: Recipe) -> float:
    """Of the logits with the weights of an assigned ``recipe``, dB: by the sum of its layers' noise powers."""
    changes = {rule.pattern: rule.given() for rule in recipe.rules[len(found.choices.recipe.rules) :]}
    chosen = [row for row in found.rows if row.option.changes == changes.get(row.option.layer, {})]
    noise = sum(row.error.mean_squared_error for row in chosen)
    return 10 * math.log10(found.signal_power / noise) if noise else math.inf


def check_reachable(choices: Choices, budget: Budget) -> None:
    """Raises RecipeError, with the range that can be had, for a budget that no assignment meets. Reads shapes alone."""
    budget.validate()
    open_costs = [[_counted(option.cost, budget) for option in choices.open_to(layer)] for layer in choices.options]
    others = sum(_counted(other, budget) for other in choices.others)
    least, most = others + sum(map(min, open_costs)), others + sum(map(max, open_costs))
    if least <= _limit(choices, budget):
        return
    whole = _whole(choices, budget)
    # The end that is named is rounded so that it can be had.
    if budget.name == "weight_bits":
        reached = f"{math.ceil(1000 * least / whole) / 1000:.3f} to {most / whole:.3f} bits per weight"
    else:
        reached = f"shares from {1 - most / whole:.4f} to {math.floor(10000 * (1 - least / whole)) / 10000:.4f}"
    fixed = f" while rules fix {len(choices.fixed)} of its {len(open_costs)} layers" if choices.fixed else ""
    raise RecipeError(
        f"budget.{budget.name}={budget.value:g}: no assignment meets it; with these candidates the model reaches "
        f"{reached}{fixed}"
    )


def _counted(cost: LayerCost, budget: Budget) -> int:
    """What of a layer's cost the budget limits."""
    return cost.weight_storage_bits if budget.name == "weight_bits" else cost.multiplications


def _whole(choices: Choices, budget: Budget) -> int:
    """What the limited costs of all layers are related to: the model's weights, or its MACs."""
    layers = [*(options[0].cost for options in choices.options.values()), *choices.others]
    return sum(layer.weights if budget.name == "weight_bits" else layer.macs for layer in layers)


def _limit(choices: Choices, budget: Budget) -> int:
    """The largest sum of limited costs with which :class:`lowprec.cost.Costs` shows that the budget is met."""
    whole = _whole(choices, budget)
    if budget.name == "weight_bits":
        limit = math.floor(budget.value * whole) + 1
        while limit / whole > budget.value:
            limit -= 1
        return limit
    limit = math.floor((1 - budget.value) * whole) + 1
    while 1 - limit / whole < budget.value:
        limit -= 1
    return limit
