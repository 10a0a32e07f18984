"""A Triton kernel of matrix products of quantized values on a GPU's 8-bit tensor cores, exact as the integers are."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowprec.numerics.triton_activations import to_bfloat16

# Rows, columns and summands of a program at once.
ROWS, COLUMNS, SUMMANDS = 128, 128, 64
OPTIONS = {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": False}


def multiply_codes(
    values: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    exponent: Tensor,
    weight_exponent: Tensor,
    offset: int,
    dtype: torch.dtype,
) -> Tensor:
    """values · weightᵀ + bias [M, O] in ``dtype``, float32 or bfloat16, rounded once.

    values: [M, I], multiples of 2^exponent, whose codes are integers of offset - 128 … offset + 127; weight: [O, I], integers of
    -128 … 127 times 2^weight_exponent [O]; bias: [O], float32. exponent and weight_exponent: int32. Sums of codes, Σ q·c, are
    integers of 32 bits; beyond 2^24 they are rounded to float32 once.
    """
    rows, inputs = values.shape
    outputs = len(weight)
    result = torch.empty(rows, outputs, dtype=dtype, device=values.device)
    if result.numel():
        with torch.cuda.device_of(values):
            product_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(outputs, COLUMNS))](
                *(values, weight, weight if bias is None else bias, result, exponent, weight_exponent),
                *(rows, outputs, inputs, values.stride(0), values.stride(1), weight.stride(0), weight.stride(1)),
                OFFSET=offset,
                BIASED=bias is not None,
                ROWS=ROWS,
                COLUMNS=COLUMNS,
                SUMMANDS=SUMMANDS,
                **OPTIONS,
            )
    return result


@triton.jit
def product_kernel(  # type: ignore[no-untyped-def]
    values,
    weight,
    bias,
    result,
    exponent,
    weight_exponent,
    rows,
    outputs,
    inputs,
    values_m,
    values_k,
    weight_n,
    weight_k,
    OFFSET: tl.constexpr,
    BIASED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SUMMANDS: tl.constexpr,
):
    """One program: ROWS x COLUMNS of the result."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    summand = tl.arange(0, SUMMANDS)
    unit = tl.load(exponent)
    units = tl.load(weight_exponent + column, mask=column < outputs, other=0)
    # From the bits of a float32: 2^-e makes integers of multiples.
    to_codes = ((127 - unit) << 23).to(tl.float32, bitcast=True)
    to_integers = ((127 - units) << 23).to(tl.float32, bitcast=True)
    sums = tl.zeros((ROWS, COLUMNS), tl.int32)
    of_weights = tl.zeros((COLUMNS,), tl.int32)
    for start in range(0, inputs, SUMMANDS):
        k = start + summand
        x = tl.load(
            values + row[:, None] * values_m + k[None, :] * values_k,
            mask=(row < rows)[:, None] & (k < inputs)[None, :],
            other=0.0,
        )
        w = tl.load(
            weight + column[None, :] * weight_n + k[:, None] * weight_k,
            mask=(column < outputs)[None, :] & (k < inputs)[:, None],
            other=0.0,
        )
        codes = (x.to(tl.float32) * to_codes - OFFSET).to(tl.int8)
        integers = (w.to(tl.float32) * to_integers[None, :]).to(tl.int8)
        sums = tl.dot(codes, integers, sums)
        of_weights += tl.sum(integers.to(tl.int32), axis=0)
    # What was taken off the codes, OFFSET, counts as often as there are weights.
    total = (sums + OFFSET * of_weights[None, :]).to(tl.float32)
    # Two factors: each is a normal number whatever the exponents.
    total = total * ((unit + 127) << 23).to(tl.float32, bitcast=True)
    total = total * ((units + 127) << 23).to(tl.float32, bitcast=True)[None, :]
    if BIASED:
        total += tl.load(bias + column, mask=column < outputs, other=0.0)[None, :]
    if result.dtype.element_ty == tl.bfloat16:
        total = to_bfloat16(total)
    place = result + row[:, None] * outputs + column[None, :]
    tl.store(place, total.to(result.dtype.element_ty), mask=(row < rows)[:, None] & (column < outputs)[None, :])
