"""From cluster scales to what is stored and multiplied: mantissas, exponents per output channel, effective codes.

A weight is worth c · 2^e: the effective code c is an integer, made of the weight's own code and the mantissa a of its
cluster; e is the exponent of its output channel. |c| ≤ 64 for ternary and 4-bit weights, so that two u8×s8 products fit
the saturating 16-bit sums of processors without VNNI.

Two ternary planes (:mod:`lowprec.numerics.residual_planes`) have two scales and two mantissas a cluster, in a first axis of
their own: [2, O, G, 1, 1 or P], with |a1| + |a2| ≤ 64. Both digits of a weight are one code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowprec.numerics.fixed_point import exponent_for, round_half_even, round_half_even_, scale_by_power_of_two

# Largest |a|: a ternary weight's effective code is a·t; a 4-bit one's is a·q / 2^4, at most 127·7 / 16 = 55.6.
MANTISSA_LIMIT = {2: 64, 4: 127}
FOUR_BIT_SHIFT = 4
# What one unit of code and mantissa is worth in the effective code, as a power of two.
CODE_SHIFT = {2: 0, 4: FOUR_BIT_SHIFT}
# The code of a weight of two planes is 3·t1 + t2, -4 ... 4: its digits to the base of three.
PLANE_BASE = 3
# Axes of the mantissas of two planes; one fewer means one plane.
PLANE_AXES = 5


def plane_count(scale: Tensor | None) -> int:
    """Ternary planes of scales or mantissas, by their axes: 2 for [2, O, G, 1, 1 or P], else 1."""
    return 2 if scale is not None and scale.dim() == PLANE_AXES else 1


def planes_of(codes: Tensor) -> tuple[Tensor, Tensor]:
    """The digits t1 and t2, -1 ... 1, of codes -4 ... 4; same shape and dtype."""
    # 2 is 3 - 1: from there on the first digit is 1.
    first = (codes >= PLANE_BASE - 1).to(codes.dtype) - (codes <= 1 - PLANE_BASE).to(codes.dtype)
    return first, codes - PLANE_BASE * first


def channel_exponents(scale: Tensor, bits: int, floor: Tensor | None = None) -> Tensor:
    """Exponents [O] (int32) at which the mantissas of ``scale`` [O, G, 1, 1 or P] just fit, at least ``floor`` [O].

    Scales may be negative (a batch norm's gain); bits is 2 or 4. Of two planes it is the sums of both scales that fit.
    """
    reach = scale.abs().sum(0) if plane_count(scale) == 2 else scale.abs()
    largest = reach.amax((1, 2, 3)) * (1 << CODE_SHIFT[bits])
    exponent = exponent_for(largest, MANTISSA_LIMIT[bits])
    return exponent if floor is None else torch.maximum(exponent, floor)


def mantissas(scale: Tensor, exponent: Tensor, bits: int) -> Tensor:
    """a = round_half_even(s · 2^shift / 2^e), signed 8-bit integers held in floating point, of the shape of ``scale``.

    scale: [O, G, 1, 1 or P]; exponent: [O], from :func:`channel_exponents`; shift: 0 for ternary, 4 for 4-bit weights. Of two
    planes, where both were rounded up and their sum left 64, the second mantissa is what the first leaves of it.
    """
    places = CODE_SHIFT[bits] - exponent.view(-1, 1, 1, 1)
    mantissa = round_half_even(scale_by_power_of_two(scale, places))
    if plane_count(scale) == 1:
        return mantissa
    left = MANTISSA_LIMIT[bits] - mantissa[0].abs()
    return torch.stack([mantissa[0], mantissa[1].clamp(-left, left)])


def effective_codes(codes: Tensor, mantissa: Tensor, bits: int) -> Tensor:
    """c = a·t (ternary), a1·t1 + a2·t2 (two planes) or round_half_even(a·q / 2^4) (4-bit), in the mantissas' dtype (floating).

    codes: w_OGNP of -1 … 1, -4 … 4 or -7 … 7; mantissa: [O, G, 1, 1 or P], of two planes [2, O, G, 1, 1 or P].
    """
    if plane_count(mantissa) == 2:
        first, second = planes_of(codes)
        return first * mantissa[0] + second * mantissa[1]
    if bits == 2:
        return codes * mantissa
    return round_half_even_(codes * (mantissa * 2.0**-FOUR_BIT_SHIFT))
