"""How each integer operator is written in ONNX.

Moving codes and looking them up is done on the codes themselves; all else stands between DequantizeLinear and
QuantizeLinear, which ONNX Runtime fuses into integer kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lowprec.export import openvino
from lowprec.export.lookup import write_lookup
from lowprec.export.pooling import write_average_pool, write_bilinear, write_max_pool
from lowprec.export.qdq import SIGNED_ZERO_POINT, QdqGraph, codes_name, values_name, zero_point
from lowprec.integer.model import Step
from lowprec.integer.operators import (
    FloatLayerNorm,
    FloatSoftmax,
    Grid,
    IntegerAdd,
    IntegerAveragePool,
    IntegerBilinear,
    IntegerConcatenation,
    IntegerConstant,
    IntegerConv2d,
    IntegerExpand,
    IntegerFlatten,
    IntegerGather,
    IntegerInput,
    IntegerLayer,
    IntegerLinear,
    IntegerLookup,
    IntegerMatmul,
    IntegerMaxPool,
    IntegerMultiply,
    IntegerMultiplyAdd,
    IntegerOperator,
    IntegerPad,
    IntegerPermute,
    IntegerReLU,
    IntegerReshape,
    IntegerRoll,
    IntegerSlice,
    IntegerUpsample,
)

FLOAT32_EXACT = 1 << 24
LARGEST_SHIFT = 16


def write_step(graph: QdqGraph, step: Step) -> str:
    """Adds a step's nodes; returns the name of the float tensor that it ends in.

    Raises:
        TypeError: the operator has no ONNX form.
    """
    write = _WRITERS.get(type(step.operator))
    if write is None:
        raise TypeError(f"{step.name}: {type(step.operator).__name__} has no ONNX form")
    write(graph, step, step.operator)
    return values_name(step.name) if step.operator.output is not None else f"{step.name}.float"


def _values(step: Step) -> list[str]:
    return [values_name(name) for name in step.inputs]


def _input(graph: QdqGraph, step: Step, operator: IntegerInput) -> None:
    values = "images"
    if graph.runtime == openvino.NAME and operator.output.signed:
        values = openvino.rounded(graph, step.name, values, operator.output.exponent)
    graph.quantize(step.name, values, operator.output)


def _convolution(graph: QdqGraph, step: Step, layer: IntegerConv2d) -> None:
    values, stride = _values(step)[0], layer.stride
    depthwise = layer.groups == layer.codes.shape[0] == graph.shapes[step.inputs[0]][1]
    weight, offset = _weight(graph, layer, depthwise)
    if graph.runtime == openvino.NAME:
        pointwise = weight.shape[2:] == (1, 1) and layer.groups == 1 and not any(layer.padding)
        if _is_doubled(graph, layer, depthwise):
            values = openvino.doubled(graph, step.inputs[0], layer.groups)
        elif pointwise and stride != (1, 1):
            values, stride = openvino.strided(graph, step.inputs[0], stride), (1, 1)
    inputs = [values, *_weight_and_bias(graph, step.name, layer, weight, offset, axis=0)]
    graph.node(
        "Conv",
        inputs,
        _sums_name(step.name, layer),
        step.name,
        kernel_shape=weight.shape[2:],
        strides=stride,
        pads=layer.padding * 2,
        dilations=layer.dilation,
        group=layer.groups,
    )
    _finish_layer(graph, step, layer)


def _linear(graph: QdqGraph, step: Step, layer: IntegerLinear) -> None:
    weight, offset = _weight(graph, layer)
    inputs = _weight_and_bias(graph, step.name, layer, np.ascontiguousarray(weight.T), offset, axis=1)
    flat = len(graph.shapes[step.name]) == 2
    values = _values(step)[0]
    if _is_doubled(graph, layer) and flat:
        values = openvino.doubled(graph, step.inputs[0], 1)
    if flat:
        graph.node("Gemm", [values, *inputs], _sums_name(step.name, layer), step.name)
    else:
        product = graph.node("MatMul", [values, inputs[0]], f"{step.name}.product")
        graph.node("Add", [product, inputs[1]], _sums_name(step.name, layer), step.name)
    _finish_layer(graph, step, layer)


def _weight(graph: QdqGraph, layer: IntegerLayer, depthwise: bool = False) -> tuple[np.ndarray, int]:
    """Effective codes with their zero point: int8, or where pairs of products might saturate uint8 or two halves."""
    weight = layer.effective.numpy()
    if _is_doubled(graph, layer, depthwise):
        return openvino.halves(weight), 0
    if layer.bits == 8 and graph.saturates and not (graph.runtime == openvino.NAME and depthwise):
        return (weight + SIGNED_ZERO_POINT).astype(np.uint8), SIGNED_ZERO_POINT
    return weight.astype(np.int8), 0


def _is_doubled(graph: QdqGraph, layer: IntegerLayer, depthwise: bool = False) -> bool:
    """Whether 8-bit weights are written as two of 7 bits: depthwise kernels sum no pairs, so nothing saturates there."""
    return graph.runtime == openvino.NAME and layer.bits == 8 and graph.saturates and not depthwise


def _weight_and_bias(
    graph: QdqGraph, name: str, layer: IntegerLayer, weight: np.ndarray, offset: int, axis: int
) -> list[str]:
    return [
        graph.dequantize_constant(f"{name}.weight", weight, layer.exponents.numpy(), offset, axis),
        graph.dequantize_constant(f"{name}.bias", layer.bias.numpy(), layer.sum_exponents.numpy(), 0, 0),
    ]


def _sums_name(name: str, layer: IntegerLayer) -> str:
    return f"{name}.sums" if layer.shortcut is not None or layer.flatten else f"{name}.float"


def _finish_layer(graph: QdqGraph, step: Step, layer: IntegerLayer) -> None:
    _check_shift(step.name, layer)
    sums = _sums_name(step.name, layer)
    if layer.shortcut is not None:
        graph.node("Add", [sums, _values(step)[1]], f"{step.name}.float", f"{step.name}.shortcut")
    if layer.flatten:
        graph.node("Flatten", [sums], f"{step.name}.float", f"{step.name}.flatten", axis=1)
    if layer.output is not None:
        _finish(graph, step.name, layer.output, layer.six)


def _check_shift(name: str, layer: IntegerLayer) -> None:
    """Runtimes hold sums in float32 before they round: exact below 2^24, or where larger ones are clamped anyway."""
    if layer.output is None:
        return
    shift = int((layer.output.exponent - layer.sum_exponents).max())
    if shift > LARGEST_SHIFT and layer.sum_bound >= FLOAT32_EXACT:
        raise ValueError(
            f"{name}: sums of up to {layer.sum_bound} are shifted by {shift} places; at most {LARGEST_SHIFT} are exact "
            "in float32 kernels. Convert the model again with this version of lowprec"
        )


def _add(graph: QdqGraph, step: Step, operator: IntegerAdd) -> None:
    values = _values(step)
    if graph.runtime == openvino.NAME:
        values = [openvino.kept_apart(graph, name) for name in step.inputs]
    graph.node("Add", values, f"{step.name}.float", step.name)
    _finish(graph, step.name, operator.output, operator.six)


def _multiply(graph: QdqGraph, step: Step, operator: IntegerMultiply) -> None:
    graph.node("Mul", _values(step), f"{step.name}.float", step.name)
    graph.quantize(step.name, f"{step.name}.float", operator.output)


def _concatenation(graph: QdqGraph, step: Step, operator: IntegerConcatenation) -> None:
    if graph.runtime == openvino.NAME:
        parts = openvino.on_one_grid(graph, step.name, step.inputs, operator.output)
        graph.node("Concat", parts, codes_name(step.name), step.name, axis=operator.axis)
        graph.dequantize(step.name, operator.output)
        return
    graph.node("Concat", _values(step), f"{step.name}.float", step.name, axis=operator.axis)
    graph.quantize(step.name, f"{step.name}.float", operator.output)


def _finish(graph: QdqGraph, name: str, output: Grid, six: int | None) -> None:
    """Activation and quantization of an operator's float result; ReLU6 cuts the 8-bit codes, in integers."""
    source = f"{name}.float"
    if not output.signed:
        source = graph.node("Relu", [source], f"{name}.relu")
    if six is None or six >= output.high:
        graph.quantize(name, source, output)
        return
    graph.quantize(f"{name}.unclipped", source, output, dequantize=False)
    graph.clip(name, codes_name(f"{name}.unclipped"), output, output.low, six)


def _relu(graph: QdqGraph, step: Step, operator: IntegerReLU) -> None:
    graph.clip(step.name, codes_name(step.inputs[0]), operator.output, 0, operator.six)


def _flatten(graph: QdqGraph, step: Step, operator: IntegerFlatten) -> None:
    # On values: ONNX Runtime fuses a matrix product with the DequantizeLinear of a quantized tensor only.
    graph.node("Flatten", _values(step), f"{step.name}.float", step.name, axis=1)
    graph.quantize(step.name, f"{step.name}.float", operator.output)


def _moved(graph: QdqGraph, step: Step, kind: str, inputs: list[str], **attributes: Any) -> None:
    """A node on the codes themselves."""
    graph.node(kind, [codes_name(step.inputs[0]), *inputs], codes_name(step.name), step.name, **attributes)
    assert step.operator.output is not None
    graph.dequantize(step.name, step.operator.output)


def _integers(graph: QdqGraph, name: str, values: Any) -> str:
    return graph.constant(name, np.array(values, np.int64))


def _reshape(graph: QdqGraph, step: Step, operator: IntegerReshape) -> None:
    _moved(graph, step, "Reshape", [_integers(graph, f"{step.name}.shape", operator.shape)])


def _permute(graph: QdqGraph, step: Step, operator: IntegerPermute) -> None:
    _moved(graph, step, "Transpose", [], perm=operator.axes)


def _slice(graph: QdqGraph, step: Step, operator: IntegerSlice) -> None:
    axes, starts, stops, steps = zip(*operator.slices, strict=True)
    named = {"starts": starts, "stops": stops, "axes": axes, "steps": steps}
    _moved(graph, step, "Slice", [_integers(graph, f"{step.name}.{key}", value) for key, value in named.items()])


def _gather(graph: QdqGraph, step: Step, operator: IntegerGather) -> None:
    _moved(graph, step, "Gather", [_integers(graph, f"{step.name}.indices", operator.indices)], axis=operator.axis)


def _pad(graph: QdqGraph, step: Step, operator: IntegerPad) -> None:
    before, after = zip(*operator.padding, strict=True)
    sides = _integers(graph, f"{step.name}.sides", (*before, *after))
    zero = graph.constant(f"{step.name}.zero", np.array(zero_point(operator.output), np.uint8))
    _moved(graph, step, "Pad", [sides, zero])


def _roll(graph: QdqGraph, step: Step, operator: IntegerRoll) -> None:
    codes = codes_name(step.inputs[0])
    for index, (axis, shift) in enumerate(operator.shifts):
        name = f"{step.name}.{index}"
        # The last ``shift`` places come first.
        cut = -shift % graph.shapes[step.name][axis]
        ends = _integers(graph, f"{name}.cut", [cut]), _integers(graph, f"{name}.end", [np.iinfo(np.int64).max])
        begin, axes = _integers(graph, f"{name}.begin", [0]), _integers(graph, f"{name}.axis", [axis])
        tail = graph.node("Slice", [codes, *ends, axes], f"{name}.tail")
        head = graph.node("Slice", [codes, begin, ends[0], axes], f"{name}.head")
        last = index == len(operator.shifts) - 1
        codes = graph.node("Concat", [tail, head], codes_name(step.name) if last else f"{name}.rolled", axis=axis)
    graph.dequantize(step.name, operator.output)


def _constant(graph: QdqGraph, step: Step, operator: IntegerConstant) -> None:
    codes = operator.codes.numpy() + zero_point(operator.output)
    graph.node("Identity", [graph.constant(f"{step.name}.constant", codes.astype(np.uint8))], codes_name(step.name))
    graph.dequantize(step.name, operator.output)


def _expand(graph: QdqGraph, step: Step, operator: IntegerExpand) -> None:
    name = step.name
    if step.inputs[0] == step.inputs[1]:
        # The codes count the batch already: 1 leaves it as it is.
        _moved(graph, step, "Expand", [_integers(graph, f"{name}.sizes", (1, *operator.shape[1:]))])
        return
    if graph.runtime == openvino.NAME:
        raise ValueError(
            f"runtime=openvino: {name} repeats a parameter for each image, and OpenVINO computes convolutions wrong "
            "in models that read the batch's size (measured with 2026.4); choose runtime=onnxruntime"
        )
    every = graph.node("Shape", ["images"], f"{name}.image_shape")
    batch = graph.node("Gather", [every, _integers(graph, f"{name}.first", [0])], f"{name}.batch")
    sizes = _integers(graph, f"{name}.sizes", operator.shape[1:])
    shape = graph.node("Concat", [batch, sizes], f"{name}.shape", axis=0)
    _moved(graph, step, "Expand", [shape])


def _matmul(graph: QdqGraph, step: Step, operator: IntegerMatmul) -> None:
    graph.node("MatMul", _values(step), f"{step.name}.float", step.name)
    graph.quantize(step.name, f"{step.name}.float", operator.output)


def _softmax(graph: QdqGraph, step: Step, operator: FloatSoftmax) -> None:
    graph.node("Softmax", _values(step), f"{step.name}.float", step.name, axis=operator.axis)
    graph.quantize(step.name, f"{step.name}.float", operator.output)


def _layer_norm(graph: QdqGraph, step: Step, operator: FloatLayerNorm) -> None:
    name, values = step.name, _values(step)[0]
    if operator.axis != -1:
        values = graph.node("Transpose", [values], f"{name}.last", perm=[0, 2, 3, 1])
    parameters = [graph.constant(f"{name}.{key}", tensor.numpy()) for key, tensor in operator.tensors().items()]
    last = operator.axis == -1
    result = f"{name}.float" if last else f"{name}.normalized"
    graph.node("LayerNormalization", [values, *parameters], result, name, axis=-1, epsilon=operator.epsilon)
    if not last:
        graph.node("Transpose", [result], f"{name}.float", f"{name}.first", perm=[0, 3, 1, 2])
    graph.quantize(name, f"{name}.float", operator.output)


def _upsample(graph: QdqGraph, step: Step, operator: IntegerUpsample) -> None:
    factors = graph.constant(f"{step.name}.factors", np.array([1, 1, *operator.factors], np.float32))
    nearest = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
    _moved(graph, step, "Resize", ["", factors], **nearest)


_WRITERS: dict[type[IntegerOperator], Callable[[QdqGraph, Step, Any], None]] = {
    IntegerInput: _input,
    IntegerConv2d: _convolution,
    IntegerMultiplyAdd: _convolution,
    IntegerLinear: _linear,
    IntegerAdd: _add,
    IntegerMultiply: _multiply,
    IntegerConcatenation: _concatenation,
    IntegerReLU: _relu,
    IntegerLookup: write_lookup,
    IntegerMaxPool: write_max_pool,
    IntegerAveragePool: write_average_pool,
    IntegerBilinear: write_bilinear,
    IntegerFlatten: _flatten,
    IntegerReshape: _reshape,
    IntegerPermute: _permute,
    IntegerSlice: _slice,
    IntegerGather: _gather,
    IntegerPad: _pad,
    IntegerUpsample: _upsample,
    IntegerRoll: _roll,
    IntegerConstant: _constant,
    IntegerExpand: _expand,
    IntegerMatmul: _matmul,
    FloatSoftmax: _softmax,
    FloatLayerNorm: _layer_norm,
}
