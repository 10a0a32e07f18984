"""Fake-quant operators of attention: products of two activation tensors, and what stays in float."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowprec.layers.activations import ActivationQuantizer
from lowprec.layers.coded_operators import ProductOfCodes, SoftmaxOfCodes, can_keep_codes
from lowprec.numerics.fixed_point import EXACT_DTYPES


class QuantizedMatmul(nn.Module):
    """Matrix product of two 8-bit tensors, requantized. sources: the quantizers of the two."""

    def __init__(
        self, quantizer: ActivationQuantizer, sources: tuple[ActivationQuantizer, ActivationQuantizer]
    ) -> None:
        super().__init__()
        self.quantizer = quantizer
        # In a tuple, so that the producers' quantizers are referred to and not registered a second time.
        self._sources = sources
        # Whether the inputs, on the grids of their sources, are kept for the backward pass as codes: see keep_codes_in_attention.
        self.keeps_codes = False

    @property
    def sources(self) -> tuple[ActivationQuantizer, ActivationQuantizer]:
        """The quantizers of the left and the right input."""
        return self._sources

    def unquantized(self, left: Tensor, right: Tensor) -> Tensor:
        """The values that the quantizer rounds."""
        if self.keeps_codes and left.shape[:-2] == right.shape[:-2] and left.dim() > 2:
            kind = left.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else left.dtype
            if dtype in EXACT_DTYPES and all(map(can_keep_codes, (left, right), self.sources)):
                product: Tensor = ProductOfCodes.apply(left, right, *self.sources, dtype)
                return product
        return left @ right

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """[..., M, K] and [..., K, N] -> [..., M, N] on the output's grid."""
        return self.quantizer(self.unquantized(left, right), overwrite=True)


class QuantizedFloatOperator(nn.Module):
    """A function without an integer form (softmax, layer norm) of 8-bit values, computed in float, rounded to 8 bits.

    Runtimes round floats in their own ways, so codes behind it may differ between them. source: the quantizer of the input.
    """

    def __init__(self, function: nn.Module, source: ActivationQuantizer, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        self.function = function
        self.quantizer = quantizer
        self._source = (source,)  # in a tuple as above
        # Whether a softmax's input, on the grid of its source, is kept for the backward pass as codes: see keep_codes_in_attention.
        self.keeps_codes = False

    @property
    def source(self) -> ActivationQuantizer:
        """The quantizer of the input tensor."""
        return self._source[0]

    def unquantized(self, values: Tensor) -> Tensor:
        """The values that the quantizer rounds."""
        return self.function(values)

    def forward(self, values: Tensor) -> Tensor:
        """Any shape that the function takes; its values on the output's grid."""
        if isinstance(self.function, nn.Softmax):
            if self.keeps_codes and can_keep_codes(values, self.source):
                result = SoftmaxOfCodes.apply(values, self.function.dim, self.source)
                return self.quantizer(result, overwrite=True)
            return self.quantizer(self.unquantized(values))  # it needs its result for the backward pass
        return self.quantizer(self.unquantized(values), overwrite=True)
