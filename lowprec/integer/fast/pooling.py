"""Pooling on bytes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from lowprec.integer.fast.storage import channels_last, zero_point
from lowprec.integer.operators import IntegerAveragePool, IntegerMaxPool
from lowprec.numerics.fixed_point import round_half_even_
from lowprec.numerics.pooling import window_sizes


class FastMaxPool:
    """Max pooling of bytes: the order of bytes is that of codes."""

    def __init__(self, operator: IntegerMaxPool) -> None:
        geometry = (operator.kernel_size, operator.stride, operator.padding, operator.dilation)
        self.geometry = tuple(list(sides) for sides in geometry)
        self.ceil_mode = operator.ceil_mode

    def __call__(self, x: Tensor) -> Tensor:
        # The plain operator counts positions in the tensor's own type and refuses images of more than 255 bytes.
        result: Tensor = torch.ops.quantized.max_pool2d.default(x, *self.geometry, self.ceil_mode)
        return channels_last(result)


class FastAveragePool:
    """Average pooling of bytes: exact window sums, one floating-point division, rounded half to even.

    A correctly rounded quotient n/d is a tie only if n/d is one: else it is at least 1/2d away, and |n/d| ≤ 255 errs by less
    than that in float32 while d < 2^14 (sums are below 2^24 then, too), in float64 always. Shifts multiply both alike.
    """

    def __init__(self, operator: IntegerAveragePool) -> None:
        self.operator = operator
        self.zero_in, self.zero_out = zero_point(operator.input), zero_point(operator.output)
        self.low, self.high = operator.output.low, operator.output.high
        self.left = operator.input.exponent - operator.output.exponent
        self.sizes: dict[torch.Size, Tensor] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H', W'], or [B, C] without the operator's keep_axes."""
        operator = self.operator
        if operator.kernel_size is None:
            positions = x.shape[2] * x.shape[3]
            totals = x.sum((2, 3), keepdim=operator.keep_axes, dtype=torch.int64)
            averages = totals.sub_(self.zero_in * positions).double() / (positions * 2.0**-self.left)
            return self._store(averages)
        sizes = self._sizes(x)
        values = x.to(sizes.dtype)
        if self.zero_in:
            values.sub_(self.zero_in)
        totals = functional.avg_pool2d(
            values,
            operator.kernel_size,
            operator.stride,
            operator.padding,
            operator.ceil_mode,
            True,
            divisor_override=1,
        )
        return self._store(totals.div_(sizes))

    def _sizes(self, x: Tensor) -> Tensor:
        """What each window's sum is divided by, [1, 1, H', W'], the shift between the exponents included."""
        operator = self.operator
        shape = x.shape[2:]
        if shape not in self.sizes:
            assert operator.kernel_size is not None
            assert operator.stride is not None
            counts = window_sizes(
                torch.ones(1, 1, *shape),
                operator.kernel_size,
                operator.stride,
                operator.padding,
                operator.ceil_mode,
                operator.count_include_pad,
            )
            divisors = counts.double() * 2.0**-self.left
            exact = int(counts.max()) < 1 << 14
            self.sizes = {shape: divisors.float() if exact else divisors}
        return self.sizes[shape]

    def _store(self, averages: Tensor) -> Tensor:
        round_half_even_(averages).clamp_(self.low, self.high)
        if self.zero_out:
            averages.add_(self.zero_out)
        return channels_last(averages.to(torch.uint8))
