"""How max and average pooling are written in ONNX. Averages are the delicate ones: kernels multiply by 1 / size, rounded."""

from __future__ import annotations

from math import prod

import numpy as np
import torch

from lowprec.export import openvino
from lowprec.export.qdq import QdqGraph, codes_name, values_name
from lowprec.integer.model import Step
from lowprec.integer.operators import Grid, IntegerAveragePool, IntegerBilinear, IntegerMaxPool
from lowprec.numerics.fixed_point import divide_round_half_even
from lowprec.numerics.pooling import window_sizes


def write_max_pool(graph: QdqGraph, step: Step, pool: IntegerMaxPool) -> None:
    """MaxPool, with all padding given: ONNX and torch disagree on ceil_mode's last window."""
    graph.node(
        "MaxPool",
        [values_name(step.inputs[0])],
        f"{step.name}.float",
        step.name,
        kernel_shape=pool.kernel_size,
        strides=pool.stride,
        pads=pool.padding + _end_padding(graph, step, pool, pool.dilation),
        dilations=pool.dilation,
    )
    graph.quantize(step.name, f"{step.name}.float", pool.output)


def write_average_pool(graph: QdqGraph, step: Step, pool: IntegerAveragePool) -> None:
    """Pooling where the kernel's arithmetic gives all averages right, else sums and a division."""
    if pool.kernel_size is not None:
        graph.quantize(step.name, _write_windows(graph, step, pool), pool.output)
        return
    name, values, shape = step.name, values_name(step.inputs[0]), graph.shapes[step.inputs[0]]
    size = prod(shape[axis] for axis in pool.axes)
    if len(shape) == 4 and sorted(pool.axes) == [2, 3] and multiplying_is_dividing(size, pool.input, pool.output):
        pooled = name if pool.keep_axes else f"{name}.pooled"
        graph.node("GlobalAveragePool", [values], f"{pooled}.float", pooled)
        graph.quantize(pooled, f"{pooled}.float", pool.output)
        if not pool.keep_axes:
            graph.node("Flatten", [values_name(pooled)], f"{name}.float", name, axis=1)
            graph.quantize(name, f"{name}.float", pool.output)
        return
    if graph.runtime == openvino.NAME:
        _write_rows(graph, step, pool, size)
        return
    # ReduceMean takes its axes as an input or as an attribute, as the operator set has it; a sum is the same in all.
    axes = _integers(graph, f"{name}.axes", list(pool.axes))
    total = graph.node("ReduceSum", [values, axes], f"{name}.sum", keepdims=int(pool.keep_axes))
    graph.quantize(name, _divided(graph, step, total, np.array(size), pool), pool.output)


def _write_windows(graph: QdqGraph, step: Step, pool: IntegerAveragePool) -> str:
    assert pool.kernel_size is not None
    pooled = step.name
    values, padding = values_name(step.inputs[0]), pool.padding + _end_padding(graph, step, pool, (1, 1))
    sizes = _window_sizes(graph, step, pool)
    if all(multiplying_is_dividing(int(size), pool.input, pool.output) for size in np.unique(sizes)):
        # What only a window that ceil_mode added hangs over is never counted.
        counted = pool.count_include_pad and not pool.ceil_mode
        if graph.runtime == openvino.NAME and counted and any(padding) and pool.input.signed:
            values, padding = openvino.zero_padded(graph, step.inputs[0], padding), (0, 0, 0, 0)
        return graph.node(
            "AveragePool",
            [values],
            f"{pooled}.float",
            pooled,
            kernel_shape=pool.kernel_size,
            strides=pool.stride,
            pads=padding,
            count_include_pad=int(counted),
        )
    channels = graph.shapes[step.inputs[0]][1]
    ones = graph.constant(f"{pooled}.ones", np.ones((channels, 1, *pool.kernel_size), np.float32))
    total = graph.node("Conv", [values, ones], f"{pooled}.sum", group=channels, strides=pool.stride, pads=padding)
    return _divided(graph, step, total, sizes, pool)


def _write_rows(graph: QdqGraph, step: Step, pool: IntegerAveragePool, size: int) -> None:
    """For OpenVINO: as an average over images."""
    name, rows = step.name, f"{step.name}.rows"
    values = openvino.as_rows(graph, step.inputs[0], pool.axes)
    if multiplying_is_dividing(size, pool.input, pool.output):
        averages = graph.node("GlobalAveragePool", [values], f"{name}.float", name)
    else:
        axes = _integers(graph, f"{name}.axes", [2, 3])
        total = graph.node("ReduceSum", [values, axes], f"{name}.sum", keepdims=1)
        averages = _divided(graph, step, total, np.array(size), pool)
    graph.quantize(rows, averages, pool.output, dequantize=False)
    final = _integers(graph, f"{name}.shape", [-1, *graph.shapes[name][1:]])
    graph.node("Reshape", [codes_name(rows), final], codes_name(name))
    graph.dequantize(name, pool.output)


def _divided(graph: QdqGraph, step: Step, total: str, sizes: np.ndarray, pool: IntegerAveragePool) -> str:
    """Sums by the sizes of their windows, rounded right for every sum; sizes: one, or of the shape of the sums."""
    name = step.name
    if graph.runtime == openvino.NAME:
        return openvino.divided(graph, name, total, sizes, pool.input, pool.output)
    divisor = graph.constant(f"{name}.sizes", sizes.astype(np.float32))
    return graph.node("Div", [total, divisor], f"{name}.float", name)


def _window_sizes(graph: QdqGraph, step: Step, pool: IntegerAveragePool) -> np.ndarray:
    assert pool.kernel_size is not None
    ones = torch.ones(1, 1, *graph.shapes[step.inputs[0]][2:])
    stride = pool.stride or pool.kernel_size
    return window_sizes(ones, pool.kernel_size, stride, pool.padding, pool.ceil_mode, pool.count_include_pad).numpy()


def _end_padding(
    graph: QdqGraph, step: Step, pool: IntegerAveragePool | IntegerMaxPool, dilation: tuple[int, ...]
) -> tuple[int, ...]:
    """Padding below and to the right with which all windows fit."""
    assert pool.kernel_size is not None
    assert pool.stride is not None
    before, after = graph.shapes[step.inputs[0]][2:], graph.shapes[step.name][2:]
    sides = zip(before, after, pool.kernel_size, pool.stride, pool.padding, dilation, strict=True)
    return tuple(
        max(padding, (windows - 1) * stride + (kernel - 1) * gap + 1 - side - padding)
        for side, windows, kernel, stride, padding, gap in sides
    )


def multiplying_is_dividing(size: int, input: Grid, output: Grid) -> bool:
    """Whether float32 kernels that multiply a sum by the rounded 1 / size round every average of ``size`` codes right.

    Tried for all sums. Where it does not hold, some average lies half way between two codes (1547 / 238 is 6.5) and the
    rounded reciprocal carries it over.
    """
    sums = torch.arange(input.low * size, input.high * size + 1)
    left = input.exponent - output.exponent
    exact = divide_round_half_even(sums << max(left, 0), size << max(-left, 0))
    found = sums.numpy().astype(np.float32) * np.float32(1 / np.float32(size)) * np.ldexp(np.float32(1), left)
    return bool((np.rint(found).clip(output.low, output.high) == exact.numpy().clip(output.low, output.high)).all())


def write_bilinear(graph: QdqGraph, step: Step, operator: IntegerBilinear) -> None:
    """Resize between pixels' centres: its weights are fractions of powers of two, so float kernels are exact."""
    factors = graph.constant(f"{step.name}.factors", np.array([1, 1, *operator.factors], np.float32))
    linear = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
    graph.node("Resize", [values_name(step.inputs[0]), "", factors], f"{step.name}.float", step.name, **linear)
    graph.quantize(step.name, f"{step.name}.float", operator.output)


def _integers(graph: QdqGraph, name: str, values: list[int]) -> str:
    return graph.constant(name, np.array(values, np.int64))
