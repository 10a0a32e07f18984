"""From a calibrated fake-quant model to the integer model that gives the same codes. The only file here that knows both."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from lowprec.integer.model import IntegerModel, Step
from lowprec.integer.operators import (
    Grid,
    IntegerAdd,
    IntegerAveragePool,
    IntegerConv2d,
    IntegerFlatten,
    IntegerInput,
    IntegerLinear,
    IntegerMaxPool,
    IntegerOperator,
    IntegerReLU,
)
from lowprec.layers import (
    ActivationQuantizer,
    QuantizedAdd,
    QuantizedAveragePool,
    QuantizedConv2d,
    QuantizedLayer,
    QuantizedReLU,
)
from lowprec.numerics.fixed_point import CodeRange, quantize


class ConversionError(ValueError):
    """A fake-quant model that no integer model equals; the message names the layer and what to do."""


@torch.no_grad()
def convert(qmodel: fx.GraphModule) -> IntegerModel:
    """The integer model, on the CPU, whose codes equal those of ``qmodel`` in eval mode; ``qmodel`` does not change.

    Raises:
        ConversionError: the model is not prepared or not calibrated, or a layer's sums could overflow 32 bits.
    """
    if not isinstance(qmodel, fx.GraphModule) or "recipe" not in qmodel.meta:
        raise ConversionError("convert expects a model made by lowprec.prepare(model, recipe, example_inputs)")
    for name, module in qmodel.named_modules():
        if isinstance(module, ActivationQuantizer) and not module.calibrated:
            raise ConversionError(f"{name} has no exponent yet: call lowprec.calibrate(qmodel, batches) before convert")
    steps: list[Step] = []
    # A dropout is nothing in an integer model: its users take what it takes.
    names: dict[fx.Node, str] = {}
    grids: dict[str, Grid] = {}
    for node in qmodel.graph.nodes:
        if node.op != "call_module":
            continue
        name = str(node.target)
        module = qmodel.get_submodule(name)
        inputs = tuple(names[used] for used in node.args if used in names)
        if isinstance(module, nn.Dropout | nn.Dropout2d | nn.Identity) or type(module).__name__ == "DropPath":
            names[node] = inputs[0]
            continue
        try:
            operator = _operator(module, [grids[used] for used in inputs])
        except ValueError as error:
            raise ConversionError(f"layer {name}: {error}") from error
        steps.append(Step(name, inputs, operator))
        names[node] = name
        if operator.output is not None:
            grids[name] = operator.output
    return IntegerModel(steps, qmodel.meta["image_shape"]).eval()


def _operator(module: nn.Module, inputs: list[Grid]) -> IntegerOperator:
    if isinstance(module, ActivationQuantizer):
        return IntegerInput(_grid(module))
    if isinstance(module, QuantizedLayer):
        return _layer(module, inputs[0])
    if isinstance(module, QuantizedAdd):
        output = _grid(module.quantizer)
        return IntegerAdd(inputs[0], inputs[1], output, _six(module.activation, output))
    if isinstance(module, QuantizedAveragePool):
        return IntegerAveragePool(
            inputs[0],
            _grid(module.quantizer),
            module.kernel_size,
            module.stride,
            module.padding,
            module.ceil_mode,
            module.count_include_pad,
            module.keep_axes,
        )
    if isinstance(module, QuantizedReLU):
        return IntegerReLU(inputs[0], _six(module.activation, inputs[0]))
    if isinstance(module, nn.MaxPool2d):
        geometry = (module.kernel_size, module.stride, module.padding, module.dilation)
        return IntegerMaxPool(inputs[0], *map(_pair, geometry), ceil_mode=module.ceil_mode)  # type: ignore[misc, arg-type]
    if isinstance(module, nn.Flatten):
        return IntegerFlatten(inputs[0])
    raise ConversionError(f"{type(module).__name__} has no integer form")


def _layer(module: QuantizedLayer, source: Grid) -> IntegerOperator:
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
    six = None if output is None else _six(module.activation, output)
    if isinstance(module, QuantizedConv2d):
        return IntegerConv2d(
            *arguments,
            six,
            stride=_pair(module.stride),
            padding=_pair(module.padding),
            dilation=_pair(module.dilation),
            groups=module.groups,
        )
    return IntegerLinear(*arguments, six)


def _bias_codes(bias: Tensor, exponent: Tensor) -> Tensor:
    # The fold has put the bias on this grid, so quantizing it again changes nothing.
    return quantize(bias, exponent, CodeRange(-(1 << 31), (1 << 31) - 1)).to(torch.int32)


def _grid(quantizer: ActivationQuantizer) -> Grid:
    return Grid(int(quantizer.exponent), quantizer.codes.low, quantizer.codes.high)


def _six(activation: str, grid: Grid) -> int | None:
    if activation != "relu6":
        return None
    return int(quantize(torch.tensor(6.0), torch.tensor(grid.exponent), CodeRange(grid.low, grid.high)))


def _pair(value: object) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)  # type: ignore[arg-type, return-value]
