"""Fake-quant modules, one for each integer operator. They know numerics and recipe, nothing above."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lowprec.layers.activations import ActivationQuantizer
from lowprec.layers.linear import QuantizedConv2d, QuantizedLayer, QuantizedLinear
from lowprec.layers.operators import QuantizedAdd, QuantizedAveragePool, QuantizedReLU

__all__ = [
    "ActivationQuantizer",
    "QuantizedAdd",
    "QuantizedAveragePool",
    "QuantizedConv2d",
    "QuantizedLayer",
    "QuantizedLinear",
    "QuantizedReLU",
    "quantized_layers",
]


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """Names and modules of the layers with quantized weights, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            yield name, module
