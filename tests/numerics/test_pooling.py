"""Window sizes: sums divided by them are what average pooling gives."""

import pytest
import torch
from torch.nn import functional

from lowprec.numerics.pooling import window_sizes


@pytest.mark.parametrize("size", [(7, 9), (6, 6)])
@pytest.mark.parametrize("kernel", [(2, 2), (3, 2), (3, 3)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
@pytest.mark.parametrize(
    ("padding", "ceil_mode", "count_include_pad"),
    [
        (padding, ceil_mode, count_include_pad)
        for padding in ((0, 0), (1, 1), (1, 0))
        for ceil_mode in (False, True)
        for count_include_pad in (False, True)
        # Refused while planning: windows over padding that counts are clipped by rules of their own.
        if not (ceil_mode and count_include_pad and any(padding))
    ],
)
def test_against_average_pooling(
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    ceil_mode: bool,
    count_include_pad: bool,
) -> None:
    values = torch.randint(0, 255, (2, 3, *size), generator=torch.Generator().manual_seed(0)).double()
    sums = functional.avg_pool2d(values, kernel, stride, padding, ceil_mode, True, divisor_override=1)
    sizes = window_sizes(torch.ones(1, 1, *size).double(), kernel, stride, padding, ceil_mode, count_include_pad)
    expected = functional.avg_pool2d(values, kernel, stride, padding, ceil_mode, count_include_pad)
    torch.testing.assert_close(sums / sizes, expected, rtol=1e-12, atol=0)
