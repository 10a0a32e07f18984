"""Dynamic fixed point (DFP): value = code · 2^exponent, with integer codes and a shared integer exponent.

The only place where rounding happens, half to even everywhere: :func:`round_half_even` on floats, and
:func:`shift_round_half_even` and :func:`divide_round_half_even`, its equals on integers. Format: arXiv 1701.08978.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Sums of an activation's and a weight's exponent stay within float32's normal range (-126 ... 127).
MINIMUM_EXPONENT = -60
MAXIMUM_EXPONENT = 60


@dataclass(frozen=True)
class CodeRange:
    """The integers that codes may take, both ends included."""

    low: int
    high: int


UNSIGNED_8_BIT = CodeRange(0, 255)
SIGNED_8_BIT = CodeRange(-128, 127)
# What networks compute in that holds every 8-bit code · 2^e.
EXACT_DTYPES = (torch.float32, torch.bfloat16)


def round_half_even(values: Tensor) -> Tensor:
    """The nearest integers of floating-point values, of two equally near ones the even one; same shape and dtype."""
    return torch.round(values)


def round_half_even_(values: Tensor) -> Tensor:
    """As :func:`round_half_even`, in place."""
    return values.round_()


def round_to_multiples(values: Tensor, scale: Tensor | float, out: Tensor) -> Tensor:
    """round_half_even(values / scale) · scale, written to ``out``, of the same shape and dtype, which may be ``values``.

    scale: a power of two, a number or a tensor of one. float32 and float64 values are below 2^22 · scale in magnitude, or
    NaN: adding 1.5 / epsilon · scale (1.5 · 2^23 · scale in float32), an even multiple whose last place is ``scale``, rounds
    them, in two passes instead of three.
    """
    if values.dtype in (torch.float32, torch.float64):
        multiple = 1.5 / torch.finfo(values.dtype).eps * scale
        return torch.add(values, multiple, out=out).sub_(multiple)
    return round_half_even_(torch.mul(values, 1 / scale, out=out)).mul_(scale)


def power_of_two(exponent: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """2^exponent, exactly, in float32 or float64; shape of ``exponent`` (an integer tensor).

    Built from the bits of the floating-point format: vectorized ``exp2`` and ``pow`` may be off by one unit in the last
    place. Exponents must lie in the normal range (float32: -126 ... 127).
    """
    if dtype == torch.float64:
        return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)


def scale_of(exponent: Tensor, inverse: bool = False) -> float:
    """2^exponent, or 2^-exponent, as a number; exponent: one element, on a CPU, where several operators would take longer."""
    number = int(exponent)
    return math.ldexp(1.0, -number if inverse else number)


def scale_by_power_of_two(values: Tensor, exponent: Tensor) -> Tensor:
    """values · 2^exponent, exact unless it leaves the normal range; broadcast; float32 for float32 and smaller inputs."""
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    return values.to(dtype) * power_of_two(exponent, dtype)


def exponent_for(largest: Tensor, limit: int) -> Tensor:
    """The smallest exponent e (int32) with round_half_even(largest / 2^e) ≤ limit, elementwise.

    largest: non-negative magnitudes, any shape. Zero gets MINIMUM_EXPONENT; results are kept within
    MINIMUM_EXPONENT ... MAXIMUM_EXPONENT.
    """
    wide = largest.to(torch.float64)
    # largest < limit · 2^e holds for frexp's e, here from the bits of a float64 (TorchInductor writes code for frexp that
    # does not compile); one less may still round into the limit.
    exponent = ((wide / limit).view(torch.int64) >> 52) - 1022
    exponent = exponent.clamp(MINIMUM_EXPONENT, MAXIMUM_EXPONENT)
    smaller = (exponent - 1).clamp(min=MINIMUM_EXPONENT)
    fits = round_half_even(scale_by_power_of_two(wide, -smaller)) <= limit
    exponent = torch.where(fits, smaller, exponent)
    return torch.where(wide > 0, exponent, MINIMUM_EXPONENT).to(torch.int32)


def quantize(values: Tensor, exponent: Tensor, codes: CodeRange) -> Tensor:
    """clamp(round_half_even(values / 2^exponent), low, high), as floating-point integers of the shape of ``values``."""
    return round_half_even_(scale_by_power_of_two(values, -exponent)).clamp_(codes.low, codes.high)


def quantize_(values: Tensor, exponent: Tensor, codes: CodeRange) -> Tensor:
    """As :func:`quantize`, in place: ``values`` is float32 or float64, and the exponents need no more room than it has."""
    return round_half_even_(values.mul_(power_of_two(-exponent, values.dtype))).clamp_(codes.low, codes.high)


def quantize_to_grid(values: Tensor, exponent: Tensor) -> Tensor:
    """round_half_even(values / 2^exponent) · 2^exponent, without a range; shape and dtype of ``values``."""
    codes = round_half_even(scale_by_power_of_two(values, -exponent))
    return scale_by_power_of_two(codes, exponent).to(values.dtype)


def dequantize(codes: Tensor, exponent: Tensor) -> Tensor:
    """codes · 2^exponent in float32 (float64 for float64 codes); integer codes are converted first."""
    if exponent.dim() == 0 and not codes.is_floating_point():
        return codes.float().mul_(power_of_two(exponent))  # the converted codes are nobody else's
    return scale_by_power_of_two(codes, exponent)


def shift_round_half_even(codes: Tensor, shift: Tensor | int) -> Tensor:
    """round_half_even(codes / 2^shift) in integer arithmetic; a negative shift multiplies.

    codes: integer tensor; shift: integers, broadcast. The result is int64 so that left shifts of up to 31 cannot overflow
    for int32 codes.
    """
    wide = codes.to(torch.int64)
    shift = torch.as_tensor(shift, dtype=torch.int64, device=codes.device)
    # Beyond 40 places a 32-bit code rounds to zero whatever it is; 62 keeps the shift itself defined.
    right = shift.clamp(0, 40)
    floor = wide >> right
    rest = wide - (floor << right)
    half = torch.where(right > 0, torch.ones_like(right) << (right - 1).clamp(min=0), torch.ones_like(right))
    up = (rest > half) | ((rest == half) & (floor & 1 == 1))
    rounded = floor + (up & (right > 0)).to(torch.int64)
    return rounded << (-shift).clamp(0, 31)


def divide_round_half_even(numerator: Tensor, denominator: Tensor | int) -> Tensor:
    """round_half_even(numerator / denominator) in integer arithmetic (int64); the denominator is positive, broadcast."""
    wide = numerator.to(torch.int64)
    denominator = torch.as_tensor(denominator, dtype=torch.int64, device=numerator.device)
    floor = torch.div(wide, denominator, rounding_mode="floor")
    twice_rest = 2 * (wide - floor * denominator)
    up = (twice_rest > denominator) | ((twice_rest == denominator) & (floor & 1 == 1))
    return floor + up.to(torch.int64)
