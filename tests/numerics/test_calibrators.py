"""Calibrators against brute force over exponents."""

from fractions import Fraction
from math import ceil

import pytest
import torch
from torch import Tensor

from lowprec.numerics import calibrators
from lowprec.numerics.calibrators import EXPONENT_OF_ZERO, choose_exponent
from lowprec.numerics.fixed_point import SIGNED_8_BIT, UNSIGNED_8_BIT, CodeRange, dequantize, quantize

RANGES = [UNSIGNED_8_BIT, SIGNED_8_BIT]


def samples(kind: str, codes: CodeRange, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(3, 4, 5, 5, generator=generator) * 2.0 ** (seed - 5) for _ in range(2)]
    if kind == "heavy":
        parts = [part**5 for part in parts]
    return [part if codes.low < 0 else part.clamp(min=0) for part in parts]


@pytest.mark.parametrize("codes", RANGES)
@pytest.mark.parametrize("kind", ["gaussian", "heavy"])
@pytest.mark.parametrize("seed", range(6))
def test_max_is_the_smallest_exponent_that_holds_the_largest_magnitude(codes: CodeRange, kind: str, seed: int) -> None:
    tensors = samples(kind, codes, seed)
    largest = max(float(part.abs().max()) for part in tensors)
    expected = next(e for e in range(-50, 50) if round(Fraction(largest) / Fraction(2) ** e) <= codes.high)
    assert choose_exponent(tensors, codes, "max", 99.99) == expected


@pytest.mark.parametrize("codes", RANGES)
@pytest.mark.parametrize("kind", ["gaussian", "heavy"])
@pytest.mark.parametrize("seed", range(6))
def test_mse_is_the_power_of_two_of_least_squared_error(codes: CodeRange, kind: str, seed: int) -> None:
    tensors = samples(kind, codes, seed)
    values = torch.cat([part.flatten() for part in tensors])
    errors = {
        e: float(
            (dequantize(quantize(values, torch.tensor(e), codes), torch.tensor(e)) - values).double().square().sum()
        )
        for e in range(-25, 25)
    }
    assert choose_exponent(tensors, codes, "mse", 99.99) == min(errors, key=lambda e: errors[e])


@pytest.mark.parametrize("codes", RANGES)
@pytest.mark.parametrize("share", [60.0, 94.0, 99.0, 99.99, 100.0])
@pytest.mark.parametrize("seed", range(4))
def test_percentile_keeps_that_share(codes: CodeRange, share: float, seed: int) -> None:
    tensors = samples("heavy", codes, seed)
    magnitudes = sorted(torch.cat([part.flatten() for part in tensors]).abs().tolist())
    kept = magnitudes[ceil(Fraction(str(share)) * len(magnitudes) / 100) - 1]
    expected = next(e for e in range(-60, 50) if round(Fraction(kept) / Fraction(2) ** e) <= codes.high)
    assert choose_exponent(tensors, codes, "percentile", share) == expected


def test_percentile_of_few_values_keeps_at_least_the_share() -> None:
    # 94 % of ten values are all ten: nine would be 90 %.
    values = torch.tensor([1.0] * 9 + [100.0])
    assert choose_exponent([values], UNSIGNED_8_BIT, "percentile", 94.0) == choose_exponent(
        [values], UNSIGNED_8_BIT, "max", 94.0
    )


def test_percentile_of_a_tensor_that_is_mostly_zero_keeps_what_is_not() -> None:
    values = torch.zeros(1000)
    values[:3] = 1.0
    assert choose_exponent([values], UNSIGNED_8_BIT, "percentile", 99.0) == choose_exponent(
        [values], UNSIGNED_8_BIT, "max", 99.0
    )


@pytest.mark.parametrize("calibrator", ["max", "percentile", "mse"])
def test_zeros_infinities_and_shapes(calibrator: str) -> None:
    assert choose_exponent([torch.zeros(2, 3)], UNSIGNED_8_BIT, calibrator, 99.99) == EXPONENT_OF_ZERO
    for bad in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match="infinite or NaN"):
            choose_exponent([torch.ones(2), torch.tensor([1.0, bad])], SIGNED_8_BIT, calibrator, 99.99)
    parts = [torch.ones(7), torch.full((2, 3), 0.5)]
    whole = [torch.cat([part.flatten() for part in parts])]
    assert choose_exponent(parts, SIGNED_8_BIT, calibrator, 99.99) == choose_exponent(
        whole, SIGNED_8_BIT, calibrator, 99.99
    )


@pytest.mark.parametrize("limit", [100, 333, 600, 999])
def test_samples_are_at_most_as_many_as_said(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrators, "SAMPLES", limit)
    assert (
        calibrators._sample([torch.arange(400.0), torch.arange(600.0)]).numel() <= limit + 1
    )  # each tensor starts anew


@pytest.mark.parametrize("calibrator", ["max", "percentile", "mse"])
def test_the_order_in_memory_changes_nothing(calibrator: str) -> None:
    values = torch.randn(3, 8, 5, 7, generator=torch.Generator().manual_seed(0))
    last = values.contiguous(memory_format=torch.channels_last)
    assert choose_exponent([last], SIGNED_8_BIT, calibrator, 95.0) == choose_exponent(
        [values], SIGNED_8_BIT, calibrator, 95.0
    )


def test_samples_are_of_all_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    # A step of 8 through memory would meet the same channel of 8 each time.
    monkeypatch.setattr(calibrators, "SAMPLES", 8 * 16)
    values = torch.arange(8.0).view(1, 8, 1, 1).expand(4, 8, 4, 8).contiguous(memory_format=torch.channels_last)
    sample = calibrators._sample([values])
    assert sample.numel() == 8 * 16
    assert sample.unique().tolist() == list(range(8))
