"""Mantissas and effective codes in exact rationals: limits, signs, rounding."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowprec.numerics.effective_codes import channel_exponents, effective_codes, mantissas

LIMITS = {2: (64, 0), 4: (127, 4)}
SCALES = st.lists(
    st.floats(2.0**-30, 2.0**10, width=32) | st.floats(-(2.0**10), -(2.0**-30), width=32) | st.just(0.0),
    min_size=1,
    max_size=6,
)


@given(SCALES, st.sampled_from([2, 4]))
@settings(max_examples=300, deadline=None)
def test_mantissas_just_fit_and_round_half_to_even(scales: list[float], bits: int) -> None:
    limit, shift = LIMITS[bits]
    scale = torch.tensor(scales, dtype=torch.float64).view(1, -1, 1, 1)
    exponent = channel_exponents(scale, bits)
    found = mantissas(scale, exponent, bits).flatten().tolist()
    e = int(exponent)

    def exact(value: float, at: int) -> int:
        return round(Fraction(value) * 2**shift / Fraction(2) ** at)

    assert found == [exact(value, e) for value in scales]
    assert max(abs(a) for a in found) <= limit
    if any(scales):
        assert max(abs(exact(value, e - 1)) for value in scales) > limit  # one exponent less would not do


@pytest.mark.parametrize("bits", [2, 4])
def test_every_effective_code_within_64_and_exact(bits: int) -> None:
    """All mantissas with all codes, against fractions."""
    limit = LIMITS[bits][0]
    codes = torch.arange(-1.0, 2.0) if bits == 2 else torch.arange(-7.0, 8.0)
    mantissa = torch.arange(-float(limit), limit + 1).view(1, -1, 1, 1)
    found = effective_codes(codes.view(1, 1, 1, -1), mantissa, bits)
    assert float(found.abs().max()) <= 64
    for a, row in zip(mantissa.flatten().tolist(), found[0, :, 0].tolist(), strict=True):
        divisor = 1 if bits == 2 else 16
        assert row == [round(Fraction(int(a) * int(q), divisor)) for q in codes.tolist()]


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_negative_scales_negate_the_mantissas(bits: int, dtype: torch.dtype) -> None:
    scale = torch.rand(20, 5, 1, 9, generator=torch.Generator().manual_seed(0), dtype=dtype)
    exponent = channel_exponents(scale, bits)
    assert torch.equal(channel_exponents(-scale, bits), exponent)
    assert torch.equal(mantissas(-scale, exponent, bits), -mantissas(scale, exponent, bits))


def test_exponents_heed_the_floor() -> None:
    scale = torch.ones(3, 2, 1, 1)
    free = channel_exponents(scale, 2)
    floor = torch.tensor([int(free[0]) + 3, int(free[0]), int(free[0]) - 5], dtype=torch.int32)
    assert channel_exponents(scale, 2, floor).tolist() == [int(free[0]) + 3, int(free[0]), int(free[0])]
    assert (
        float(mantissas(scale, channel_exponents(scale, 2, floor), 2)[0, 0])
        == float(mantissas(scale, free, 2)[0, 0]) / 8
    )


@pytest.mark.parametrize("bits", [2, 4])
def test_dead_channel(bits: int) -> None:
    scale = torch.zeros(1, 3, 1, 1)
    mantissa = mantissas(scale, channel_exponents(scale, bits), bits)
    assert bool((mantissa == 0).all())
    assert bool((effective_codes(torch.ones(1, 3, 2, 4), mantissa, bits) == 0).all())
