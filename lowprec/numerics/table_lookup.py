"""Functions of 8-bit values, looked up in a table in training too, and their gradients in a table of slopes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowprec.numerics import native_activations
from lowprec.numerics.memory import holders, holders_of_unshared, is_dense
from lowprec.numerics.native_activations import runs_native
from lowprec.numerics.pools import passing_like


def look_up(values: Tensor, exponent: Tensor, low: int, table: Tensor, slopes: Tensor | None = None) -> Tensor | None:
    """table[values / 2^exponent − low], of dtype and strides of ``values``, any shape.

    None where there is no kernel for it, or a value is not on the grid: NaN, or one that a dropout has scaled. table: [256],
    float32, numbers that the dtype of ``values`` holds; slopes: see :class:`StraightThroughLookup`; without them there is no
    gradient.
    """
    if not runs_native(values) or not is_dense(values):
        return None
    result = passing_like(values) if slopes is not None else torch.empty_like(values)
    places = native_activations.look_up(values, exponent, low, table, result)
    if places is None or slopes is None:
        return None if places is None else result
    found: Tensor = StraightThroughLookup.apply(values, result, places, slopes)
    return found


class StraightThroughLookup(torch.autograd.Function):
    """y = table[p], looked up already, for places p = x / 2^e − low.

    Gradient: ∂L/∂x = ∂L/∂y · slopes[p], none for the others. For a quantized function f the slopes are f'(x) where its quantizer
    does not clip, else 0 (arXiv 1701.08978, with the gradient of PACT, arXiv 1805.06085). Saved is one byte an element.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, result: Tensor, places: Tensor, slopes: Tensor) -> Tensor:
        ctx.strides = values.stride()
        ctx.unshared = holders_of_unshared()
        ctx.save_for_backward(places, slopes)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        places, slopes = ctx.saved_tensors
        unshared = ctx.unshared is not None and holders(gradient) == ctx.unshared
        if gradient.stride() != ctx.strides:
            unshared = True
            gradient = torch.empty_strided(gradient.shape, ctx.strides, dtype=gradient.dtype).copy_(gradient)
        passed = gradient if unshared else passing_like(gradient)
        native_activations.times_slopes(gradient, places, slopes, passed)
        return passed, None, None, None
