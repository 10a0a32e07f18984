"""An ONNX graph under construction: codes between QuantizeLinear and DequantizeLinear.

The tensor ``NAME.codes`` holds the codes of a step with its zero point added, ``NAME.values`` what they are worth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from lowprec.integer.operators import Grid

SIGNED_ZERO_POINT = 128


def codes_name(step_name: str) -> str:
    """Name of the ONNX tensor that holds the codes of a step, with its zero point added."""
    return f"{step_name}.codes"


def values_name(step_name: str) -> str:
    """Name of the ONNX tensor that holds the values of a step's codes."""
    return f"{step_name}.values"


def zero_point(grid: Grid) -> int:
    """What ONNX adds to the codes of a tensor to make them unsigned."""
    return SIGNED_ZERO_POINT if grid.signed else 0


class QdqGraph:
    """Nodes and constants, in order.

    shapes: of each step's codes for one image. runtime: whose exact form is written, ``onnxruntime`` or ``openvino``.
    saturates: whether processors are to be expected that add pairs of products in int16.
    """

    def __init__(
        self, shapes: dict[str, tuple[int, ...]], runtime: str = "onnxruntime", saturates: bool = True
    ) -> None:
        self.shapes = shapes
        self.runtime = runtime
        self.saturates = saturates
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}

    def constant(self, name: str, value: np.ndarray) -> str:
        """Adds a constant tensor; returns its name."""
        self.constants[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def node(self, kind: str, inputs: list[str], output: str, name: str | None = None, **attributes: Any) -> str:
        """Adds a node, named as its output unless told; returns its output's name."""
        self.nodes.append(helper.make_node(kind, inputs, [output], name=name or output, **attributes))
        return output

    def quantize(self, name: str, values: str, grid: Grid, dequantize: bool = True) -> None:
        """Float ``values`` to the codes of ``name`` (and back to its values)."""
        self.node("QuantizeLinear", [values, *self._grid(name, grid)], codes_name(name), f"{name}.quantize")
        if dequantize:
            self.dequantize(name, grid)

    def dequantize(self, name: str, grid: Grid) -> None:
        """The codes of ``name`` to its values."""
        inputs = [codes_name(name), *self._grid(name, grid)]
        self.node("DequantizeLinear", inputs, values_name(name), f"{name}.dequantize")

    def dequantize_constant(self, name: str, codes: np.ndarray, exponents: np.ndarray, offset: int, axis: int) -> str:
        """Constant codes, with ``offset`` added, to their values: one exponent for each index of ``axis``."""
        self.constant(name, codes)
        self.constant(f"{name}.scale", np.ldexp(np.float32(1), exponents.astype(np.int32)))
        self.constant(f"{name}.zero_point", np.full(len(exponents), offset, codes.dtype))
        inputs = [name, f"{name}.scale", f"{name}.zero_point"]
        return self.node("DequantizeLinear", inputs, values_name(name), f"{name}.dequantize", axis=axis)

    def recode(self, name: str, part: str, write: Callable[[str, str], None]) -> str:
        """Values of the codes of ``name`` after ``write(codes, result)`` has moved them; written once for each ``part``."""
        moved = f"{name}.{part}"
        if values_name(moved) not in {output for node in self.nodes for output in node.output}:
            write(codes_name(name), codes_name(moved))
            inputs = [codes_name(moved), f"{name}.scale", f"{name}.zero_point"]
            self.node("DequantizeLinear", inputs, values_name(moved), f"{moved}.dequantize")
        return values_name(moved)

    def clip(self, name: str, codes: str, grid: Grid, low: int, six: int | None) -> None:
        """Cuts codes, in integers, to ``low`` and to the grid's highest code or ReLU6's ``six``."""
        high = grid.high if six is None else min(six, grid.high)
        bounds = [
            self.constant(f"{name}.{bound}", np.array(value + zero_point(grid), np.uint8))
            for bound, value in (("low", low), ("high", high))
        ]
        self.node("Clip", [codes, *bounds], codes_name(name), f"{name}.clip")
        self.dequantize(name, grid)

    def _grid(self, name: str, grid: Grid) -> list[str]:
        """Scale and zero point of a tensor."""
        return [
            self.constant(f"{name}.scale", np.ldexp(np.float32(1), grid.exponent)),
            self.constant(f"{name}.zero_point", np.array(zero_point(grid), np.uint8)),
        ]
