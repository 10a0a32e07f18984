"""Ternary weights with a second, residual ternary plane: w ≈ s1·t1 + s2·t2, both planes in the same clusters.

Mellempudi et al., "Ternary Residual Networks", arXiv 1707.04679. A weight's two ternary digits are one code, 3·t1 + t2 (see
:func:`lowprec.numerics.effective_codes.planes_of`), so its nine levels are 0, ±s1, ±s2, ±(s1 + s2), ±(s1 − s2). Scales are
kept as s1 ≥ s2 ≥ 0, which these levels allow: exchanging both, or a sign, changes the digits alone. All work on w_OGNP
(see :mod:`lowprec.numerics.clusters`), vectorized over clusters.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lowprec.numerics.clusters import ClusterLayout
from lowprec.numerics.effective_codes import PLANE_BASE, planes_of
from lowprec.numerics.solvers import WEIGHTS_PER_BLOCK, solve_ternary, ternary_codes

# Other starting points than the greedy one: s1 + s2 as a share of the largest weight, and s2 / s1. Greedy scales lie in a
# valley with a quarter to a half more error (Gaussian weights); more starts than these take off less than 1 % of it.
STARTS = ((1.0, 0.62), (0.85, 0.62), (0.7, 0.62), (0.55, 0.62), (1.0, 0.33), (0.8, 0.33))
# Rounds of codes and scales in turn from each start, and of the best one.
ROUNDS_OF_STARTS = 2
ROUNDS = 5


class PlaneScales(NamedTuple):
    """s1 ≥ s2 ≥ 0 of each cluster, float32, both of :attr:`ClusterLayout.scale_shape`."""

    scale: Tensor
    residual: Tensor


def solve_two_planes(weight: Tensor, layout: ClusterLayout, solver: str = "exact") -> PlaneScales:
    """Scales of both planes of ``weight`` [O, I, *kernel], any floating-point dtype.

    As in arXiv 1707.04679, ``solver`` (of ternary scales) for the weights, then for what they lack. From there and from a few
    more starts codes and scales in turn, as :func:`descend_two_planes`; the best is kept. So the squared error is never above
    that of ``solver`` with one plane. A cluster of zeros gets scales 0 and codes 0.
    """
    values = layout.split(weight.detach().to(torch.float32))
    first = solve_ternary(weight, layout, solver)
    residual = values - ternary_codes(values, first.threshold) * first.scale
    second = solve_ternary(layout.merge(residual), layout, solver)
    rows = layout.rows(values).abs().flatten(1)
    greedy = ordered(_rows_of_scales(first.scale), _rows_of_scales(second.scale))
    per_block = max(1, WEIGHTS_PER_BLOCK // rows.shape[1])
    # Clusters as columns: sums over a handful of members are many times quicker along the first axis.
    parts = [
        _best(block.T.contiguous(), PlaneScales(*scales))
        for block, *scales in zip(rows.split(per_block), *(scale.split(per_block, 1) for scale in greedy), strict=True)
    ]
    s1, s2 = (torch.cat(scale, 1).reshape(layout.scale_shape) for scale in zip(*parts, strict=True))
    return PlaneScales(s1, s2)


def two_plane_codes(w_OGNP: Tensor, scales: PlaneScales) -> Tensor:
    """3·t1 + t2 of each weight, -4 ... 4: the nearest of the nine levels; 0 in a cluster whose scales are 0."""
    return torch.sign(w_OGNP) * _magnitude_codes(w_OGNP.abs(), scales)


def descend_two_planes(w_OGNP: Tensor, scales: PlaneScales, layout: ClusterLayout) -> PlaneScales:
    """One descent step: the nearest levels, then the least-squares scales of both planes. The squared error never rises.

    min over (s1, s2) of Σ (w − s1·t1 − s2·t2)², which is [Σt1², Σt1·t2; Σt1·t2, Σt2²] (s1, s2) = (Σw·t1, Σw·t2). A first
    scale of 0 restarts at mean |w|, a second one at the mean of what the first plane leaves.
    """
    magnitude = w_OGNP.detach().abs()
    members = layout.members_of_clusters(w_OGNP.device).view(1, -1, 1, 1)
    members = members * (layout.positions if layout.shares_positions else 1)
    return _fit(magnitude, _restarted(magnitude, scales, members, layout.shared_axes), layout.shared_axes)[0]


def _best(w_NC: Tensor, greedy: PlaneScales) -> PlaneScales:
    """The best scales [1, C] found for magnitudes in columns."""
    largest = w_NC.amax(0, keepdim=True)
    best, best_gain = greedy, torch.full_like(largest, -torch.inf, dtype=torch.float64)
    others = [(largest * (share / (1 + ratio)), ratio) for share, ratio in STARTS]
    for scales in (greedy, *(PlaneScales(s1, s1 * ratio) for s1, ratio in others)):
        for _ in range(ROUNDS_OF_STARTS):
            scales, gain = _fit(w_NC, scales, (0,))
        best = ordered(*(torch.where(gain > best_gain, new, old) for new, old in zip(scales, best, strict=True)))
        best_gain = torch.maximum(gain, best_gain)
    for _ in range(ROUNDS):
        best, _ = _fit(w_NC, best, (0,))
    return best


def _fit(magnitude: Tensor, scales: PlaneScales, axes: tuple[int, ...]) -> tuple[PlaneScales, Tensor]:
    """Least-squares scales for the codes of ``scales``, and the part of Σ w² that they explain (float64)."""
    codes = _magnitude_codes(magnitude, scales)
    first, second = planes_of(codes)

    def total(values: Tensor) -> Tensor:
        # In float64: products with digits are float32 weights, whose sums are then the same in any order.
        return values.sum(axes, keepdim=True, dtype=torch.float64)

    # Magnitudes have codes 0 ... 4, so first digits are 0 and 1, and are their own squares.
    a, b, c = total(first), total(first * second), total(second.square())
    p, q = total(magnitude * first), total(magnitude * second)
    determinant = a * c - b * b
    # Where one level alone is taken (or none) its two scales are not determined: one plane holds it.
    both, leading = determinant > 0, a > 0
    alone = torch.where(leading, p, q)
    level = alone / torch.where(leading, a, c).clamp(min=1)
    safe = torch.where(both, determinant, 1.0)
    s1 = torch.where(both, (p * c - q * b) / safe, level)
    s2 = torch.where(both, (q * a - p * b) / safe, 0.0)
    gain = torch.where(both, p * s1 + q * s2, alone * level)
    return ordered(s1.abs().to(torch.float32), s2.abs().to(torch.float32)), gain


def ordered(one: Tensor, other: Tensor) -> PlaneScales:
    """Both scales of each cluster, the larger one first."""
    return PlaneScales(torch.maximum(one, other), torch.minimum(one, other))


def _rows_of_scales(scale: Tensor) -> Tensor:
    """[O, G, 1, 1 or P] -> [1, C], in the order of :meth:`ClusterLayout.rows`."""
    return scale.reshape(1, -1)


def _magnitude_codes(magnitude: Tensor, scales: PlaneScales) -> Tensor:
    """0 ... 4 of each |w|: where it lies among the middles between the five levels 0, s2, s1 − s2, s1, s1 + s2."""
    s1, s2 = scales
    low, high = torch.minimum(s2, s1 - s2), torch.maximum(s2, s1 - s2)
    # A level that two codes have (where s2 = 0, or s2 = s1) is 0's or the first plane's.
    own = low > 0
    middles = (
        torch.where(own, low, s1),
        s1,
        torch.where(own, high + s1, s1),
        torch.where(s2 > 0, 2 * s1 + s2, torch.inf),
    )
    place = torch.zeros_like(magnitude)
    for middle in middles:
        place += magnitude > torch.where(s1 > 0, middle / 2, torch.inf)
    # In the order of size the levels have the codes 0, 1, 2, 3, 4, or with s1 < 2·s2 0, 2, 1, 3, 4.
    swapped = ((place == 1) | (place == 2)) & (s1 < 2 * s2)
    return torch.where(swapped, PLANE_BASE - place, place)


def _restarted(magnitude: Tensor, scales: PlaneScales, members: Tensor, axes: tuple[int, ...]) -> PlaneScales:
    def mean(values: Tensor) -> Tensor:
        return values.sum(axes, keepdim=True) / members

    first = torch.where(scales.scale > 0, scales.scale, mean(magnitude))
    left = (magnitude - first * (magnitude > first / 2)).abs()
    return ordered(first, torch.where(scales.residual > 0, scales.residual, mean(left)))
