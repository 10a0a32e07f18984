"""Average and max pooling of codes, and upsampling between pixels."""

from __future__ import annotations

from dataclasses import asdict
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lowprec.integer.operators.base import Grid, IntegerOperator
from lowprec.numerics.fixed_point import divide_round_half_even, shift_round_half_even
from lowprec.numerics.pooling import window_sizes


class IntegerAveragePool(IntegerOperator):
    """Average pooling: integer window sums, one division by the window's size, rounded half to even.

    kernel_size None pools over whole ``axes``; the other arguments are those of ``nn.AvgPool2d``.
    """

    KIND = "average_pool"
    output: Grid

    def __init__(
        self,
        input: Grid,
        output: Grid,
        kernel_size: tuple[int, int] | None,
        stride: tuple[int, int] | None,
        padding: tuple[int, int],
        ceil_mode: bool,
        count_include_pad: bool,
        keep_axes: bool,
        axes: tuple[int, ...] = (2, 3),
    ) -> None:
        super().__init__(output)
        distance = abs(input.exponent - output.exponent)
        # Shifted by more, the averages of 8-bit codes would all be zero or out of range; sums stay far below 2^63.
        if distance > 31:
            raise ValueError(f"the exponents lie {distance} apart; averages can be shifted by at most 31 places")
        self.input = input
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding
        self.ceil_mode = ceil_mode
        self.count_include_pad = count_include_pad
        self.keep_axes = keep_axes
        self.axes = axes

    def forward(self, codes: Tensor) -> Tensor:
        """[B, C, H, W] int32 codes -> int32 codes [B, C, H', W']; without keep_axes the pooled axes are gone."""
        if self.kernel_size is None:
            totals = codes.sum(self.axes, keepdim=self.keep_axes, dtype=torch.int64)
            sizes = torch.tensor(prod(codes.shape[axis] for axis in self.axes), device=codes.device)
        else:
            totals, sizes = self._windows(codes)
        left = self.input.exponent - self.output.exponent
        averages = divide_round_half_even(totals << max(left, 0), sizes << max(-left, 0))
        return averages.clamp(self.output.low, self.output.high).to(torch.int32)

    def _windows(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        assert self.kernel_size is not None
        assert self.stride is not None
        # Sizes are small whole numbers, exact in float; their shape tells how many windows there are.
        ones = torch.ones(1, 1, *codes.shape[2:], device=codes.device)
        sizes = window_sizes(
            ones, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad
        ).to(torch.int64)
        height, width = (
            max(0, (windows - 1) * stride + kernel - side - padding)
            for windows, stride, kernel, side, padding in zip(
                sizes.shape[2:], self.stride, self.kernel_size, codes.shape[2:], self.padding, strict=True
            )
        )
        padded = functional.pad(codes, (self.padding[1], width, self.padding[0], height))
        windows = padded.unfold(2, self.kernel_size[0], self.stride[0]).unfold(3, self.kernel_size[1], self.stride[1])
        return windows[:, :, : sizes.shape[2], : sizes.shape[3]].sum((-2, -1), dtype=torch.int64), sizes

    def attributes(self) -> dict[str, Any]:
        names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "keep_axes", "axes")
        return {**super().attributes(), "input": asdict(self.input), **{name: getattr(self, name) for name in names}}


class IntegerMaxPool(IntegerOperator):
    """Max pooling of codes; the arguments are those of ``nn.MaxPool2d``, as (height, width)."""

    KIND = "max_pool"
    output: Grid

    def __init__(
        self,
        output: Grid,
        kernel_size: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        ceil_mode: bool,
    ) -> None:
        super().__init__(output)
        self.kernel_size = tuple(kernel_size)
        self.stride = tuple(stride)
        self.padding = tuple(padding)
        self.dilation = tuple(dilation)
        self.ceil_mode = ceil_mode

    def forward(self, codes: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H', W'], int32."""
        return functional.max_pool2d(codes, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)

    def attributes(self) -> dict[str, Any]:
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
        return {**super().attributes(), **{name: getattr(self, name) for name in names}}


class IntegerBilinear(IntegerOperator):
    """Bilinear upsampling by ``factors`` (height, width), powers of two, shifted to the output's exponent."""

    KIND = "bilinear"
    output: Grid

    def __init__(self, input: Grid, output: Grid, factors: tuple[int, int]) -> None:
        super().__init__(output)
        self.input = input
        self.factors = factors

    def forward(self, codes: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H · height, W · width], int32."""
        # Each weight is a multiple of 1 / (2 · height) · 1 / (2 · width): scaled up, the results are whole numbers.
        unit = 4 * self.factors[0] * self.factors[1]
        factors = [float(factor) for factor in self.factors]
        scaled = functional.interpolate(
            codes.double() * unit, scale_factor=factors, mode="bilinear", align_corners=False
        )
        shift = self.output.exponent - self.input.exponent + unit.bit_length() - 1
        rounded = shift_round_half_even(scaled.to(torch.int64), shift)
        return rounded.clamp(self.output.low, self.output.high).to(torch.int32)

    def attributes(self) -> dict[str, Any]:
        return {**super().attributes(), "input": asdict(self.input), "factors": self.factors}
