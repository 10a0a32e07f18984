"""Fake-quant operators of attention: products of two activation tensors, and what stays in float."""

from __future__ import annotations

from torch import Tensor, nn

from lowprec.layers.activations import ActivationQuantizer
from lowprec.layers.autocast import dtype_of_products
from lowprec.layers.coded_operators import FunctionOfCodes, ProductOfCodes, can_keep_codes
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
        # Kinds of devices where inputs are kept for the backward pass as codes: see keep_codes_in_attention.
        self.keeps_codes_on: frozenset[str] = frozenset()

    @property
    def sources(self) -> tuple[ActivationQuantizer, ActivationQuantizer]:
        """The quantizers of the left and the right input."""
        return self._sources

    def unquantized(self, left: Tensor, right: Tensor) -> Tensor:
        """The values that the quantizer rounds."""
        if left.device.type in self.keeps_codes_on and all(map(can_keep_codes, (left, right), self.sources)):
            dtype = dtype_of_products(left)
            alike = left.dim() > 2 and left.shape[:-2] == right.shape[:-2] and left.dtype == right.dtype
            if alike and dtype in EXACT_DTYPES:
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
        # Kinds of devices where the input is kept for the backward pass as codes: see keep_codes_in_attention.
        self.keeps_codes_on: frozenset[str] = frozenset()

    @property
    def source(self) -> ActivationQuantizer:
        """The quantizer of the input tensor."""
        return self._source[0]

    def unquantized(self, values: Tensor) -> Tensor:
        """The values that the quantizer rounds."""
        return self.function(values)

    def forward(self, values: Tensor) -> Tensor:
        """Any shape that the function takes; its values on the output's grid."""
        if values.device.type in self.keeps_codes_on and can_keep_codes(values, self.source):
            parameters = self.function.parameters()
            return self.quantizer(
                FunctionOfCodes.apply(values, self.function, self.source, *parameters), overwrite=True
            )
        # A softmax needs its result for the backward pass.
        return self.quantizer(self.unquantized(values), overwrite=not isinstance(self.function, nn.Softmax))
