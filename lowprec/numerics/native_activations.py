"""Kernels of activations for CPUs, in C: one pass over memory each way, equal to what PyTorch's operators give, bit by bit.

PyTorch's operators take seven passes, and as many waits of all threads for each other. The functions are those of
:mod:`lowprec.numerics.triton_activations`. They are built once for a machine, by the C compiler that is there; without one, and
on CPUs without AVX2, operators do the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowprec.numerics.fixed_point import scale_of
from lowprec.numerics.native.library import is_built, library
from lowprec.numerics.pools import kept_like

NAMES = {torch.float32: "float", torch.bfloat16: "bfloat16"}


def runs_native(tensor: Tensor) -> bool:
    """Whether these kernels quantize ``tensor``: float32 or bfloat16 on a CPU, where nothing is being compiled or traced."""
    plain = tensor.device.type == "cpu" and tensor.dtype in NAMES and type(tensor) in (Tensor, nn.Parameter)
    return plain and not torch.compiler.is_compiling() and is_built()


def quantize_activation(
    values: Tensor,
    addend: Tensor | None,
    exponent: Tensor,
    ends: tuple[float, float, float, float],
    activation: str,
    out: Tensor,
    masked: bool,
) -> Tensor | None:
    """As :func:`lowprec.numerics.triton_activations.quantize_activation`."""
    size = values.numel()
    mask = kept_like(values, torch.uint8, (-(-size // 8),)) if masked else None
    function = getattr(library(), f"quantize_{NAMES[values.dtype]}")
    function(
        *(values.data_ptr(), None if addend is None else addend.data_ptr(), out.data_ptr()),
        *(None if mask is None else mask.data_ptr(), size, *limits(exponent, ends, activation, values.dtype)),
    )
    return mask


def limits(
    exponent: Tensor, ends: tuple[float, float, float, float], activation: str, dtype: torch.dtype
) -> tuple[float, float, float, float, float]:
    """What a kernel quantizes with: 1.5 · 2^23 units, which rounds to multiples when it is added and taken off, and ``ends``."""
    unit = scale_of(exponent)
    low, high, least, most = (end * unit for end in ends)
    precision = torch.finfo(dtype)
    if activation:
        low, least = 0.0, precision.smallest_normal
    if activation == "relu6":
        high, most = min(high, 6.0), min(most, 6 - 4 * precision.eps)
    return 12582912.0 * unit, low, high, least, most


def gradient_within(gradient: Tensor, mask: Tensor, out: Tensor) -> None:
    """As :func:`lowprec.numerics.triton_activations.gradient_within`; float32 or bfloat16."""
    function = getattr(library(), f"gradient_{NAMES[gradient.dtype]}")
    function(gradient.data_ptr(), mask.data_ptr(), out.data_ptr(), gradient.numel())


def write_codes(values: Tensor, exponent: Tensor, offset: int, out: Tensor) -> None:
    """As :func:`lowprec.numerics.triton_activations.write_codes`."""
    function = getattr(library(), f"codes_{NAMES[values.dtype]}")
    flip, more = _as_signed(out)
    function(values.data_ptr(), out.data_ptr(), values.numel(), scale_of(exponent, inverse=True), offset + more, flip)


def write_values(codes: Tensor, exponent: Tensor, offset: int, out: Tensor) -> None:
    """As :func:`lowprec.numerics.triton_activations.write_values`."""
    function = getattr(library(), f"values_{NAMES[out.dtype]}")
    flip, more = _as_signed(codes)
    function(codes.data_ptr(), out.data_ptr(), codes.numel(), scale_of(exponent), offset + more, flip)


def look_up(values: Tensor, exponent: Tensor, low: int, table: Tensor, out: Tensor) -> Tensor | None:
    """Writes the entries of ``table`` for values on the grid of 2^exponent; returns their places in it, uint8.

    None where a value is not on the grid, or its code not one of low … low + 255; ``out`` is of no use then. values: dense;
    out: of their dtype and strides. table: [256], float32, what ``out`` holds exactly.
    """
    places = kept_like(values, torch.uint8)
    function = getattr(library(), f"look_up_{NAMES[values.dtype]}")
    inverse = scale_of(exponent, inverse=True)
    lost = function(
        values.data_ptr(), places.data_ptr(), out.data_ptr(), values.numel(), inverse, low, table.data_ptr()
    )
    return None if lost else places


def times_slopes(gradient: Tensor, places: Tensor, slopes: Tensor, out: Tensor) -> None:
    """gradient · slopes[places]; dense, in one order; ``out`` may be ``gradient``. slopes: [256], float32."""
    function = getattr(library(), f"times_slopes_{NAMES[gradient.dtype]}")
    function(gradient.data_ptr(), places.data_ptr(), out.data_ptr(), gradient.numel(), slopes.data_ptr())


def _as_signed(codes: Tensor) -> tuple[int, int]:
    """An unsigned byte is the signed one with the first bit turned, and 128 more."""
    return (-128, 128) if codes.dtype == torch.uint8 else (0, 0)
