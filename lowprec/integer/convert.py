"""From a calibrated fake-quant model to the integer model that gives the same codes. The only file here that knows both."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, fx, nn

from lowprec import __version__
from lowprec.graph.movement import is_movement
from lowprec.graph.nodes import constant_nodes, number_nodes, pair, step_names, tensors_of
from lowprec.graph.recognition import is_nothing
from lowprec.graph.shapes import ShapeError, Shapes
from lowprec.integer.convert_movement import convert_movement
from lowprec.integer.convertible import averaged_axes
from lowprec.integer.model import IntegerModel, Step
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
    IntegerInput,
    IntegerLinear,
    IntegerLookup,
    IntegerMatmul,
    IntegerMaxPool,
    IntegerMultiply,
    IntegerMultiplyAdd,
    IntegerOperator,
    IntegerReLU,
)
from lowprec.layers import (
    ActivationQuantizer,
    QuantizedAdd,
    QuantizedAveragePool,
    QuantizedConcatenation,
    QuantizedConv2d,
    QuantizedFloatOperator,
    QuantizedLayer,
    QuantizedLinear,
    QuantizedLookup,
    QuantizedMatmul,
    QuantizedMaxPool2d,
    QuantizedMultiply,
    QuantizedReLU,
    QuantizedUpsample,
)
from lowprec.numerics.fixed_point import CodeRange, quantize
from lowprec.prepare import expect_prepared, full_precision


class ConversionError(ValueError):
    """A fake-quant model that no integer model equals; the message names the layer and what to do."""


@torch.no_grad()
def convert(qmodel: fx.GraphModule) -> IntegerModel:
    """The integer model, on the CPU, whose codes equal those of ``qmodel`` in eval mode; ``qmodel`` does not change.

    Raises:
        TypeError: the model is not a prepared one.
        ConversionError: the model is not calibrated, or a layer's sums could overflow 32 bits.
    """
    expect_prepared(qmodel, "convert")
    for name, module in qmodel.named_modules():
        if isinstance(module, ActivationQuantizer) and not module.calibrated:
            raise ConversionError(f"{name} has no exponent yet: call lowprec.calibrate(qmodel, batches) before convert")
    metadata = {"lowprec": __version__, "recipe": qmodel.meta["recipe"].to_dict()}
    return IntegerModel(_Converter(qmodel).steps(), qmodel.meta["image_shape"], metadata).eval()


class _Converter:
    """Goes through the graph in order and makes a step of every node that computes or moves codes."""

    def __init__(self, qmodel: fx.GraphModule) -> None:
        self.qmodel = qmodel
        self.numbers = number_nodes(qmodel.graph)
        self.constants = constant_nodes(qmodel.graph)
        # A dropout is nothing in an integer model: its users take what it takes.
        self.names: dict[fx.Node, str] = {}
        self.grids: dict[str, Grid] = {}
        self.made: list[Step] = []

    @cached_property
    def shapes(self) -> Shapes:
        """Needed by models that move codes only."""
        with full_precision(self.qmodel):
            return Shapes(self.qmodel, self.qmodel.meta["image_shape"])

    def steps(self) -> list[Step]:
        """All steps of the integer model, in order."""
        names = step_names(self.qmodel.graph)
        for node in self.qmodel.graph.nodes:
            if node.op not in ("call_module", "call_function", "call_method") or node in self.numbers | self.constants:
                continue
            name = names[node]
            try:
                self._convert(node, name)
            except ShapeError as error:
                raise ConversionError(f"layer {error}") from error
            except ValueError as error:
                raise ConversionError(f"layer {name}: {error}") from error
        return self.made

    def _convert(self, node: fx.Node, name: str) -> None:
        module = self.qmodel.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, ActivationQuantizer) and node.all_input_nodes[0].op != "placeholder":
            self._add(node, name, (), self._constant(node.all_input_nodes[0], module))
            return
        inputs = tuple(self.names[used] for used in tensors_of(node) if used in self.names)
        if module is not None and is_nothing(module):
            self.names[node] = inputs[0]
        elif is_movement(node, module) and not isinstance(module, nn.Flatten):
            self._move(node, module, name, inputs[0])
        else:
            assert module is not None
            operator = _operator(module, [self.grids[used] for used in inputs])
            if isinstance(operator, IntegerAveragePool) and operator.axes != (2, 3):
                operator.axes = averaged_axes(self.shapes.shape(node.all_input_nodes[0]), operator.axes)
            self._add(node, name, inputs, operator)

    def _move(self, node: fx.Node, module: nn.Module | None, name: str, source: str) -> None:
        movements = convert_movement(node, module, self.grids[source], self.shapes)
        self.names[node] = source
        for part, operator in movements or []:
            part_name = f"{name}.{part}" if part else name
            batch = (self._batch_of(node),) if isinstance(operator, IntegerExpand) else ()
            self._add(node, part_name, (self.names[node], *batch), operator)

    def _batch_of(self, node: fx.Node) -> str:
        """The step whose batch an expanded tensor has: its own, or for a constant that of the images."""
        source = node.all_input_nodes[0]
        return self.names[source] if self.shapes.shape(source)[0] == -1 else self.made[0].name

    def _constant(self, node: fx.Node, quantizer: ActivationQuantizer) -> IntegerConstant:
        """The codes of a tensor that depends on parameters alone."""
        value = _ConstantValue(self.qmodel).of(node)
        codes = quantize(value.cpu(), quantizer.exponent.cpu(), quantizer.codes)
        return IntegerConstant(codes.to(torch.int16), _grid(quantizer))

    def _add(self, node: fx.Node, name: str, inputs: tuple[str, ...], operator: IntegerOperator) -> None:
        self.made.append(Step(name, inputs, operator))
        self.names[node] = name
        if operator.output is not None:
            self.grids[name] = operator.output


class _ConstantValue(fx.Interpreter):
    """Computes a node that depends on parameters and buffers alone."""

    def of(self, node: fx.Node) -> Tensor:
        """The node's value."""
        for used in node.all_input_nodes:
            self.env[used] = self.of(used)
        value: Tensor = self.run_node(node)
        return value


def _operator(module: nn.Module, inputs: list[Grid]) -> IntegerOperator:
    if isinstance(module, QuantizedLayer):
        return _layer(module, *inputs)
    for kind, make in _MAKERS.items():
        if isinstance(module, kind):
            return make(module, inputs)
    raise ConversionError(f"{type(module).__name__} has no integer form")


def _add(module: Any, inputs: list[Grid]) -> IntegerOperator:
    output = _grid(module.quantizer)
    return IntegerAdd(inputs[0], inputs[1], output, _six(module.activation, output))


def _average_pool(module: Any, inputs: list[Grid]) -> IntegerOperator:
    names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "keep_axes", "axes")
    return IntegerAveragePool(inputs[0], _grid(module.quantizer), **{name: getattr(module, name) for name in names})


def _float_operator(module: Any, inputs: list[Grid]) -> IntegerOperator:
    function, output = module.function, _grid(module.quantizer)
    if isinstance(function, nn.Softmax):
        return FloatSoftmax(inputs[0], output, int(function.dim or 0))
    tensors = function.weight.detach().float().cpu(), function.bias.detach().float().cpu()
    axis = 1 if isinstance(function, LayerNorm2d) else -1
    return FloatLayerNorm(inputs[0], output, *tensors, function.eps, axis)


def _max_pool(module: Any, inputs: list[Grid]) -> IntegerOperator:
    geometry = (module.kernel_size, module.stride, module.padding, module.dilation)
    return IntegerMaxPool(inputs[0], *map(pair, geometry), ceil_mode=module.ceil_mode)  # type: ignore[misc, arg-type]


_MAKERS: dict[type[nn.Module], Callable[[Any, list[Grid]], IntegerOperator]] = {
    ActivationQuantizer: lambda module, inputs: IntegerInput(_grid(module)),
    QuantizedAdd: _add,
    QuantizedMultiply: lambda module, inputs: IntegerMultiply(inputs[0], inputs[1], _grid(module.quantizer)),
    QuantizedConcatenation: lambda module, inputs: IntegerConcatenation(inputs, _grid(module.quantizer), module.axis),
    QuantizedAveragePool: _average_pool,
    QuantizedReLU: lambda module, inputs: IntegerReLU(inputs[0], _six(module.activation, inputs[0])),
    QuantizedLookup: lambda module, inputs: IntegerLookup(module.table(), inputs[0], _grid(module.quantizer)),
    QuantizedUpsample: lambda module, inputs: IntegerBilinear(inputs[0], _grid(module.quantizer), module.factors),
    QuantizedMatmul: lambda module, inputs: IntegerMatmul(inputs[0], inputs[1], _grid(module.quantizer)),
    QuantizedFloatOperator: _float_operator,
    QuantizedMaxPool2d: _max_pool,
    nn.Flatten: lambda module, inputs: IntegerFlatten(inputs[0]),
}


def _layer(module: QuantizedLayer, source: Grid, shortcut: Grid | None = None) -> IntegerOperator:
    weights, bias = module.fold()
    output = None if module.quantizer is None else _grid(module.quantizer)
    exponents = weights.exponent
    tensors = (
        weights.codes.to(torch.int8).cpu(),
        None if weights.mantissas is None else weights.mantissas.to(torch.int8).cpu(),
        exponents.to(torch.int8).cpu(),
        _bias_codes(bias, exponents + source.exponent).cpu(),
    )
    scheme = module.scheme
    arguments = (*tensors, scheme.bits, scheme.cluster_size, scheme.layout, source, output)
    options: dict[str, Any] = {
        "six": None if output is None else _six(module.activation, output),
        "shortcut": shortcut,
        "flatten": module.flatten,
    }
    if isinstance(module, QuantizedLinear):
        return IntegerLinear(*arguments, **options)
    if isinstance(module, QuantizedConv2d):
        geometry = {name: pair(getattr(module, name)) for name in ("stride", "padding", "dilation")}
        return IntegerConv2d(*arguments, **options, **geometry, groups=module.groups)
    unit = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
    return IntegerMultiplyAdd(*arguments, **options, **unit, groups=len(bias))


def _bias_codes(bias: Tensor, exponent: Tensor) -> Tensor:
    # The fold has put the bias on this grid, so quantizing it again changes nothing.
    return quantize(bias, exponent, CodeRange(-(1 << 31), (1 << 31) - 1)).to(torch.int32)


def _grid(quantizer: ActivationQuantizer) -> Grid:
    return Grid(int(quantizer.exponent), quantizer.codes.low, quantizer.codes.high)


def _six(activation: str, grid: Grid) -> int | None:
    if activation != "relu6":
        return None
    return int(quantize(torch.tensor(6.0), torch.tensor(grid.exponent), CodeRange(grid.low, grid.high)))
