"""The quantizer of an activation tensor: one exponent, 8-bit codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowprec.layers.training_norm import normalize, quantized_norm
from lowprec.numerics.fixed_point import (
    MAXIMUM_EXPONENT,
    SIGNED_8_BIT,
    UNSIGNED_8_BIT,
    CodeRange,
)
from lowprec.numerics.straight_through import straight_through_activation

# What the exponent holds until calibration has chosen one.
UNCALIBRATED = MAXIMUM_EXPONENT + 1


def activate(values: Tensor, activation: str, overwrite: bool = False) -> Tensor:
    """The activation function that is fused into an operator: "relu", "relu6", or "" for none; any shape.

    overwrite: whether the memory of ``values`` may be used.
    """
    if activation == "relu":
        return functional.relu(values, inplace=overwrite)
    return functional.relu6(values, inplace=overwrite) if activation == "relu6" else values


class ActivationQuantizer(nn.Module):
    """Quantizes a tensor to 8-bit dynamic fixed point: clamp(round_half_even(x / 2^e)) · 2^e.

    Every tensor between operators has one, whatever the number of its users. signed: whether the tensor can be negative.
    The exponent is state (a buffer); :func:`lowprec.calibrate` sets it. With ``quantizing`` off, values pass unchanged.
    """

    exponent: Tensor

    def __init__(self, signed: bool) -> None:
        super().__init__()
        self.signed = signed
        self.quantizing = True
        self.calibrated = False
        self.register_buffer("exponent", torch.tensor(UNCALIBRATED, dtype=torch.int32))

    @property
    def codes(self) -> CodeRange:
        """The codes that the tensor may take: 0 … 255, or -128 … 127 where it can be negative."""
        return SIGNED_8_BIT if self.signed else UNSIGNED_8_BIT

    @property
    def int8_offset(self) -> int:
        """What is taken off a code so that int8 holds it."""
        return 0 if self.signed else 128

    def set_exponent(self, exponent: int) -> None:
        """Fixes the exponent; the quantizer is calibrated from here on."""
        self.exponent.fill_(exponent)
        self.calibrated = True

    def forward(
        self,
        values: Tensor,
        activation: str = "",
        overwrite: bool = False,
        *,
        norm: nn.Module | None = None,
        addend: Tensor | None = None,
    ) -> Tensor:
        """Any shape; values on the grid of 2^e. Gradient: straight through, zero outside the range.

        norm: a batch norm, to apply first. addend: a tensor of the same shape, to add then. activation: "", "relu" or "relu6",
        a function to apply next. overwrite: whether the memory of ``values``, or of what a norm makes of them, may be used.

        Raises:
            RuntimeError: no exponent has been chosen yet.
        """
        if norm is not None:
            quantizes = self.quantizing and self.calibrated
            result = quantized_norm(norm, values, self.exponent, self.codes, activation, addend) if quantizes else None
            if result is not None:
                return result
            values = normalize(norm, values)
        if not self.quantizing:
            return activate(values if addend is None else values + addend, activation, overwrite or addend is not None)
        if not self.calibrated:
            raise RuntimeError("activation exponents are not chosen yet: call lowprec.calibrate(qmodel, batches) first")
        return straight_through_activation(values, self.exponent, self.codes, activation, overwrite, addend)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self.calibrated = int(self.exponent) != UNCALIBRATED

    def extra_repr(self) -> str:
        exponent = f"2^{int(self.exponent)}" if self.calibrated else "not calibrated"
        return f"[{self.codes.low}, {self.codes.high}], {exponent}"
