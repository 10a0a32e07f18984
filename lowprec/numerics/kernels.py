"""What this process's oneDNN kernels compute exactly, found out by running them: flags of the CPU tell less.

``ONEDNN_MAX_CPU_ISA`` limits oneDNN but not ``torch.cpu``'s flags, and without VNNI instructions (AVX2, plain AVX-512) the
kernels add pairs of u8×s8 products in saturating 16 bits: exact while |c| ≤ 64, wrong integers for full-range weights.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

# Whatever the default device is.
CPU = torch.device("cpu")
# 2 · 255 · 64 = 32640 fits int16.
SAFE_MAGNITUDE = 64
# (inputs, outputs, groups, kernel): oneDNN picks other kernels for images, for one channel a group, and for few groups.
SHAPES = {
    "dense": ((3, 16, 1, 7), (64, 64, 1, 3), (64, 96, 1, 1), (20, 12, 1, 5)),
    "grouped": ((32, 32, 2, 3), (24, 36, 2, 3), (128, 128, 4, 3)),
    "depthwise": ((32, 32, 32, 3), (24, 24, 24, 5), (7, 7, 7, 3)),
}


@lru_cache(maxsize=64)
def convolves_exactly(kind: str, magnitude: int) -> bool:
    """Whether integer convolutions of a kind (a key of ``SHAPES``) are exact for weights of up to that magnitude."""
    return all(_convolution_agrees(*shape, magnitude=magnitude) for shape in SHAPES[kind])


@lru_cache(maxsize=64)
def multiplies_exactly(magnitude: int) -> bool:
    """Whether integer matrix products are exact for weights of up to that magnitude."""
    generator = torch.Generator().manual_seed(0)
    for rows, inputs, outputs in ((1, 64, 16), (8, 256, 40), (5, 30, 7)):
        x = _bytes(generator, rows, inputs)
        weight = _weights(generator, magnitude, outputs, inputs)
        expected = (x.double() - 128) @ weight.double().t()
        try:
            sums = _product(x, weight, torch.float32)
        except (RuntimeError, AttributeError):
            return False
        if not torch.equal(sums.double(), expected):
            return False
    return True


@lru_cache(maxsize=4)
def writes(dtype: torch.dtype) -> bool:
    """Whether integer products can be had in that dtype, rounded once, from the kernels that give them in float32.

    Elsewhere oneDNN has no more than a loop for bfloat16, hundreds of times as slow.
    """
    if dtype is not torch.bfloat16:
        return dtype is torch.float32
    # Private: a missing one counts as "not supported".
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    if not supported():
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight = _bytes(generator, 8, 256), _weights(generator, SAFE_MAGNITUDE, 40, 256)
    expected, rounded = (_product(x, weight, written) for written in (torch.float32, torch.bfloat16))
    return torch.equal(rounded, expected.to(torch.bfloat16))


def _product(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """(x − 128) · weightᵀ of bytes [rows, inputs] and int8 weights [outputs, inputs]."""
    packed = torch.ops.onednn.qlinear_prepack.default(weight, list(x.shape))
    ones, zeros = (
        torch.ones(len(weight), dtype=torch.float32, device=CPU),
        weight.new_zeros(len(weight), dtype=torch.int32),
    )
    result: Tensor = torch.ops.onednn.qlinear_pointwise.default(
        x, 1.0, 128, packed, ones, zeros, None, 1.0, 0, dtype, "none", [], ""
    )
    return result


def _convolution_agrees(inputs: int, outputs: int, groups: int, kernel: int, magnitude: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    padding = kernel // 2
    x = _bytes(generator, 2, inputs, 9, 10).contiguous(memory_format=torch.channels_last)
    weight = _weights(generator, magnitude, outputs, inputs // groups, kernel, kernel)
    # Shifts that leave ties: half of the odd multiples of 2^(shift − 1) must round down to even.
    scale = 2.0 ** -torch.randint(5, 12, (outputs,), generator=generator, device=CPU).float()
    bias = torch.randint(-999, 999, (outputs,), generator=generator, device=CPU).float()
    geometry = ([1, 1], [padding, padding], [1, 1], groups)
    for zero, output_zero in ((0, 0), (128, 128)):
        sums = functional.conv2d(x.double() - zero, weight.double(), bias.double(), 1, padding, 1, groups)
        expected = (sums * scale.double().view(-1, 1, 1)).round().add(output_zero).clamp(0, 255)
        try:
            packed = torch.ops.onednn.qconv_prepack.default(weight, scale, 1.0, zero, *geometry, list(x.shape))
            zeros = weight.new_zeros(outputs, dtype=torch.int32)
            found = torch.ops.onednn.qconv2d_pointwise.default(
                x,
                1.0,
                zero,
                packed,
                scale,
                zeros,
                bias * scale,
                *geometry,
                1.0,
                output_zero,
                torch.uint8,
                "none",
                [],
                "",
            )
        except (RuntimeError, AttributeError):
            return False
        if not torch.equal(found.double(), expected):
            return False
    return True


def _bytes(generator: torch.Generator, *shape: int) -> Tensor:
    """Mostly 255, so that pairs of products saturate where they can."""
    x = torch.randint(0, 256, shape, generator=generator, device=CPU)
    return torch.where(_mostly(generator, shape), 255, x).to(torch.uint8)


def _weights(generator: torch.Generator, magnitude: int, *shape: int) -> Tensor:
    """Mostly of the largest magnitude, with runs of one sign."""
    weight = torch.randint(-magnitude, magnitude + 1, shape, generator=generator, device=CPU)
    signs = 1 - 2 * torch.randint(0, 2, (*shape[:1], *[1] * (len(shape) - 1)), generator=generator, device=CPU)
    return torch.where(_mostly(generator, shape), magnitude * signs, weight).clamp(-128, 127).char()


def _mostly(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float32, device=CPU) < 0.7
