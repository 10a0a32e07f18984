"""Average pooling: how many elements each window divides by."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def window_sizes(
    ones: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    ceil_mode: bool,
    count_include_pad: bool,
) -> Tensor:
    """How many elements each pooling window divides by: [1, 1, H', W'], of the dtype of ``ones`` [1, 1, H, W]."""
    if count_include_pad:
        height, width = padding
        ones = functional.pad(ones, (width, width, height, height), value=1.0)
        padding = (0, 0)
    return functional.avg_pool2d(ones, kernel_size, stride, padding, ceil_mode, True, divisor_override=1)
