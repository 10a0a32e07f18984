"""Weights as the integers that they are multiples of: weight = integer · 2^exponent of its output channel, both exact."""

from __future__ import annotations

import torch
from torch import Tensor

from lowprec.numerics import native_weights
from lowprec.numerics.fixed_point import dequantize, scale_by_power_of_two
from lowprec.numerics.memory import is_dense
from lowprec.numerics.native_activations import runs_native
from lowprec.numerics.pools import passing_like


def integers_of_weight(weight: Tensor, exponent: Tensor) -> Tensor:
    """weight / 2^exponent as int8, -128 … 127, in shape and strides of ``weight`` [O, …], dense; exponent: [O], int32."""
    if _by_channel(weight) and runs_native(weight):
        return native_weights.integers_of_weights(weight, exponent)
    return scale_by_power_of_two(weight, -_beside(exponent, weight)).to(torch.int8)


def weight_of_integers(integers: Tensor, exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """integers · 2^exponent in ``dtype``, which holds each exactly; shape and strides of the ``integers`` [O, …], int8."""
    weight = passing_like(integers, dtype)
    if _by_channel(integers) and runs_native(weight):
        native_weights.weights_of_integers(integers, exponent, weight)
        return weight
    return weight.copy_(dequantize(integers, _beside(exponent, integers)))


def _by_channel(tensor: Tensor) -> bool:
    """Whether the elements of an output channel lie side by side."""
    return is_dense(tensor) and tensor.stride(0) == tensor[0].numel()


def _beside(exponent: Tensor, weight: Tensor) -> Tensor:
    return exponent.view(-1, *[1] * (weight.dim() - 1))
