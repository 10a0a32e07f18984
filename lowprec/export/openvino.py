"""Forms that OpenVINO computes exactly, where it would silently compute something else (measured with OpenVINO 2026.4).

It fuses a quantized convolution into the add that follows and skips the rounding between them, moves the stride of a 1×1
convolution in front of the quantization, has no integer kernel for weights with a zero point, pads averages with code 0
whatever the zero point, and adds an input's zero point before it rounds. Each function writes what stands in the way of one
of these. All of it is exact in ONNX Runtime as well.

Compile with ``{"INFERENCE_PRECISION_HINT": "f32"}``: the default may round 32-bit sums to bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lowprec.export.qdq import QdqGraph, codes_name, values_name
from lowprec.integer.operators import Grid

NAME = "openvino"


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


def rounded(graph: QdqGraph, name: str, values: str, exponent: int) -> str:
    """Float values on the grid of 2^exponent, so that the quantization that follows has nothing left to round."""
    inverse = graph.constant(f"{name}.inverse_scale", np.ldexp(np.float32(1), -exponent))
    scale = graph.constant(f"{name}.rounded_scale", np.ldexp(np.float32(1), exponent))
    codes = graph.node("Round", [graph.node("Mul", [values, inverse], f"{name}.scaled")], f"{name}.rounded_codes")
    return graph.node("Mul", [codes, scale], f"{name}.rounded")


def _pool(graph: QdqGraph, codes: str, out: str, stride: tuple[int, ...]) -> None:
    graph.node("MaxPool", [codes], out, kernel_shape=[1, 1], strides=list(stride))
