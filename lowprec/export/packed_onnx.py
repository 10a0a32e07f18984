"""Packed ONNX: ternary weights in 2 bits (INT2), 4-bit ones in 4 (INT4), a mantissa of one byte for each cluster.

A layer's weight is unpacked by standard operators, exactly as :func:`lowprec.numerics.effective_codes.effective_codes` does:

    codes -> DequantizeLinear by cluster -> Round -> QuantizeLinear to int8 -> Reshape -> DequantizeLinear by channel

The first scale is a cluster's mantissa (a sixteenth of it for 4 bits), so that Round, which is half to even, gives the
effective codes; the last one is the channel's 2^e. ONNX Runtime keeps a DequantizeLinear of constants to run it again for
every batch, except where the next operator has one input and a QuantizeLinear follows: then it folds all of them when it
loads the file. Round in just this place therefore leaves the integer kernels and speed of :func:`export_onnx`. Of two ternary
planes each has such a chain of its own, up to int8; both are added as int32.
All else is as :mod:`lowprec.export.onnx` writes it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto, helper

from lowprec.export.assembly import assemble, check_and_write, layers_by_weight
from lowprec.export.operators import write_step
from lowprec.export.options import ExportOptions, checked_options
from lowprec.export.qdq import QdqGraph, values_name
from lowprec.integer.model import IntegerModel, expect_integer_model
from lowprec.integer.operators import IntegerLayer
from lowprec.numerics.effective_codes import CODE_SHIFT, planes_of
from lowprec.targets import writable_path

# The first operator set with INT2.
OPSET = 25
CODE_TYPES = {2: TensorProto.INT2, 4: TensorProto.INT4}
PLANE_NAMES = ("first", "residual")
# Powers of two that a FLOAT8E8M0 holds, in one byte.
EXPONENTS = range(-127, 128)


def export_packed_onnx(model: IntegerModel, path: str | Path, options: ExportOptions | None = None) -> None:
    """Writes the integer model as an ONNX file of packed weights: input ``images``, output ``logits`` float.

    options: as for :func:`lowprec.export_onnx`, but the operator set is 25 and the runtime ONNX Runtime. The file is checked
    by ONNX's own checker, written to a temporary name and renamed.

    Raises:
        TypeError: ``model`` is not an integer model, or a step has no ONNX form. ValueError: an option that cannot be.
        OSError: ``path`` is a folder or lies in none.
    """
    expect_integer_model(model, "export_packed_onnx")
    path, graph = writable_path(path), PackedGraph(model)
    options = checked_options(options, graph.shapes[model.steps[-1].name])
    graph.saturates = options.processor == "any"
    if options.runtime != "onnxruntime":
        raise ValueError(f"runtime={options.runtime}: packed weights are for onnxruntime")
    if options.opset not in (None, OPSET):
        raise ValueError(f"opset={options.opset}: packed weights need {OPSET}, or None (null)")
    proto = assemble(model, graph, write_step, [helper.make_opsetid("", OPSET)], options, "packed")
    check_and_write(proto, path)


class PackedGraph(QdqGraph):
    """A :class:`QdqGraph` whose constants take as few bytes as they can."""

    def __init__(self, model: IntegerModel) -> None:
        super().__init__(model.shapes())
        self.layers = layers_by_weight(model)

    def dequantize_constant(self, name: str, codes: np.ndarray, exponents: np.ndarray, offset: int, axis: int) -> str:
        """As in :class:`QdqGraph`, with scales of one byte, without zero points of 0, and with packed weights."""
        layer = self.layers.get(name)
        if layer is None or layer.mantissas is None:
            source = self.constant(name, codes)
        else:
            source = self._effective_codes(name, layer, transposed=axis == 1)
        inputs = [source, self._powers_of_two(f"{name}.scale", exponents)]
        # ONNX Runtime's matrix product of integers takes no weights without a zero point; its convolution does.
        if offset or axis == 1:
            inputs.append(self.constant(f"{name}.zero_point", np.full(len(exponents), offset, codes.dtype)))
        return self.node("DequantizeLinear", inputs, values_name(name), f"{name}.dequantize", axis=axis)

    def _effective_codes(self, name: str, layer: IntegerLayer, transposed: bool) -> str:
        """The int8 effective codes of a layer's weight [O, I, *kernel], or transposed [I, O], from packed ones."""
        assert layer.mantissas is not None
        if layer.planes == 1:
            effective = self._plane(name, layer, layer.codes.numpy(), layer.mantissas.numpy(), transposed)
        else:
            wide = []
            for part, codes, mantissas in zip(PLANE_NAMES, planes_of(layer.codes), layer.mantissas, strict=True):
                plane = self._plane(f"{name}.{part}", layer, codes.numpy(), mantissas.numpy(), transposed)
                wide.append(self.node("Cast", [plane], f"{plane}.wide", to=TensorProto.INT32))
            # ONNX Runtime adds no int8; their sum is one: |a1| + |a2| <= 64.
            total = self.node("Add", wide, f"{name}.sum")
            effective = self.node("Cast", [total], f"{name}.effective", to=TensorProto.INT8)
        if layer.codes.dim() == 2 or not layer.layout.shares_positions:
            return effective
        shape = self.constant(f"{name}.shape", np.array(layer.codes.shape, np.int64))
        return self.node("Reshape", [effective, shape], f"{name}.reshaped")

    def _plane(self, name: str, layer: IntegerLayer, codes: np.ndarray, mantissas: np.ndarray, transposed: bool) -> str:
        """Codes times mantissas of one plane, int8; with rows of whole kernels where a cluster's positions share its scale."""
        layout = layer.layout
        channels = (len(codes), layout.groups)
        if layout.shares_positions:
            # A cluster's kernels lie side by side: one block of a row.
            codes, mantissas = codes.reshape(len(codes), -1), mantissas.reshape(channels)
        else:
            mantissas = mantissas.reshape(*channels, *codes.shape[2:])
        if transposed:
            codes, mantissas = codes.T, mantissas.T
        packed = self.constant(name, codes.astype(helper.tensor_dtype_to_np_dtype(CODE_TYPES[layer.bits])))
        scale = self._mantissas(name, mantissas, layer.bits)
        values = self.node(
            "DequantizeLinear",
            [packed, scale],
            f"{name}.unrounded",
            axis=0 if transposed else 1,
            block_size=layout.weights_per_cluster,
        )
        rounded = self.node("Round", [values], f"{name}.rounded")
        one = self.constant("lowprec.one", np.float32(1))
        zero = self.constant("lowprec.zero", np.int8(0))
        return self.node("QuantizeLinear", [rounded, one, zero], f"{name}.effective")

    def _mantissas(self, name: str, mantissas: np.ndarray, bits: int) -> str:
        """Scales of clusters, from int8: what one unit of a weight's code is worth in effective codes."""
        scale = self._as_float(f"{name}.mantissas", np.ascontiguousarray(mantissas))
        if not CODE_SHIFT[bits]:
            return scale
        unit = self.constant(f"lowprec.unit{bits}", np.ldexp(np.float32(1), -CODE_SHIFT[bits]))
        return self.node("Mul", [scale, unit], f"{name}.cluster_scale")

    def _powers_of_two(self, name: str, exponents: np.ndarray) -> str:
        """2^e as float, kept as FLOAT8E8M0, which is an exponent and nothing else."""
        powers = np.ldexp(np.float32(1), exponents.astype(np.int32))
        if exponents.min() < EXPONENTS.start or exponents.max() > EXPONENTS.stop - 1:
            return self.constant(name, powers)
        return self._as_float(name, powers.astype(helper.tensor_dtype_to_np_dtype(TensorProto.FLOAT8E8M0)))

    def _as_float(self, name: str, small: np.ndarray) -> str:
        """A constant of one byte an element, as float; ONNX Runtime casts it when it loads the file."""
        return self.node("Cast", [self.constant(name, small)], f"{name}.float", to=TensorProto.FLOAT)
