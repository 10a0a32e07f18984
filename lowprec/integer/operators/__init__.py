"""Integer operators: codes in, codes out, int32 tensors of 8-bit values; no floating-point arithmetic between them.

Obviously right rather than fast. Each operator's ``attributes`` are what a file needs, beside a layer's tensors, to build
it again.
"""

from __future__ import annotations

from lowprec.integer.operators.attention import FloatLayerNorm, FloatOperator, FloatSoftmax, IntegerMatmul
from lowprec.integer.operators.base import Grid, IntegerOperator
from lowprec.integer.operators.elementwise import (
    IntegerAdd,
    IntegerConcatenation,
    IntegerInput,
    IntegerLookup,
    IntegerMultiply,
    IntegerReLU,
)
from lowprec.integer.operators.layers import (
    IntegerConv2d,
    IntegerLayer,
    IntegerLinear,
    IntegerMultiplyAdd,
    logits_of,
    sum_exponents_like,
)
from lowprec.integer.operators.movement import (
    IntegerConstant,
    IntegerExpand,
    IntegerFlatten,
    IntegerGather,
    IntegerMovement,
    IntegerPad,
    IntegerPermute,
    IntegerReshape,
    IntegerRoll,
    IntegerSlice,
    IntegerUpsample,
)
from lowprec.integer.operators.pooling import IntegerAveragePool, IntegerBilinear, IntegerMaxPool

__all__ = [
    "OPERATORS",
    "FloatLayerNorm",
    "FloatOperator",
    "FloatSoftmax",
    "Grid",
    "IntegerAdd",
    "IntegerAveragePool",
    "IntegerBilinear",
    "IntegerConcatenation",
    "IntegerConstant",
    "IntegerConv2d",
    "IntegerExpand",
    "IntegerFlatten",
    "IntegerGather",
    "IntegerInput",
    "IntegerLayer",
    "IntegerLinear",
    "IntegerLookup",
    "IntegerMatmul",
    "IntegerMaxPool",
    "IntegerMovement",
    "IntegerMultiply",
    "IntegerMultiplyAdd",
    "IntegerOperator",
    "IntegerPad",
    "IntegerPermute",
    "IntegerReLU",
    "IntegerReshape",
    "IntegerRoll",
    "IntegerSlice",
    "IntegerUpsample",
    "logits_of",
    "sum_exponents_like",
]

OPERATORS: dict[str, type[IntegerOperator]] = {
    operator.KIND: operator
    for operator in (
        IntegerInput,
        IntegerConv2d,
        IntegerLinear,
        IntegerMultiplyAdd,
        IntegerAdd,
        IntegerMultiply,
        IntegerConcatenation,
        IntegerAveragePool,
        IntegerMaxPool,
        IntegerBilinear,
        IntegerReLU,
        IntegerLookup,
        IntegerFlatten,
        IntegerReshape,
        IntegerPermute,
        IntegerSlice,
        IntegerGather,
        IntegerPad,
        IntegerUpsample,
        IntegerRoll,
        IntegerConstant,
        IntegerExpand,
        IntegerMatmul,
        FloatSoftmax,
        FloatLayerNorm,
    )
}
