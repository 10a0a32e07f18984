"""Fake-quant average pooling."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowprec.layers.activations import ActivationQuantizer
from lowprec.numerics.pooling import window_sizes


class QuantizedAveragePool(nn.Module):
    """Average pooling of an 8-bit tensor, requantized.

    kernel_size None pools globally, to [B, C, 1, 1]. The sum of codes is exact; one correctly rounded division by a tensor
    (a Python number may turn it into a multiplication by the reciprocal) and one rounding follow, so ties are ties
    everywhere. keep_axes False drops the pooled axes: [B, C].
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
    ) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.kernel_size = kernel_size
        self.stride = stride or kernel_size
        self.padding = padding
        self.ceil_mode = ceil_mode
        self.count_include_pad = count_include_pad
        self.keep_axes = keep_axes

    def unquantized(self, values: Tensor) -> Tensor:
        """The values that the quantizer rounds."""
        if self.kernel_size is None:
            total = values.sum((2, 3), keepdim=self.keep_axes)
            return total / torch.full((), values.shape[2] * values.shape[3], dtype=total.dtype, device=total.device)
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
