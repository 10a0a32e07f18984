"""Tensors as calibration keeps them, a byte an element, and what layers compute from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowprec.layers import ActivationQuantizer, QuantizedLayer
from lowprec.layers.integer_product import PackedProduct
from lowprec.numerics.straight_through import codes_of_multiples, multiples_of_codes


class Codes(NamedTuple):
    """Codes on a quantizer's grid as bytes, signed ones raised by 128, images channels_last: as integer kernels take them."""

    bytes: Tensor
    quantizer: ActivationQuantizer

    @classmethod
    def of(cls, values: Tensor, quantizer: ActivationQuantizer) -> Codes:
        """Those of values on the quantizer's grid."""
        memory_format = torch.channels_last if values.dim() == 4 else torch.contiguous_format
        codes = codes_of_multiples(values, quantizer.exponent, quantizer.int8_offset - 128, torch.uint8)
        return cls(codes.contiguous(memory_format=memory_format), quantizer)

    def values(self, exponent: Tensor | None = None) -> Tensor:
        """The values, float32, in shape and strides of the bytes. exponent: where it is no longer the quantizer's."""
        offset = self.quantizer.int8_offset - 128
        return multiples_of_codes(
            self.bytes, self.quantizer.exponent if exponent is None else exponent, offset, torch.float32
        )


def values_of(stored: Any) -> Any:
    """Of codes, their values; anything else is what it is."""
    return stored.values() if isinstance(stored, Codes) else stored


def products(
    layer: QuantizedLayer, inputs: Iterable[Codes | Tensor], weight: Tensor, exponent: Tensor, bias: Tensor | None
) -> Iterator[Tensor]:
    """``layer.operate(values, weight, bias)`` for each input; from codes on integers, where these are exact.

    weight: integers of -128 … 127 times 2^exponent; exponent: [O].
    """
    product = None
    for stored in inputs:
        if isinstance(stored, Codes) and PackedProduct.takes(layer, stored.bytes):
            product = product or PackedProduct.of(layer, weight, exponent, bias)
            yield product(stored.bytes)
        else:
            yield layer.operate(values_of(stored), weight, bias)
