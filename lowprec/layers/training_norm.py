"""Batch norm in training: PyTorch's, with its result, which is quantized in place and soon gone, in memory for such tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lowprec.numerics.fixed_point import EXACT_DTYPES
from lowprec.numerics.memory import is_dense
from lowprec.numerics.pools import passing_like


def normalize(norm: nn.Module, values: Tensor) -> Tensor:
    """``norm(values)``, [B, C, H, W], bit by bit, and the same gradients; in training on a CPU in memory for passing tensors."""
    if not _can_place(norm, values):
        result: Tensor = norm(values)
        return result
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    momentum = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    parameters = norm.weight, norm.bias, norm.running_mean, norm.running_var
    placed: Tensor = _BatchNorm.apply(values, *parameters, momentum, norm.eps)
    return placed


def _can_place(norm: nn.Module, values: Tensor) -> bool:
    """Whether ``norm`` is PyTorch's own, in training, on what it normalizes without an error, and nobody watches its calls."""
    if (
        torch.compiler.is_compiling()
        or type(norm) is not nn.BatchNorm2d
        or norm._forward_hooks
        or norm._forward_pre_hooks
    ):
        return False
    tensors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    if any(tensor is None or tensor.dtype != torch.float32 for tensor in tensors) or norm.num_batches_tracked is None:
        return False
    several = norm.training and values.dim() == 4 and values.numel() > values.shape[1]
    placeable = values.device.type == "cpu" and values.dtype in EXACT_DTYPES and is_dense(values)
    return several and placeable and values.requires_grad


class _BatchNorm(torch.autograd.Function):
    """y = (x − mean) / √(variance + ε) · weight + bias with the batch's mean and variance, which the running ones follow.

    Gradients: ∂L/∂x, ∂L/∂weight and ∂L/∂bias of PyTorch's batch norm, by the same operator. x: [B, C, H, W], dense.
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
    ) -> Tensor:
        ctx.eps = eps
        result, mean, inverse_deviation = passing_like(values), torch.empty_like(weight), torch.empty_like(weight)
        torch.native_batch_norm(
            *(values, weight, bias, running_mean, running_variance, True, momentum, eps),
            out=(result, mean, inverse_deviation),
        )
        ctx.save_for_backward(values, weight, mean, inverse_deviation)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, weight, mean, inverse_deviation = ctx.saved_tensors
        needed = list(ctx.needs_input_grad[:3])
        gradients = torch.ops.aten.native_batch_norm_backward(
            gradient, values, weight, None, None, mean, inverse_deviation, True, ctx.eps, needed
        )
        return *gradients, None, None, None, None
