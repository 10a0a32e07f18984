"""Integer operators: codes in, codes out, int32 tensors of 8-bit values; no floating-point arithmetic between them.

Obviously right rather than fast. Each operator's ``attributes`` are what a file needs, beside a layer's tensors, to build
it again.
"""

from __future__ import annotations

from lowprec.integer.operators.base import Grid, IntegerOperator
from lowprec.integer.operators.elementwise import IntegerAdd, IntegerInput, IntegerReLU
from lowprec.integer.operators.layers import IntegerConv2d, IntegerLayer, IntegerLinear, logits_of
from lowprec.integer.operators.movement import IntegerFlatten
from lowprec.integer.operators.pooling import IntegerAveragePool, IntegerMaxPool

__all__ = [
    "OPERATORS",
    "Grid",
    "IntegerAdd",
    "IntegerAveragePool",
    "IntegerConv2d",
    "IntegerFlatten",
    "IntegerInput",
    "IntegerLayer",
    "IntegerLinear",
    "IntegerMaxPool",
    "IntegerOperator",
    "IntegerReLU",
    "logits_of",
]

OPERATORS: dict[str, type[IntegerOperator]] = {
    operator.KIND: operator
    for operator in (
        IntegerInput,
        IntegerConv2d,
        IntegerLinear,
        IntegerAdd,
        IntegerAveragePool,
        IntegerMaxPool,
        IntegerReLU,
        IntegerFlatten,
    )
}
