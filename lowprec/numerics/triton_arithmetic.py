"""What the Triton kernels compute with: :mod:`lowprec.numerics.fixed_point` for values in a GPU's registers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_to_multiples(x: tl.tensor, unit: tl.tensor) -> tl.tensor:
    """round_half_even(x / unit) · unit, for a power of two; |x| is below 2^22 · unit, or NaN.

    1.5 · 2^23 · unit is added, whose last place is the unit, and taken off.
    """
    multiple = 12582912.0 * unit
    return (x + multiple) - multiple


@triton.jit
def round_half_even(x: tl.tensor) -> tl.tensor:
    """The nearest integer, below 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def clamp(x: tl.tensor, low: tl.tensor, high: tl.tensor) -> tl.tensor:
    """NaN, with which comparisons are false, stays what it is, so that a training that diverges is seen to."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def power_of_two(exponent: tl.tensor) -> tl.tensor:
    """Built from the bits of a float32."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def to_bfloat16(x: tl.tensor) -> tl.tensor:
    """Rounds a float32 as a sum in bfloat16 is, half to even, by its bits: Triton's interpreter would cut them off."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
