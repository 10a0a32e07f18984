"""Fake-quant modules, one for each integer operator. They know numerics and recipe, nothing above."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lowprec.layers.activations import ActivationQuantizer
from lowprec.layers.attention import QuantizedFloatOperator, QuantizedMatmul
from lowprec.layers.elementwise import QuantizedAdd, QuantizedConcatenation, QuantizedMultiply, QuantizedReLU
from lowprec.layers.linear import QuantizedBatchNorm2d, QuantizedConv2d, QuantizedLayer, QuantizedLinear
from lowprec.layers.lookup import QuantizedLookup
from lowprec.layers.pooling import QuantizedAveragePool, QuantizedMaxPool2d, QuantizedUpsample

__all__ = [
    "ActivationQuantizer",
    "QuantizedAdd",
    "QuantizedAveragePool",
    "QuantizedBatchNorm2d",
    "QuantizedConcatenation",
    "QuantizedConv2d",
    "QuantizedFloatOperator",
    "QuantizedLayer",
    "QuantizedLinear",
    "QuantizedLookup",
    "QuantizedMatmul",
    "QuantizedMaxPool2d",
    "QuantizedMultiply",
    "QuantizedReLU",
    "QuantizedUpsample",
    "quantized_layers",
]


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """Names and modules of the layers whose weights a recipe quantizes, in the model's order; no batch norms."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer) and not isinstance(module, QuantizedBatchNorm2d):
            yield name, module
