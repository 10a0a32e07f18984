"""QONNX, the format of FINN and hls4ml: float operators of standard ONNX, and ``Quant`` nodes that say what hardware holds.

Activations: Quant of 8 bits with a power of two as scale, zero point 0, signed as the grid is. Weights:

- ternary ones: Quant of 2 bits, signed, narrow; the scale |a|·2^e of each cluster, repeated for its input channels (one for
  each output channel where a cluster holds all of them). Where no weight of a layer is 0: BipolarQuant. FINN takes scales
  by output channel alone; ``cluster_scales=False`` writes a·t, of 8 bits, with scale 2^e instead. Of two planes each has such
  a Quant, and an Add follows; without cluster scales one Quant holds a1·t1 + a2·t2.
- 4-bit ones: Quant of 7 bits with scale 2^e on the effective codes round_half_even(a·q / 16), which are what is multiplied.
  A Quant of 4 bits with scales a·2^e / 16 would leave this rounding out. A second Quant behind it would bring it in, but
  FINN folds no weight's Quant into a Quant.
- 8-bit ones: Quant of 8 bits with scale 2^e.

There are no tensors of codes, only values: ``STEP.values`` is code · 2^exponent. Hardware that holds the integers is always
exact; float32 execution, as in the ``qonnx`` package, where sums stay below 2^24 (``IntegerModel.sum_bound``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from torch import Tensor

from lowprec.export.assembly import assemble, layers_by_weight, write_proto
from lowprec.export.operators import write_step
from lowprec.export.options import ExportOptions
from lowprec.export.qdq import QdqGraph, codes_name, values_name
from lowprec.integer.model import IntegerModel, Step, expect_integer_model
from lowprec.integer.operators import (
    Grid,
    IntegerAdd,
    IntegerAveragePool,
    IntegerConcatenation,
    IntegerConv2d,
    IntegerFlatten,
    IntegerGather,
    IntegerInput,
    IntegerLayer,
    IntegerLinear,
    IntegerLookup,
    IntegerMaxPool,
    IntegerMultiply,
    IntegerMultiplyAdd,
    IntegerPad,
    IntegerPermute,
    IntegerReLU,
    IntegerReshape,
    IntegerSlice,
    IntegerUpsample,
)
from lowprec.numerics.effective_codes import planes_of
from lowprec.targets import writable_path

# What FINN, hls4ml and the transformations of the qonnx package know: later sets give operators other forms.
OPSET = 13
DOMAIN = "qonnx.custom_op.general"
# What holds a layer's effective codes, signed and narrow: up to 64 for ternary weights, 56 for 4-bit ones.
EFFECTIVE_BITS = {2: 8, 4: 7, 8: 8}
# Operators whose results lie on their inputs' grid.
KEEPING = ("MaxPool", "Flatten")

# Whose ONNX form holds for values as well as for codes: no constants of codes, no operator newer than ``OPSET``.
SHARED = (
    IntegerInput,
    IntegerConv2d,
    IntegerMultiplyAdd,
    IntegerLinear,
    IntegerAdd,
    IntegerMultiply,
    IntegerConcatenation,
    IntegerReLU,
    IntegerMaxPool,
    IntegerAveragePool,
    IntegerFlatten,
    IntegerReshape,
    IntegerPermute,
    IntegerSlice,
    IntegerGather,
)


def export_qonnx(model: IntegerModel, path: str | Path, cluster_scales: bool = True) -> None:
    """Writes the integer model as a QONNX file: input ``images`` [1, C, H, W], output ``logits`` [1, classes], both float.

    The batch is 1, as the tools want fixed shapes; every tensor's shape stands in the file. cluster_scales: ternary weights
    have 2 bits and a scale for each cluster; else 8 bits and one for each output channel, which is what FINN can fold.

    Raises:
        TypeError: ``model`` is not an integer model, or a step has no QONNX form.
        ValueError: a bias has more than float32's 24 bits, or a tensor is not of 8 bits. OSError: ``path`` is a folder or
            lies in none.
    """
    expect_integer_model(model, "export_qonnx")
    path = writable_path(path)
    if not isinstance(cluster_scales, bool):
        raise TypeError(
            f"cluster_scales must be True or False, not {type(cluster_scales).__name__}: a QONNX file has no other options"
        )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    options = ExportOptions(opset=OPSET, batch_size=1)
    proto = assemble(model, QonnxGraph(model, cluster_scales), _write_step, opsets, options, "qonnx")
    proto.graph.value_info.extend(_shapes(proto))
    onnx.checker.check_model(proto)
    write_proto(proto, path)


class QonnxGraph(QdqGraph):
    """A :class:`QdqGraph` in which values stand where it has codes, and Quant where it quantizes."""

    def __init__(self, model: IntegerModel, cluster_scales: bool) -> None:
        super().__init__(model.shapes())
        self.layers = layers_by_weight(model)
        self.cluster_scales = cluster_scales

    def node(self, kind: str, inputs: list[str], output: str, name: str | None = None, **attributes: Any) -> str:
        """Adds a node; what would move codes moves their values."""
        tensors: list[str] = []
        for tensor in map(_values_for, inputs):
            # The qonnx package's clean-up renames a tensor once for each node, so none may come twice.
            copy = f"{output}.copy{len(tensors)}"
            tensors.append(super().node("Identity", [tensor], copy) if tensor in tensors else tensor)
        return super().node(kind, tensors, _values_for(output), name, **attributes)

    def quantize(self, name: str, values: str, grid: Grid, dequantize: bool = True) -> None:
        """Float ``values`` to those of ``name``, on the grid."""
        if (grid.low, grid.high) not in ((0, 255), (-128, 127)):
            raise ValueError(f"{name}: codes from {grid.low} to {grid.high} are not all of an 8-bit Quant")
        if self.nodes and self.nodes[-1].op_type in KEEPING and self.nodes[-1].output[0] == values:
            self.nodes[-1].output[0] = values_name(name)
            return
        scale = self.constant(f"{name}.scale", np.ldexp(np.float32(1), grid.exponent))
        self._quant(values, scale, 8, grid.signed, False, values_name(name), f"{name}.quant")

    def dequantize(self, name: str, grid: Grid) -> None:
        """Nothing: values are all there is."""

    def dequantize_constant(self, name: str, codes: np.ndarray, exponents: np.ndarray, offset: int, axis: int) -> str:
        """A layer's weight behind its Quant, or its bias as plain float32."""
        layer = self.layers.get(name)
        if layer is not None:
            return self._weight(name, layer, transposed=axis == 1)
        values = np.ldexp(codes.astype(np.float32), exponents.astype(np.int32))
        if not np.array_equal(np.ldexp(values.astype(np.float64), -exponents.astype(np.int32)), codes):
            raise ValueError(f"{name} has more than the 24 bits that float32 holds: QONNX has no exact form for it")
        return self.constant(values_name(name), values)

    def clip(self, name: str, codes: str, grid: Grid, low: int, six: int | None) -> None:
        """Cuts values at codes ``low`` and ``six``; the grid's own end is cut by its Quant."""
        source = codes
        if codes == codes_name(f"{name}.unclipped"):
            # Cutting at a code before rounding is cutting after it, so one Quant will do.
            source = self.nodes.pop().input[0]
        if six is not None and six < grid.high:
            bounds = [
                self.constant(f"{name}.{bound}", np.ldexp(np.float32(code), grid.exponent))
                for bound, code in (("low", low), ("high", six))
            ]
            self.node("Clip", [source, *bounds], f"{name}.clipped")
        else:
            assert low == 0
            self.node("Relu", [source], f"{name}.clipped")
        self.quantize(name, f"{name}.clipped", grid)

    def _weight(self, name: str, layer: IntegerLayer, transposed: bool) -> str:
        effective = layer.effective.numpy()
        powers = np.ldexp(np.float32(1), layer.exponents.numpy().astype(np.int32))
        powers = powers.reshape(-1, *[1] * (effective.ndim - 1))
        if layer.bits == 2 and self.cluster_scales:
            return self._ternary(name, layer, powers, transposed)
        values = effective.astype(np.float32) * powers
        source, scale = self._oriented(name, values, powers, transposed)
        narrow = bool(effective.min() > -128)
        bits = EFFECTIVE_BITS[layer.bits]
        return self._quant(source, scale, bits, True, narrow, values_name(name), f"{name}.quant")

    def _ternary(self, name: str, layer: IntegerLayer, powers: np.ndarray, transposed: bool) -> str:
        """A Quant of 2 bits with a scale for each cluster; of two planes one for each, and their sum."""
        assert layer.mantissas is not None
        if layer.planes == 1:
            self._plane(name, layer.codes, _mantissas(layer, layer.mantissas), powers, transposed)
            return values_name(name)
        parts = [f"{name}.first", f"{name}.residual"]
        for part, codes, mantissas in zip(parts, planes_of(layer.codes), layer.mantissas, strict=True):
            self._plane(part, codes, _mantissas(layer, mantissas), powers, transposed)
        return self.node("Add", [values_name(part) for part in parts], values_name(name), f"{name}.sum")

    def _plane(self, name: str, codes: Tensor, mantissas: np.ndarray, powers: np.ndarray, transposed: bool) -> None:
        effective, magnitudes = codes.numpy() * mantissas, np.abs(mantissas)
        # Clusters of mantissa 0 hold zeros, at any scale but 0, by which a Quant would divide.
        scale = np.where(magnitudes == 0, 1, magnitudes).astype(np.float32) * powers
        source, scale_name = self._oriented(name, effective.astype(np.float32) * powers, scale, transposed)
        if effective.all():
            self.node("BipolarQuant", [source, scale_name], values_name(name), f"{name}.quant", domain=DOMAIN)
        else:
            self._quant(source, scale_name, 2, True, True, values_name(name), f"{name}.quant")

    def _oriented(self, name: str, values: np.ndarray, scale: np.ndarray, transposed: bool) -> list[str]:
        """Constants of a weight's values and scales, [O, I, *kernel] or transposed [I, O]."""
        arrays = {"float": values.T, "scale": scale.T} if transposed else {"float": values, "scale": scale}
        return [self.constant(f"{name}.{part}", np.ascontiguousarray(array)) for part, array in arrays.items()]

    def _quant(self, source: str, scale: str, bits: int, signed: bool, narrow: bool, output: str, name: str) -> str:
        zero = self.constant("lowprec.zero_point", np.float32(0))
        width = self.constant(f"lowprec.bits{bits}", np.float32(bits))
        settings = {"signed": int(signed), "narrow": int(narrow), "rounding_mode": "ROUND"}
        return self.node("Quant", [source, scale, zero, width], output, name, domain=DOMAIN, **settings)


def _values_for(tensor: str) -> str:
    """The tensor of values in the place of a tensor of codes."""
    return values_name(tensor.removesuffix(".codes")) if tensor.endswith(".codes") else tensor


def _mantissas(layer: IntegerLayer, mantissas: Tensor) -> np.ndarray:
    """a of each weight's cluster, int32, of a shape that broadcasts against the weight [O, I, *kernel]."""
    layout, channels = layer.layout, layer.codes.shape[1]
    kernel = [1] * (layer.codes.dim() - 2) if layout.shares_positions else list(layer.codes.shape[2:])
    wide = mantissas.numpy().astype(np.int32).reshape(len(layer.codes), layout.groups, *kernel)
    return wide if layout.groups == 1 else wide.repeat(layout.members, axis=1)[:, :channels]


def _write_step(graph: QdqGraph, step: Step) -> str:
    """As :func:`write_step`, but for operators that need other constants for values than for codes."""
    operator = step.operator
    if isinstance(operator, IntegerLookup):
        _lookup(graph, step, operator)
    elif isinstance(operator, IntegerPad):
        before, after = zip(*operator.padding, strict=True)
        sides = graph.constant(f"{step.name}.sides", np.array((*before, *after), np.int64))
        zero = graph.constant(f"{step.name}.zero", np.float32(0))
        graph.node("Pad", [values_name(step.inputs[0]), sides, zero], values_name(step.name), step.name)
    elif isinstance(operator, IntegerUpsample):
        # An explicit, empty region: the qonnx package finds no tensor for one that is left out.
        region = graph.constant(f"{step.name}.region", np.zeros(0, np.float32))
        factors = graph.constant(f"{step.name}.factors", np.array([1, 1, *operator.factors], np.float32))
        nearest = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
        graph.node(
            "Resize", [values_name(step.inputs[0]), region, factors], values_name(step.name), step.name, **nearest
        )
    elif type(operator) in SHARED:
        return write_step(graph, step)
    else:
        raise TypeError(f"{step.name}: {type(operator).__name__} has no QONNX form")
    return values_name(step.name)


def _lookup(graph: QdqGraph, step: Step, operator: IntegerLookup) -> None:
    """A table's entry is value / 2^e − low, a whole number; the table holds values."""
    name, table = step.name, operator.table.numpy()
    graph.constant(f"{name}.table", np.ldexp(table.reshape(-1).astype(np.float32), operator.output.exponent))
    inverse = graph.constant(f"{name}.inverse_scale", np.ldexp(np.float32(1), -operator.input.exponent))
    codes = graph.node("Mul", [values_name(step.inputs[0]), inverse], f"{name}.whole")
    first = np.full(1, -operator.input.low, np.float32)
    if table.ndim == 2:
        shape = [1] * len(graph.shapes[step.inputs[0]])
        shape[1] = -1
        first = (first + np.arange(len(table), dtype=np.float32) * table.shape[1]).reshape(shape)
    entries = graph.node("Add", [codes, graph.constant(f"{name}.first", first)], f"{name}.entries")
    entries = graph.node("Cast", [entries], f"{name}.indices", to=TensorProto.INT64)
    graph.node("Gather", [f"{name}.table", entries], f"{name}.float", name)
    graph.quantize(name, f"{name}.float", operator.output)


def _shapes(proto: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Type and shape of every tensor between the operators; Quant changes neither."""
    plain = onnx.ModelProto()
    plain.CopyFrom(proto)
    for node in plain.graph.node:
        if node.domain == DOMAIN:
            node.CopyFrom(helper.make_node("Identity", node.input[:1], node.output, name=node.name))
    inferred = onnx.shape_inference.infer_shapes(plain, check_type=True, strict_mode=True)
    return list(inferred.graph.value_info)
