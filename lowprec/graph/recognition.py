"""Recognising one node of a traced graph as the operation that it is."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import Linear
from timm.layers.adaptive_avgmax_pool import FastAdaptiveAvgPool
from torch import fx, nn
from torch.nn import functional

from lowprec.graph.float_operators import float_function, float_module
from lowprec.graph.movement import bilinear_factors, is_movement
from lowprec.graph.nodes import ADDS, MULTIPLIES, argument, is_number, pair, tensors_of
from lowprec.graph.operation import Operation
from lowprec.graph.pointwise import pointwise_function, pointwise_module

NOTHING = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Identity)


def recognise(node: fx.Node, modules: dict[str, nn.Module]) -> Operation | None:
    """The operation of a node; None for one that has no integer form."""
    if node.op == "placeholder":
        return Operation("input", node)
    if node.op == "call_module":
        return _recognise_module(node, modules[str(node.target)])
    activation = function_activation(node)
    if activation:
        return Operation("relu", node, node.all_input_nodes[:1], activation=activation)
    tensors = tensors_of(node)
    if node.target in ADDS | MULTIPLIES and len(tensors) == 2 and not node.kwargs:
        return Operation("add" if node.target in ADDS else "multiply", node, tensors)
    specific = _FUNCTIONS.get(node.target)
    if specific is not None and (operation := specific(node)) is not None:
        return operation
    if is_movement(node, None):
        return Operation("movement", node, tensors[:1])
    if (factors := bilinear_factors(node, None)) is not None:
        return Operation("upsample", node, tensors[:1], options={"factors": factors})
    in_float = float_function(node)
    if in_float is not None:
        return Operation("float", node, tensors[:1], options={"function": in_float})
    function = pointwise_function(node)
    return Operation("lookup", node, tensors[:1], options={"function": function}) if function else None


def _recognise_module(node: fx.Node, module: nn.Module) -> Operation | None:
    inputs = node.all_input_nodes[:1]
    if is_nothing(module):
        return Operation("nothing", node, inputs)
    if module_activation(module):
        return Operation("relu", node, inputs, activation=module_activation(module))
    if is_norm(module):
        return Operation("batch_norm", node, inputs, options={"module": module})
    if is_movement(node, module):
        return Operation("movement", node, inputs)
    if isinstance(module, nn.AvgPool2d):
        names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
        return _average_pool(node, inputs, *(getattr(module, name) for name in names))
    if (factors := bilinear_factors(node, module)) is not None:
        return Operation("upsample", node, inputs, options={"factors": factors})
    if (function := float_module(module)) is not None:
        return Operation("float", node, inputs, options={"function": function})
    if (function := pointwise_module(module)) is not None:
        return Operation("lookup", node, inputs, options={"function": function})
    kind: str | None = None
    options: dict[str, Any] = {}
    # A weight that a hook computes is no parameter.
    trainable = "weight" in module._parameters
    plain_padding = (
        isinstance(module, nn.Conv2d) and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    )
    if type(module) is nn.Conv2d and plain_padding and trainable:
        kind = "convolution"
    elif type(module) in (nn.Linear, Linear) and trainable:
        kind = "linear"
    elif type(module) is nn.MaxPool2d and not module.return_indices:
        kind, options = "max_pool", {"module": module}
    elif isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1)):
        kind, options = "average_pool", {"keep_axes": True}
    elif isinstance(module, FastAdaptiveAvgPool) and sorted(axis % 4 for axis in module.dim) == [2, 3]:
        kind, options = "average_pool", {"keep_axes": not module.flatten}
    elif isinstance(module, nn.Flatten) and module.start_dim == 1 and module.end_dim == -1:
        kind = "flatten"
    return Operation(kind, node, inputs, options=options) if kind else None


def is_nothing(module: nn.Module) -> bool:
    """A module that does nothing in evaluation."""
    return isinstance(module, NOTHING) or type(module).__name__ == "DropPath"


def module_activation(module: nn.Module) -> str:
    """ "relu" or "relu6" for a module that computes it, else ""."""
    if isinstance(module, nn.ReLU6) or (isinstance(module, nn.Hardtanh) and (module.min_val, module.max_val) == (0, 6)):
        return "relu6"
    return "relu" if isinstance(module, nn.ReLU) else ""


def function_activation(node: fx.Node) -> str:
    """ "relu" or "relu6" for a call of a function or method that computes it, else ""."""
    if node.target in (functional.relu, torch.relu, torch.relu_, functional.relu_) or (
        node.op == "call_method" and node.target in ("relu", "relu_")
    ):
        return "relu"
    bounds = (*node.args[1:], node.kwargs.get("min_val"), node.kwargs.get("max_val"))
    six = node.target in (functional.hardtanh, functional.hardtanh_) and 0 in bounds and 6 in bounds
    return "relu6" if node.target is functional.relu6 or six else ""


def is_norm(module: nn.Module | None) -> bool:
    """A batch norm with running statistics."""
    return type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm) and bool(module.track_running_stats)  # type: ignore[union-attr]


def _average_pool(
    node: fx.Node,
    inputs: list[fx.Node],
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Operation | None:
    if any(isinstance(value, fx.Node) for value in (kernel_size, stride, padding)):
        return None
    padding = pair(padding)
    # Windows that hang over padding which counts are clipped by rules of their own: not worth an integer form.
    if divisor_override is not None or (ceil_mode and count_include_pad and any(padding)):
        return None
    options = {
        "kernel_size": pair(kernel_size),
        "stride": pair(stride or kernel_size),
        "padding": padding,
        "ceil_mode": ceil_mode,
        "count_include_pad": count_include_pad,
    }
    return Operation("average_pool", node, inputs, options=options)


def _adaptive_pool_function(node: fx.Node) -> Operation | None:
    size = argument(node, 1, "output_size")
    return Operation("average_pool", node, [node.all_input_nodes[0]]) if size in (1, (1, 1), [1, 1]) else None


def _mean(node: fx.Node) -> Operation | None:
    axes = argument(node, 1, "dim")
    axes = (axes,) if is_number(axes) else axes
    if not isinstance(axes, list | tuple) or not all(is_number(axis) and axis != 0 for axis in axes):
        return None
    axes = (2, 3) if sorted(axes) == [2, 3] else tuple(axes)
    keep = bool(argument(node, 2, "keepdim", False))
    return Operation("average_pool", node, [node.all_input_nodes[0]], options={"keep_axes": keep, "axes": axes})


def _matmul(node: fx.Node) -> Operation | None:
    return Operation("matmul", node, tensors_of(node)) if len(tensors_of(node)) == 2 else None


def _average_pool_function(node: fx.Node) -> Operation | None:
    options: dict[str, Any] = {key: value for key, value in node.kwargs.items() if key != "input"}
    return _average_pool(node, [node.all_input_nodes[0]], *node.args[1:], **options)  # type: ignore[arg-type]


def _max_pool_function(node: fx.Node) -> Operation | None:
    if node.kwargs.get("return_indices"):
        return None
    options = {key: value for key, value in node.kwargs.items() if key not in ("input", "return_indices")}
    module = nn.MaxPool2d(*node.args[1:], **options)  # type: ignore[arg-type]
    return Operation("max_pool", node, [node.all_input_nodes[0]], options={"module": module})


def _flatten(node: fx.Node) -> Operation | None:
    same = argument(node, 1, "start_dim", 0) == 1 and argument(node, 2, "end_dim", -1) == -1
    return Operation("flatten", node, [node.all_input_nodes[0]]) if same else None


def _view(node: fx.Node) -> Operation | None:
    shape = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], list | tuple) else node.args[1:]
    same = len(shape) == 2 and _is_batch_size(shape[0]) and shape[1] == -1
    return Operation("flatten", node, [node.all_input_nodes[0]]) if same else None


def _is_batch_size(value: Any) -> bool:
    """x.size(0), x.size()[0] or x.shape[0]."""
    return isinstance(value, fx.Node) and value.op != "placeholder" and tuple(value.args[1:]) == (0,)


def _functional_dropout(node: fx.Node) -> Operation | None:
    """One that does nothing: it drops nothing, or was traced with training=False."""
    share, training = argument(node, 1, "p", 0.5), argument(node, 2, "training", True)
    return Operation("nothing", node, [node.all_input_nodes[0]]) if share == 0 or not training else None


def _concatenation(node: fx.Node) -> Operation | None:
    axis = argument(node, 1, "dim", 0)
    tensors = tensors_of(node)
    if not is_number(axis) or not isinstance(node.args[0], list | tuple):
        return None
    if len(tensors) == 1:
        return Operation("nothing", node, tensors)
    return Operation("concatenation", node, tensors, options={"axis": axis})


_FUNCTIONS: dict[Any, Callable[[fx.Node], Operation | None]] = {
    functional.adaptive_avg_pool2d: _adaptive_pool_function,
    functional.avg_pool2d: _average_pool_function,
    functional.max_pool2d: _max_pool_function,
    functional.dropout: _functional_dropout,
    torch.max_pool2d: _max_pool_function,
    torch.mean: _mean,
    "mean": _mean,
    torch.flatten: _flatten,
    "flatten": _flatten,
    "view": _view,
    "reshape": _view,
    operator.matmul: _matmul,
    torch.matmul: _matmul,
    torch.bmm: _matmul,
    "matmul": _matmul,
    torch.cat: _concatenation,
    torch.concat: _concatenation,
}
