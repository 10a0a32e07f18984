"""Tracing a full-precision model with torch.fx, and the proof that the traced model is the same model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import Linear
from timm.models import get_notrace_functions, get_notrace_modules
from timm.models.vgg import ConvMlp
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from lowprec.graph.nodes import argument, module_path


class TracingError(ValueError):
    """The model cannot be traced, or the traced model computes something else."""


class _Tracer(fx.Tracer):
    """Keeps whole the modules and functions that timm registers as not to be traced into."""

    def __init__(self) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        # timm's own linear layer does what torch's does; whole, it is one.
        self._leaves = (*get_notrace_modules(), Linear)

    def is_leaf_module(self, module: nn.Module, module_qualified_name: str) -> bool:
        if type(module) in _TRACEABLE_FORWARDS:
            return False
        return isinstance(module, self._leaves) or super().is_leaf_module(module, module_qualified_name)

    def call_module(
        self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        traceable = _TRACEABLE_FORWARDS.get(type(module))
        return super().call_module(module, partial(traceable, module) if traceable else forward, args, kwargs)


def _conv_mlp(module: ConvMlp, values: Tensor) -> Tensor:
    """Without the pooling that widens images smaller than the kernel: the comparison of the two models finds those."""
    hidden = module.drop(module.act1(module.fc1(values)))
    return module.act2(module.fc2(hidden))


# What timm's modules compute where the branch that they take does not depend on data.
_TRACEABLE_FORWARDS: dict[type[nn.Module], Callable[..., Tensor]] = {ConvMlp: _conv_mlp}


def trace(model: nn.Module) -> fx.GraphModule:
    """The model as a graph of operators; module names are kept and parameters shared.

    Raises:
        TracingError: torch.fx cannot trace it, for instance because its control flow depends on data.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        graphs = {training: _Tracer().trace(model.train(training)) for training in (True, False)}
    except Exception as error:  # torch.fx raises whatever the model's own code raises on proxies
        raise TracingError(
            f"{type(model).__name__} cannot be traced by torch.fx: {error}. Its control flow may depend on data; wrap "
            "that part in a module of its own or choose a traceable variant"
        ) from error
    finally:
        for module, training in modes:
            module.training = training
    traced = fx.GraphModule(model, graphs[False], type(model).__name__)
    _restore_dropout(traced, graphs[True])
    return traced


def _restore_dropout(traced: fx.GraphModule, in_training: fx.Graph) -> None:
    """Calls of functional.dropout(..., training=self.training) become modules, which follow the mode as the calls did."""
    pairs = list(zip(traced.graph.nodes, in_training.nodes, strict=False))
    if len(traced.graph.nodes) != len(in_training.nodes) or any(one.target != other.target for one, other in pairs):
        return  # The mode changes more than dropout: comparing the two models will show it.
    for node, other in pairs:
        if node.target is functional.dropout and not argument(node, 2, "training", True):
            if not argument(other, 2, "training", True):
                continue
            path = module_path(node)
            names = {name for name, _ in traced.named_modules()}
            base = f"{path}.dropout" if path else "dropout"
            name = next(free for free in (base, *(f"{base}_{index}" for index in range(1, 1000))) if free not in names)
            traced.add_submodule(name, nn.Dropout(argument(node, 1, "p", 0.5)))
            with traced.graph.inserting_before(node):
                module_node = traced.graph.call_module(name, (node.all_input_nodes[0],))
            node.replace_all_uses_with(module_node)
            traced.graph.erase_node(node)
    traced.recompile()


def check_same_function(model: nn.Module, traced: nn.Module, example_inputs: Tensor) -> None:
    """Runs both models on ``example_inputs``, in train and in eval mode with equal seeds, and compares bit for bit.

    Models on the meta device have no values and pass. Neither model's state changes.

    Raises:
        TracingError: the outputs differ.
    """
    if example_inputs.is_meta:
        return
    for training in (False, True):
        expected, found = (_outputs(candidate, example_inputs, training) for candidate in (model, traced))
        same = len(expected) == len(found) and all(
            torch.equal(left, right) for left, right in zip(expected, found, strict=True)
        )
        if not same:
            mode = "train" if training else "eval"
            raise TracingError(
                f"{type(model).__name__}: the traced model differs from the original in {mode} mode; a value that "
                "depends on self.training or on data was fixed while tracing"
            )


def _outputs(model: nn.Module, example_inputs: Tensor, training: bool) -> list[Tensor]:
    candidate = copy.deepcopy(model).train(training)
    devices = [example_inputs.device] if example_inputs.is_cuda else []
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(0)
        return [leaf for leaf in tree_leaves(candidate(example_inputs)) if isinstance(leaf, Tensor)]


def describe(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    """An operation as a user knows it: the kind of module or function, and where it stands in the model."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        inner = [type(child).__name__ for name, child in module.named_children() if name == "act"]
        return f"{type(module).__name__}{f' with {inner[0]}' if inner else ''} at {node.target}"
    target: Callable[..., Any] | str = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    return f"{name}() in {module_path(node) or 'the model itself'}"
