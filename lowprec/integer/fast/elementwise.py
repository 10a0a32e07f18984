"""Input, residual add, ReLU, products, concatenation, tables and movements on bytes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowprec.integer.fast.storage import channels_last, load, store, zero_point
from lowprec.integer.operators import (
    Grid,
    IntegerAdd,
    IntegerConcatenation,
    IntegerInput,
    IntegerLookup,
    IntegerMovement,
    IntegerMultiply,
    IntegerReLU,
)
from lowprec.numerics import kernels
from lowprec.numerics.fixed_point import round_half_even_


class FastInput:
    """Float images -> bytes, channels_last: scaled by a power of two, rounded half to even, clamped."""

    def __init__(self, operator: IntegerInput) -> None:
        self.low, self.high = operator.output.low, operator.output.high
        self.zero = zero_point(operator.output)
        self.scale = 2.0**-operator.output.exponent

    def __call__(self, images: Tensor) -> Tensor:
        values = round_half_even_(images.float().mul(self.scale)).clamp_(self.low, self.high)
        if self.zero:
            values.add_(self.zero)
        # Bytes first: reordering them moves a quarter of the memory.
        return channels_last(values.to(torch.uint8))


class FastAdd:
    """Residual add as a 1×1 depthwise convolution of ones onto the other operand: oneDNN's sum, vectorized on every CPU.

    t = left · 2^i + right · 2^j in float32, rounded once. Exact: IntegerAdd allows exponents of which t, zero point
    included, takes at most 24 bits. ``reuse``: which operand (0 or 1) may be overwritten; None copies one.
    """

    CHANNELS = 64

    def __init__(self, operator: IntegerAdd, reuse: int | None) -> None:
        self.operator = operator
        self.reuse = reuse
        target = 0 if reuse == 0 else 1
        self.target = target
        grids = (operator.left, operator.right)
        output = operator.output
        self.source_zero, self.target_zero = zero_point(grids[1 - target]), zero_point(grids[target])
        self.zero = zero_point(output)
        high = output.high if operator.six is None else min(operator.six, output.high)
        self.low, self.high = output.low + self.zero, high + self.zero
        self.target_scale = 2.0 ** (grids[target].exponent - output.exponent)
        self.scale = torch.full((self.CHANNELS,), 2.0 ** (grids[1 - target].exponent - output.exponent))
        self.weight_zeros = torch.zeros(self.CHANNELS, dtype=torch.int32)
        self.exact = kernels.convolves_exactly("depthwise", kernels.SAFE_MAGNITUDE)
        if self.exact:
            ones = torch.ones(self.CHANNELS, 1, 1, 1, dtype=torch.int8)
            shape = [1, self.CHANNELS, 64, 64]
            self.weight = torch.ops.onednn.qconv_prepack.default(
                ones, self.scale, 1.0, self.source_zero, [1, 1], [0, 0], [1, 1], self.CHANNELS, shape
            )

    def __call__(self, left: Tensor, right: Tensor) -> Tensor:
        if not self.exact or left.numel() % self.CHANNELS or left.shape != right.shape:
            operator = self.operator
            codes = operator(load(left, operator.left), load(right, operator.right))
            return store(codes, operator.output)
        source, target = (right, left) if self.target == 0 else (left, right)
        source, target = channels_last(source), channels_last(target)
        if self.reuse is None or source is target:
            target = target.clone()
        total: Tensor = torch.ops.onednn.qconv2d_pointwise.binary(
            self._view(source),
            1.0,
            self.source_zero,
            self.weight,
            self.scale,
            self.weight_zeros,
            self._view(target),
            None,
            [1, 1],
            [0, 0],
            [1, 1],
            self.CHANNELS,
            1.0,
            self.zero,
            torch.uint8,
            self.target_scale,
            self.target_zero,
            "sum",
            1.0,
            None,
            [],
            None,
        )
        if (self.low, self.high) != (0, 255):
            total.clamp_(self.low, self.high)
        return total.as_strided(target.shape, target.stride())

    def _view(self, tensor: Tensor) -> Tensor:
        """The same bytes in memory order as an image [1, 64, H, W] channels_last."""
        positions = tensor.numel() // self.CHANNELS
        height = math.gcd(positions, 64)
        flat = tensor.permute(0, 2, 3, 1) if tensor.dim() == 4 else tensor
        return flat.view(1, height, positions // height, self.CHANNELS).permute(0, 3, 1, 2)


class FastReLU:
    """A ReLU of its own: bytes below that of code 0 become it."""

    def __init__(self, operator: IntegerReLU) -> None:
        zero, high = zero_point(operator.output), operator.output.high
        self.low, self.high = zero, zero + (high if operator.six is None else min(operator.six, high))

    def __call__(self, x: Tensor) -> Tensor:
        return x.clamp(self.low, self.high)


class FastMultiply:
    """Products of two tensors that broadcast: 16 bits, so that float32 scales and rounds them exactly."""

    def __init__(self, operator: IntegerMultiply) -> None:
        self.zeros = (zero_point(operator.left), zero_point(operator.right))
        output = operator.output
        self.low, self.high, self.zero = output.low, output.high, zero_point(output)
        self.scale = 2.0 ** (operator.left.exponent + operator.right.exponent - output.exponent)

    def __call__(self, left: Tensor, right: Tensor) -> Tensor:
        first, second = (side.float().sub_(zero) for side, zero in zip((left, right), self.zeros, strict=True))
        # The smaller operand takes the scale: a gate of one code a channel, most often.
        product = first * second.mul_(self.scale)
        return channels_last(round_half_even_(product).clamp_(self.low, self.high).add_(self.zero).to(torch.uint8))


class FastConcatenation:
    """Concatenation of bytes; operands on another grid than the result's go through a table of 256 bytes."""

    def __init__(self, operator: IntegerConcatenation) -> None:
        self.axis = operator.axis
        self.tables = [_table(operator, grid) for grid in operator.grids]

    def __call__(self, *tensors: Tensor) -> Tensor:
        moved = [x if table is None else look_up(x, table) for x, table in zip(tensors, self.tables, strict=True)]
        return channels_last(torch.cat(moved, self.axis))


class FastLookup:
    """A function of one code as a table of 256 bytes, the same for all channels."""

    def __init__(self, operator: IntegerLookup) -> None:
        codes = torch.arange(256) - zero_point(operator.input)
        entries = operator(codes.clamp(operator.input.low, operator.input.high))
        self.table = store(entries, operator.output)

    def __call__(self, x: Tensor) -> Tensor:
        return look_up(x, self.table)


class FastMovement:
    """Bytes elsewhere, by the reference operator itself: it moves elements of any type."""

    def __init__(self, operator: IntegerMovement) -> None:
        self.operator = operator

    def __call__(self, x: Tensor) -> Tensor:
        return channels_last(self.operator(x))


def look_up(x: Tensor, table: Tensor) -> Tensor:
    """table[x] for bytes of any shape, channels_last where x is."""
    flat = x.permute(0, 2, 3, 1) if x.dim() == 4 else x
    found = table.index_select(0, flat.reshape(-1).to(torch.int32)).view(flat.shape)
    return found.permute(0, 3, 1, 2) if x.dim() == 4 else found


def _table(operator: IntegerConcatenation, grid: Grid) -> Tensor | None:
    """Bytes on ``grid`` -> bytes on the result's, [256]; None where they are the same bytes."""
    output = operator.output
    if (grid.exponent, zero_point(grid)) == (output.exponent, zero_point(output)) and (
        output.low <= grid.low and grid.high <= output.high
    ):
        return None
    codes = torch.arange(256) - zero_point(grid)
    return store(IntegerConcatenation([grid], output, 0)(codes), output)
