"""int8 ONNX: QuantizeLinear/DequantizeLinear around each operator, which ONNX Runtime turns into integer kernels.

All activations are uint8 (zero point 128 where a tensor can be negative), so that adds find equal types. Weights of ternary
and 4-bit layers are their effective codes as int8, within ±64: pairs of products fit the saturating int16 sums of
processors without VNNI. Weights of 8-bit layers are uint8 with zero point 128, which takes another kernel. Scales are
powers of two, so runtimes that compute in float32 between quantize and dequantize are exact as well.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from lowprec.integer.model import IntegerModel
from lowprec.integer.operators import (
    Grid,
    IntegerAdd,
    IntegerAveragePool,
    IntegerConv2d,
    IntegerFlatten,
    IntegerInput,
    IntegerLayer,
    IntegerLinear,
    IntegerMaxPool,
    IntegerOperator,
    IntegerReLU,
)

OPSET = 18
IR_VERSION = 10
SIGNED_ZERO_POINT = 128


def export_onnx(model: IntegerModel, path: str | Path) -> None:
    """Writes the integer model as an ONNX file: input ``images`` [batch, C, H, W] float, output ``logits``.

    The file is checked by ONNX's own checker, written to a temporary name and renamed.

    Raises:
        TypeError: ``model`` is not an integer model.
    """
    if not isinstance(model, IntegerModel):
        raise TypeError(
            f"export_onnx expects an integer model, from lowprec.convert(qmodel), not {type(model).__name__}"
        )
    path = Path(path)
    proto = _Exporter(model).export()
    onnx.checker.check_model(proto, full_check=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        onnx.save(proto, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def codes_name(step_name: str) -> str:
    """Name of the ONNX tensor that holds the codes of a step, with its zero point added."""
    return f"{step_name}.codes"


def zero_point(grid: Grid) -> int:
    """What ONNX adds to the codes of a tensor to make them unsigned."""
    return SIGNED_ZERO_POINT if grid.signed else 0


class _Exporter:
    def __init__(self, model: IntegerModel) -> None:
        self.model = model
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        images = torch.zeros(1, *model.image_shape)
        self.shapes = {name: tuple(codes.shape) for name, codes in model.codes(images).items()}

    def export(self) -> onnx.ModelProto:
        for step in self.model.steps:
            inputs = [f"{name}.values" for name in step.inputs] or ["images"]
            self._step(step.name, step.operator, inputs, [self.shapes[name] for name in step.inputs])
        last = self.model.steps[-1]
        self.nodes[-1].output[0] = "logits"
        graph = helper.make_graph(
            self.nodes,
            "lowprec",
            [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", *self.model.image_shape])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", *self.shapes[last.name][1:]])],
            self.initializers,
        )
        return helper.make_model(
            graph, producer_name="lowprec", ir_version=IR_VERSION, opset_imports=[helper.make_opsetid("", OPSET)]
        )

    def _step(self, name: str, operator: IntegerOperator, inputs: list[str], shapes: list[tuple[int, ...]]) -> None:
        if isinstance(operator, IntegerInput):
            self._quantize(name, inputs[0], operator.output)
        elif isinstance(operator, IntegerLayer):
            self._layer(name, operator, inputs[0])
        elif isinstance(operator, IntegerAdd):
            self._node("Add", inputs, name)
            self._finish(name, operator.output, operator.six)
        elif isinstance(operator, IntegerAveragePool):
            self._average_pool(name, operator, inputs[0], shapes[0])
        elif isinstance(operator, IntegerMaxPool):
            self._node(
                "MaxPool",
                inputs,
                name,
                kernel_shape=operator.kernel_size,
                strides=operator.stride,
                pads=operator.padding + self._end_padding(name, operator, shapes[0], operator.dilation),
                dilations=operator.dilation,
            )
            self._quantize(name, f"{name}.float", operator.output)
        elif isinstance(operator, IntegerReLU):
            self._clip(name, codes_name(_owner(inputs[0])), operator.output, operator.six, low=0)
        elif isinstance(operator, IntegerFlatten):
            self._node("Flatten", inputs, name, axis=1)
            self._quantize(name, f"{name}.float", operator.output)
        else:
            raise TypeError(f"{name}: {type(operator).__name__} has no ONNX form")

    def _layer(self, name: str, layer: IntegerLayer, values: str) -> None:
        weight = layer.effective.numpy()
        kind, axis = (np.uint8, 0) if layer.bits == 8 else (np.int8, 0)
        offset = SIGNED_ZERO_POINT if layer.bits == 8 else 0
        weight = (weight + offset).astype(kind)
        if isinstance(layer, IntegerLinear):
            weight, axis = weight.T, 1
        channels = len(layer.bias)
        scales = np.ldexp(np.float32(1), layer.exponents.numpy().astype(np.int32))
        self._constant(f"{name}.weight", np.ascontiguousarray(weight))
        self._dequantize(f"{name}.weight", scales, np.full(channels, offset, kind), axis)
        self._constant(f"{name}.bias", layer.bias.numpy())
        bias_scales = np.ldexp(np.float32(1), layer.sum_exponents.numpy())
        self._dequantize(f"{name}.bias", bias_scales, np.zeros(channels, np.int32), 0)
        inputs = [values, f"{name}.weight.values", f"{name}.bias.values"]
        if isinstance(layer, IntegerConv2d):
            self._node(
                "Conv",
                inputs,
                name,
                kernel_shape=weight.shape[2:],
                strides=layer.stride,
                pads=layer.padding * 2,
                dilations=layer.dilation,
                group=layer.groups,
            )
        else:
            self._node("Gemm", inputs, name)
        if layer.output is not None:
            self._finish(name, layer.output, layer.six)

    def _average_pool(self, name: str, pool: IntegerAveragePool, values: str, shape: tuple[int, ...]) -> None:
        pooled = name if pool.keep_axes else f"{name}.pooled"
        if pool.kernel_size is not None:
            self._node(
                "AveragePool",
                [values],
                pooled,
                kernel_shape=pool.kernel_size,
                strides=pool.stride,
                pads=pool.padding + self._end_padding(name, pool, shape, (1, 1)),
                # What only a window that ceil_mode added hangs over is never counted.
                count_include_pad=int(pool.count_include_pad and not pool.ceil_mode),
            )
        elif _multiplying_is_dividing(shape[2] * shape[3], pool.input.exponent - pool.output.exponent):
            self._node("GlobalAveragePool", [values], pooled)
        else:
            self._node("AveragePool", [values], pooled, kernel_shape=shape[2:])
        self._quantize(pooled, f"{pooled}.float", pool.output)
        if not pool.keep_axes:
            self._node("Flatten", [f"{pooled}.values"], name, axis=1)
            self._quantize(name, f"{name}.float", pool.output)

    def _end_padding(
        self,
        name: str,
        pool: IntegerAveragePool | IntegerMaxPool,
        shape: tuple[int, ...],
        dilation: tuple[int, ...],
    ) -> tuple[int, ...]:
        """Padding below and to the right with which all windows fit: ONNX and torch disagree on ceil_mode's last one."""
        assert pool.kernel_size is not None
        assert pool.stride is not None
        sides = zip(
            shape[2:], self.shapes[name][2:], pool.kernel_size, pool.stride, pool.padding, dilation, strict=True
        )
        return tuple(
            max(padding, (windows - 1) * stride + (kernel - 1) * gap + 1 - side - padding)
            for side, windows, kernel, stride, padding, gap in sides
        )

    def _finish(self, name: str, output: Grid, six: int | None) -> None:
        """Activation and quantization of an operator's float result; ReLU6 cuts the 8-bit codes, in integers."""
        if not output.signed:
            self.nodes.append(helper.make_node("Relu", [f"{name}.float"], [f"{name}.relu"], name=f"{name}.relu"))
        source = f"{name}.float" if output.signed else f"{name}.relu"
        if six is None or six >= output.high:
            self._quantize(name, source, output)
            return
        self._quantize(f"{name}.unclipped", source, output, dequantize=False)
        self._clip(name, codes_name(f"{name}.unclipped"), output, six, low=output.low)

    def _clip(self, name: str, codes: str, grid: Grid, six: int | None, low: int) -> None:
        high = grid.high if six is None else min(six, grid.high)
        for bound, value in (("low", low), ("high", high)):
            self._constant(f"{name}.{bound}", np.array(value + zero_point(grid), np.uint8))
        inputs = [codes, f"{name}.low", f"{name}.high"]
        self.nodes.append(helper.make_node("Clip", inputs, [codes_name(name)], name=f"{name}.clip"))
        self._dequantize_codes(name, grid)

    def _quantize(self, name: str, values: str, grid: Grid, dequantize: bool = True) -> None:
        self._constant(f"{name}.scale", np.ldexp(np.float32(1), grid.exponent))
        self._constant(f"{name}.zero_point", np.array(zero_point(grid), np.uint8))
        inputs = [values, f"{name}.scale", f"{name}.zero_point"]
        self.nodes.append(helper.make_node("QuantizeLinear", inputs, [codes_name(name)], name=f"{name}.quantize"))
        if dequantize:
            self._dequantize_codes(name, grid)

    def _dequantize_codes(self, name: str, grid: Grid) -> None:
        known = {initializer.name for initializer in self.initializers}
        if f"{name}.scale" not in known:
            self._constant(f"{name}.scale", np.ldexp(np.float32(1), grid.exponent))
            self._constant(f"{name}.zero_point", np.array(zero_point(grid), np.uint8))
        inputs = [codes_name(name), f"{name}.scale", f"{name}.zero_point"]
        self.nodes.append(helper.make_node("DequantizeLinear", inputs, [f"{name}.values"], name=f"{name}.dequantize"))

    def _dequantize(self, name: str, scales: np.ndarray, zero_points: np.ndarray, axis: int) -> None:
        self._constant(f"{name}.scale", scales)
        self._constant(f"{name}.zero_point", zero_points)
        inputs = [name, f"{name}.scale", f"{name}.zero_point"]
        self.nodes.append(
            helper.make_node("DequantizeLinear", inputs, [f"{name}.values"], name=f"{name}.dequantize", axis=axis)
        )

    def _constant(self, name: str, value: np.ndarray) -> None:
        self.initializers.append(numpy_helper.from_array(np.asarray(value), name))

    def _node(self, kind: str, inputs: list[str], name: str, **attributes: Any) -> None:
        self.nodes.append(helper.make_node(kind, inputs, [f"{name}.float"], name=name, **attributes))


def _owner(values: str) -> str:
    return values.removesuffix(".values")


def _multiplying_is_dividing(size: int, shift: int) -> bool:
    """Whether rounding sum · (2^shift / size) equals rounding sum · 2^shift / size for all sums of 8-bit codes.

    ONNX Runtime's global pooling multiplies by a rounded reciprocal. That is exact for powers of two; else it may miss a
    tie (a quotient of exactly one half), and ties happen only where 2^(shift + 1) and size leave a multiple of size.
    """
    return size & (size - 1) == 0 or (size % 2 == 1 and shift >= 0)
