"""Two ternary planes: solver and descent against their definitions, mantissas within the bound, digits of codes."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lowprec
from lowprec.numerics import residual_planes
from lowprec.numerics.clusters import ClusterLayout
from lowprec.numerics.effective_codes import channel_exponents, effective_codes, mantissas, planes_of
from lowprec.numerics.residual_planes import PlaneScales, descend_two_planes, solve_two_planes, two_plane_codes
from lowprec.numerics.solvers import solve_ternary, ternary_codes
from lowprec.recipe import RecipeError

SHAPE = (20, 10, 3, 3)
LAYOUTS = [("kernel", 4), ("element", 4), ("kernel", 1), ("element", 1), ("kernel", 64), ("element", 64)]
DISTRIBUTIONS = ["gaussian", "laplace", "integers", "equal", "sparse", "tiny", "huge"]


def sample(kind: str, shape: tuple[int, ...] = SHAPE) -> Tensor:
    generator = torch.Generator().manual_seed(DISTRIBUTIONS.index(kind))
    normal = torch.randn(shape, generator=generator)
    uniform = torch.rand(shape, generator=generator)
    if kind == "laplace":
        return normal.sign() * -(1 - uniform).log()
    if kind == "integers":  # many ties
        return torch.randint(-3, 4, shape, generator=generator).float()
    if kind == "equal":
        return normal.sign() * 0.3
    if kind == "sparse":
        return normal * (uniform < 0.3)
    return normal * {"gaussian": 1.0, "tiny": 1e-30, "huge": 1e30}[kind]


def values(w_OGNP: Tensor, scales: PlaneScales) -> Tensor:
    first, second = planes_of(two_plane_codes(w_OGNP, scales).double())
    return first * scales.scale.double() + second * scales.residual.double()


def errors(w_OGNP: Tensor, scales: PlaneScales, layout: ClusterLayout) -> Tensor:
    return (w_OGNP.double() - values(w_OGNP, scales)).square().sum(layout.shared_axes, keepdim=True)


def energies(w_OGNP: Tensor, layout: ClusterLayout) -> Tensor:
    return w_OGNP.double().square().sum(layout.shared_axes, keepdim=True)


@pytest.mark.parametrize("code", range(-4, 5))
@pytest.mark.parametrize("dtype", [torch.int8, torch.float32, torch.float64])
def test_a_code_is_its_two_digits(code: int, dtype: torch.dtype) -> None:
    first, second = planes_of(torch.tensor([code], dtype=dtype))
    assert first.dtype == second.dtype == dtype
    assert 3 * int(first) + int(second) == code
    assert abs(int(first)) <= 1
    assert abs(int(second)) <= 1


@pytest.mark.parametrize(("kind", "size"), LAYOUTS)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("solver", ["exact", "paper"])
def test_the_error_is_never_above_that_of_one_plane(kind: str, size: int, distribution: str, solver: str) -> None:
    weight = sample(distribution)
    layout = ClusterLayout(SHAPE, size, kind)
    w_OGNP = layout.split(weight)
    one = solve_ternary(weight, layout, solver)
    single = (w_OGNP.double() - ternary_codes(w_OGNP, one.threshold) * one.scale.double()).square()
    scales = solve_two_planes(weight, layout, solver)
    assert scales.scale.shape == scales.residual.shape == layout.scale_shape
    assert scales.scale.dtype == scales.residual.dtype == torch.float32
    assert bool((scales.scale >= scales.residual).all())
    assert bool((scales.residual >= 0).all())
    slack = 1e-12 * energies(w_OGNP, layout)  # scales are float32
    found = errors(w_OGNP, scales, layout)
    assert bool((found <= single.sum(layout.shared_axes, keepdim=True) + slack).all())


@pytest.mark.parametrize(("kind", "size"), LAYOUTS)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_error_never_rises_in_a_descent(kind: str, size: int, distribution: str) -> None:
    layout = ClusterLayout(SHAPE, size, kind)
    w_OGNP = layout.split(sample(distribution))
    unit = float(w_OGNP.abs().max())
    slack = 1e-12 * energies(w_OGNP, layout)
    for one, other in ((0.0, 0.0), (0.5, 0.0), (0.5, 0.5), (0.4, 0.3), (0.7, 0.2), (1e-3, 1e-4), (100.0, 50.0)):
        scales = PlaneScales(*(torch.full(layout.scale_shape, share * unit) for share in (one, other)))
        before = errors(w_OGNP, scales, layout)
        for _ in range(4):
            scales = descend_two_planes(w_OGNP, scales, layout)
            assert bool((scales.scale >= scales.residual).all())
            assert bool((scales.residual >= 0).all())
            after = errors(w_OGNP, scales, layout)
            assert bool((after <= before * (1 + 1e-6) + slack).all())
            before = after


@given(
    st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=8),
    st.floats(2.0**-8, 2, width=32),
    st.sampled_from([0.0, 2.0**-6, 0.25, 1 / 3, 0.4375, 0.5, 0.625, 0.75, 1.0]),
)
@settings(max_examples=300, deadline=None)
def test_codes_are_the_nearest_of_nine_levels(weights: list[float], s1: float, ratio: float) -> None:
    scales = PlaneScales(torch.full((1, 1, 1, 1), s1), torch.full((1, 1, 1, 1), s1) * ratio)
    w_OGNP = torch.tensor(weights).view(1, 1, -1, 1)
    found = values(w_OGNP, scales).flatten()
    first, second = float(scales.scale), float(scales.residual)
    levels = torch.tensor([a * first + b * second for a in (-1, 0, 1) for b in (-1, 0, 1)], dtype=torch.float64)
    distance = (torch.tensor(weights).double()[:, None] - levels).abs().amin(1)
    # Middles are float32.
    assert bool(((torch.tensor(weights).double() - found).abs() <= distance + 1e-6 * s1).all())


@pytest.mark.parametrize("kind", ["kernel", "element"])
def test_scales_of_a_descent_are_least_squares(kind: str) -> None:
    layout = ClusterLayout(SHAPE, 4, kind)
    w_OGNP = layout.split(sample("gaussian"))
    start = PlaneScales(torch.full(layout.scale_shape, 1.2), torch.full(layout.scale_shape, 0.4))
    rows = layout.rows(w_OGNP).flatten(1).double()
    digits = [layout.rows(plane).flatten(1).double() for plane in planes_of(two_plane_codes(w_OGNP, start))]
    found = torch.stack(descend_two_planes(w_OGNP, start, layout)).flatten(1).double()
    for row, first, second, pair in zip(rows, *digits, found.T, strict=True):
        design = torch.stack([first, second], 1)
        if torch.linalg.matrix_rank(design) == 2:
            wanted = torch.linalg.lstsq(design, row[:, None]).solution.flatten().abs().sort(descending=True).values
            torch.testing.assert_close(pair, wanted, rtol=1e-5, atol=1e-6)


def test_zero_clusters_get_scales_and_codes_of_zero() -> None:
    weight = sample("gaussian")
    weight[1] = 0
    weight[2, :4] = 0
    weight[3, :, 0, 0] = -0.0
    for kind, size in LAYOUTS:
        layout = ClusterLayout(SHAPE, size, kind)
        scales = solve_two_planes(weight, layout)
        assert bool(torch.isfinite(torch.stack(scales)).all())
        codes = layout.merge(two_plane_codes(layout.split(weight), scales))
        assert torch.stack(scales)[:, 1].abs().sum() == 0
        assert codes[1].abs().sum() == 0
        again = descend_two_planes(layout.split(weight), scales, layout)
        assert bool(torch.isfinite(torch.stack(again)).all())
        assert torch.stack(again)[:, 1].abs().sum() == 0


def test_members_that_fill_up_the_last_cluster_have_code_zero() -> None:
    layout = ClusterLayout(SHAPE, 4)
    for distribution in DISTRIBUTIONS:
        w_OGNP = layout.split(sample(distribution))
        codes = two_plane_codes(w_OGNP, solve_two_planes(sample(distribution), layout))
        assert codes[:, -1, 2:].abs().sum() == 0


def test_clusters_die_and_live_again() -> None:
    layout = ClusterLayout((2, 4), 4)
    dead = layout.split(torch.zeros(2, 4))
    ones = torch.ones(layout.scale_shape)
    after = descend_two_planes(dead, PlaneScales(ones, ones / 3), layout)
    assert torch.stack(after).abs().sum() == 0
    alive = layout.split(torch.tensor([[0.5, -0.125, 0.0, 0.625], [0.25, 0.25, 0.25, -0.25]]))
    for _ in range(3):
        after = descend_two_planes(alive, after, layout)
    assert torch.equal(values(alive, after), alive.double())
    # Four equal magnitudes need one plane.
    assert (float(after.scale[1]), float(after.residual[1])) == (0.25, 0.0)
    assert two_plane_codes(alive, after)[1].flatten().tolist() == [3, 3, 3, -3]


def test_it_follows_weights_that_move_a_little() -> None:
    layout = ClusterLayout(SHAPE, 4)
    generator = torch.Generator().manual_seed(1)
    weight = sample("gaussian")
    scales = solve_two_planes(weight, layout)
    for _ in range(20):
        weight = weight + 0.01 * torch.randn(SHAPE, generator=generator)
        scales = descend_two_planes(layout.split(weight), scales, layout)
    w_OGNP = layout.split(weight)
    best = errors(w_OGNP, solve_two_planes(weight, layout), layout).sum()
    assert float(errors(w_OGNP, scales, layout).sum()) <= 1.1 * float(best)


@pytest.mark.parametrize(
    ("width", "expected", "one_plane"), [(4, 0.0029, 0.100), (36, 0.0196, 0.179), (576, 0.0283, 0.190)]
)
def test_relative_squared_error_of_gaussian_weights(width: int, expected: float, one_plane: float) -> None:
    """Clusters of that many weights: 36 is N = 4 of 3×3 kernels, 4 of 1×1. One plane leaves six times as much and more."""
    clusters = 100_000 // width
    weight = torch.randn(clusters, 1, width, generator=torch.Generator().manual_seed(width))
    layout = ClusterLayout((clusters, 1, width), 1)
    w_OGNP = layout.split(weight)
    found = float(errors(w_OGNP, solve_two_planes(weight, layout), layout).sum() / energies(w_OGNP, layout).sum())
    assert abs(found - expected) < 0.04 * expected
    assert found < one_plane / 6


@pytest.mark.parametrize("block", [1, 100, 1000])
def test_blocks_do_not_change_the_result(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = ClusterLayout(SHAPE, 4)
    whole = solve_two_planes(sample("laplace"), layout)
    monkeypatch.setattr(residual_planes, "WEIGHTS_PER_BLOCK", block)
    parts = solve_two_planes(sample("laplace"), layout)
    assert torch.equal(torch.stack(whole), torch.stack(parts))


SCALES = st.lists(st.tuples(st.floats(2.0**-30, 2.0**10, width=32), st.floats(0, 1, width=32)), min_size=1, max_size=6)


@given(SCALES, st.booleans(), st.integers(-40, 20))
@settings(max_examples=400, deadline=None)
def test_mantissas_of_a_cluster_sum_up_to_64_at_most(
    pairs: list[tuple[float, float]], negative: bool, floor: int
) -> None:
    s1 = torch.tensor([first for first, _ in pairs], dtype=torch.float64)
    scale = torch.stack([s1, s1 * torch.tensor([ratio for _, ratio in pairs])]).view(2, 1, -1, 1, 1)
    scale = -scale if negative else scale
    for exponent in (channel_exponents(scale, 2), channel_exponents(scale, 2, torch.tensor([floor]))):
        found = mantissas(scale, exponent, 2)
        assert float(found.abs().sum(0).max()) <= 64
        for value, mantissa in zip(scale.flatten().tolist(), found.flatten().tolist(), strict=True):
            exact = Fraction(value) / Fraction(2) ** int(exponent)
            # At most one is cut, where both were rounded up.
            assert mantissa == round(exact) or (
                abs(mantissa) == abs(round(exact)) - 1 and abs(exact) - abs(mantissa) < 1.5
            )
    free = channel_exponents(scale, 2)
    reach = max(sum(map(Fraction, pair)) for pair in zip(*scale.abs().flatten(1).tolist(), strict=True))
    assert round(reach / Fraction(2) ** (int(free) - 1)) > 64  # one exponent less would not do


def test_the_second_mantissa_gives_way_where_both_are_rounded_up() -> None:
    scale = torch.tensor([40.7, 23.7]).view(2, 1, 1, 1, 1)
    assert mantissas(scale, torch.zeros(1, dtype=torch.int32), 2).flatten().tolist() == [41, 23]
    assert mantissas(-scale, torch.zeros(1, dtype=torch.int32), 2).flatten().tolist() == [-41, -23]


def test_every_effective_code() -> None:
    codes = torch.arange(-4.0, 5.0).view(1, 1, 1, 9)
    for a1 in range(-64, 65):
        for a2 in (0, 1, -1, 64 - abs(a1), abs(a1) - 64):
            found = effective_codes(codes, torch.tensor([a1, a2]).double().view(2, 1, 1, 1, 1), 2).flatten()
            assert found.tolist() == [t1 * a1 + t2 * a2 for t1 in (-1, 0, 1) for t2 in (-1, 0, 1)]


def test_the_solver_alone() -> None:
    codes, scales = lowprec.solve(sample("gaussian"), cluster_size=4, planes=2)
    assert codes.dtype == torch.int8
    assert codes.shape == SHAPE
    assert scales.shape == (2, 20, 3, 1, 1)
    assert int(codes.abs().max()) == 4
    with pytest.raises(RecipeError, match=r"solve.planes=2: only ternary weights \(bits=2\)"):
        lowprec.solve(sample("gaussian"), bits=4, planes=2)
