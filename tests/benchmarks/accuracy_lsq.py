"""LSQ, a baseline of accuracy.py written from its paper: Esser, McKinstry, Bablani, Appuswamy, Modha, "Learned Step Size
Quantization", arXiv 1902.08153.

2-bit weights of four levels {-2, -1, 0, 1} · s, 8-bit activations, a learned step s for each layer's weights and for each
activation tensor; the first convolution's and the classifier's weights in 8 bits, as in the paper.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from accuracy_peer import END_BITS, Candidate, Quantized, Start, Weighted, bits_per_weight, rounded, run_calibration
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize

WEIGHT_BITS = 2
ACTIVATION_BITS = 8


class LearnedStepQuantization(torch.autograd.Function):
    """Rounds to multiples of a step that is learned.

    Equation (1, 2): v̂ = round(clamp(v / s, -Qn, Qp)) · s. Gradients (3, 5), where r = v / s: ∂v̂/∂s = round(r) - r where
    -Qn < r < Qp, -Qn where r ≤ -Qn, Qp where r ≥ Qp, summed over the tensor and multiplied by g (section 2.2);
    ∂v̂/∂v = 1 where -Qn < r < Qp, else 0. Source: arXiv 1902.08153, section 2.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, step: Tensor, low: int, high: int, gradient_scale: float) -> Tensor:
        ratio = values / step
        ctx.save_for_backward(ratio)
        ctx.low, ctx.high, ctx.gradient_scale, ctx.dtype = low, high, gradient_scale, values.dtype
        return ratio.clamp(low, high).round() * step

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (ratio,) = ctx.saved_tensors
        inside = (ratio > ctx.low) & (ratio < ctx.high)
        of_step = torch.where(inside, ratio.round() - ratio, ratio.clamp(ctx.low, ctx.high))
        step_gradient = (gradient * of_step).sum() * ctx.gradient_scale
        return (gradient * inside).to(ctx.dtype), step_gradient, None, None, None


class LearnedStep(nn.Module):
    """A quantizer with a learned step. Codes: -2^(bits - 1) … 2^(bits - 1) - 1, or 0 … 2^bits - 1 of what is not negative.

    The first tensor sets the step: s = 2 · mean |v| / √Qp (section 2.1). The gradient scale is g = 1 / √(N · Qp)
    (section 2.2), with N the tensor's elements: of activations, [B, ...], those of one image.
    """

    def __init__(self, bits: int, signed: bool = True, activation: bool = False) -> None:
        super().__init__()
        self.low = -(2 ** (bits - 1)) if signed else 0
        self.high = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
        self.activation = activation
        self.started = False
        self.step = nn.Parameter(torch.ones(()))

    def forward(self, values: Tensor) -> Tensor:
        """Any shape; multiples of the step."""
        if not self.started:
            with torch.no_grad():
                self.step.copy_(2 * values.abs().mean() / math.sqrt(self.high))
            self.started = True
        elements = values[0].numel() if self.activation else values.numel()
        scale = 1 / math.sqrt(elements * self.high)
        return LearnedStepQuantization.apply(values, self.step, self.low, self.high, scale)


def _layer(operator: Weighted, is_end: bool) -> nn.Module:
    parametrize.register_parametrization(operator, "weight", LearnedStep(END_BITS if is_end else WEIGHT_BITS))
    return operator


def _weight_bits(model: nn.Module) -> float:
    layers = [module for module in model.modules() if parametrize.is_parametrized(module)]
    steps = [layer.parametrizations.weight[0] for layer in layers]
    codes = [(step.high - step.low + 1).bit_length() - 1 for step in steps]
    return bits_per_weight((bits, layer.weight.numel(), 1) for bits, layer in zip(codes, layers, strict=True))


def learned_steps(start: Start) -> Quantized:
    """The model with steps in it, of activations from the first batch of calibration images."""
    model = rounded(start.model, _layer, lambda signed: LearnedStep(ACTIVATION_BITS, signed, activation=True))
    run_calibration(model, start.calibration[:1])
    return Quantized(model, _weight_bits(model))


CANDIDATES = [Candidate("LSQ, 2-bit, four levels", learned_steps)]
