"""The plan of a prepared model: which nodes of a traced graph make up which fake-quant module.

``plan`` reads the graph and changes nothing; :mod:`lowprec.prepare` carries the plan out. An operation that has no
integer form is collected and named, never passed over.
"""

from __future__ import annotations

import operator
from collections import Counter

from torch import fx, nn

from lowprec.graph.nodes import constant_nodes, number_nodes, only_user
from lowprec.graph.operation import Operation
from lowprec.graph.reasons import reason
from lowprec.graph.recognition import function_activation, is_norm, module_activation, recognise
from lowprec.graph.tracing import describe

LAYERS = ("convolution", "linear")
# Kinds whose activation function becomes the clamping of their requantization.
TAKES_ACTIVATION = (*LAYERS, "batch_norm", "add")


class UnsupportedModelError(ValueError):
    """The model holds operations without an integer form; the message names each, and where it stands."""


def unsupported_error(traced: fx.GraphModule, faults: list[str]) -> UnsupportedModelError:
    """The error that names all faults of a model, each once."""
    shown = "\n  ".join(dict.fromkeys(faults))
    return UnsupportedModelError(
        f"{type(traced).__name__} holds operations that have no integer form in this version:\n  {shown}\n"
        "README.md lists the supported ones. Replace these operations, or choose another model"
    )


def plan(traced: fx.GraphModule, residual: str = "requantized") -> list[Operation]:
    """The operations of the graph, in the order in which they can be carried out.

    residual: with ``accumulator`` a layer without an activation of its own takes in the add that follows it.

    Raises:
        UnsupportedModelError: operations that have no integer form here, all of them named.
    """
    return _Planner(traced, residual).plan()


class _Planner:
    def __init__(self, traced: fx.GraphModule, residual: str) -> None:
        self.traced = traced
        self.modules = dict(traced.named_modules())
        self.residual = residual
        self.numbers = number_nodes(traced.graph)
        self.constants = constant_nodes(traced.graph)
        self.absorbed: set[fx.Node] = set()

    def plan(self) -> list[Operation]:
        operations: list[Operation] = []
        unsupported: list[str] = []
        for node in self.traced.graph.nodes:
            if node in self.absorbed or node in self.numbers:
                continue
            if node in self.constants:
                # A constant becomes a tensor of codes where the network's tensors meet it, not on the way there.
                if any(user not in self.constants and user not in self.numbers for user in node.users):
                    operations.append(Operation("constant", node))
                continue
            if node.op == "output" or not node.users:
                continue
            operation = recognise(node, self.modules)
            if operation is None or not self._takes_tensors(operation) or self._indexes_by_tensor(node):
                why = reason(node, self.modules, self.numbers, self.constants)
                unsupported.append(f"{describe(node, self.modules)}{f': {why}' if why else ''}")
                continue
            if operation.kind in TAKES_ACTIVATION:
                self._absorb(operation)
                self.absorbed.update(operation.absorbed)
            operations.append(operation)
        unsupported += self._called_again()
        unsupported += self._unsupported_inputs_and_outputs()
        if unsupported:
            raise unsupported_error(self.traced, unsupported)
        position = {node: index for index, node in enumerate(self.traced.graph.nodes)}
        return sorted(operations, key=lambda operation: position[operation.anchor])

    def _takes_tensors(self, operation: Operation) -> bool:
        """Whether all inputs are tensors, of the network or constant: not numbers taken from shapes."""
        inputs = operation.inputs
        return (bool(inputs) or operation.kind == "input") and not any(node in self.numbers for node in inputs)

    def _indexes_by_tensor(self, node: fx.Node) -> bool:
        """Whether the places that are taken of a tensor are a parameter's or a buffer's values."""
        return node.target is operator.getitem and any(used in self.constants for used in node.all_input_nodes[1:])

    def _called_again(self) -> list[str]:
        """Modules with weights that the graph calls several times: one module cannot have several grids."""
        calls = Counter(str(node.target) for node in self.traced.graph.nodes if node.op == "call_module")
        return [
            f"{name}, called {count} times"
            for name, count in calls.items()
            if count > 1 and next(self.modules[name].parameters(), None) is not None
        ]

    def _unsupported_inputs_and_outputs(self) -> list[str]:
        inputs = [node for node in self.traced.graph.nodes if node.op == "placeholder" and node.users]
        outputs = [node for node in self.traced.graph.nodes if node.op == "output"]
        faults = []
        if len(inputs) != 1:
            faults.append(
                f"{len(inputs)} inputs ({', '.join(node.name for node in inputs)}); one image tensor is expected"
            )
        if not isinstance(outputs[0].args[0], fx.Node):
            faults.append("an output that is not one tensor")
        return faults

    def _absorb(self, operation: Operation) -> None:
        """Takes in what follows and has no other user: no-ops, for a convolution its batch norm, then a shortcut that is
        added, then an activation.
        """
        # An add that a layer has taken in already is not the other operand's as well.
        while (follower := only_user(operation.result)) is not None and follower not in self.absorbed:
            module = self.modules.get(str(follower.target)) if follower.op == "call_module" else None
            activation = module_activation(module) if module is not None else function_activation(follower)
            plain = not operation.activation and operation.shortcut is None
            if isinstance(module, nn.Identity):
                pass
            elif operation.kind == "convolution" and plain and operation.norm is None and is_norm(module):
                assert isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm)
                operation.norm = module
            elif operation.kind in LAYERS and plain and self._is_residual_add(operation, follower):
                operation.shortcut = next(node for node in follower.args if node is not operation.result)  # type: ignore[assignment]
                operation.anchor = follower
            elif operation.kind == "convolution" and plain and self._is_flatten_before_output(follower):
                operation.options["flatten"] = True
            elif not operation.activation and activation:
                operation.activation = activation
            else:
                return
            operation.absorbed.append(follower)

    def _is_residual_add(self, operation: Operation, follower: fx.Node) -> bool:
        if self.residual != "accumulator":
            return False
        add = recognise(follower, self.modules)
        return add is not None and add.kind == "add" and self._takes_tensors(add) and len(set(add.inputs)) == 2

    def _is_flatten_before_output(self, follower: fx.Node) -> bool:
        flatten = recognise(follower, self.modules)
        user = only_user(follower)
        return flatten is not None and flatten.kind == "flatten" and user is not None and user.op == "output"
