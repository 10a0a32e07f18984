"""Kernels of batch norm in training for CPUs, in C, the quantizer behind it included: equal to PyTorch's operators, bit by bit.

PyTorch's write normalized values to memory for the quantizer to read, and its gradient for the norm to read twice. Both add up
in the same order here, and round where they do, which :func:`agrees` finds out by running them.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from lowprec.numerics.memory import is_channels_last
from lowprec.numerics.native.library import library
from lowprec.numerics.native_activations import NAMES, limits, runs_native
from lowprec.numerics.pools import kept_like

log = logging.getLogger("lowprec.kernels")

# The kernels take channels by the eights.
LANES = 8


class Statistics(NamedTuple):
    """Of a batch, float32 [C] each: its mean, 1 / √(variance + ε), and what makes x its norm, x · slope + offset."""

    mean: Tensor
    inverse: Tensor
    slope: Tensor
    offset: Tensor


def takes(values: Tensor) -> bool:
    """Whether these kernels normalize ``values``, [B, C, H, W]."""
    fits = is_channels_last(values) and values.shape[1] % LANES == 0 and _rows(values) > torch.get_num_threads()
    return fits and runs_native(values) and agrees(values.dtype, torch.get_num_threads())


def statistics(
    values: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_variance: Tensor,
    momentum: float,
    eps: float,
) -> Statistics:
    """Of ``values`` [B, C, H, W], channels last, for a norm with that weight and bias; the running ones [C] follow them."""
    channels, threads = values.shape[1], torch.get_num_threads()
    result = Statistics(*_floats(values, 4, channels).unbind())
    parts = _floats(values, threads, channels)
    function = getattr(library(), f"statistics_{NAMES[values.dtype]}")
    function(
        *(tensor.data_ptr() for tensor in (values, weight, bias, running_mean, running_variance)),
        *(_rows(values), channels, threads, momentum, eps),
        *(tensor.data_ptr() for tensor in (parts, *result)),
    )
    for changed in (running_mean, running_variance):
        increment_version(changed)
    return result


def quantize_normalized(
    values: Tensor,
    norm: Statistics,
    addend: Tensor | None,
    exponent: Tensor,
    ends: tuple[float, float, float, float],
    activation: str,
    out: Tensor,
) -> Tensor:
    """As :func:`lowprec.numerics.native_activations.quantize_activation` of the normalized values; returns the mask."""
    mask = kept_like(values, torch.uint8, (values.numel() // 8,))
    function = getattr(library(), f"quantize_normalized_{NAMES[values.dtype]}")
    function(
        *(values.data_ptr(), norm.slope.data_ptr(), norm.offset.data_ptr()),
        *(None if addend is None else addend.data_ptr(), out.data_ptr(), mask.data_ptr()),
        *(_rows(values), values.shape[1], *limits(exponent, ends, activation, values.dtype)),
    )
    return mask


def norm_gradient(
    gradient: Tensor,
    mask: Tensor,
    values: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor,
    masked: Tensor | None,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """Writes ∂L/∂x to ``out`` and, if it is asked for, the gradient where the mask has bits to ``masked``.

    gradient: of the quantized values, in strides and dtype of ``values``, as are ``out`` and ``masked``, one of which may be its
    memory. Returns ∂L/∂weight and ∂L/∂bias, [C].
    """
    channels, threads = values.shape[1], torch.get_num_threads()
    of_weight, of_bias = _floats(values, channels), _floats(values, channels)
    parts = _floats(values, 2, threads, channels)
    function = getattr(library(), f"norm_gradient_{NAMES[values.dtype]}")
    function(
        *(tensor.data_ptr() for tensor in (gradient, mask, values, mean, inverse, weight)),
        *(_rows(values), channels, threads, parts.data_ptr(), None if masked is None else masked.data_ptr()),
        *(tensor.data_ptr() for tensor in (out, of_weight, of_bias)),
    )
    return of_weight, of_bias


@lru_cache(maxsize=64)
def agrees(dtype: torch.dtype, threads: int) -> bool:
    """Whether PyTorch's operators come to the same bits here with so many threads: others may be compiled in another way.

    Says once, as information, where they do not.
    """
    with torch.device("cpu"):
        same = _is_same(dtype)
    if not same:
        log.info(
            "batch norm and quantizer run apart, which takes longer: with %d threads PyTorch's %s batch norm rounds otherwise",
            *(threads, NAMES[dtype]),
        )
    return same


def _is_same(dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    # Not a multiple of all vectors; more rows than threads on any machine.
    values = (3 * some(2, 24, 33, 41) + 1).to(dtype).contiguous(memory_format=torch.channels_last)
    # Next to nothing is left of such a gradient but what the last places of all factors make of it.
    gradient = values + (some(*values.shape) / 64).to(dtype)
    weight, bias, mean, variance = some(24) + 2, some(24), some(24), some(24).square()
    running = mean.clone(), variance.clone()
    expected = torch.native_batch_norm(values, weight, bias, mean, variance, True, 0.1, 1e-5)
    found = statistics(values, weight, bias, *running, 0.1, 1e-5)
    gradients = torch.ops.aten.native_batch_norm_backward(
        gradient, values, weight, None, None, *expected[1:], True, 1e-5, [True] * 3
    )
    out, normalized = torch.empty_like(values), torch.empty_like(values)
    mask = torch.full((values.numel() // 8,), 255, dtype=torch.uint8)
    of_parameters = norm_gradient(gradient, mask, values, found.mean, found.inverse, weight, None, out)
    # Steps so fine that the quantizer leaves the values as they are.
    codes = quantize_normalized(
        values,
        found,
        None,
        torch.tensor(-8, dtype=torch.int32),
        (-(2.0**14), 2.0**14, -(2.0**14), 2.0**14),
        "",
        normalized,
    )
    rounded = (expected[0] * 256).round() / 256
    pairs = (
        *zip((mean, variance, *expected[1:], *gradients), (*running, *found[:2], out, *of_parameters), strict=True),
        (rounded, normalized),
        (mask, codes),
    )
    return all(torch.equal(one, other) for one, other in pairs)


def _floats(like: Tensor, *shape: int) -> Tensor:
    """What kernels write float32 to, whatever the default dtype and device are."""
    return like.new_empty(shape, dtype=torch.float32)


def _rows(values: Tensor) -> int:
    return values.numel() // values.shape[1]
