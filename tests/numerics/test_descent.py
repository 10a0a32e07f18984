"""Descent steps: the error never rises, the optimum stays, a few steps from cold come near it."""

import pytest
import torch
from torch import Tensor

from lowprec.numerics.clusters import ClusterLayout
from lowprec.numerics.solvers import (
    ClusterScales,
    descend_four_bit,
    descend_ternary,
    four_bit_codes,
    solve_four_bit,
    solve_ternary,
    ternary_codes,
)

SHAPE = (40, 6, 3, 3)


def weights(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ternary_errors(w_OGNP: Tensor, scales: ClusterScales, layout: ClusterLayout) -> Tensor:
    residual = w_OGNP.double() - ternary_codes(w_OGNP, scales.threshold) * scales.scale.double()
    return residual.square().sum(layout.shared_axes)


def four_bit_errors(w_OGNP: Tensor, scale: Tensor, layout: ClusterLayout) -> Tensor:
    residual = w_OGNP.double() - four_bit_codes(w_OGNP, scale) * scale.double()
    return residual.square().sum(layout.shared_axes)


@pytest.mark.parametrize("kind", ["kernel", "element"])
@pytest.mark.parametrize("start", [0.0, 1e-3, 0.3, 1.0, 3.0, 100.0])
def test_ternary_error_never_rises(kind: str, start: float) -> None:
    layout = ClusterLayout(SHAPE, 4, kind)
    w_OGNP = layout.split(weights())
    scale = torch.full(layout.scale_shape, start)
    scales = ClusterScales(scale, torch.where(scale > 0, scale / 2, torch.inf))
    before = ternary_errors(w_OGNP, scales, layout)
    for _ in range(6):
        scales = descend_ternary(w_OGNP, scales, layout)
        after = ternary_errors(w_OGNP, scales, layout)
        assert bool((after <= before * (1 + 1e-6)).all())
        before = after


@pytest.mark.parametrize("solver", ["rms", "paper", "twn"])
def test_ternary_error_falls_from_other_solvers(solver: str) -> None:
    layout = ClusterLayout(SHAPE, 4)
    w_OGNP = layout.split(weights())
    start = solve_ternary(weights(), layout, solver)
    before = ternary_errors(w_OGNP, start, layout)
    after = ternary_errors(w_OGNP, descend_ternary(w_OGNP, start, layout), layout)
    assert bool((after <= before * (1 + 1e-6)).all())
    assert float(after.sum()) < float(before.sum())


@pytest.mark.parametrize("kind", ["kernel", "element"])
def test_the_exact_optimum_stays(kind: str) -> None:
    layout = ClusterLayout(SHAPE, 4, kind)
    w_OGNP = layout.split(weights())
    best = solve_ternary(weights(), layout)
    after = descend_ternary(w_OGNP, best, layout)
    assert torch.equal(ternary_codes(w_OGNP, after.threshold), ternary_codes(w_OGNP, best.threshold))
    torch.testing.assert_close(after.scale, best.scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(after.threshold, best.threshold, rtol=1e-6, atol=0)


def test_three_steps_from_cold_come_near_the_optimum() -> None:
    layout = ClusterLayout((2000, 4, 3, 3), 4)
    weight = weights(shape=(2000, 4, 3, 3))
    w_OGNP = layout.split(weight)
    scales = ClusterScales(torch.zeros(layout.scale_shape), torch.full(layout.scale_shape, torch.inf))
    for _ in range(3):
        scales = descend_ternary(w_OGNP, scales, layout)
    best = ternary_errors(w_OGNP, solve_ternary(weight, layout), layout).sum()
    assert float(ternary_errors(w_OGNP, scales, layout).sum()) <= 1.04 * float(best)


def test_it_follows_weights_that_move_a_little() -> None:
    layout = ClusterLayout(SHAPE, 4)
    weight = weights()
    scales = solve_ternary(weight, layout)
    for step in range(20):
        weight = weight + 0.01 * weights(step + 1)
        scales = descend_ternary(layout.split(weight), scales, layout)
    w_OGNP = layout.split(weight)
    best = ternary_errors(w_OGNP, solve_ternary(weight, layout), layout).sum()
    assert float(ternary_errors(w_OGNP, scales, layout).sum()) <= 1.01 * float(best)


@pytest.mark.parametrize("zero_scale", [True, False])
def test_ternary_clusters_die_and_live_again(zero_scale: bool) -> None:
    layout = ClusterLayout((2, 4), 4)
    dead = layout.split(torch.zeros(2, 4))
    scale = torch.zeros(layout.scale_shape) if zero_scale else torch.ones(layout.scale_shape)
    after = descend_ternary(dead, ClusterScales(scale, scale / 2), layout)
    assert after.scale.tolist() == torch.zeros(layout.scale_shape).tolist()
    assert bool((ternary_codes(dead, after.threshold) == 0).all())
    alive = layout.split(torch.full((2, 4), 0.25))
    again = descend_ternary(alive, after, layout)
    assert bool((again.scale == 0.25).all())
    assert bool((ternary_codes(alive, again.threshold) == 1).all())


@pytest.mark.parametrize("kind", ["kernel", "element"])
@pytest.mark.parametrize("start", [0.0, 1e-3, 0.3, 1.0, 100.0])
def test_four_bit_error_never_rises(kind: str, start: float) -> None:
    layout = ClusterLayout(SHAPE, 4, kind)
    w_OGNP = layout.split(weights())
    scale = torch.full(layout.scale_shape, start)
    before = four_bit_errors(w_OGNP, scale, layout)
    for _ in range(6):
        scale = descend_four_bit(w_OGNP, scale, layout)
        after = four_bit_errors(w_OGNP, scale, layout)
        assert bool((after <= before * (1 + 1e-5) + 1e-12).all())
        before = after


def test_four_bit_solution_hardly_moves() -> None:
    layout = ClusterLayout(SHAPE, 4)
    scale = solve_four_bit(weights(), layout)
    w_OGNP = layout.split(weights())
    before = four_bit_errors(w_OGNP, scale, layout)
    after = four_bit_errors(w_OGNP, descend_four_bit(w_OGNP, scale, layout), layout)
    assert bool((after <= before * (1 + 1e-6)).all())
    assert float(after.sum()) >= 0.999 * float(before.sum())


def test_four_bit_zero_cluster_stays_zero() -> None:
    layout = ClusterLayout((2, 4), 4)
    dead = layout.split(torch.zeros(2, 4))
    scale = descend_four_bit(dead, torch.ones(layout.scale_shape), layout)
    assert bool((scale == 0).all())
    assert bool((four_bit_codes(dead, scale) == 0).all())
