"""A Triton kernel of matrix products of quantized values on a GPU's 8-bit tensor cores, exact as the integers are."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowprec.numerics.triton_arithmetic import power_of_two, to_bfloat16

# Rows and columns of a program, and bytes of summands that it loads at once: two such stages and the codes that are made of them
# fit 99 KiB, what the smallest of today's GPUs have for a program.
ROWS, COLUMNS = 128, 128
BYTES_OF_SUMMANDS = 128
OPTIONS = {"num_warps": 8, "num_stages": 2, "enable_fp_fusion": False}


def multiply_codes(
    values: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    exponent: Tensor,
    weight_exponent: Tensor,
    offset: int,
    out: Tensor,
) -> None:
    """Writes values · weightᵀ + bias to ``out`` [M, O], float32 or bfloat16, contiguous: the exact sums,
    rounded once, or with a bias to float32 and then to the dtype.

    values: [M, I], multiples of 2^exponent, whose codes are integers of offset - 128 … offset + 127; weight: [O, I], integers of
    -128 … 127 times 2^weight_exponent [O]; both of one dtype, bfloat16 or float32. bias: [O], float32. exponent and
    weight_exponent: int32. Sums of codes, Σ q·c, are integers of 32 bits; beyond 2^24 they are rounded to float32 first. A row of
    values, or of the weight, with a NaN in it gives NaN.
    """
    rows, inputs = values.shape
    outputs = len(weight)
    if not out.numel():
        return
    # Side by side, as channels-last images and linear layers have them.
    values = values if values.stride(1) == 1 else values.contiguous()
    weight = weight.contiguous()
    # Exact in whatever order: multiples of one power of two, below 2^24 of it.
    sums = weight.sum(1, dtype=torch.float32)
    with torch.cuda.device_of(values):
        product_kernel[(triton.cdiv(rows, ROWS) * triton.cdiv(outputs, COLUMNS),)](
            *(values, weight, sums, sums if bias is None else bias, out, exponent, weight_exponent),
            *(rows, outputs, inputs, values.stride(0)),
            **constants_of(values.dtype, offset, bias is not None),
            **OPTIONS,
        )


def constants_of(dtype: torch.dtype, offset: int, biased: bool) -> dict[str, int | bool]:
    """What the kernel is compiled for."""
    return {
        "OFFSET": offset,
        "BIASED": biased,
        "ROWS": ROWS,
        "COLUMNS": COLUMNS,
        "SUMMANDS": BYTES_OF_SUMMANDS // dtype.itemsize,
    }


@triton.jit
def product_kernel(
    values: tl.tensor,
    weight: tl.tensor,
    weight_sums: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    exponent: tl.tensor,
    weight_exponent: tl.tensor,
    rows: tl.tensor,
    outputs: tl.tensor,
    inputs: tl.tensor,
    values_m: tl.tensor,
    OFFSET: tl.constexpr,
    BIASED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SUMMANDS: tl.constexpr,
) -> None:
    """One program: ROWS x COLUMNS of the result; those of the same rows follow each other, and find them in the cache."""
    columns = tl.cdiv(outputs, COLUMNS)
    row = (tl.program_id(0) // columns).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % columns) * COLUMNS + tl.arange(0, COLUMNS)
    summand = tl.arange(0, SUMMANDS)
    unit = tl.load(exponent)
    units = tl.load(weight_exponent + column, mask=column < outputs, other=0)
    # They make integers of multiples.
    to_codes = power_of_two(-unit)
    to_integers = power_of_two(-units)
    sums = tl.zeros((ROWS, COLUMNS), tl.int32)
    # Zeros, or NaN, which no integer says.
    poison = tl.zeros((ROWS,), tl.float32)
    for start in range(0, inputs, SUMMANDS):
        k = start + summand
        x = tl.load(
            values + row[:, None] * values_m + k[None, :],
            mask=(row < rows)[:, None] & (k < inputs)[None, :],
            other=0.0,
        ).to(tl.float32)
        w = tl.load(
            weight + column[None, :] * inputs + k[:, None],
            mask=(column < outputs)[None, :] & (k < inputs)[:, None],
            other=0.0,
        ).to(tl.float32)
        # Beyond the last summand the weight is 0, whatever the code.
        codes = (x * to_codes - OFFSET).to(tl.int8)
        integers = (w * to_integers[None, :]).to(tl.int8)
        sums = tl.dot(codes, integers, sums)
        poison += tl.sum(x * 0.0, axis=1)
    of_weights = tl.load(weight_sums + column, mask=column < outputs, other=0.0)
    # What was taken off the codes, OFFSET, counts as often as there are weights.
    total = (sums + ((of_weights * to_integers).to(tl.int32) * OFFSET)[None, :]).to(tl.float32)
    # Two factors: each is a normal number whatever the exponents.
    total = total * power_of_two(unit)
    total = total * power_of_two(units)[None, :]
    if BIASED:
        total += tl.load(bias + column, mask=column < outputs, other=0.0)[None, :]
    total += poison[:, None] + (of_weights * 0.0)[None, :]
    if out.dtype.element_ty == tl.bfloat16:
        total = to_bfloat16(total)
    place = out + row[:, None] * outputs + column[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=(row < rows)[:, None] & (column < outputs)[None, :])
