"""How lookup tables are written in ONNX: as Gather, or as arithmetic where all of a runtime's ways of rounding give the table.

Gather takes any table. Runtimes have no fast kernel for it, so the one function that large tensors meet often, hard-swish,
is written as x · clip(x + 3, 0, 6) / 6 if that gives the table's code for every input code, whichever way a runtime divides
by 6 and adds the zero point.
"""

from __future__ import annotations

import numpy as np
import onnx

from lowprec.export.qdq import SIGNED_ZERO_POINT, QdqGraph, codes_name, values_name, zero_point
from lowprec.integer.model import Step
from lowprec.integer.operators import Grid, IntegerLookup


def write_lookup(graph: QdqGraph, step: Step, operator: IntegerLookup) -> None:
    """The table's codes, and their values."""
    if not is_hard_swish(operator):
        _write_gather(graph, step, operator)
    elif hard_swish_zero_point(operator.input) is None:
        _write_float(graph, step, operator)
    else:
        _write_product(graph, step, operator)


def is_hard_swish(operator: IntegerLookup) -> bool:
    """Whether arithmetic in float32 gives exactly the table, however a runtime does it."""
    if operator.table.dim() != 1 or not operator.input.signed:
        return False
    grid, output = operator.input, operator.output
    codes = np.arange(grid.low, grid.high + 1).astype(np.float32)
    values = codes * np.ldexp(np.float32(1), grid.exponent)
    # 8 bits times at most 10: exact.
    products = values * np.clip(values + np.float32(3), np.float32(0), np.float32(6))
    unit, six = np.ldexp(np.float32(1), output.exponent), np.float32(6)
    quotients = [products / six / unit, products * (np.float32(1) / six) / unit, products / (six * unit)]
    # A fused product multiplies the codes' product by one rounded ratio of scales.
    ratio = np.ldexp(np.float32(1), 2 * grid.exponent) / (six * unit)
    quotients.append(products * np.ldexp(np.float32(1), -2 * grid.exponent) * ratio)
    zero = np.float32(zero_point(output))
    expected = operator.table.numpy()
    return all(
        np.array_equal(np.clip(found, output.low, output.high), expected)
        for quotient in quotients
        for found in (np.rint(quotient), np.rint(quotient + zero) - zero)
    )


def hard_swish_zero_point(grid: Grid) -> int | None:
    """The zero point with which a byte is worth x + 3 instead of x; None if no byte is."""
    if grid.exponent > 0:
        return None
    shifted = SIGNED_ZERO_POINT - (3 << -grid.exponent)
    return shifted if shifted >= 0 else None


def _write_product(graph: QdqGraph, step: Step, operator: IntegerLookup) -> None:
    """x · (x + 3), the second factor cut in codes and read with another zero point; 6 is part of the output's scale."""
    name, source, grid = step.name, step.inputs[0], operator.input
    three = 3 << -grid.exponent
    factor = f"{name}.factor"
    bounds = [
        graph.constant(f"{factor}.{key}", np.array(min(max(code, grid.low), grid.high) + SIGNED_ZERO_POINT, np.uint8))
        for key, code in (("low", -three), ("high", three))
    ]
    graph.node("Clip", [codes_name(source), *bounds], codes_name(factor), f"{factor}.clip")
    inputs = [
        codes_name(factor),
        graph.constant(f"{factor}.scale", np.ldexp(np.float32(1), grid.exponent)),
        graph.constant(f"{factor}.zero_point", np.array(hard_swish_zero_point(grid), np.uint8)),
    ]
    graph.node("DequantizeLinear", inputs, values_name(factor), f"{factor}.dequantize")
    graph.node("Mul", [values_name(source), values_name(factor)], f"{name}.float", name)
    sixfold = [
        f"{name}.float",
        graph.constant(f"{name}.sixfold_scale", np.float32(6) * np.ldexp(np.float32(1), operator.output.exponent)),
        graph.constant(f"{name}.sixfold_zero_point", np.array(zero_point(operator.output), np.uint8)),
    ]
    graph.node("QuantizeLinear", sixfold, codes_name(name), f"{name}.quantize")
    graph.dequantize(name, operator.output)


def _write_float(graph: QdqGraph, step: Step, operator: IntegerLookup) -> None:
    """The same step by step between DequantizeLinear and QuantizeLinear."""
    name, values = step.name, values_name(step.inputs[0])
    constants = {
        key: graph.constant(f"hard_swish.{key}", np.float32(value))
        for key, value in (("zero", 0), ("three", 3), ("six", 6))
    }
    raised = graph.node("Add", [values, constants["three"]], f"{name}.raised")
    factor = graph.node("Clip", [raised, constants["zero"], constants["six"]], f"{name}.factor")
    product = graph.node("Mul", [values, factor], f"{name}.product")
    graph.node("Div", [product, constants["six"]], f"{name}.float", name)
    graph.quantize(name, f"{name}.float", operator.output)


def _write_gather(graph: QdqGraph, step: Step, operator: IntegerLookup) -> None:
    name = step.name
    table = operator.table.numpy().reshape(-1) + zero_point(operator.output)
    graph.constant(f"{name}.table", table.astype(np.uint8))
    # A code with its zero point added is its place in the table, which begins at the lowest code.
    entries = graph.node("Cast", [codes_name(step.inputs[0])], f"{name}.entries", to=onnx.TensorProto.INT32)
    if operator.table.dim() == 2:
        shape = [1] * len(graph.shapes[step.inputs[0]])
        shape[1] = -1
        offsets = np.arange(len(operator.table), dtype=np.int32) * operator.table.shape[1]
        graph.constant(f"{name}.offsets", offsets.reshape(shape))
        entries = graph.node("Add", [entries, f"{name}.offsets"], f"{name}.channel_entries")
    graph.node("Gather", [f"{name}.table", entries], codes_name(name), name)
    graph.dequantize(name, operator.output)
