"""Fake-quant operators of attention: products of two activation tensors, and what stays in float."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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
        # Whether a softmax's result is computed anew for the backward pass, not kept: see saved_as_codes.
        self.recomputes = False

    def unquantized(self, values: Tensor) -> Tensor:
        """The values that the quantizer rounds."""
        return self.function(values)

    def forward(self, values: Tensor) -> Tensor:
        """Any shape that the function takes; its values on the output's grid."""
        if isinstance(self.function, nn.Softmax):
            if self.recomputes:
                return self.quantizer(RecomputedSoftmax.apply(values, self.function.dim), overwrite=True)
            return self.quantizer(self.unquantized(values))  # it needs its result for the backward pass
        return self.quantizer(self.unquantized(values), overwrite=True)


class RecomputedSoftmax(torch.autograd.Function):
    """A softmax that keeps its input for the backward pass, of which codes may be kept, and no result, which is on no grid.

    Equation: y = exp(x) / Σ exp(x) over one axis. Gradient: ∂L/∂x = y · (∂L/∂y − Σ y · ∂L/∂y), with y computed anew, by the
    operators that PyTorch's autograd uses.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, dim: int) -> Tensor:
        result = torch.softmax(values, dim)
        ctx.save_for_backward(values)
        ctx.dim, ctx.dtype = dim, result.dtype  # under autocast not that of the values
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (values,) = ctx.saved_tensors
        result = torch.softmax(values.to(ctx.dtype), ctx.dim)
        of_values = torch.ops.aten._softmax_backward_data.default(gradient, result, ctx.dim, ctx.dtype)
        return of_values.to(values.dtype), None
