"""Which float32 arithmetic gives a layer's codes exactly: the numbers that its kernel gets, and the proof's conditions.

The kernels sum code products in int32, then compute in float32: t = acc · 2^-s, + bias · 2^-s, clamped, + zero point,
rounded half to even, saturated to a byte. Each operation is monotone in acc, so it is enough that it is exact for
every sum that does not saturate (and the two next to them): then larger and smaller sums saturate as they should.
Powers of two scale exactly; sums of 24 bits convert exactly; t + 128 is exact while t < 2^8 has at most 16 fractional
bits (and 128 is even: ties stay ties of the same parity).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor

from lowprec.integer.fast.storage import SIGNED_ZERO, zero_point
from lowprec.integer.operators import Grid, IntegerLayer
from lowprec.numerics.fixed_point import power_of_two, shift_round_half_even

# float32 holds every integer up to here.
FLOAT32_EXACT = 1 << 24
INT32_LIMIT = 1 << 31


class Method(Enum):
    """How a layer's sums become codes."""

    FUSED = "the kernel rounds, in float32"
    FLOAT_SUMS = "the kernel gives float32 sums, all exact; rounding comes after"
    DOUBLE = "float64 sums"


@dataclass(frozen=True)
class LayerArithmetic:
    """A layer's numbers as kernels take them.

    weight: int64 of the layer's shape; bias: int64 [O] in units of the sums; shift: int64 [O], codes = sums / 2^shift;
    low, high: where codes are clamped; zero_in, zero_out: the bytes of code 0. ``sums_only``: the network's output, unshifted.
    ``shortcut``: output exponent less that of a second input's codes, which are added before the rounding.
    """

    weight: Tensor
    bias: Tensor
    shift: Tensor
    low: int
    high: int
    input: Grid
    zero_in: int
    zero_out: int
    sums_only: bool
    shortcut: int | None

    @property
    def magnitude(self) -> int:
        """The largest magnitude of a weight."""
        return int(self.weight.abs().max())

    @property
    def bounds(self) -> Tensor:
        """The largest magnitudes [O] (int64) of sum and bias together, of each on the way to it, too."""
        largest = self.input.largest if self.zero_in or not self.input.signed else 255
        return self._absolute * largest + self.bias.abs()

    @property
    def _absolute(self) -> Tensor:
        return self.weight.flatten(1).abs().sum(1)

    @property
    def scale(self) -> Tensor:
        """2^-shift, float32 [O]."""
        return power_of_two(-self.shift, torch.float64).float()

    @property
    def scaled_bias(self) -> Tensor:
        """bias · 2^-shift, float32 [O]; exact where the conditions below hold."""
        return self.bias.float() * self.scale

    @property
    def clamps(self) -> bool:
        """Whether the codes' range is narrower than a byte's."""
        return (self.low, self.high) != (-self.zero_out, 255 - self.zero_out)

    @property
    def byte_range(self) -> tuple[int, int]:
        """The same range in bytes."""
        return self.low + self.zero_out, self.high + self.zero_out

    @property
    def method(self) -> Method:
        """The cheapest exact way."""
        # Kernels sum bytes before they take the zero point's share off again.
        if int((self._absolute * 255).max()) >= INT32_LIMIT:
            return Method.DOUBLE
        small = self.bounds < FLOAT32_EXACT
        if self.sums_only:
            return Method.FLOAT_SUMS if bool(small.all()) else Method.DOUBLE
        with_zero_point = (self.shift <= 16) if self.zero_out else torch.ones_like(small)
        # |sum + bias| · 2^-s ≤ 2^8 holds for all that does not saturate, |sum + bias + shortcut| · 2^-s with one.
        reach = 256.0 if self.shortcut is None else 256 + 256 * 2.0**-self.shortcut
        in_range = reach * power_of_two(self.shift, torch.float64)
        rounded = (self.shift <= 15) & (in_range + self.bias.abs() <= FLOAT32_EXACT)
        if self.shortcut is not None:
            # Their sum has as many fractional bits as the finer of the two.
            fine = bool((self.shift <= 15).all()) and self.shortcut <= 15
            return Method.FUSED if fine and bool((small | rounded).all()) else Method.DOUBLE
        if bool(((small & with_zero_point) | rounded).all()):
            return Method.FUSED
        return Method.FLOAT_SUMS if bool(small.all()) else Method.DOUBLE

    def without_zero_point(self) -> LayerArithmetic:
        """The same sums from bytes, the zero point's share in the bias: right only where nothing is padded."""
        share = self.zero_in * self.weight.flatten(1).sum(1)
        return replace(self, bias=self.bias - share, zero_in=0)


def arithmetic_of(layer: IntegerLayer, padded: bool) -> LayerArithmetic:
    """The numbers of a layer for kernels; ``padded``: code 0 surrounds the image."""
    weight = layer.effective.to(torch.int64)
    bias = layer.bias.to(torch.int64)
    zero_in = zero_point(layer.input)
    if layer.output is None:
        # Sums themselves, which only a float32 or float64 result can hold.
        low, high, zero_out, shift = -INT32_LIMIT, INT32_LIMIT - 1, 0, torch.zeros_like(bias)
    else:
        low, high = layer.output.low, layer.output.high
        if layer.six is not None:
            high = min(layer.six, high)
        zero_out, shift = zero_point(layer.output), (layer.output.exponent - layer.sum_exponents).to(torch.int64)
        if layer.shortcut is None:
            weight, bias, shift = _without_constant_channels(weight, bias, shift, layer.input.largest, low, high)
    distance = (
        None if layer.shortcut is None or layer.output is None else layer.output.exponent - layer.shortcut.exponent
    )
    arithmetic = LayerArithmetic(
        weight,
        bias,
        shift,
        low,
        high,
        layer.input,
        zero_in,
        zero_out,
        sums_only=layer.output is None,
        shortcut=distance,
    )
    if zero_in == SIGNED_ZERO and not padded:
        folded = arithmetic.without_zero_point()
        if folded.method == arithmetic.method:
            return folded
    return arithmetic


def _without_constant_channels(
    weight: Tensor, bias: Tensor, shift: Tensor, largest: int, low: int, high: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Channels that always give one code become that code as a bias, so that odd exponents of dead channels do no harm."""
    absolute = weight.flatten(1).abs().sum(1)
    always_zero = (absolute * largest + bias.abs()) * power_of_two(-shift, torch.float64) < 0.5
    constant = always_zero | (absolute == 0)
    code = shift_round_half_even(bias, shift).clamp(low, high)
    weight = torch.where(constant.view(-1, *[1] * (weight.dim() - 1)), 0, weight)
    # A sum that is not 0 saturates at 2^-9 already: larger scales would only leave float32's range.
    return weight, torch.where(constant, code, bias), torch.where(constant, 0, shift).clamp(min=-9)
