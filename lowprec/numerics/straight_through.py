"""Straight-through estimators: quantized values forward, a simple gradient backward (Bengio et al., arXiv 1308.3432)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowprec.numerics.fixed_point import CodeRange, round_half_even_


class StraightThroughWeight(torch.autograd.Function):
    """Stands a quantized weight in for its latent one.

    Equation: y = ŵ. Gradient: ∂L/∂w = ∂L/∂y, unclipped, wherever w lies; nothing flows into ŵ. Source: arXiv 1705.01462.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, quantized: Tensor) -> Tensor:
        return quantized.view_as(quantized)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class StraightThroughActivation(torch.autograd.Function):
    """Quantizes activations to dynamic fixed point.

    Equation: y = clamp(round_half_even(x / s), low, high) · s with s = 2^exponent. Gradient: ∂L/∂x = ∂L/∂y where the
    unclamped code lies in [low, high], else 0; none for s. Exact in bfloat16 too, whose 8 significant bits hold every
    8-bit code; float16, whose exponents do not reach, is computed in float32. Source: arXiv 1701.08978, with the gradient
    of PACT (arXiv 1805.06085).
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        wide = values.float() if values.dtype == torch.float16 else values
        # In place where nothing else holds the tensor: a pass over activations costs as much as it moves memory.
        unclamped = round_half_even_(wide / scale)
        codes = unclamped.clamp(low, high)
        ctx.save_for_backward(codes == unclamped)
        ctx.dtype = values.dtype
        return codes.mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (inside,) = ctx.saved_tensors
        return (gradient * inside).to(ctx.dtype), None, None, None


def straight_through_weight(weight: Tensor, quantized: Tensor) -> Tensor:
    """``quantized`` forward, its gradient to ``weight`` unchanged; equal shapes. See :class:`StraightThroughWeight`."""
    return StraightThroughWeight.apply(weight, quantized)


def straight_through_activation(values: Tensor, scale: Tensor, codes: CodeRange) -> Tensor:
    """Values on the grid of ``scale``, a power of two, within ``codes``. See :class:`StraightThroughActivation`."""
    return StraightThroughActivation.apply(values, scale, codes.low, codes.high)
