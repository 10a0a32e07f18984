"""From cluster scales to what is stored and multiplied: mantissas, exponents per output channel, effective codes.

A weight is worth c · 2^e: the effective code c is an integer, made of the weight's own code and the mantissa a of its
cluster; e is the exponent of its output channel. |c| ≤ 64 for ternary and 4-bit weights, so that two u8×s8 products fit
the saturating 16-bit sums of processors without VNNI.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowprec.numerics.fixed_point import exponent_for, round_half_even, scale_by_power_of_two

# Largest |a|: a ternary weight's effective code is a·t; a 4-bit one's is a·q / 2^4, at most 127·7 / 16 = 55.6.
MANTISSA_LIMIT = {2: 64, 4: 127}
FOUR_BIT_SHIFT = 4
# What one unit of code and mantissa is worth in the effective code, as a power of two.
CODE_SHIFT = {2: 0, 4: FOUR_BIT_SHIFT}


def channel_exponents(scale: Tensor, bits: int, floor: Tensor | None = None) -> Tensor:
    """Exponents [O] (int32) at which the mantissas of ``scale`` [O, G, 1, 1 or P] just fit, at least ``floor`` [O].

    Scales may be negative (a batch norm's gain); bits is 2 or 4.
    """
    largest = scale.abs().amax((1, 2, 3)) * (1 << CODE_SHIFT[bits])
    exponent = exponent_for(largest, MANTISSA_LIMIT[bits])
    return exponent if floor is None else torch.maximum(exponent, floor)


def mantissas(scale: Tensor, exponent: Tensor, bits: int) -> Tensor:
    """a = round_half_even(s · 2^shift / 2^e), signed 8-bit integers held in floating point, of the shape of ``scale``.

    scale: [O, G, 1, 1 or P]; exponent: [O], from :func:`channel_exponents`; shift: 0 for ternary, 4 for 4-bit weights.
    """
    places = CODE_SHIFT[bits] - exponent.view(-1, 1, 1, 1)
    return round_half_even(scale_by_power_of_two(scale, places))


def effective_codes(codes: Tensor, mantissa: Tensor, bits: int) -> Tensor:
    """c = a·t (ternary) or round_half_even(a·q / 2^4) (4-bit), in the floating-point dtype of the mantissas.

    codes: w_OGNP of -1 … 1 or -7 … 7; mantissa: [O, G, 1, 1 or P].
    """
    product = codes * mantissa
    return product if bits == 2 else round_half_even(product * 2.0**-FOUR_BIT_SHIFT)
