"""The knapsack against all assignments there are."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowprec.numerics.knapsack import least_error_within

OPTIONS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 40)), min_size=1, max_size=4)


def brute_force(classes: list[list[tuple[int, int]]], limit: int) -> tuple[int, int]:
    """The least error, and the least cost that it can be had for."""
    totals = [tuple(map(sum, zip(*taken, strict=True))) for taken in itertools.product(*classes)]
    return min((error, cost) for cost, error in totals if cost <= limit)


@settings(max_examples=300, deadline=None)
@given(st.lists(OPTIONS, min_size=1, max_size=6), st.floats(0, 1))
def test_it_is_the_best_of_all_assignments(classes: list[list[tuple[int, int]]], where: float) -> None:
    costs, errors = ([[option[part] for option in options] for options in classes] for part in (0, 1))
    least, most = sum(map(min, costs)), sum(map(max, costs))
    limit = least + int(where * (most - least))
    taken = least_error_within(costs, [[float(error) for error in options] for options in errors], limit)
    found = [options[index] for options, index in zip(classes, taken, strict=True)]
    assert (sum(error for _, error in found), sum(cost for cost, _ in found)) == brute_force(classes, limit)


def test_nothing_to_choose_and_nothing_that_fits() -> None:
    assert least_error_within([], [], 0) == []
    assert least_error_within([[3]], [[1.5]], 3) == [0]
    with pytest.raises(ValueError, match="the cheapest options cost 5, more than 4"):
        least_error_within([[2, 9], [3, 7]], [[1.0, 0.0], [1.0, 0.0]], 4)


def test_as_many_layers_as_the_largest_networks_have() -> None:
    """An exact search of 4^300 assignments; no other one within the limit that changes one or two layers is better."""
    draw = random.Random(0)
    costs, errors = [], []
    for _ in range(300):
        size, noise = draw.randrange(1_000, 3_000_000), draw.lognormvariate(0, 2)
        costs.append([size * bits + draw.randrange(size) for bits in (2, 4, 5, 8)])
        errors.append([noise * draw.uniform(0.5, 1) * 4.0**-bits for bits in (2, 4, 5, 8)])
    limit = sum(cost[0] for cost in costs) * 8 // 5
    taken = least_error_within(costs, errors, limit)
    spent = sum(cost[index] for cost, index in zip(costs, taken, strict=True))
    assert spent <= limit
    gains = [
        (errors[layer][index] - errors[layer][other], costs[layer][other] - costs[layer][index])
        for layer, index in enumerate(taken)
        for other in range(4)
    ]
    assert not [gain for gain, cost in gains if gain > 1e-12 and cost <= limit - spent]
