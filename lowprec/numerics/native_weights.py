"""Kernels of weights for CPUs, in C: a descent step of the scales of clusters, and quantized values, one pass or two each.

PyTorch's operators take dozens of passes. The functions are those of :mod:`lowprec.numerics.triton_weights`, and so are results:
what operators give. Built as :mod:`lowprec.numerics.native_activations` is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowprec.numerics.clusters import ClusterLayout, with_positions
from lowprec.numerics.effective_codes import CODE_SHIFT, MANTISSA_LIMIT
from lowprec.numerics.memory import is_dense
from lowprec.numerics.native.library import Sizes, Strides, library
from lowprec.numerics.pools import kept_like


def descend(weight: Tensor, scale: Tensor, threshold: Tensor | None, layout: ClusterLayout) -> None:
    """As :func:`lowprec.numerics.triton_weights.descend`."""
    w_OIP = with_positions(weight)
    library().descend(
        *(w_OIP.data_ptr(), scale.data_ptr(), None if threshold is None else threshold.data_ptr()),
        *(_sizes(layout), Strides(*w_OIP.stride()), _strides_of_scale(scale)),
    )


def quantize_weight(
    weight: Tensor, scale: Tensor, threshold: Tensor | None, layout: ClusterLayout, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As :func:`lowprec.numerics.triton_weights.quantize_weight`."""
    w_OIP = with_positions(weight)
    quantized = torch.empty_like(w_OIP, dtype=dtype)
    exponent = weight.new_empty(len(weight), dtype=torch.int32)
    bits = 4 if threshold is None else 2
    library().quantize_clusters(
        *(w_OIP.data_ptr(), scale.data_ptr(), None if threshold is None else threshold.data_ptr()),
        *(quantized.data_ptr(), exponent.data_ptr()),
        *(_sizes(layout), Strides(*w_OIP.stride()), _strides_of_scale(scale), Strides(*quantized.stride())),
        *(CODE_SHIFT[bits], MANTISSA_LIMIT[bits], dtype == torch.bfloat16),
    )
    return quantized.view(weight.shape), exponent


def quantize_eight_bit(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As :func:`lowprec.numerics.triton_weights.quantize_eight_bit`."""
    # Both orders of memory keep an output channel together.
    weight = weight.detach() if is_dense(weight) else weight.detach().contiguous()
    quantized = torch.empty_like(weight, dtype=dtype)
    exponent = weight.new_empty(len(weight), dtype=torch.int32)
    library().quantize_eight_bit(
        *(weight.data_ptr(), quantized.data_ptr(), exponent.data_ptr()),
        *(len(weight), weight[0].numel(), dtype == torch.bfloat16),
    )
    return quantized, exponent


def integers_of_weights(weight: Tensor, exponent: Tensor) -> Tensor:
    """weight / 2^exponent as int8, float32 or bfloat16 [O, …] whose output channels lie one after the other; exponent: [O]."""
    integers = kept_like(weight, torch.int8)
    library().integers_of_weights(
        *(weight.data_ptr(), integers.data_ptr(), exponent.data_ptr()),
        *(len(weight), weight[0].numel(), weight.dtype == torch.bfloat16),
    )
    return integers


def weights_of_integers(integers: Tensor, exponent: Tensor, out: Tensor) -> None:
    """Writes integers · 2^exponent to ``out``, float32 or bfloat16, of the same strides; as :func:`integers_of_weights`."""
    library().weights_of_integers(
        *(integers.data_ptr(), out.data_ptr(), exponent.data_ptr()),
        *(len(integers), integers[0].numel(), out.dtype == torch.bfloat16),
    )


def _sizes(layout: ClusterLayout) -> Sizes:
    outputs, channels = layout.weight_shape[:2]
    return Sizes(outputs, channels, layout.positions, layout.members, layout.shares_positions)


def _strides_of_scale(scale: Tensor) -> Strides:
    return Strides(scale.stride(0), scale.stride(1), scale.stride(3))
