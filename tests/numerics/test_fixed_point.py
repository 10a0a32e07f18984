"""Dynamic fixed point against exact rational arithmetic: Python's ``round`` of a Fraction rounds half to even."""

from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowprec.numerics.fixed_point import (
    MAXIMUM_EXPONENT,
    MINIMUM_EXPONENT,
    SIGNED_8_BIT,
    UNSIGNED_8_BIT,
    CodeRange,
    dequantize,
    divide_round_half_even,
    exponent_for,
    power_of_two,
    quantize,
    quantize_to_grid,
    round_half_even,
    scale_of,
    shift_round_half_even,
)

LIMITS = [1, 64, 127, 255, 1 << 22]


def rounded_quotient(value: float, exponent: int) -> int:
    return round(Fraction(value) / Fraction(2) ** exponent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_half_even_of_halves(dtype: torch.dtype) -> None:
    halves = torch.arange(-1001, 1002, 2, dtype=dtype) / 2
    expected = torch.tensor([round(Fraction(value)) for value in halves.tolist()], dtype=dtype)
    assert torch.equal(round_half_even(halves), expected)


def test_power_of_two_is_exact_over_the_normal_range() -> None:
    single = torch.arange(-126, 128, dtype=torch.int32)
    assert power_of_two(single).dtype == torch.float32
    assert power_of_two(single).tolist() == [2.0**e for e in range(-126, 128)]
    double = torch.arange(-1022, 1024, dtype=torch.int32)
    assert power_of_two(double, torch.float64).dtype == torch.float64
    assert power_of_two(double, torch.float64).tolist() == [2.0**e for e in range(-1022, 1024)]


def test_a_scale_as_a_number() -> None:
    for exponent in range(-126, 127):
        assert scale_of(torch.tensor(exponent, dtype=torch.int32)) == 2.0**exponent
        assert scale_of(torch.tensor(exponent, dtype=torch.int32), inverse=True) == 2.0**-exponent


@given(
    st.floats(min_value=2.0**-55, max_value=2.0**55, width=32) | st.floats(min_value=2.0**-55, max_value=2.0**55),
    st.sampled_from(LIMITS),
)
@settings(max_examples=400, deadline=None)
def test_exponent_for_is_the_smallest_that_fits(largest: float, limit: int) -> None:
    exponent = int(exponent_for(torch.tensor(largest, dtype=torch.float64), limit))
    assert rounded_quotient(largest, exponent) <= limit
    if exponent > MINIMUM_EXPONENT:
        assert rounded_quotient(largest, exponent - 1) > limit


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("exponent", [-30, -7, 0, 11, 30])
def test_exponent_for_at_the_boundary(limit: int, exponent: int) -> None:
    """Codes that are just the limit, half a code more, and a hair beyond that."""
    unit = 2.0**exponent
    magnitudes = [limit * unit, (limit + 0.5) * unit, (limit + 0.5 + 2.0**-20) * unit, (limit - 0.5) * unit]
    found = exponent_for(torch.tensor(magnitudes, dtype=torch.float64), limit)
    assert found.dtype == torch.int32
    for magnitude, candidate in zip(magnitudes, found.tolist(), strict=True):
        assert rounded_quotient(magnitude, candidate) <= limit < rounded_quotient(magnitude, candidate - 1)


def test_exponent_for_an_even_limit_uses_the_half_that_rounds_down() -> None:
    # 64.5 rounds to 64 and 127.5 to 128: the same half fits one limit and not the other.
    assert int(exponent_for(torch.tensor(64.5), 64)) == 0
    assert int(exponent_for(torch.tensor(127.5), 127)) == 1


def test_exponent_for_zero_and_beyond_the_ends() -> None:
    magnitudes = torch.tensor([0.0, 1e-44, 1e-30, 3e38], dtype=torch.float64)
    assert exponent_for(magnitudes, 127).tolist() == [MINIMUM_EXPONENT] * 3 + [MAXIMUM_EXPONENT]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_exponent_for_any_dtype(dtype: torch.dtype) -> None:
    magnitudes = torch.tensor([0.5, 1.0, 3.0, 127.0, 128.0], dtype=dtype)
    assert exponent_for(magnitudes, 127).tolist() == [-7, -6, -5, 0, 1]


@pytest.mark.parametrize("exponent", [-60, -31, -7, 0, 5, 60])
@pytest.mark.parametrize(
    ("codes", "dtype"),
    [
        *((codes, dtype) for codes in (UNSIGNED_8_BIT, SIGNED_8_BIT) for dtype in (torch.float32, torch.float64)),
        (UNSIGNED_8_BIT, torch.uint8),
        (SIGNED_8_BIT, torch.int8),
    ],
)
def test_codes_survive_the_round_trip(codes: CodeRange, exponent: int, dtype: torch.dtype) -> None:
    all_codes = torch.arange(codes.low, codes.high + 1).to(dtype)
    values = dequantize(all_codes, torch.tensor(exponent))
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert values.tolist() == [code * 2.0**exponent for code in all_codes.tolist()]
    assert torch.equal(quantize(values, torch.tensor(exponent), codes), all_codes.to(values.dtype))
    assert torch.equal(quantize_to_grid(values, torch.tensor(exponent)), values)


@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20),
    st.integers(-20, 20),
    st.sampled_from([UNSIGNED_8_BIT, SIGNED_8_BIT]),
)
@settings(max_examples=100, deadline=None)
def test_quantize_against_rationals(values: list[float], exponent: int, codes: CodeRange) -> None:
    found = quantize(torch.tensor(values, dtype=torch.float32), torch.tensor(exponent), codes)
    assert found.tolist() == [min(max(rounded_quotient(value, exponent), codes.low), codes.high) for value in values]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_quantize_to_grid_keeps_the_dtype(dtype: torch.dtype) -> None:
    found = quantize_to_grid(torch.tensor([0.75, -1.25, 3.5], dtype=dtype), torch.tensor(-1))
    assert found.dtype == dtype
    assert found.tolist() == [1.0, -1.0, 3.5]


INT32 = st.integers(-(1 << 31), (1 << 31) - 1)


@given(INT32, st.integers(-31, 70))
@example(-(1 << 31), 32)
@example((1 << 31) - 1, 31)
@example(-(1 << 31), -31)
@example(-1, 70)
@settings(max_examples=500, deadline=None)
def test_shift_against_rationals(code: int, shift: int) -> None:
    expected = round(Fraction(code) / Fraction(2) ** shift)
    found = shift_round_half_even(torch.tensor(code, dtype=torch.int32), shift)
    assert found.dtype == torch.int64
    assert int(found) == expected


@pytest.mark.parametrize("shift", range(10))
def test_shift_equals_the_rounding_of_floats(shift: int) -> None:
    codes = torch.arange(-5000, 5001, dtype=torch.int32)
    floats = round_half_even(codes.double() / (1 << shift))
    assert torch.equal(shift_round_half_even(codes, shift), floats.to(torch.int64))


def test_shift_broadcasts() -> None:
    codes: Tensor = torch.tensor([[3, 5, -6]], dtype=torch.int32)
    found = shift_round_half_even(codes, torch.tensor([[1], [-2], [0]]))
    assert found.tolist() == [[2, 2, -3], [12, 20, -24], [3, 5, -6]]


@given(st.integers(-(1 << 53), 1 << 53), st.integers(1, 1 << 31))
@example(7, 2)
@example(-7, 2)
@example(-5, 2)
@example(49 * 5 + 0, 10)
@settings(max_examples=500, deadline=None)
def test_division_against_rationals(numerator: int, denominator: int) -> None:
    found = divide_round_half_even(torch.tensor(numerator), denominator)
    assert int(found) == round(Fraction(numerator, denominator))


@pytest.mark.parametrize("denominator", [1, 2, 3, 4, 6, 9, 49, 64])
def test_division_of_all_small_numerators(denominator: int) -> None:
    numerators = torch.arange(-2000, 2001, dtype=torch.int32)
    found = divide_round_half_even(numerators, torch.tensor(denominator))
    assert found.tolist() == [round(Fraction(numerator, denominator)) for numerator in numerators.tolist()]
