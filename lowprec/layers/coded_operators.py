"""Products of activations, and float operators, that keep 8-bit codes for their backward pass: the values come back exactly."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lowprec.layers.activations import ActivationQuantizer
from lowprec.layers.autocast import Autocast
from lowprec.numerics.fixed_point import EXACT_DTYPES
from lowprec.numerics.pools import converted, passing_like
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
        operands = [_batch(values.to(dtype)) for values in (left, right)]
        coded = [
            _Coded.of(values, source) for values, source in zip(operands, (left_source, right_source), strict=True)
        ]
        ctx.offsets, ctx.turned = [one.offset for one in coded], [one.turned for one in coded]
        ctx.save_for_backward(*(tensor for one in coded for tensor in (one.codes, one.exponent)))
        # Not a view, so that the quantizer behind may use its memory.
        return torch.ops.aten._unsafe_view(_products(*operands), [*left.shape[:-1], right.shape[-1]])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        left, right = (_Coded(*parts) for parts in zip(saved[::2], saved[1::2], ctx.offsets, ctx.turned, strict=True))
        gradient = _batch(gradient)
        of_left = of_right = None
        if ctx.needs_input_grad[0]:
            of_left = _gradient(gradient, right.values(ctx.dtype).mT, ctx.shapes[0], ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            of_right = _gradient(left.values(ctx.dtype).mT, gradient, ctx.shapes[1], ctx.dtypes[1])
        return of_left, of_right, None, None, None


def _batch(values: Tensor) -> Tensor:
    """[..., M, K] as [B, M, K], as ``@`` makes it: a copy where no view tells it."""
    shape = (-1, *values.shape[-2:])
    try:
        return values.view(shape)
    except RuntimeError:  # it is of no such strides
        return passing_like(values, shape=values.shape).copy_(values).view(shape)


def _products(left: Tensor, right: Tensor) -> Tensor:
    """[B, M, K] · [B, K, N]."""
    return torch.bmm(left, right, out=passing_like(left, shape=(*left.shape[:-1], right.shape[-1])))


def _gradient(left: Tensor, right: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return converted(_products(left, right).view(shape), dtype, passing_like)


class FunctionOfCodes(torch.autograd.Function):
    """y = f(x), of which only codes of x are kept: neither x nor what ``f`` would keep, such as a softmax its result.

    Gradient: that of ``f``, which is computed anew in the backward pass, by the same operators from the same values. x: any
    shape, on the grid of ``source``. function: a module without randomness; parameters: all that it has.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, function: nn.Module, source: ActivationQuantizer, *parameters: Tensor
    ) -> Tensor:
        codes = codes_of_multiples(values, source.exponent, source.int8_offset)
        ctx.save_for_backward(codes, source.exponent.clone(), *parameters)
        ctx.function, ctx.dtype, ctx.offset = function, values.dtype, source.int8_offset
        ctx.autocast = Autocast.now(values.device.type)
        return function(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        codes, exponent, *parameters = ctx.saved_tensors
        values = multiples_of_codes(codes, exponent, ctx.offset, ctx.dtype).requires_grad_()
        needed = (ctx.needs_input_grad[0], *ctx.needs_input_grad[3:])
        wanted = [tensor for tensor, needs in zip((values, *parameters), needed, strict=True) if needs]
        with torch.enable_grad(), torch.autocast(*ctx.autocast):
            result = ctx.function(values)
        found = iter(torch.autograd.grad(result, wanted, gradient))
        of_values, *of_parameters = (next(found) if needs else None for needs in needed)
        return of_values, None, None, *of_parameters


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
