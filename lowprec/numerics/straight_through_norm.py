"""Batch norm in training and the straight-through quantizer behind it, in one: what lies between them is never written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowprec.numerics import native_norms
from lowprec.numerics.fixed_point import CodeRange
from lowprec.numerics.memory import holders, holders_of_unshared
from lowprec.numerics.pools import passing_like
from lowprec.numerics.straight_through import Ends


class StraightThroughNorm(torch.autograd.Function):
    """Normalizes a batch, adds a second tensor, applies an activation function and quantizes to dynamic fixed point.

    Equation: y = clamp(round_half_even(f(n(x) + a) / s), low, high) · s with s = 2^exponent and n(x) = (x − mean) /
    √(variance + ε) · weight + bias of the batch's mean and variance, which the running ones follow; f and a as of
    :class:`lowprec.numerics.straight_through.StraightThroughActivation`. Gradients: its, and for x, weight and bias those of
    PyTorch's batch norm (arXiv 1502.03167) behind it. x: [B, C, H, W], that :func:`lowprec.numerics.native_norms.takes`; a: of
    its dtype and strides.
    """

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_variance: Tensor,
        momentum: float,
        eps: float,
        addend: Tensor | None,
        exponent: Tensor,
        codes: CodeRange,
        activation: str,
    ) -> Tensor:
        norm = native_norms.statistics(values, weight, bias, running_mean, running_variance, momentum, eps)
        result = passing_like(values)
        ends = Ends.of(codes.low, codes.high, values.dtype)
        mask = native_norms.quantize_normalized(values, norm, addend, exponent, ends, activation, result)
        ctx.save_for_backward(values, mask, weight, norm.mean, norm.inverse)
        ctx.unshared = holders_of_unshared()
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, mask, weight, mean, inverse = ctx.saved_tensors
        unshared = ctx.unshared is not None and holders(gradient) == ctx.unshared
        if gradient.stride() != values.stride():
            unshared = True
            gradient = passing_like(values).copy_(gradient)
        # Memory that is nobody else's is used again.
        first = gradient if unshared else passing_like(gradient)
        of_addend = first if ctx.needs_input_grad[7] else None
        of_values = first if of_addend is None else passing_like(gradient)
        of_weight, of_bias = native_norms.norm_gradient(
            gradient, mask, values, mean, inverse, weight, of_addend, of_values
        )
        return of_values, of_weight, of_bias, None, None, None, None, of_addend, None, None, None
