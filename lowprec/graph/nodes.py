"""What a node of a traced graph stands for: a tensor of the network, a number taken from shapes, or a constant."""

from __future__ import annotations

import operator
from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from torch import fx

# Of a tensor these give numbers, not tensors of the network.
_SHAPE_METHODS = {"size", "dim", "numel"}
_SHAPE_ATTRIBUTES = {"shape", "ndim", "device", "dtype"}


def number_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that give numbers: x.size(0), x.shape, and whatever is computed from such numbers alone."""
    numbers: set[fx.Node] = set()
    for node in graph.nodes:
        from_shape = (node.op == "call_method" and node.target in _SHAPE_METHODS) or (
            node.target is getattr and node.args[1] in _SHAPE_ATTRIBUTES
        )
        inputs = node.all_input_nodes
        if from_shape or (node.op.startswith("call") and inputs and all(used in numbers for used in inputs)):
            numbers.add(node)
    return numbers


def constant_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose value depends on parameters and buffers alone, not on the image."""
    constants: set[fx.Node] = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        # With a number taken from the image's shape, such as the batch's size, it depends on the image.
        computed = node.op in ("call_function", "call_method") and inputs and all(used in constants for used in inputs)
        if node.op == "get_attr" or computed:
            constants.add(node)
    return constants


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """The argument of a call, whether it was given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def step_name(node: fx.Node) -> str:
    """The name under which a prepared model's node is known in the integer model: its module's, or its own."""
    if node.op == "call_module":
        return str(node.target)
    path = module_path(node)
    return f"{path}.{node.name}" if path else node.name


def step_names(graph: fx.Graph) -> dict[fx.Node, str]:
    """Names of all nodes' steps, each of them once: a module may be called twice, or be called as a function's node is."""
    modules = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    names: dict[fx.Node, str] = {}
    taken: set[str] = set()
    for node in graph.nodes:
        name = step_name(node)
        # A module's name is kept for its own first call.
        if name in taken or (node.op != "call_module" and name in modules):
            name = next(free for index in count(1) if (free := f"{name}_{index}") not in taken | modules)
        taken.add(name)
        names[node] = name
    return names


def module_path(node: fx.Node) -> str:
    """Path of the module whose forward holds the operation, "" for the model's own."""
    stack = node.meta.get("nn_module_stack") or {}
    return next(reversed([str(entry[0]) for entry in stack.values()]), "")


def only_user(node: fx.Node) -> fx.Node | None:
    """The one node that uses this one, None if there are more or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def pair(value: Any) -> tuple[int, int]:
    """One number for height and width, or both."""
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def tensors_of(node: fx.Node) -> list[fx.Node]:
    """The nodes that a call takes as tensors, in order and as often as they occur: those of a list, else all."""
    first = node.args[0] if node.args else None
    if isinstance(first, list | tuple):
        return [item for item in first if isinstance(item, fx.Node)]
    return [item for item in node.args if isinstance(item, fx.Node)] or node.all_input_nodes


def is_number(value: object) -> bool:
    """Whether a call's argument is a plain Python number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


Target = Callable[..., Any] | str

ADDS: set[Target] = {torch.add, operator.add, operator.iadd, "add", "add_"}
MULTIPLIES: set[Target] = {torch.mul, operator.mul, operator.imul, "mul", "mul_"}
