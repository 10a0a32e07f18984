"""Batch norm in training: with the quantizer behind it in one, or PyTorch's with its result in memory for passing tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lowprec.numerics import native_norms
from lowprec.numerics.fixed_point import EXACT_DTYPES, CodeRange
from lowprec.numerics.memory import is_dense
from lowprec.numerics.pools import passing_like
from lowprec.numerics.straight_through import alike
from lowprec.numerics.straight_through_norm import StraightThroughNorm


def normalize(norm: nn.Module, values: Tensor) -> Tensor:
    """``norm(values)``, [B, C, H, W], bit by bit, and the same gradients; in training on a CPU in memory for passing tensors."""
    if not _can_place(norm, values):
        result: Tensor = norm(values)
        return result
    assert isinstance(norm, nn.BatchNorm2d)
    placed: Tensor = _BatchNorm.apply(values, *_arguments(norm))
    return placed


def quantized_norm(
    norm: nn.Module,
    values: Tensor,
    exponent: Tensor,
    codes: CodeRange,
    activation: str = "",
    addend: Tensor | None = None,
) -> Tensor | None:
    """``straight_through_activation(normalize(norm, values), exponent, codes, activation, addend=addend)``, bit by bit.

    In one, as :class:`lowprec.numerics.straight_through_norm.StraightThroughNorm`, or None where that cannot be.
    """
    if not (_can_place(norm, values) and native_norms.takes(values) and (addend is None or alike(values, addend))):
        return None
    assert isinstance(norm, nn.BatchNorm2d)
    result: Tensor = StraightThroughNorm.apply(values, *_arguments(norm), addend, exponent, codes, activation)
    return result


def _arguments(norm: nn.BatchNorm2d) -> tuple[Any, ...]:
    """Weight, bias, running mean and variance, momentum and ε, for one more batch."""
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    momentum = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    return norm.weight, norm.bias, norm.running_mean, norm.running_var, momentum, norm.eps


def _can_place(norm: nn.Module, values: Tensor) -> bool:
    """Whether ``norm`` is PyTorch's own, in training, on what it normalizes without an error, and nobody watches its calls."""
    if torch.compiler.is_compiling() or type(norm) is not nn.BatchNorm2d or _is_watched(norm):
        return False
    # What does not fit is PyTorch's to complain about.
    fitting = torch.float32, values.device, values.shape[1:2], (1,)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        if tensor is None or (tensor.dtype, tensor.device, tensor.shape, tensor.stride()) != fitting:
            return False
    if norm.num_batches_tracked is None or not norm.track_running_stats or norm.eps <= 0:
        return False
    several = norm.training and values.dim() == 4 and values.numel() > values.shape[1]
    placeable = values.device.type == "cpu" and values.dtype in EXACT_DTYPES and is_dense(values)
    return several and placeable and values.requires_grad


def _is_watched(norm: nn.Module) -> bool:
    """Whether a call of it does more than its class says: hooks, or a function in its place."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    everywhere = vars(nn.modules.module).get("_has_any_global_hook", lambda: True)()
    return everywhere or "forward" in vars(norm) or any(getattr(norm, kind) for kind in hooks)


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
