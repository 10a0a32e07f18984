"""Operators of two activations, or none with weights, that keep 8-bit codes for their backward pass and compute anew from them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowprec.layers.activations import ActivationQuantizer
from lowprec.numerics.fixed_point import EXACT_DTYPES
from lowprec.numerics.straight_through import codes_of_multiples, multiples_of_codes


def can_keep_codes(values: Tensor, source: ActivationQuantizer) -> bool:
    """Whether ``values``, which lie on the grid of ``source``, can be told by 8-bit codes, and somebody will ask for them."""
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and values.requires_grad):
        return False
    return source.quantizing and source.calibrated and values.dtype in EXACT_DTYPES


class ProductOfCodes(torch.autograd.Function):
    """y = a · b, the matrix products of a batch, which keeps codes of both operands: of a float one a quarter of the memory.

    Gradient: ∂L/∂a = ∂L/∂y · bᵀ and ∂L/∂b = aᵀ · ∂L/∂y, by the operators of ``a @ b`` at the same values. a: [..., M, K] and b:
    [..., K, N], equal but in the last two axes, on the grids of their sources. dtype: of the products, which holds both exactly.
    """

    @staticmethod
    def forward(
        ctx: Any,
        left: Tensor,
        right: Tensor,
        left_source: ActivationQuantizer,
        right_source: ActivationQuantizer,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.shapes, ctx.dtypes, ctx.dtype = (left.shape, right.shape), (left.dtype, right.dtype), dtype
        operands = [values.to(dtype).reshape(-1, *values.shape[-2:]) for values in (left, right)]
        coded = [_Coded.of(values, source) for values, source in zip(operands, (left_source, right_source), strict=True)]
        ctx.offsets, ctx.turned = [one.offset for one in coded], [one.turned for one in coded]
        ctx.save_for_backward(*(tensor for one in coded for tensor in (one.codes, one.exponent)))
        # Not a view, so that the quantizer behind may use its memory.
        return torch.ops.aten._unsafe_view(torch.bmm(*operands), [*left.shape[:-1], right.shape[-1]])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        left, right = (_Coded(*parts) for parts in zip(saved[::2], saved[1::2], ctx.offsets, ctx.turned, strict=True))
        gradient = gradient.reshape(-1, *gradient.shape[-2:])
        of_left = of_right = None
        if ctx.needs_input_grad[0]:
            of_left = torch.bmm(gradient, right.values(ctx.dtype).mT).view(ctx.shapes[0]).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            of_right = torch.bmm(left.values(ctx.dtype).mT, gradient).view(ctx.shapes[1]).to(ctx.dtypes[1])
        return of_left, of_right, None, None, None


class SoftmaxOfCodes(torch.autograd.Function):
    """A softmax that keeps codes of its input for the backward pass, and no result, which is on no grid.

    Equation: y = exp(x) / Σ exp(x) over one axis. Gradient: ∂L/∂x = y · (∂L/∂y − Σ y · ∂L/∂y), with y computed anew, by the
    operators that PyTorch's autograd uses. x: on the grid of ``source``.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, dim: int, source: ActivationQuantizer) -> Tensor:
        codes = codes_of_multiples(values, source.exponent, source.int8_offset)
        result = torch.softmax(values, dim)
        ctx.save_for_backward(codes, source.exponent.clone())
        ctx.dim, ctx.offset = dim, source.int8_offset
        ctx.dtypes = values.dtype, result.dtype  # under autocast not the same
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        codes, exponent = ctx.saved_tensors
        of_input, of_result = ctx.dtypes
        result = torch.softmax(multiples_of_codes(codes, exponent, ctx.offset, of_result), ctx.dim)
        of_values = torch.ops.aten._softmax_backward_data.default(gradient, result, ctx.dim, of_result)
        return of_values.to(of_input), None, None


class _Coded(NamedTuple):
    """A batch of matrices as codes: ``turned``, transposed, where they lay in memory like that, as products notice."""

    codes: Tensor
    exponent: Tensor
    offset: int
    turned: bool

    @classmethod
    def of(cls, values: Tensor, source: ActivationQuantizer) -> _Coded:
        turned = not values.is_contiguous() and values.mT.is_contiguous()
        codes = codes_of_multiples(values.mT if turned else values, source.exponent, source.int8_offset)
        # A copy: the quantizer's own may be another one when the values are asked for.
        return cls(codes, source.exponent.clone(), source.int8_offset, turned)

    def values(self, dtype: torch.dtype) -> Tensor:
        values = multiples_of_codes(self.codes, self.exponent, self.offset, dtype)
        return values.mT if self.turned else values
