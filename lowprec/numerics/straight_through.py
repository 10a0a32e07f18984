"""Straight-through estimators: quantized values forward, a simple gradient backward (Bengio et al., arXiv 1308.3432)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lowprec.numerics.fixed_point import CodeRange, round_half_even, round_half_even_

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
    1701.08978, with the gradient of PACT (arXiv 1805.06085). Saved for the backward pass is one bit an element.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, scale: Tensor, low: int, high: int, activation: str, overwrite: bool
    ) -> Tensor:
        ctx.dtype = values.dtype
        result = _own(values.float() if values.dtype == torch.float16 else values, overwrite)
        if result is values:
            ctx.mark_dirty(values)
        needs_gradient = ctx.needs_input_grad[0]
        least, most = _unclamped_limits(low, high, bool(activation), result.dtype)
        inverse = 1 / scale
        six = (6 * inverse).to(result.dtype)
        inside = []
        ctx.size = _block_size(result)
        for block in _blocks(result, ctx.size):
            block.mul_(inverse)
            if needs_gradient:
                limited = block.clamp(least, most)
                if activation == "relu6":
                    limited = torch.minimum(limited, torch.nextafter(six, torch.zeros_like(six)))
                # Comparisons that give numbers are vectorized, those that give booleans are not.
                inside.append(_packed(limited.eq_(block)))
            round_half_even_(block).clamp_(0 if activation else low, high)
            if activation == "relu6":
                torch.minimum(block, round_half_even(six), out=block)
            block.mul_(scale)
        if needs_gradient:
            ctx.save_for_backward(*inside)
            ctx.strides = result.stride()
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        if gradient.stride() != ctx.strides:
            gradient = torch.empty_strided(
                gradient.shape, ctx.strides, dtype=gradient.dtype, device=gradient.device
            ).copy_(gradient)
        passed = torch.empty_like(gradient)
        for to, incoming, inside in zip(
            _blocks(passed, ctx.size), _blocks(gradient, ctx.size), ctx.saved_tensors, strict=True
        ):
            torch.mul(incoming, _unpacked(inside, incoming), out=to)
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


def _unclamped_limits(low: int, high: int, rectified: bool, dtype: torch.dtype) -> tuple[float, float]:
    """The least and the largest number of ``dtype`` that rounds into the codes, above zero where it is rectified."""
    # The spacing of numbers just below 2^n is 2^n · epsilon / 2. Ties go to even numbers: low is even, high is odd.
    spacing = (high + 1) * torch.finfo(dtype).eps / 2
    most = high + 0.5 - spacing if spacing <= 0.5 else float(high)
    least = torch.finfo(dtype).smallest_normal if rectified else low - 0.5
    return least, most


def _own(values: Tensor, overwrite: bool) -> Tensor:
    """A tensor that may be written to and fills a stretch of memory: the given one, or a copy."""
    if values.is_contiguous() or (values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last)):
        return values if overwrite else values.clone()
    return values.clone(memory_format=torch.contiguous_format)


def _block_size(tensor: Tensor) -> int:
    """Elements of a block that fits a cache; all of them where that is no gain."""
    if torch.compiler.is_compiling() or tensor.is_cuda:
        return max(1, tensor.numel())
    return BLOCK * torch.get_num_threads()


def _blocks(tensor: Tensor, size: int) -> Sequence[Tensor]:
    """Views of a tensor of ``size`` elements each, in the order of its memory; a compiler gets the whole."""
    if torch.compiler.is_compiling():
        return (tensor,)
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset()).split(size)


def _packed(ones: Tensor) -> Tensor:
    """Zeros and ones as the bits of uint8, eight numbers a byte, the last ones filled up; in logical order."""
    flat = ones.flatten().float()
    missing = -flat.numel() % 8
    if missing:
        flat = functional.pad(flat, (0, missing))
    return (flat.view(-1, 8) @ (1 << torch.arange(8, device=flat.device)).float()).to(torch.uint8)


def _unpacked(packed: Tensor, like: Tensor) -> Tensor:
    """What :func:`_packed` was given, in dtype and shape of ``like``."""
    bits = torch.arange(256, device=packed.device)[:, None] >> torch.arange(8, device=packed.device) & 1
    rows = bits.to(like.dtype).index_select(0, packed.int())
    return rows.view(-1)[: like.numel()].view(like.shape)
