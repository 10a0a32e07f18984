"""Straight-through estimators: quantized values forward, a simple gradient backward (Bengio et al., arXiv 1308.3432)."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowprec.numerics.fixed_point import CodeRange, round_half_even

# Elements of a block for each thread: several passes over one find it in the processor's cache.
BLOCK = 1 << 18


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
    """Applies an activation function and quantizes to dynamic fixed point.

    Equation: y = clamp(round_half_even(f(x) / s), low, high) · s with s = 2^exponent; f is the identity, ReLU or ReLU6.
    Gradient: ∂L/∂x = ∂L/∂y · f'(x) where the unclamped code lies in [low, high], else 0; none for s. Exact in bfloat16 too,
    whose 8 significant bits hold every 8-bit code; float16, whose exponents do not reach, is computed in float32. Source: arXiv
    1701.08978, with the gradient of PACT (arXiv 1805.06085). Saved for the backward pass is one byte an element.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, scale: Tensor, low: int, high: int, activation: str, overwrite: bool
    ) -> Tensor:
        ctx.dtype = values.dtype
        wide = values.float() if values.dtype == torch.float16 else values
        result = wide if overwrite or wide is not values else wide.clone()
        if result is values:
            ctx.mark_dirty(values)
        needs_gradient = ctx.needs_input_grad[0]
        inside = torch.empty_like(result, dtype=torch.uint8) if needs_gradient else result
        least, most = _unclamped_limits(low, high, bool(activation), result.dtype)
        inverse = 1 / scale
        six = (6 * inverse).to(result.dtype)
        for block, mask in _blocks(result, inside):
            block.mul_(inverse)
            if needs_gradient:
                limited = block.clamp(least, most)
                if activation == "relu6":
                    limited = torch.minimum(limited, torch.nextafter(six, torch.zeros_like(six)))
                # Comparisons that give numbers are vectorized, those that give booleans are not.
                mask.copy_(limited.eq_(block))
            block.round_().clamp_(low, high)
            if activation == "relu6":
                torch.minimum(block, round_half_even(six), out=block)
            block.mul_(scale)
        if needs_gradient:
            ctx.save_for_backward(inside)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (inside,) = ctx.saved_tensors
        passed = torch.empty_like(gradient)
        for to, incoming, mask in _blocks(passed, gradient, inside):
            torch.mul(incoming, mask.to(gradient.dtype), out=to)
        return passed.to(ctx.dtype), None, None, None, None, None


def straight_through_weight(weight: Tensor, quantized: Tensor) -> Tensor:
    """``quantized`` forward, its gradient to ``weight`` unchanged; equal shapes. See :class:`StraightThroughWeight`."""
    return StraightThroughWeight.apply(weight, quantized)


def straight_through_activation(
    values: Tensor, scale: Tensor, codes: CodeRange, activation: str = "", overwrite: bool = False
) -> Tensor:
    """Values on the grid of ``scale``, a power of two, within ``codes``. See :class:`StraightThroughActivation`.

    activation: "", "relu" or "relu6", applied first. overwrite: the result may take the memory of ``values``, which nobody else
    reads, not even the backward pass of what gave them.
    """
    # What is compiled is fused, and makes up its own mind on memory; views are not worth the trouble.
    overwrite = overwrite and not torch.compiler.is_compiling() and not values._is_view()
    return StraightThroughActivation.apply(values, scale, codes.low, codes.high, activation, overwrite)


@functools.cache
def _unclamped_limits(low: int, high: int, rectified: bool, dtype: torch.dtype) -> tuple[float, float]:
    """The least and the largest number of ``dtype`` that rounds into the codes, above zero where it is rectified."""
    zero = torch.zeros((), dtype=dtype)
    least = torch.nextafter(zero, zero + 1) if rectified else torch.tensor(low - 0.5, dtype=dtype)
    # Ties go to even numbers: low is even, high is odd.
    most = torch.nextafter(torch.tensor(high + 0.5, dtype=dtype), zero)
    return float(least), float(most)


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape in parts that fit a cache, views of them; whole where that is no gain, or strides differ."""
    first = tensors[0]
    size = BLOCK * torch.get_num_threads()
    alike = all(tensor.stride() == first.stride() for tensor in tensors)
    if torch.compiler.is_compiling() or first.is_cuda or first.numel() <= size or not alike or not _is_dense(first):
        yield tensors
        return
    flat = [tensor.as_strided((first.numel(),), (1,)) for tensor in tensors]
    yield from zip(*(tensor.split(size) for tensor in flat), strict=True)


def _is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill a stretch of memory, each once, in some order of the axes."""
    return tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
