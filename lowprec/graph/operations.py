"""Recognising a traced model's operators: which nodes of its graph make up which fake-quant module.

``plan`` reads the graph and changes nothing; :mod:`lowprec.prepare` carries the plan out. An operation that has no
integer form is collected and named, never passed over.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers.adaptive_avgmax_pool import FastAdaptiveAvgPool
from timm.layers.norm_act import BatchNormAct2d
from torch import fx, nn
from torch.nn import functional

from lowprec.graph.tracing import describe


class UnsupportedModelError(ValueError):
    """The model holds operations without an integer form; the message names each, and where it stands."""


@dataclass
class Operation:
    """One future fake-quant module.

    kind: input, convolution, linear, add, average_pool, max_pool, relu, flatten or dropout. node: whose place it takes;
    absorbed: nodes after it that go into it (batch norm, activation), the last of them last. inputs: nodes of its tensors.
    """

    kind: str
    node: fx.Node
    inputs: list[fx.Node] = field(default_factory=list)
    absorbed: list[fx.Node] = field(default_factory=list)
    activation: str = ""
    norm: nn.BatchNorm2d | nn.SyncBatchNorm | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def result(self) -> fx.Node:
        """The node whose value the module gives."""
        return self.absorbed[-1] if self.absorbed else self.node


def plan(traced: fx.GraphModule) -> list[Operation]:
    """The operations of the graph, in order.

    Raises:
        UnsupportedModelError: operations that have no integer form here, all of them named.
    """
    modules = dict(traced.named_modules())
    operations: list[Operation] = []
    absorbed: set[fx.Node] = set()
    unsupported: list[str] = []
    called: dict[str, int] = {}
    for node in traced.graph.nodes:
        if node in absorbed or node.op in ("output", "get_attr") or not node.users:
            continue
        operation = _recognise(node, modules)
        if operation is None or not _takes_tensors(operation):
            if not _is_shape_arithmetic(node):
                unsupported.append(describe(node, modules))
            continue
        if operation.kind in ("convolution", "linear"):
            called[str(node.target)] = called.get(str(node.target), 0) + 1
        if operation.kind in ("convolution", "linear", "add", "relu"):
            _absorb(operation, modules)
            absorbed.update(operation.absorbed)
            for follower in operation.absorbed:
                if _is_norm(modules.get(str(follower.target))):
                    called[str(follower.target)] = called.get(str(follower.target), 0) + 1
        operations.append(operation)
    unsupported += [f"{name}, called {times} times" for name, times in called.items() if times > 1]
    unsupported += _unsupported_inputs_and_outputs(traced)
    if unsupported:
        shown = "\n  ".join(dict.fromkeys(unsupported))
        raise UnsupportedModelError(
            f"{type(traced).__name__} holds operations that have no integer form in this version:\n  {shown}\n"
            "Supported: convolution, linear, batch norm after a convolution, ReLU, ReLU6, add of two tensors, max and "
            "average pooling, flatten, dropout. Replace these operations, or choose another model"
        )
    return operations


def _unsupported_inputs_and_outputs(traced: fx.GraphModule) -> list[str]:
    inputs = [node for node in traced.graph.nodes if node.op == "placeholder" and node.users]
    outputs = [node for node in traced.graph.nodes if node.op == "output"]
    faults = []
    if len(inputs) != 1:
        faults.append(f"{len(inputs)} inputs ({', '.join(node.name for node in inputs)}); one image tensor is expected")
    if not isinstance(outputs[0].args[0], fx.Node):
        faults.append("an output that is not one tensor")
    return faults


def _recognise(node: fx.Node, modules: dict[str, nn.Module]) -> Operation | None:
    if node.op == "placeholder":
        return Operation("input", node)
    if node.op == "call_module":
        return _recognise_module(node, modules[str(node.target)])
    tensors = [argument for argument in node.args if isinstance(argument, fx.Node)]
    if node.target in _ADDS and len(tensors) == 2 and not node.kwargs:
        return Operation("add", node, tensors)
    activation = _function_activation(node)
    if activation:
        return Operation("relu", node, node.all_input_nodes[:1], activation=activation)
    recognise = _FUNCTIONS.get(node.target)
    return recognise(node) if recognise else None


def _takes_tensors(operation: Operation) -> bool:
    """Whether all inputs are tensors of the network: not parameters, not numbers taken from shapes."""
    inputs = operation.inputs
    return (bool(inputs) or operation.kind == "input") and not any(
        node.op == "get_attr" or _is_shape_arithmetic(node) for node in inputs
    )


def _recognise_module(node: fx.Node, module: nn.Module) -> Operation | None:
    inputs = node.all_input_nodes[:1]
    kind: str | None = None
    options: dict[str, Any] = {}
    if type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str):
        kind = "convolution"
    elif type(module) is nn.Linear:
        kind = "linear"
    elif module_activation(module):
        return Operation("relu", node, inputs, activation=module_activation(module))
    elif isinstance(module, nn.MaxPool2d) and not module.return_indices:
        kind, options = "max_pool", {"module": module}
    elif isinstance(module, nn.AvgPool2d):
        return _average_pool(
            node,
            inputs,
            module.kernel_size,
            module.stride,
            module.padding,
            module.ceil_mode,
            module.count_include_pad,
            module.divisor_override,
        )
    elif isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1)):
        kind, options = "average_pool", {"keep_axes": True}
    elif isinstance(module, FastAdaptiveAvgPool) and sorted(axis % 4 for axis in module.dim) == [2, 3]:
        kind, options = "average_pool", {"keep_axes": not module.flatten}
    elif isinstance(module, nn.Flatten) and module.start_dim == 1 and module.end_dim == -1:
        kind = "flatten"
    elif isinstance(module, nn.Dropout | nn.Dropout2d | nn.Identity) or type(module).__name__ == "DropPath":
        kind = "dropout"
    return Operation(kind, node, inputs, options=options) if kind else None


def module_activation(module: nn.Module) -> str:
    """ "relu" or "relu6" for a module that computes it, else ""."""
    if isinstance(module, nn.ReLU6) or (isinstance(module, nn.Hardtanh) and (module.min_val, module.max_val) == (0, 6)):
        return "relu6"
    return "relu" if isinstance(module, nn.ReLU) else ""


def _function_activation(node: fx.Node) -> str:
    if node.target in (functional.relu, torch.relu, torch.relu_, functional.relu_) or (
        node.op == "call_method" and node.target in ("relu", "relu_")
    ):
        return "relu"
    bounds = (*node.args[1:], node.kwargs.get("min_val"), node.kwargs.get("max_val"))
    six = node.target in (functional.hardtanh, functional.hardtanh_) and 0 in bounds and 6 in bounds
    return "relu6" if node.target is functional.relu6 or six else ""


def _absorb(operation: Operation, modules: dict[str, nn.Module]) -> None:
    """Takes in what follows and has no other user: no-ops, for a convolution its batch norm, then an activation."""
    while (follower := _only_user(operation.result)) is not None:
        module = modules.get(str(follower.target)) if follower.op == "call_module" else None
        if isinstance(module, nn.Identity):
            pass
        elif (
            operation.kind == "convolution" and operation.norm is None and not operation.activation and _is_norm(module)
        ):
            assert isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm)
            operation.norm = module
            if isinstance(module, BatchNormAct2d):
                operation.activation = module_activation(module.act)
        elif not operation.activation and operation.kind != "relu" and _activation_of(follower, module):
            operation.activation = _activation_of(follower, module)
        else:
            return
        operation.absorbed.append(follower)


def _activation_of(node: fx.Node, module: nn.Module | None) -> str:
    return module_activation(module) if module is not None else _function_activation(node)


def _is_norm(module: nn.Module | None) -> bool:
    """A batch norm with running statistics; timm's with an activation inside only if that is a ReLU or nothing."""
    if isinstance(module, BatchNormAct2d):
        known = module_activation(module.act) or isinstance(module.act, nn.Identity)
        return bool(known) and isinstance(module.drop, nn.Identity) and module.track_running_stats
    return type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm) and bool(module.track_running_stats)  # type: ignore[union-attr]


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


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
    padding = _pair(padding)
    # Windows that hang over padding which counts are clipped by rules of their own: not worth an integer form.
    if divisor_override is not None or (ceil_mode and count_include_pad and any(padding)):
        return None
    options = {
        "kernel_size": _pair(kernel_size),
        "stride": _pair(stride or kernel_size),
        "padding": padding,
        "ceil_mode": ceil_mode,
        "count_include_pad": count_include_pad,
    }
    return Operation("average_pool", node, inputs, options=options)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _adaptive_pool_function(node: fx.Node) -> Operation | None:
    size = node.args[1] if len(node.args) > 1 else node.kwargs.get("output_size")
    return Operation("average_pool", node, [node.all_input_nodes[0]]) if size in (1, (1, 1), [1, 1]) else None


def _mean(node: fx.Node) -> Operation | None:
    axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if not isinstance(axes, list | tuple) or sorted(axis % 4 for axis in axes) != [2, 3]:
        return None
    keep = bool(node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False))
    return Operation("average_pool", node, [node.all_input_nodes[0]], options={"keep_axes": keep})


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
    arguments = {"start_dim": 0, "end_dim": -1, **dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False))}
    arguments.update({key: value for key, value in node.kwargs.items() if key != "input"})
    same = arguments == {"start_dim": 1, "end_dim": -1}
    return Operation("flatten", node, [node.all_input_nodes[0]]) if same else None


def _view(node: fx.Node) -> Operation | None:
    shape = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], list | tuple) else node.args[1:]
    same = len(shape) == 2 and _is_batch_size(shape[0]) and shape[1] == -1
    return Operation("flatten", node, [node.all_input_nodes[0]]) if same else None


def _is_batch_size(value: Any) -> bool:
    """x.size(0), x.size()[0] or x.shape[0]."""
    if not isinstance(value, fx.Node) or not _is_shape_arithmetic(value):
        return False
    return tuple(value.args[1:]) == (0,)


def _functional_dropout(node: fx.Node) -> Operation | None:
    """One that does nothing: it drops nothing, or was traced with training=False."""
    share, training = (
        node.args[index] if len(node.args) > index else node.kwargs.get(key, default)
        for index, key, default in ((1, "p", 0.5), (2, "training", True))
    )
    return Operation("dropout", node, [node.all_input_nodes[0]]) if share == 0 or not training else None


def _is_shape_arithmetic(node: fx.Node) -> bool:
    """x.size(0), x.shape and x.shape[0]: numbers, not tensors of the network."""
    if node.op == "call_method" and node.target == "size":
        return True
    if node.target is getattr and node.args[1] == "shape":
        return True
    return node.target is operator.getitem and isinstance(node.args[0], fx.Node) and _is_shape_arithmetic(node.args[0])


_ADDS = {operator.add, operator.iadd, torch.add, "add", "add_"}
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
}
