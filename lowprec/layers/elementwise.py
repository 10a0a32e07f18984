"""Fake-quant operators on one position at a time: residual add, multiply, concatenation, a ReLU of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowprec.layers.activations import ActivationQuantizer, activate
from lowprec.numerics.fixed_point import quantize_to_grid


class QuantizedAdd(nn.Module):
    """Residual add of two 8-bit tensors, then its activation function, requantized: the form ``requantized``."""

    def __init__(self, activation: str, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        self.activation = activation
        self.quantizer = quantizer

    def unquantized(self, left: Tensor, right: Tensor) -> Tensor:
        """The values that the quantizer rounds."""
        return activate(left + right, self.activation, overwrite=True)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Two tensors of equal shape; their sum on the output's grid."""
        return self.quantizer(left, self.activation, addend=right)


class QuantizedMultiply(nn.Module):
    """Product of two 8-bit tensors that broadcast, such as a squeeze-excite gate and what it weighs, requantized."""

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    def unquantized(self, left: Tensor, right: Tensor) -> Tensor:
        """The values that the quantizer rounds."""
        return left * right

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """The product on the output's grid."""
        return self.quantizer(self.unquantized(left, right), overwrite=True)


class QuantizedConcatenation(nn.Module):
    """8-bit tensors one after the other along ``axis``, brought to one grid."""

    def __init__(self, quantizer: ActivationQuantizer, axis: int) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.axis = axis

    def unquantized(self, *tensors: Tensor) -> Tensor:
        """The values that the quantizer rounds."""
        return torch.cat(tensors, self.axis)

    def forward(self, *tensors: Tensor) -> Tensor:
        """Tensors that are equal in shape but along ``axis``; all of them on the output's grid."""
        return self.quantizer(self.unquantized(*tensors), overwrite=True)


class QuantizedReLU(nn.Module):
    """A ReLU or ReLU6 that no operator could take in: it cuts an 8-bit tensor, which stays on its grid."""

    def __init__(self, activation: str, source: ActivationQuantizer) -> None:
        super().__init__()
        self.activation = activation
        # In a tuple, so that the producer's quantizer is referred to and not registered a second time.
        self._source = (source,)

    @property
    def source(self) -> ActivationQuantizer:
        """The quantizer whose grid the tensor lies on."""
        return self._source[0]

    def forward(self, values: Tensor) -> Tensor:
        """Any shape. ReLU6's 6 is rounded to the grid."""
        values = functional.relu(values)
        if self.activation == "relu6" and self.source.quantizing:
            return torch.minimum(values, quantize_to_grid(values.new_tensor(6.0), self.source.exponent))
        return values if self.activation == "relu" else values.clamp(max=6.0)
