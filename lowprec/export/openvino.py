"""Forms that OpenVINO computes exactly, where it would silently compute something else (measured with OpenVINO 2026.4).

It fuses a quantized convolution into the add that follows and skips the rounding between them, moves the stride of a 1×1
convolution in front of the quantization, has no integer kernel for weights with a zero point, pads averages with code 0
whatever the zero point, and adds an input's zero point before it rounds. Each function writes what stands in the way of one
of these. All of it is exact in ONNX Runtime as well.

Compile with ``{"INFERENCE_PRECISION_HINT": "f32"}``: the default may round 32-bit sums to bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from lowprec.export.qdq import QdqGraph, codes_name, values_name
from lowprec.integer.operators import Grid

NAME = "openvino"
# Bits beyond the code in which averages are rounded first; an average s / D that is no tie lies 1 / (2 D) from one.
FINE = 12
LARGEST_DENOMINATOR = 3000


def kept_apart(graph: QdqGraph, name: str) -> str:
    """An operand of an add, behind a 1×1 max pooling of its codes: it changes none, and no fusion reaches over it."""
    if len(graph.shapes[name]) != 4:
        return f"{name}.values"
    return graph.recode(name, "kept", lambda codes, out: _pool(graph, codes, out, (1, 1)))


def strided(graph: QdqGraph, name: str, stride: tuple[int, ...]) -> str:
    """Every stride-th position, so that the 1×1 convolution behind it needs no stride."""
    part = f"every{stride[0]}x{stride[1]}"
    return graph.recode(name, part, lambda codes, out: _pool(graph, codes, out, stride))


def doubled(graph: QdqGraph, name: str, groups: int) -> str:
    """All channels twice, group by group, for weights that are written as a sum of two: see :func:`halves`."""

    def write(codes: str, out: str) -> None:
        if groups == 1:
            graph.node("Concat", [codes, codes], out, axis=1)
            return
        channels = graph.shapes[name][1]
        order = np.arange(channels, dtype=np.int64).reshape(groups, 1, -1).repeat(2, axis=1).reshape(-1)
        graph.node("Gather", [codes, graph.constant(f"{out}.order", order)], out, axis=1)

    return graph.recode(name, f"twice{groups}", write)


def halves(weight: np.ndarray) -> np.ndarray:
    """8-bit codes [O, I, ...] as the sum of two int8 codes within ±64 [O, 2I, ...]: no processor's pair sums saturate."""
    first = np.trunc(weight / 2).astype(np.int8)
    return np.concatenate([first, (weight - first).astype(np.int8)], axis=1)


def zero_padded(graph: QdqGraph, name: str, padding: tuple[int, ...]) -> str:
    """The codes of [B, C, H, W] framed by the zero point; padding: top, left, bottom, right."""
    top, left, bottom, right = padding

    def write(codes: str, out: str) -> None:
        sides = graph.constant(f"{out}.sides", np.array([0, 0, top, left, 0, 0, bottom, right], np.int64))
        graph.node("Pad", [codes, sides, f"{name}.zero_point"], out)

    return graph.recode(name, f"padded{top}_{left}_{bottom}_{right}", write)


def on_one_grid(graph: QdqGraph, name: str, inputs: Sequence[str], output: Grid) -> list[str]:
    """Codes of each operand of a concatenation on the result's grid: joined as values, zero points were lost."""
    parts = []
    for index, operand in enumerate(inputs):
        part = f"{name}.operand{index}"
        graph.quantize(part, values_name(operand), output, dequantize=False)
        parts.append(codes_name(part))
    return parts


def as_rows(graph: QdqGraph, name: str, axes: Sequence[int]) -> str:
    """The codes as images [B, all other axes, all ``axes``, 1]: sums over the axes of other tensors are computed wrong."""
    shape = graph.shapes[name]
    others = [axis for axis in range(1, len(shape)) if axis not in axes]
    sizes = [-1, prod(shape[axis] for axis in others), prod(shape[axis] for axis in axes), 1]

    def write(codes: str, out: str) -> None:
        moved = graph.node("Transpose", [codes], f"{out}.moved", perm=[0, *others, *axes])
        graph.node("Reshape", [moved, graph.constant(f"{out}.shape", np.array(sizes, np.int64))], out)

    return graph.recode(name, f"rows{'_'.join(map(str, axes))}", write)


def divided(graph: QdqGraph, name: str, total: str, sizes: np.ndarray, input: Grid, output: Grid) -> str:
    """Float sums of codes by ``sizes``, rounded to the output's grid; for division by a constant OpenVINO multiplies.

    First rounded to FINE more bits: that makes ties of what the rounded inverse has carried over one (a product of less than
    2^20 is off by less than an eighth), and all else lies further from a tie than that moves it.

    Raises:
        ValueError: the averages lie too close to ties.
    """
    left = input.exponent - output.exponent
    largest = int(sizes.max()) << max(-left, 0)
    if largest > LARGEST_DENOMINATOR:
        raise ValueError(
            f"runtime=openvino: {name} averages {int(sizes.max())} codes, too many to round them all right on its "
            "output's grid; choose runtime=onnxruntime"
        )
    # Whole numbers, so that the factors that follow cannot be moved into the sum.
    unit = graph.constant(f"{name}.input_unit", np.ldexp(np.float32(1), -input.exponent))
    codes = graph.node("Round", [graph.node("Mul", [total, unit], f"{name}.codes_sum")], f"{name}.whole_sum")
    inverse = graph.constant(f"{name}.inverse", (2.0 ** (left + FINE) / sizes).astype(np.float32))
    fine = graph.node("Round", [graph.node("Mul", [codes, inverse], f"{name}.quotient", name)], f"{name}.fine")
    coarse = graph.constant(f"{name}.coarse", np.ldexp(np.float32(1), -FINE))
    result = graph.node("Round", [graph.node("Mul", [fine, coarse], f"{name}.unrounded")], f"{name}.average")
    scale = graph.constant(f"{name}.output_unit", np.ldexp(np.float32(1), output.exponent))
    return graph.node("Mul", [result, scale], f"{name}.float")


def rounded(graph: QdqGraph, name: str, values: str, exponent: int) -> str:
    """Float values on the grid of 2^exponent, so that the quantization that follows has nothing left to round."""
    inverse = graph.constant(f"{name}.inverse_scale", np.ldexp(np.float32(1), -exponent))
    scale = graph.constant(f"{name}.rounded_scale", np.ldexp(np.float32(1), exponent))
    codes = graph.node("Round", [graph.node("Mul", [values, inverse], f"{name}.scaled")], f"{name}.rounded_codes")
    return graph.node("Mul", [codes, scale], f"{name}.rounded")


def _pool(graph: QdqGraph, codes: str, out: str, stride: tuple[int, ...]) -> None:
    graph.node("MaxPool", [codes], out, kernel_shape=[1, 1], strides=list(stride))
