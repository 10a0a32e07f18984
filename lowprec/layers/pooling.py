"""Fake-quant average pooling, and upsampling between pixels."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowprec.layers.activations import ActivationQuantizer
from lowprec.numerics.pooling import window_sizes


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
