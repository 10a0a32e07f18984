"""Triton kernels of weights: a descent step of the scales of ternary and 4-bit clusters, and quantized values, 8-bit ones too.

One launch each for a layer, where PyTorch's operators take dozens. Scales, codes, mantissas
and exponents are what these give, bit by bit: sums over a cluster are of float64, rounded once, in whatever order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowprec.numerics.clusters import ClusterLayout, with_positions
from lowprec.numerics.effective_codes import CODE_SHIFT, MANTISSA_LIMIT
from lowprec.numerics.fixed_point import MAXIMUM_EXPONENT, MINIMUM_EXPONENT
from lowprec.numerics.fixed_point import SIGNED_8_BIT as EIGHT_BIT_CODES
from lowprec.numerics.memory import is_dense
from lowprec.numerics.solvers import FOUR_BIT_LIMIT
from lowprec.numerics.triton_arithmetic import clamp, power_of_two, round_half_even

# Weights of a program, several clusters; one cluster of more is a program's own.
BLOCK = 2048
# Beyond that many a cluster does not fit a program's registers.
LARGEST_CLUSTER = 8192
# Weights of an output channel, and its scales, that are looked at at once.
ROW_BLOCK = 1024
SCALES = 512
# No fused multiply-adds: they round once where PyTorch's operators round twice.
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


def fits(layout: ClusterLayout) -> bool:
    """Whether clusters of this size are for the kernels."""
    return layout.weights_per_cluster <= LARGEST_CLUSTER


def descend(weight: Tensor, scale: Tensor, threshold: Tensor | None, layout: ClusterLayout) -> None:
    """One descent step, in place, of ``scale`` and, of ternary weights, ``threshold``.

    Both are of ``layout.scale_shape``, with equal strides. The step is that of
    :func:`lowprec.numerics.solvers.descend_ternary`, or without a threshold ``descend_four_bit``.
    """
    w_OIP = with_positions(weight)
    with torch.cuda.device_of(weight):
        descend_kernel[_grid(layout)](
            *(w_OIP, scale, scale if threshold is None else threshold),
            *(*w_OIP.stride(), *_strides(scale), *_sizes(layout)),
            **constants_of(layout, threshold),
            **OPTIONS,
        )


def quantize_weight(
    weight: Tensor, scale: Tensor, threshold: Tensor | None, layout: ClusterLayout, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Values c · 2^e of ``weight`` in ``dtype``, in its shape and strides, and the exponents e [O], int32.

    scale, and of ternary weights threshold: of ``layout.scale_shape``, with equal strides.
    """
    w_OIP = with_positions(weight)
    quantized = torch.empty_like(w_OIP, dtype=dtype)
    exponent = torch.empty(len(weight), dtype=torch.int32, device=weight.device)
    with torch.cuda.device_of(weight):
        quantize_kernel[_grid(layout)](
            *(w_OIP, scale, scale if threshold is None else threshold, quantized, exponent),
            *(*w_OIP.stride(), *_strides(scale), *_sizes(layout), *quantized.stride()),
            **constants_of(layout, threshold),
            **constants_of_format(threshold),
            **OPTIONS,
        )
    return quantized.view(weight.shape), exponent


def quantize_eight_bit(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values c · 2^e of 8-bit ``weight`` in ``dtype``, its shape and strides, and the exponents e [O], int32, of least error.

    :func:`lowprec.numerics.solvers.solve_eight_bit` and ``eight_bit_codes``.
    """
    # Both orders of memory keep an output channel together.
    weight = weight.detach() if is_dense(weight) else weight.detach().contiguous()
    quantized = torch.empty_like(weight, dtype=dtype)
    exponent = torch.empty(len(weight), dtype=torch.int32, device=weight.device)
    with torch.cuda.device_of(weight):
        eight_bit_kernel[(len(weight),)](
            *(weight, quantized, exponent, weight[0].numel()), **constants_of_eight_bits(weight), **OPTIONS
        )
    return quantized, exponent


def constants_of_eight_bits(weight: Tensor) -> dict[str, int]:
    """What :func:`eight_bit_kernel` is compiled for."""
    return {
        "LOWEST_CODE": EIGHT_BIT_CODES.low,
        "HIGHEST_CODE": EIGHT_BIT_CODES.high,
        "LOWEST": MINIMUM_EXPONENT,
        "HIGHEST": MAXIMUM_EXPONENT,
        "BLOCK": min(ROW_BLOCK, triton.next_power_of_2(weight[0].numel())),
    }


def _strides(scale: Tensor) -> tuple[int, int, int]:
    """Of output channels, clusters along the input channels, and positions."""
    return scale.stride(0), scale.stride(1), scale.stride(3)


def _grid(layout: ClusterLayout) -> tuple[int, int]:
    clusters = layout.clusters // layout.weight_shape[0]
    return layout.weight_shape[0], triton.cdiv(clusters, _clusters_of_program(layout))


def _clusters_of_program(layout: ClusterLayout) -> int:
    return max(1, BLOCK // triton.next_power_of_2(layout.weights_per_cluster))


def _sizes(layout: ClusterLayout) -> tuple[int, int]:
    """Input channels, and clusters of an output channel: not compiled for, so that most layers share a kernel."""
    return layout.weight_shape[1], layout.clusters // layout.weight_shape[0]


def constants_of(layout: ClusterLayout, threshold: Tensor | None) -> dict[str, int | bool]:
    """What both kernels are compiled for."""
    return {
        "POSITIONS": layout.positions,
        "MEMBERS": layout.members,
        "SHARED": layout.shares_positions,
        "TERNARY": threshold is not None,
        "CODE_LIMIT": FOUR_BIT_LIMIT,
        "CLUSTER_BLOCK": _clusters_of_program(layout),
        "MEMBER_BLOCK": triton.next_power_of_2(layout.weights_per_cluster),
    }


def constants_of_format(threshold: Tensor | None) -> dict[str, int]:
    """What :func:`quantize_kernel` is compiled for besides."""
    bits = 4 if threshold is None else 2
    return {
        "SHIFT": CODE_SHIFT[bits],
        "LIMIT": MANTISSA_LIMIT[bits],
        "LOWEST": MINIMUM_EXPONENT,
        "HIGHEST": MAXIMUM_EXPONENT,
        "SCALES": SCALES,
    }


@triton.jit
def _places(
    channels: tl.tensor,
    clusters: tl.tensor,
    POSITIONS: tl.constexpr,
    MEMBERS: tl.constexpr,
    SHARED: tl.constexpr,
    CLUSTER_BLOCK: tl.constexpr,
    MEMBER_BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The program's clusters [C], and of its weights [C, M] the input channel, the position, and whether they exist."""
    cluster = tl.program_id(1) * CLUSTER_BLOCK + tl.arange(0, CLUSTER_BLOCK)
    member = tl.arange(0, MEMBER_BLOCK)[None, :]
    if SHARED:
        channel = cluster[:, None] * MEMBERS + member // POSITIONS
        position = member % POSITIONS + cluster[:, None] * 0
        exists = (member < MEMBERS * POSITIONS) & (channel < channels)
    else:
        channel = (cluster // POSITIONS)[:, None] * MEMBERS + member
        position = (cluster % POSITIONS)[:, None] + member * 0
        exists = (member < MEMBERS) & (channel < channels)
    return cluster, channel, position, exists & (cluster < clusters)[:, None]


@triton.jit
def _places_of_scales(
    cluster: tl.tensor,
    scale_o: tl.tensor,
    scale_g: tl.tensor,
    scale_p: tl.tensor,
    POSITIONS: tl.constexpr,
    SHARED: tl.constexpr,
) -> tl.tensor:
    """Where the scales of these clusters of the program's output channel lie."""
    row = tl.program_id(0).to(tl.int64) * scale_o
    if SHARED:
        return row + cluster * scale_g
    return row + (cluster // POSITIONS) * scale_g + (cluster % POSITIONS) * scale_p


@triton.jit
def _four_bit_codes(w: tl.tensor, scale: tl.tensor, CODE_LIMIT: tl.constexpr) -> tl.tensor:
    """clamp(round_half_even(w / s)), 0 where s is: clamped first, which gives the same."""
    known = scale > 0
    ratio = tl.where(known, tl.div_rn(w, tl.where(known, scale, 1.0) + w * 0), 0.0)
    return round_half_even(clamp(ratio, -CODE_LIMIT, CODE_LIMIT))


@triton.jit
def _sum(values: tl.tensor) -> tl.tensor:
    """Over clusters [C, M], in float64, rounded once: the same in whatever order."""
    return tl.sum(values.to(tl.float64), axis=1).to(tl.float32)


@triton.jit
def descend_kernel(
    weight: tl.tensor,
    scale: tl.tensor,
    threshold: tl.tensor,
    stride_o: tl.tensor,
    stride_i: tl.tensor,
    stride_p: tl.tensor,
    scale_o: tl.tensor,
    scale_g: tl.tensor,
    scale_p: tl.tensor,
    channels: tl.tensor,
    clusters: tl.tensor,
    POSITIONS: tl.constexpr,
    MEMBERS: tl.constexpr,
    SHARED: tl.constexpr,
    TERNARY: tl.constexpr,
    CODE_LIMIT: tl.constexpr,
    CLUSTER_BLOCK: tl.constexpr,
    MEMBER_BLOCK: tl.constexpr,
) -> None:
    """One program: some clusters of one output channel."""
    row = tl.program_id(0).to(tl.int64)
    cluster, channel, position, exists = _places(
        channels, clusters, POSITIONS, MEMBERS, SHARED, CLUSTER_BLOCK, MEMBER_BLOCK
    )
    w = tl.load(weight + row * stride_o + channel * stride_i + position * stride_p, mask=exists, other=0.0)
    w = w.to(tl.float32)
    magnitude = tl.abs(w)
    place = _places_of_scales(cluster, scale_o, scale_g, scale_p, POSITIONS, SHARED)
    old = tl.load(scale + place, mask=cluster < clusters, other=0.0)
    if TERNARY:
        count = tl.maximum(tl.sum(exists.to(tl.float32), axis=1), 1.0)
        mean = tl.div_rn(_sum(magnitude), count)
        half = tl.where(old > 0, old, mean) * 0.5
        support = ((magnitude >= half[:, None]) & exists).to(tl.float32)
        size = tl.sum(support, axis=1)
        of_support = tl.div_rn(_sum(support * magnitude), tl.maximum(size, 1.0))
        found = tl.where(size > 0, of_support, mean)
        reach = tl.where(found > 0, found * 0.5, float("inf"))
        tl.store(threshold + place, reach, mask=cluster < clusters)
    else:
        codes = _four_bit_codes(w, old[:, None], CODE_LIMIT)
        power = tl.sum(codes * codes, axis=1)
        fitted = tl.div_rn(_sum(w * codes), tl.maximum(power, 1.0))
        largest = tl.max(magnitude, axis=1)
        found = tl.where(power > 0, fitted, tl.div_rn(largest, largest * 0 + CODE_LIMIT))
    tl.store(scale + place, found, mask=cluster < clusters)


@triton.jit
def quantize_kernel(
    weight: tl.tensor,
    scale: tl.tensor,
    threshold: tl.tensor,
    quantized: tl.tensor,
    exponents: tl.tensor,
    stride_o: tl.tensor,
    stride_i: tl.tensor,
    stride_p: tl.tensor,
    scale_o: tl.tensor,
    scale_g: tl.tensor,
    scale_p: tl.tensor,
    channels: tl.tensor,
    clusters: tl.tensor,
    to_o: tl.tensor,
    to_i: tl.tensor,
    to_p: tl.tensor,
    POSITIONS: tl.constexpr,
    MEMBERS: tl.constexpr,
    SHARED: tl.constexpr,
    TERNARY: tl.constexpr,
    CODE_LIMIT: tl.constexpr,
    CLUSTER_BLOCK: tl.constexpr,
    MEMBER_BLOCK: tl.constexpr,
    SHIFT: tl.constexpr,
    LIMIT: tl.constexpr,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    SCALES: tl.constexpr,
) -> None:
    """One program: some clusters of one output channel, whose exponent each of its programs finds for itself."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((SCALES,), tl.float32)
    for start in range(0, clusters, SCALES):
        some = start + tl.arange(0, SCALES)
        place = _places_of_scales(some, scale_o, scale_g, scale_p, POSITIONS, SHARED)
        largest = tl.maximum(largest, tl.abs(tl.load(scale + place, mask=some < clusters, other=0.0)))
    exponent = _exponent_for(tl.max(largest, axis=0) * (1 << SHIFT), LIMIT, LOWEST, HIGHEST)
    if tl.program_id(1) == 0:
        tl.store(exponents + row, exponent)
    cluster, channel, position, exists = _places(
        channels, clusters, POSITIONS, MEMBERS, SHARED, CLUSTER_BLOCK, MEMBER_BLOCK
    )
    w = tl.load(weight + row * stride_o + channel * stride_i + position * stride_p, mask=exists, other=0.0)
    w = w.to(tl.float32)
    place = _places_of_scales(cluster, scale_o, scale_g, scale_p, POSITIONS, SHARED)
    own = tl.load(scale + place, mask=cluster < clusters, other=0.0)
    mantissa = round_half_even(own * power_of_two(SHIFT - exponent))
    if TERNARY:
        reach = tl.load(threshold + place, mask=cluster < clusters, other=0.0)
        support = tl.abs(w) >= reach[:, None]
        effective = tl.where(support & (w > 0), 1.0, tl.where(support & (w < 0), -1.0, 0.0)) * mantissa[:, None]
    else:
        codes = _four_bit_codes(w, own[:, None], CODE_LIMIT)
        effective = round_half_even(codes * (mantissa * power_of_two(exponent * 0 - SHIFT))[:, None])
    value = effective * power_of_two(exponent)
    tl.store(quantized + row * to_o + channel * to_i + position * to_p, value, mask=exists)


@triton.jit
def _exponent_for(largest: tl.tensor, LIMIT: tl.constexpr, LOWEST: tl.constexpr, HIGHEST: tl.constexpr) -> tl.tensor:
    """:func:`lowprec.numerics.fixed_point.exponent_for` of one float32."""
    wide = largest.to(tl.float64)
    exponent = ((wide / LIMIT).to(tl.int64, bitcast=True) >> 52) - 1022
    exponent = tl.minimum(tl.maximum(exponent, LOWEST), HIGHEST)
    smaller = tl.maximum(exponent - 1, LOWEST)
    scaled = wide * ((1023 - smaller) << 52).to(tl.float64, bitcast=True)
    # The last place of 1.5 · 2^52 is one.
    fits = (scaled + 6755399441055744.0) - 6755399441055744.0 <= LIMIT
    exponent = tl.where(fits, smaller, exponent)
    return tl.where(wide > 0, exponent, LOWEST).to(tl.int32)


@triton.jit
def eight_bit_kernel(
    weight: tl.tensor,
    quantized: tl.tensor,
    exponents: tl.tensor,
    size: tl.tensor,
    LOWEST_CODE: tl.constexpr,
    HIGHEST_CODE: tl.constexpr,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program: an output channel, of ``size`` weights that lie together."""
    row = tl.program_id(0).to(tl.int64) * size
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        place = start + tl.arange(0, BLOCK)
        w = tl.load(weight + row + place, mask=place < size, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(w))
    fitting = _exponent_for(tl.max(largest, axis=0), HIGHEST_CODE, LOWEST, HIGHEST)
    first = tl.zeros((BLOCK,), tl.float64)
    second = tl.zeros((BLOCK,), tl.float64)
    third = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, size, BLOCK):
        place = start + tl.arange(0, BLOCK)
        w = tl.load(weight + row + place, mask=place < size, other=0.0).to(tl.float32)
        first += _squared_error(w, fitting, LOWEST_CODE, HIGHEST_CODE)
        second += _squared_error(w, fitting - 1, LOWEST_CODE, HIGHEST_CODE)
        third += _squared_error(w, fitting - 2, LOWEST_CODE, HIGHEST_CODE)
    least = tl.sum(first, axis=0)
    # Of equal errors, the larger exponent's.
    error = tl.sum(second, axis=0)
    exponent = tl.where(error < least, fitting - 1, fitting)
    least = tl.minimum(least, error)
    exponent = tl.where(tl.sum(third, axis=0) < least, fitting - 2, exponent)
    tl.store(exponents + tl.program_id(0), exponent)
    for start in range(0, size, BLOCK):
        place = start + tl.arange(0, BLOCK)
        w = tl.load(weight + row + place, mask=place < size, other=0.0).to(tl.float32)
        tl.store(quantized + row + place, _eight_bits(w, exponent, LOWEST_CODE, HIGHEST_CODE), mask=place < size)


@triton.jit
def _eight_bits(w: tl.tensor, exponent: tl.tensor, LOWEST_CODE: tl.constexpr, HIGHEST_CODE: tl.constexpr) -> tl.tensor:
    """The nearest values of 8-bit codes, half to even: clamped first, which gives the same."""
    return round_half_even(clamp(w * power_of_two(-exponent), LOWEST_CODE, HIGHEST_CODE)) * power_of_two(exponent)


@triton.jit
def _squared_error(
    w: tl.tensor, exponent: tl.tensor, LOWEST_CODE: tl.constexpr, HIGHEST_CODE: tl.constexpr
) -> tl.tensor:
    error = _eight_bits(w, exponent, LOWEST_CODE, HIGHEST_CODE) - w
    return (error * error).to(tl.float64)
