"""Operators of attention: products of two tensors of codes, and the two functions that stay in float."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lowprec.integer.operators.base import Grid, IntegerOperator
from lowprec.numerics.fixed_point import dequantize, quantize, shift_round_half_even


class IntegerMatmul(IntegerOperator):
    """Matrix product of two tensors of codes: 32-bit sums, shifted to the output's exponent.

    Sums of K products of 8-bit codes stay below 2^31 for K up to 2^15.
    """

    KIND = "matmul"
    output: Grid

    def __init__(self, left: Grid, right: Grid, output: Grid) -> None:
        super().__init__(output)
        self.left = left
        self.right = right

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """int32 codes [..., M, K] and [..., K, N] -> [..., M, N]."""
        # Integers up to 2^53 are exact in float64, whose products are many times faster than those of integers.
        sums = (left.double() @ right.double()).to(torch.int64)
        shift = self.output.exponent - self.left.exponent - self.right.exponent
        return shift_round_half_even(sums, shift).clamp(self.output.low, self.output.high).to(torch.int32)

    def attributes(self) -> dict[str, Any]:
        return {**super().attributes(), "left": asdict(self.left), "right": asdict(self.right)}


class FloatOperator(IntegerOperator):
    """A function in float32 between codes: not equal everywhere, because runtimes round floats in their own ways."""

    output: Grid

    def __init__(self, input: Grid, output: Grid) -> None:
        super().__init__(output)
        self.input = input

    def compute(self, values: Tensor) -> Tensor:
        """The function itself, float32 of any shape that it takes."""
        raise NotImplementedError

    def forward(self, codes: Tensor) -> Tensor:
        """int32 codes -> int32 codes."""
        device = codes.device
        values = dequantize(codes, torch.tensor(self.input.exponent, dtype=torch.int32, device=device))
        exponent = torch.tensor(self.output.exponent, dtype=torch.int32, device=device)
        return quantize(self.compute(values), exponent, self.output.codes).to(torch.int32)

    def attributes(self) -> dict[str, Any]:
        return {**super().attributes(), "input": asdict(self.input)}


class FloatSoftmax(FloatOperator):
    """Softmax along ``axis``."""

    KIND = "softmax"

    def __init__(self, input: Grid, output: Grid, axis: int) -> None:
        super().__init__(input, output)
        self.axis = axis

    def compute(self, values: Tensor) -> Tensor:
        return values.softmax(self.axis)

    def attributes(self) -> dict[str, Any]:
        return {**super().attributes(), "axis": self.axis}


class FloatLayerNorm(FloatOperator):
    """Layer norm over ``axis`` (the last one, or 1 of [B, C, H, W]) with weight and bias, float32 of that axis' size."""

    KIND = "layer_norm"
    weight: Tensor
    bias: Tensor

    def __init__(self, input: Grid, output: Grid, weight: Tensor, bias: Tensor, epsilon: float, axis: int) -> None:
        super().__init__(input, output)
        self.epsilon = epsilon
        self.axis = axis
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def compute(self, values: Tensor) -> Tensor:
        last = values.movedim(self.axis, -1)
        return functional.layer_norm(last, last.shape[-1:], self.weight, self.bias, self.epsilon).movedim(-1, self.axis)

    def attributes(self) -> dict[str, Any]:
        return {**super().attributes(), "epsilon": self.epsilon, "axis": self.axis}

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight, "bias": self.bias}
