"""The multiple-choice knapsack: of each class one option, with the least total error that a limit of cost allows. Exact.

States are the undominated pairs (cost, error) of the classes so far (Nemhauser and Ullmann 1969). Of these only such are kept
as can still lead to the best end: the linear relaxation of the classes to come (Sinha and Zoltners 1979), which is the lower
hull of their options joined by steepness, bounds every end from below, and its corners are ends themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

# Sums of the same errors in another order differ by less than this share.
ROUNDING = 1e-12


def least_error_within(costs: Sequence[Sequence[int]], errors: Sequence[Sequence[float]], limit: int) -> list[int]:
    """The option to take of each class: Σ error is least, with Σ cost ≤ limit.

    costs, errors: of each class's options, at least one each; finite numbers of any sign. Of equal errors the cheaper.

    Raises:
        ValueError: even the cheapest options cost more than ``limit``.
    """
    if sum(map(min, costs)) > limit:
        raise ValueError(f"the cheapest options cost {sum(map(min, costs))}, more than {limit}")
    hulls = _hulls_to_come(costs, errors)
    cost, error = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    best = torch.inf
    steps: list[tuple[Tensor, Tensor]] = []  # for each class: the state that a state comes from, and its option
    for class_costs, class_errors, hull in zip(costs, errors, hulls, strict=True):
        states, options = len(cost), len(class_costs)
        cost = (cost[:, None] + torch.tensor(class_costs, dtype=torch.int64)).flatten()
        error = (error[:, None] + torch.tensor(class_errors, dtype=torch.float64)).flatten()
        left = limit - cost
        corner = torch.searchsorted(hull.cost, left, right=True) - 1
        possible, corner = corner >= 0, corner.clamp(min=0)
        end = torch.where(possible, error + hull.error[corner], torch.inf)
        best = min(best, float(end.min()))
        bound = end + hull.slope[corner] * (left - hull.cost[corner])
        kept = _undominated(cost, error, possible & (bound <= best + ROUNDING * abs(best)))
        steps.append(
            (torch.arange(states).repeat_interleave(options)[kept], torch.arange(options).repeat(states)[kept])
        )
        cost, error = cost[kept], error[kept]
    state = int(error.argmin())
    taken = []
    for parents, choices in reversed(steps):
        taken.append(int(choices[state]))
        state = int(parents[state])
    return taken[::-1]


class _Hull(NamedTuple):
    """Least error by cost, convex: its corners [V], and the slope behind each, 0 behind the last."""

    cost: Tensor
    error: Tensor
    slope: Tensor


def _hulls_to_come(costs: Sequence[Sequence[int]], errors: Sequence[Sequence[float]]) -> list[_Hull]:
    """For each class, the joint hull of all classes after it."""
    hulls: list[_Hull] = []
    start_cost, start_error = 0, 0.0
    segments: list[tuple[float, int, float]] = []  # slope, cost, error
    for class_costs, class_errors in zip(reversed(costs), reversed(errors), strict=True):
        segments.sort(key=lambda segment: segment[0])
        steps_cost = torch.tensor([start_cost, *(cost for _, cost, _ in segments)], dtype=torch.int64)
        steps_error = torch.tensor([start_error, *(error for _, _, error in segments)], dtype=torch.float64)
        slope = torch.tensor([*(slope for slope, _, _ in segments), 0.0], dtype=torch.float64)
        hulls.append(_Hull(steps_cost.cumsum(0), steps_error.cumsum(0), slope))
        corners = _lower_hull(class_costs, class_errors)
        start_cost, start_error = start_cost + corners[0][0], start_error + corners[0][1]
        slope_before = -torch.inf
        for (cost, error), (next_cost, next_error) in pairwise(corners):
            # Slopes of a class rise, also where rounding says otherwise: its segments stay in their order.
            slope_before = max(slope_before, (next_error - error) / (next_cost - cost))
            segments.append((slope_before, next_cost - cost, next_error - error))
    return hulls[::-1]


def _lower_hull(costs: Sequence[int], errors: Sequence[float]) -> list[tuple[int, float]]:
    """The corners of a class's falling convex hull, from its cheapest option to its best."""
    corners: list[tuple[int, float]] = []
    for cost, error in sorted(zip(costs, errors, strict=True)):
        if corners and error >= corners[-1][1]:
            continue
        while len(corners) > 1 and _is_above(corners[-2], corners[-1], (cost, error)):
            corners.pop()
        corners.append((cost, error))
    return corners


def _is_above(left: tuple[int, float], middle: tuple[int, float], right: tuple[int, float]) -> bool:
    return (middle[1] - left[1]) * (right[0] - left[0]) >= (right[1] - left[1]) * (middle[0] - left[0])


def _undominated(cost: Tensor, error: Tensor, candidates: Tensor) -> Tensor:
    """Indices of the candidates than which no other is as cheap and as good, by rising cost."""
    indices = candidates.nonzero().flatten()
    indices = indices[error[indices].argsort(stable=True)]
    indices = indices[cost[indices].argsort(stable=True)]
    sorted_error = error[indices]
    least_before = torch.cat((sorted_error.new_tensor([torch.inf]), sorted_error.cummin(0).values[:-1]))
    return indices[sorted_error < least_before]
