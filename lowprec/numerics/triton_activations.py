"""Triton kernels of activations: one pass over memory each way, equal to what PyTorch's operators give, bit by bit.

Forward reads the values, and those that are added to them, and writes what lies on the grid and one bit an element; backward
reads the gradient and the bits. Codes are made of what lies on the grid, and that again of them. What is rounded is computed in
float32, which holds every bfloat16; nothing is contracted to fused multiply-adds. The exponent is read on the device, so that
nothing waits for it and CUDA graphs can replay the kernels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowprec.numerics.triton_arithmetic import clamp, power_of_two, round_to_multiples, to_bfloat16

# Elements of a program; eight of bfloat16 are what a thread loads at once.
BLOCK = 2048
WARPS = 4
ACTIVATIONS = {"": 0, "relu": 1, "relu6": 2}


def quantize_activation(
    values: Tensor,
    addend: Tensor | None,
    exponent: Tensor,
    ends: tuple[float, float, float, float],
    activation: str,
    out: Tensor,
    masked: bool,
) -> Tensor | None:
    """Writes clamp(round_half_even(f(x + a) / s), low, high) · s to ``out``; the bits of those with a gradient, where asked for.

    values, and addend where there is one: float32 or bfloat16, dense; out: of the same strides and dtype, or ``values``.
    exponent: of s = 2^exponent, int32. ends: low, high, and in units of s what has a gradient at least and at most.
    activation: f, a key of ``ACTIVATIONS``.
    Returns uint8 [⌈elements / 8⌉], the first element in the lowest bit, in the order of memory.
    """
    size = values.numel()
    mask = torch.empty(-(-size // 8) if masked else 0, dtype=torch.uint8, device=values.device)
    if size:
        low, high, least, most = ends
        precision = torch.finfo(values.dtype)
        with torch.cuda.device_of(values):
            quantize_kernel[(triton.cdiv(size, BLOCK),)](
                *(values, values if addend is None else addend, out, mask, exponent, size, low, high, least, most),
                # In dtype's own spacing: the largest number that ReLU6 passes with a gradient, and the least that ReLU does.
                *(6 - 4 * precision.eps, precision.smallest_normal),
                ADDS=addend is not None,
                ACTIVATION=ACTIVATIONS[activation],
                MASKED=masked,
                BLOCK=BLOCK,
                num_warps=WARPS,
                enable_fp_fusion=False,
            )
    return mask if masked else None


def gradient_within(gradient: Tensor, mask: Tensor, out: Tensor) -> None:
    """Writes ``gradient`` where the bits of ``mask``, from :func:`quantize_activation`, are set, and zeros elsewhere.

    gradient and out: any floating-point dtype, of the strides that the values had.
    """
    size = gradient.numel()
    if size:
        with torch.cuda.device_of(gradient):
            gradient_kernel[(triton.cdiv(size, BLOCK),)](gradient, out, mask, size, BLOCK=BLOCK, num_warps=WARPS)


def write_codes(values: Tensor, exponent: Tensor, offset: int, out: Tensor) -> None:
    """Writes values / 2^exponent - offset to ``out``, int8 or uint8.

    values: on that grid; float32 or bfloat16, dense, of the same strides.
    """
    size = values.numel()
    if size:
        with torch.cuda.device_of(values):
            codes_kernel[(triton.cdiv(size, BLOCK),)](
                values, out, exponent, size, OFFSET=offset, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False
            )


def write_values(codes: Tensor, exponent: Tensor, offset: int, out: Tensor) -> None:
    """Writes (codes + offset) · 2^exponent to ``out``, float32 or bfloat16; codes: int8 or uint8, dense, of the same strides."""
    size = codes.numel()
    if size:
        with torch.cuda.device_of(codes):
            values_kernel[(triton.cdiv(size, BLOCK),)](
                codes, out, exponent, size, OFFSET=offset, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False
            )


@triton.jit
def quantize_kernel(
    values: tl.tensor,
    addend: tl.tensor,
    out: tl.tensor,
    mask: tl.tensor,
    exponent: tl.tensor,
    size: tl.tensor,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    BELOW_SIX: tl.constexpr,
    TINY: tl.constexpr,
    ADDS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program: BLOCK elements as they lie in memory."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    places = start + tl.arange(0, BLOCK)
    exists = places < size
    loaded = tl.load(values + places, mask=exists, other=0.0)
    x = loaded.to(tl.float32)
    if ADDS:
        x += tl.load(addend + places, mask=exists, other=0.0).to(tl.float32)
        if loaded.dtype == tl.bfloat16:
            x = to_bfloat16(x)
    unit = power_of_two(tl.load(exponent))
    smallest = LOW * unit
    largest = HIGH * unit
    least = LEAST * unit
    most = MOST * unit
    if ACTIVATION >= 1:
        smallest = unit * 0.0
        least = unit * 0.0 + TINY
    if ACTIVATION == 2:
        largest = tl.minimum(largest, 6.0)
        most = tl.minimum(most, BELOW_SIX)
    rounded = round_to_multiples(clamp(x, smallest, largest), unit)
    tl.store(out + places, rounded.to(loaded.dtype), mask=exists)
    if MASKED:
        inside = ((x >= least) & (x <= most)).to(tl.int32)
        bits = tl.sum(tl.reshape(inside, (BLOCK // 8, 8)) << tl.arange(0, 8)[None, :], axis=1)
        byte = start // 8 + tl.arange(0, BLOCK // 8)
        tl.store(mask + byte, bits.to(tl.uint8), mask=byte * 8 < size)


@triton.jit
def gradient_kernel(gradient: tl.tensor, out: tl.tensor, mask: tl.tensor, size: tl.tensor, BLOCK: tl.constexpr) -> None:
    """One program: BLOCK elements as they lie in memory."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = places < size
    incoming = tl.load(gradient + places, mask=exists, other=0.0)
    byte = tl.load(mask + places // 8, mask=exists, other=0)
    inside = (byte.to(tl.int32) >> (places % 8).to(tl.int32)) & 1
    tl.store(out + places, tl.where(inside == 1, incoming, 0.0), mask=exists)


@triton.jit
def codes_kernel(
    values: tl.tensor, out: tl.tensor, exponent: tl.tensor, size: tl.tensor, OFFSET: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """One program: BLOCK elements as they lie in memory."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = places < size
    x = tl.load(values + places, mask=exists, other=0.0).to(tl.float32)
    tl.store(out + places, (x * power_of_two(-tl.load(exponent)) - OFFSET).to(out.dtype.element_ty), mask=exists)


@triton.jit
def values_kernel(
    codes: tl.tensor, out: tl.tensor, exponent: tl.tensor, size: tl.tensor, OFFSET: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """One program: BLOCK elements as they lie in memory."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = places < size
    code = tl.load(codes + places, mask=exists, other=0).to(tl.float32)
    tl.store(out + places, (code + OFFSET) * power_of_two(tl.load(exponent)), mask=exists)
