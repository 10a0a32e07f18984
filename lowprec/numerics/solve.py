"""The solver alone: codes and scales of a weight, without a model."""

from __future__ import annotations

import torch
from torch import Tensor

from lowprec.numerics.clusters import ClusterLayout
from lowprec.numerics.fixed_point import power_of_two
from lowprec.numerics.residual_planes import solve_two_planes, two_plane_codes
from lowprec.numerics.solvers import (
    check_finite,
    eight_bit_codes,
    four_bit_codes,
    solve_eight_bit,
    solve_four_bit,
    solve_ternary,
    ternary_codes,
)
from lowprec.recipe import WeightScheme, check_weight_scheme


@torch.no_grad()
def solve(
    weight: Tensor,
    cluster_size: int = 4,
    solver: str = "exact",
    bits: int = 2,
    layout: str = "kernel",
    planes: int = 1,
) -> tuple[Tensor, Tensor]:
    """Codes and scales of one weight tensor.

    weight: [O, I, *kernel], any floating-point dtype. cluster_size: N adjacent input channels; layout: `kernel` or
    `element`; solver: of ternary scales, `exact`, `rms`, `paper` or `twn`; planes: 2 for ternary weights with a residual plane.

    Returns codes (int8, shape of ``weight``) and scales (float32) that broadcast against the codes split into clusters,
    :meth:`ClusterLayout.split`: [O, G, 1, 1], or [O, G, 1, P] in layout `element`; [O, 1, 1, 1] for 8 bits. Scales are
    not rounded to mantissas yet. Two planes: codes 3·t1 + t2, -4 … 4, and scales s1, s2 as [2, O, G, 1, 1 or P].

    Raises:
        ValueError: an impossible argument, fewer than two axes, or a weight that is infinite or NaN.
    """
    check_weight_scheme(WeightScheme(bits, cluster_size, layout, solver, planes), "solve")
    if weight.dim() < 2 or not weight.is_floating_point():
        raise ValueError(f"weight must be floating point [O, I, *kernel], not {weight.dtype} {list(weight.shape)}")
    check_finite(weight, "weight")
    clusters = ClusterLayout(tuple(weight.shape), cluster_size, layout)
    if bits == 8:
        exponent = solve_eight_bit(weight)
        return eight_bit_codes(weight, exponent).to(torch.int8), power_of_two(exponent).view(-1, 1, 1, 1)
    w_OGNP = clusters.split(weight.float())
    if bits == 4:
        scale = solve_four_bit(weight, clusters)
        return clusters.merge(four_bit_codes(w_OGNP, scale)).to(torch.int8), scale
    if planes == 2:
        scales = solve_two_planes(weight, clusters, solver)
        return clusters.merge(two_plane_codes(w_OGNP, scales)).to(torch.int8), torch.stack(scales)
    solution = solve_ternary(weight, clusters, solver)
    return clusters.merge(ternary_codes(w_OGNP, solution.threshold)).to(torch.int8), solution.scale
