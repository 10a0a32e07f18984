"""Operators on one code at a time: the input's quantizer, residual add, ReLU."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from lowprec.integer.operators.base import Grid, IntegerOperator
from lowprec.numerics.fixed_point import CodeRange, quantize, shift_round_half_even


class IntegerInput(IntegerOperator):
    """Float image -> codes: clamp(round_half_even(x / 2^e), low, high)."""

    KIND = "input"
    output: Grid

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] floats -> int32 codes."""
        exponent = torch.tensor(self.output.exponent, dtype=torch.int32, device=images.device)
        return quantize(images.float(), exponent, CodeRange(self.output.low, self.output.high)).to(torch.int32)


class IntegerAdd(IntegerOperator):
    """Residual add: both codes at the smaller exponent, their sum shifted to the output's; clamping does the ReLU."""

    KIND = "add"
    output: Grid

    def __init__(self, left: Grid, right: Grid, output: Grid, six: int | None = None) -> None:
        super().__init__(output)
        self.left = left
        self.right = right
        self.six = six
        distance = abs(left.exponent - right.exponent)
        # Codes of 8 bits shifted by at most 15 places: sums stay below 2^24, exact in float32 kernels too.
        if distance > 15:
            raise ValueError(f"the operands' exponents lie {distance} apart; at most 15 can be added exactly")
        above = output.exponent - min(left.exponent, right.exponent)
        # Kernels add the output's zero point, 2^7 of its units, to the sum in float32 before they round: 24 bits in all.
        if above > 16:
            raise ValueError(
                f"the output's exponent lies {above} above an operand's; at most 16 can be rounded exactly"
            )

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Two int32 tensors of codes of equal shape -> int32 codes."""
        exponent = min(self.left.exponent, self.right.exponent)
        total = (left << (self.left.exponent - exponent)) + (right << (self.right.exponent - exponent))
        shifted = shift_round_half_even(total, self.output.exponent - exponent)
        high = self.output.high if self.six is None else min(self.six, self.output.high)
        return shifted.clamp(self.output.low, high).to(torch.int32)

    def attributes(self) -> dict[str, Any]:
        return {**super().attributes(), "left": asdict(self.left), "right": asdict(self.right), "six": self.six}


class IntegerReLU(IntegerOperator):
    """A ReLU of its own, on codes; ``six`` is ReLU6's 6 in codes."""

    KIND = "relu"
    output: Grid

    def __init__(self, output: Grid, six: int | None = None) -> None:
        super().__init__(output)
        self.six = six

    def forward(self, codes: Tensor) -> Tensor:
        """Any shape, int32."""
        return codes.clamp(0, self.output.high if self.six is None else min(self.six, self.output.high))

    def attributes(self) -> dict[str, Any]:
        return {**super().attributes(), "six": self.six}
