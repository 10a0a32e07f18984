"""Codes and scales for given moments of the inputs: the error never rises, and without correlation it is the solver's."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowprec.numerics import compensation
from lowprec.numerics.clusters import ClusterLayout
from lowprec.numerics.compensation import (
    CompensatedWeights,
    compensate_clusters,
    compensate_mantissas,
    compensate_steps,
    damped,
    ridge_target,
)
from lowprec.numerics.effective_codes import channel_exponents, effective_codes, mantissas
from lowprec.numerics.fixed_point import SIGNED_8_BIT, round_half_even
from lowprec.numerics.solvers import four_bit_codes, solve_four_bit, solve_ternary, ternary_codes

LAYOUTS = [
    ClusterLayout((6, 8, 3, 3), 4),
    ClusterLayout((6, 7, 2, 2), 3, "element"),
    ClusterLayout((8, 1, 3, 3), 4),
    ClusterLayout((5, 12), 64),
]
# One weight a cluster: nothing is lost, whatever the inputs.
SINGLE = ClusterLayout((4, 9), 1)


def weights(layout: ClusterLayout, seed: int = 0) -> Tensor:
    return torch.randn(layout.weight_shape, generator=torch.Generator().manual_seed(seed))


def correlated_moments(layout: ClusterLayout, groups: int = 1, seed: int = 0) -> Tensor:
    """h_gKK of inputs that are much alike, as neighbouring pixels are."""
    inputs = layout.weight_shape[1] * layout.positions
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(groups, inputs, inputs, generator=generator, dtype=torch.float64)
    common = torch.randn(groups, inputs, 1, generator=generator, dtype=torch.float64)
    x_gKN = 0.3 * mixing @ torch.randn(groups, inputs, 4 * inputs, generator=generator, dtype=torch.float64) + common
    return x_gKN @ x_gKN.transpose(1, 2) / x_gKN.shape[-1]


def output_error(quantized: Tensor, weight: Tensor, h_gKK: Tensor) -> float:
    """Σ over output channels of (ŵ − w) H (ŵ − w)ᵀ."""
    error = (quantized.double() - weight.double()).reshape(h_gKK.shape[0], -1, h_gKK.shape[-1])
    return float((error @ h_gKK * error).sum())


def solved(weight: Tensor, layout: ClusterLayout, bits: int) -> Tensor:
    w_OGNP = layout.split(weight)
    if bits == 2:
        scale, threshold = solve_ternary(weight, layout)
        return layout.merge(scale * ternary_codes(w_OGNP, threshold))
    scale = solve_four_bit(weight, layout)
    return layout.merge(scale * four_bit_codes(w_OGNP, scale))


def groups_of(layout: ClusterLayout) -> int:
    return layout.weight_shape[0] if layout.weight_shape[1] == 1 else 1


def codes_of(found: CompensatedWeights, layout: ClusterLayout) -> Tensor:
    scale = found.scale.double()
    return layout.merge(layout.split(found.weight) / torch.where(scale > 0, scale, 1.0))


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_codes_are_whole_and_outputs_come_closer_than_by_the_solver(layout: ClusterLayout, bits: int) -> None:
    weight, h_gKK = weights(layout), correlated_moments(layout, groups_of(layout))
    found = compensate_clusters(weight, h_gKK, layout, bits)
    assert found.scale.shape == layout.scale_shape
    assert bool((found.scale >= 0).all())
    codes = codes_of(found, layout)
    assert float((codes - codes.round()).abs().max()) < 1e-9
    assert float(codes.abs().max()) <= {2: 1, 4: 7}[bits] + 1e-9
    assert output_error(found.weight, weight, h_gKK) < output_error(solved(weight, layout, bits), weight, h_gKK)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(LAYOUTS), st.sampled_from([2, 4]), st.integers(0, 10_000))
def test_a_further_pass_never_raises_the_error(layout: ClusterLayout, bits: int, seed: int) -> None:
    weight, h_gKK = weights(layout, seed), correlated_moments(layout, groups_of(layout), seed)
    errors = []
    with pytest.MonkeyPatch.context() as patch:
        for passes in range(4):
            patch.setattr(compensation, "PASSES", passes)
            errors.append(output_error(compensate_clusters(weight, h_gKK, layout, bits).weight, weight, h_gKK))
    for before, after in itertools.pairwise(errors):
        assert after <= before * (1 + 1e-9)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_without_correlation_it_is_the_exact_solver(layout: ClusterLayout) -> None:
    weight = weights(layout)
    inputs = layout.weight_shape[1] * layout.positions
    identity = torch.eye(inputs, dtype=torch.float64).repeat(groups_of(layout), 1, 1)
    found, exact = compensate_clusters(weight, identity, layout, 2), solve_ternary(weight, layout)
    assert torch.equal(
        codes_of(found, layout).round(), layout.merge(ternary_codes(layout.split(weight), exact.threshold)).double()
    )
    torch.testing.assert_close(found.scale.float(), exact.scale)


def test_clusters_of_one_weight_lose_nothing() -> None:
    weight = weights(SINGLE)
    found = compensate_clusters(weight, correlated_moments(SINGLE), SINGLE, 2)
    torch.testing.assert_close(found.weight, weight.double())


def test_clusters_of_zeros_and_inputs_that_are_always_zero() -> None:
    layout = ClusterLayout((4, 8, 3, 3), 4)
    weight, h_gKK = weights(layout), correlated_moments(layout)
    weight[1] = 0
    weight[2, :4] = 0
    h_gKK[:, 9:18] = 0
    h_gKK[:, :, 9:18] = 0
    for bits in (2, 4):
        found = compensate_clusters(weight, h_gKK, layout, bits)
        assert bool(torch.isfinite(found.weight).all())
        assert float(found.weight[1].abs().max()) == 0
        assert float(found.scale[1].abs().max()) == 0
    nothing = compensate_clusters(weight, torch.zeros_like(h_gKK), layout, 2)
    assert bool(torch.isfinite(nothing.weight).all())


def test_eight_bit_weights_keep_their_steps() -> None:
    layout = ClusterLayout((6, 80, 1, 1), 4)  # more inputs than are done at a time
    weight, h_gKK = weights(layout), correlated_moments(layout)
    step = torch.tensor([2.0**-5, -(2.0**-5), 0.03, 2.0**-4, -0.05, 2.0**-6], dtype=torch.float64)
    found = compensate_steps(weight, h_gKK, step)
    codes = found / step.view(-1, 1, 1, 1)
    assert float((codes - codes.round()).abs().max()) < 1e-9
    assert SIGNED_8_BIT.low <= float(codes.round().min()) < float(codes.round().max()) <= SIGNED_8_BIT.high
    rounded = step.view(-1, 1, 1, 1) * round_half_even(weight.double() / step.view(-1, 1, 1, 1)).clamp(-128, 127)
    assert output_error(found, weight, h_gKK) < output_error(rounded, weight, h_gKK)
    identity = torch.eye(80, dtype=torch.float64)[None]
    torch.testing.assert_close(compensate_steps(weight, identity, step), rounded)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_four_bit_codes_are_settled_with_the_mantissas_that_ship(layout: ClusterLayout) -> None:
    weight, h_gKK = weights(layout), correlated_moments(layout)
    fitted = compensate_clusters(weight, h_gKK, layout, 4)
    gain = torch.linspace(-1.6, 2.1, weight.shape[0], dtype=torch.float64).view(-1, 1, 1, 1)
    scale = fitted.scale * gain
    exponent = channel_exponents(scale, 4)
    mantissa = mantissas(scale, exponent, 4)
    codes = layout.merge(four_bit_codes(layout.split(fitted.weight), fitted.scale))
    step = torch.exp2(exponent.double()) / gain.flatten()

    def shipped(codes: Tensor) -> Tensor:
        effective = layout.merge(effective_codes(layout.split(codes), mantissa, 4))
        return effective * step.view(-1, *[1] * (weight.dim() - 1))

    settled = compensate_mantissas(weight, h_gKK, step, mantissa, codes, layout)
    assert torch.equal(settled, settled.round().clamp(-7, 7))
    assert output_error(shipped(settled), weight, h_gKK) <= output_error(shipped(codes), weight, h_gKK)
    silent = mantissa.clone()
    silent[0] = 0
    assert torch.equal(compensate_mantissas(weight, h_gKK, step, silent, codes, layout)[0], codes[0])


def test_the_ridge_target_solves_its_equations_and_stays_near_the_weights() -> None:
    layout = ClusterLayout((6, 8, 3, 3), 4)
    h_gKK = correlated_moments(layout)
    w_gOK = weights(layout).double().reshape(1, 6, 72)
    other = weights(layout, 1).double().reshape(1, 6, 72)
    cross_gKO = h_gKK @ other.transpose(1, 2)  # the outputs of other weights are wanted
    torch.testing.assert_close(ridge_target(w_gOK, h_gKK, cross_gKO, 1e-9), other, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ridge_target(w_gOK, h_gKK, cross_gKO, 1e9), w_gOK, rtol=1e-4, atol=1e-4)
    mean = h_gKK.diagonal(dim1=1, dim2=2).mean()
    torch.testing.assert_close(damped(h_gKK, 0.5) - h_gKK, 0.5 * mean * torch.eye(72, dtype=torch.float64)[None])
