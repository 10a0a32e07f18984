"""Fake-quant pooling, and upsampling between pixels."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lowprec.layers.activations import ActivationQuantizer
from lowprec.numerics.pooling import window_sizes
from lowprec.numerics.pools import passing_like


class QuantizedMaxPool2d(nn.MaxPool2d):
    """Max pooling of an 8-bit tensor, whose results are on its grid; see :class:`MaxPool` for what a training step keeps."""

    @classmethod
    def of(cls, pool: nn.MaxPool2d) -> QuantizedMaxPool2d:
        """The same pooling as ``pool``, one without ``return_indices``."""
        return cls(pool.kernel_size, pool.stride, pool.padding, pool.dilation, ceil_mode=pool.ceil_mode)

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H', W']."""
        if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and input.requires_grad):
            result: Tensor = super().forward(input)
        else:
            geometry = (self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)
            result = MaxPool.apply(input, geometry)
        return result


class MaxPool(torch.autograd.Function):
    """Max pooling [B, C, H, W] that keeps less for the backward pass: the places of the maxima, in 16 or 32 bits, and no input.

    Equation and gradient are those of ``torch.nn.functional.max_pool2d``, whose operators compute both: y is the largest x of a
    window, and ∂L/∂y goes to where it was found. They keep the input, and 64 bits a place.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, geometry: tuple[Any, ...]) -> Tensor:
        result, places = torch.ops.aten.max_pool2d_with_indices.default(values, *geometry)
        fits = values.shape[-2:].numel() <= 1 << 15
        ctx.save_for_backward(places.to(torch.int16 if fits else torch.int32))
        ctx.geometry, ctx.shape, ctx.strides = geometry, values.shape, values.stride()
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        result = torch.empty_strided(ctx.shape, ctx.strides, dtype=gradient.dtype, device=gradient.device)
        if result.device.type == "cpu":
            result = passing_like(result)
        # Of its input the operator asks shape and strides alone, which are the result's.
        backward = torch.ops.aten.max_pool2d_with_indices_backward.grad_input
        return backward(gradient, result, *ctx.geometry, places.long(), grad_input=result), None


class QuantizedAveragePool(nn.Module):
    """Average pooling of an 8-bit tensor, requantized.

    kernel_size None pools over whole ``axes``, to [B, C, 1, 1] for those of an image. The sum of codes is exact; one
    correctly rounded division by a tensor (a Python number may turn it into a multiplication by the reciprocal) and one
    rounding follow, so ties are ties everywhere. keep_axes False drops the pooled axes: [B, C].
    """

    def __init__(
        self,
        quantizer: ActivationQuantizer,
        kernel_size: tuple[int, int] | None = None,
        stride: tuple[int, int] | None = None,
        padding: tuple[int, int] = (0, 0),
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        keep_axes: bool = True,
        axes: tuple[int, ...] = (2, 3),
    ) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.kernel_size = kernel_size
        self.stride = stride or kernel_size
        self.padding = padding
        self.ceil_mode = ceil_mode
        self.count_include_pad = count_include_pad
        self.keep_axes = keep_axes
        self.axes = axes

    def unquantized(self, values: Tensor) -> Tensor:
        """The values that the quantizer rounds."""
        if self.kernel_size is None:
            total = values.sum(self.axes, keepdim=self.keep_axes)
            size = prod([values.shape[axis] for axis in self.axes])  # a list: torch.compile follows no generator
            return total / torch.full((), size, dtype=total.dtype, device=total.device)
        ones = torch.ones_like(values[:1, :1])
        return self._window_sums(values) / window_sizes(
            ones,
            self.kernel_size,
            self.stride or self.kernel_size,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
        )

    def _window_sums(self, values: Tensor) -> Tensor:
        return functional.avg_pool2d(
            values, self.kernel_size or 1, self.stride, self.padding, self.ceil_mode, True, divisor_override=1
        )

    def forward(self, values: Tensor) -> Tensor:
        """[B, C, H, W]; the averages on the output's grid."""
        return self.quantizer(self.unquantized(values))


class QuantizedUpsample(nn.Module):
    """Bilinear upsampling of an 8-bit tensor by powers of two, requantized: its weights are fractions of powers of two."""

    def __init__(self, quantizer: ActivationQuantizer, factors: tuple[int, int]) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.factors = factors

    def unquantized(self, values: Tensor) -> Tensor:
        """The values that the quantizer rounds."""
        factors = [float(factor) for factor in self.factors]
        return functional.interpolate(values, scale_factor=factors, mode="bilinear", align_corners=False)

    def forward(self, values: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H · height, W · width], on the output's grid."""
        return self.quantizer(self.unquantized(values))
