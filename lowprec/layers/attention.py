"""Fake-quant operators of attention: products of two activation tensors, and what stays in float."""

from __future__ import annotations

from torch import Tensor, nn

from lowprec.layers.activations import ActivationQuantizer


class QuantizedMatmul(nn.Module):
    """Matrix product of two 8-bit tensors, requantized."""

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    def unquantized(self, left: Tensor, right: Tensor) -> Tensor:
        """The values that the quantizer rounds."""
        return left @ right

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """[..., M, K] and [..., K, N] -> [..., M, N] on the output's grid."""
        return self.quantizer(self.unquantized(left, right), overwrite=True)


class QuantizedFloatOperator(nn.Module):
    """A function without an integer form (softmax, layer norm) of 8-bit values, computed in float, rounded to 8 bits.

    Runtimes round floats in their own ways, so codes behind it may differ between them.
    """

    def __init__(self, function: nn.Module, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        self.function = function
        self.quantizer = quantizer

    def unquantized(self, values: Tensor) -> Tensor:
        """The values that the quantizer rounds."""
        return self.function(values)

    def forward(self, values: Tensor) -> Tensor:
        """Any shape that the function takes; its values on the output's grid."""
        # A softmax needs its result for the backward pass, a layer norm does not.
        return self.quantizer(self.unquantized(values), overwrite=not isinstance(self.function, nn.Softmax))
