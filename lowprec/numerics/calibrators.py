"""Calibrators: the exponent of an activation tensor from samples of its values."""

from __future__ import annotations

from math import ceil, inf

import torch
from torch import Tensor

from lowprec.numerics.fixed_point import CodeRange, exponent_for
from lowprec.numerics.memory import in_memory_order, is_channels_last
from lowprec.numerics.straight_through import straight_through_activation

# Exponents below the one that just fits are tried down to this many (2^6: an outlier 64 times the bulk).
CANDIDATES = 7
# Errors and percentiles are taken from at most this many evenly spaced values; maxima from all.
SAMPLES = 1 << 22
# Values of a block whose errors are summed: it stays in the processor's cache.
BLOCK = 1 << 18
# 2^-7: as if the largest value were near one. For a tensor that is zero on all calibration images.
EXPONENT_OF_ZERO = -7


def choose_exponent(tensors: list[Tensor], codes: CodeRange, calibrator: str, percentile: float) -> int:
    """The exponent of a tensor of which ``tensors`` are samples (any shapes, finite), whose codes lie in ``codes``.

    calibrator: `max` – the smallest exponent at which the largest magnitude is not clipped at ``codes.high``;
    `percentile` – at which at least that share (%) of magnitudes is not (as `max` where that share is all zeros);
    `mse` – the power of two that minimises the squared error, clipping included.

    Raises:
        ValueError: a value is infinite or NaN.
    """
    # No tensor of magnitudes: this finds both ends in one pass, and copies what does not lie in the usual order.
    extremes = [torch.stack(torch.aminmax(in_memory_order(tensor.detach()))).abs().amax().float() for tensor in tensors]
    largest = torch.stack(extremes).amax()
    if not torch.isfinite(largest):
        raise ValueError("values are infinite or NaN")
    if largest == 0:
        return EXPONENT_OF_ZERO
    fitting = int(exponent_for(largest, codes.high))
    if calibrator == "max":
        return fitting
    values = _sample(tensors)
    if calibrator == "percentile":
        # At least that share; the tolerance takes back what the product's own rounding adds.
        rank = min(max(1, ceil(values.numel() * percentile / 100 - 1e-6)), values.numel())
        kept = values.abs().kthvalue(rank).values
        return int(exponent_for(kept, codes.high)) if kept > 0 else fitting
    best, chosen = inf, fitting
    for candidate in range(fitting, fitting - CANDIDATES, -1):
        error = _squared_error(values, torch.tensor(candidate, dtype=torch.int32, device=values.device), codes)
        if error < best:
            best, chosen = error, candidate
        # Rounding is half a step off at most; the rest is clipping, which only grows with smaller exponents.
        if error - values.numel() * (2.0**candidate / 2) ** 2 > best:
            break
    return chosen


def _squared_error(values: Tensor, exponent: Tensor, codes: CodeRange) -> float:
    errors = [
        straight_through_activation(block, exponent, codes).sub_(block).square_().sum(dtype=torch.float64)
        for block in values.split(BLOCK)
    ]
    return float(torch.stack(errors).sum())


def _sample(tensors: list[Tensor]) -> Tensor:
    step = max(1, ceil(sum(tensor.numel() for tensor in tensors) / SAMPLES))
    return torch.cat([_every(step, tensor.detach()).float() for tensor in tensors])


def _every(step: int, tensor: Tensor) -> Tensor:
    if not is_channels_last(tensor):
        return tensor.reshape(-1)[::step]
    # All channels of some positions: every step-th number would always be of the same channels.
    return tensor.permute(0, 2, 3, 1).flatten(0, 2)[::step].flatten()
