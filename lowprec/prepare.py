"""From a full-precision model to its fake-quant twin: same names, same parameters, weights solved."""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from lowprec.graph.nodes import constant_nodes, module_path, tensors_of
from lowprec.graph.norm_activations import split_norm_activations
from lowprec.graph.operation import Operation
from lowprec.graph.planning import UnsupportedModelError, plan, unsupported_error
from lowprec.graph.pointwise import can_be_negative
from lowprec.graph.preconditions import check_example_inputs, check_model
from lowprec.graph.tracing import TracingError, check_same_function, describe, trace
from lowprec.integer.convertible import DESCRIPTION, unconvertible
from lowprec.layers import (
    ActivationQuantizer,
    QuantizedAdd,
    QuantizedAveragePool,
    QuantizedBatchNorm2d,
    QuantizedConcatenation,
    QuantizedConv2d,
    QuantizedFloatOperator,
    QuantizedLinear,
    QuantizedLookup,
    QuantizedMatmul,
    QuantizedMaxPool2d,
    QuantizedMultiply,
    QuantizedReLU,
    QuantizedUpsample,
    quantized_layers,
)
from lowprec.numerics import pools
from lowprec.recipe import LayerAssignment, LayerTraits, Recipe, WeightScheme

log = logging.getLogger(__name__)

# The rewritten graph in full precision against the original: pooling sums in another order, nothing else may differ.
REWRITE_TOLERANCE = 1e-4


def prepare(model: nn.Module, recipe: Recipe | str | Path, example_inputs: Tensor) -> fx.GraphModule:
    """A fake-quant copy of ``model``: weights quantized and solved, activation quantizers on every tensor.

    model: full-precision, weights loaded; it is not changed. recipe: a :class:`Recipe`, or a name or path for
    ``Recipe.load``. example_inputs: images [B, C, H, W] on the model's device, to check the traced graph with (B ≥ 2 is
    best: batch norm in train mode needs more than one value per channel).

    The result keeps the model's module names; a convolution's batch norm becomes its child ``norm``. Its
    ``meta["assignments"]`` says which layer got which scheme by which rules, ``meta["recipe"]`` is the recipe. Call
    :func:`lowprec.calibrate` before anything else. A model on the meta device is prepared from shapes alone.

    Raises:
        UnsupportedModelError: operations without an integer form, each named; a model that is compiled, scripted, wrapped
            or not float32.
        TracingError: the model cannot be traced faithfully, or itself fails on ``example_inputs``.
        RecipeError: a rule that matches no layer, or an impossible recipe.
        TypeError, ValueError: a weight that is infinite or NaN; ``example_inputs`` of another type, shape or device.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    recipe.validate()
    check_model(model)
    if any(isinstance(module, ActivationQuantizer) for module in model.modules()):
        raise ValueError("the model is prepared already: prepare the full-precision model")
    check_example_inputs(example_inputs, model)
    original, model = model, copy.deepcopy(model)
    traced = trace(model)
    # Against the model that was traced: fused attention rounds otherwise. The rewritten graph is compared with the original.
    check_same_function(model, traced, example_inputs)
    split_norm_activations(traced)
    operations = plan(traced, recipe.activations.residual)
    traits = _traits(operations, traced)
    if not traits:
        raise UnsupportedModelError(
            f"{type(original).__name__} holds no convolution and no linear layer: nothing to quantize"
        )
    assignments = recipe.assign(traits)
    for assignment in assignments:
        log.info("%s", describe_assignment(assignment))
    _Builder(traced, {assignment.name: assignment.scheme for assignment in assignments}).build(operations)
    traced.meta["recipe"] = recipe
    traced.meta["assignments"] = assignments
    traced.meta["image_shape"] = tuple(example_inputs.shape[1:])
    traced.train(original.training)
    with full_precision(traced):
        faults = unconvertible(traced, traced.meta["image_shape"])
    if faults:
        raise unsupported_error(traced, faults)
    _check_rewritten(original, traced, example_inputs)
    # Memory that its training steps have used stays for the next ones as long as it lives.
    weakref.finalize(traced, pools.release).atexit = False
    return traced


def describe_assignment(assignment: LayerAssignment) -> str:
    """One line: the layer, its scheme, and the rules that gave it."""
    scheme = assignment.scheme
    clusters = "" if scheme.bits == 8 else f", clusters of {scheme.cluster_size} ({scheme.layout}, {scheme.solver})"
    rules = f" by {', '.join(assignment.rules)}" if assignment.rules else ""
    planes = " in two planes" if scheme.planes == 2 else ""
    return f"{assignment.name}: {scheme.bits}-bit weights{planes}{clusters}{rules}"


def expect_prepared(model: object, function: str) -> None:
    """Raises TypeError, in the name of ``function``, if ``model`` is no model that :func:`prepare` made."""
    if not isinstance(model, fx.GraphModule) or "recipe" not in model.meta:
        raise TypeError(
            f"{function} expects a fake-quant model, from lowprec.prepare(model, recipe, example_inputs), not "
            f"{type(model).__name__}"
        )


@contextmanager
def full_precision(qmodel: nn.Module) -> Iterator[None]:
    """Within it, the prepared model computes with latent weights and unrounded activations."""
    switched = [module for module in qmodel.modules() if getattr(module, "quantizing", None) is True]
    for module in switched:
        module.quantizing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in switched:
            module.quantizing = True  # type: ignore[assignment]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it, the model is in eval mode; after it, each of its modules in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _traits(operations: list[Operation], traced: fx.GraphModule) -> list[LayerTraits]:
    layers = [operation for operation in operations if operation.kind in ("convolution", "linear")]
    convolutions = [operation for operation in layers if operation.kind == "convolution"]
    traits = []
    for operation in layers:
        module = traced.get_submodule(str(operation.node.target))
        roles = set()
        if convolutions and operation is convolutions[0]:
            roles.add("first_convolution")
        if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1:
            roles.add("depthwise")
        if _is_output(operation):
            roles.add("classifier")
        traits.append(LayerTraits(str(operation.node.target), frozenset(roles)))
    return traits


def _is_output(operation: Operation) -> bool:
    """Whether the operation's value is the network's output, unactivated: its sums stay 32-bit."""
    return not operation.activation and [user.op for user in operation.result.users] == ["output"]


class _Builder:
    """Carries out a plan on the traced graph: replaces nodes and modules, in order."""

    def __init__(self, traced: fx.GraphModule, schemes: dict[str, WeightScheme]) -> None:
        self.traced = traced
        self.graph = traced.graph
        self.schemes = schemes
        self.constants = constant_nodes(self.graph)
        # The quantizer on whose grid each node's tensor lies.
        self.source: dict[fx.Node, ActivationQuantizer] = {}

    def build(self, operations: list[Operation]) -> None:
        """Carries the whole plan out."""
        for operation in operations:
            getattr(self, f"_build_{operation.kind}")(operation)
        self.graph.eliminate_dead_code()
        self.traced.delete_all_unused_submodules()
        self.graph.lint()
        self.traced.recompile()

    def _build_input(self, operation: Operation) -> None:
        quantizer = ActivationQuantizer(signed=True)
        with self.graph.inserting_after(operation.node):
            node = self.graph.call_module(self._add_module("input_quantizer", quantizer), (operation.node,))
        operation.node.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
        self.source[node] = quantizer

    def _build_layer(self, operation: Operation, kind: type[QuantizedConv2d] | type[QuantizedLinear]) -> None:
        name = str(operation.node.target)
        quantizer = None if _is_output(operation) else ActivationQuantizer(signed=not operation.activation)
        layer = kind(
            self.traced.get_submodule(name),  # type: ignore[arg-type]
            self.schemes[name],
            self._source(operation),
            norm=operation.norm,
            activation=operation.activation,
            quantizer=quantizer,
            name=name,
            shortcut=None if operation.shortcut is None else self.source[self._shortcut(operation)],
            flatten=operation.options.get("flatten", False),
        )
        self._replace(operation, name, layer, quantizer)

    def _build_convolution(self, operation: Operation) -> None:
        self._build_layer(operation, QuantizedConv2d)

    def _build_linear(self, operation: Operation) -> None:
        self._build_layer(operation, QuantizedLinear)

    def _build_batch_norm(self, operation: Operation) -> None:
        name = str(operation.node.target)
        quantizer = ActivationQuantizer(signed=not operation.activation)
        layer = QuantizedBatchNorm2d(
            operation.options["module"],
            self._source(operation),
            activation=operation.activation,
            quantizer=quantizer,
            name=name,
        )
        self._replace(operation, name, layer, quantizer)

    def _build_add(self, operation: Operation) -> None:
        signed = not operation.activation and any(quantizer.signed for quantizer in self._sources(operation))
        quantizer = ActivationQuantizer(signed=signed)
        module = QuantizedAdd(operation.activation, quantizer)
        self._replace(operation, self._free_name(operation, "add"), module, quantizer)

    def _build_multiply(self, operation: Operation) -> None:
        quantizer = ActivationQuantizer(signed=any(quantizer.signed for quantizer in self._sources(operation)))
        self._replace(operation, self._free_name(operation, "multiply"), QuantizedMultiply(quantizer), quantizer)

    def _build_concatenation(self, operation: Operation) -> None:
        quantizer = ActivationQuantizer(signed=any(quantizer.signed for quantizer in self._sources(operation)))
        module = QuantizedConcatenation(quantizer, operation.options["axis"])
        self._replace(operation, self._free_name(operation, "concatenation"), module, quantizer)

    def _build_average_pool(self, operation: Operation) -> None:
        quantizer = ActivationQuantizer(signed=self._source(operation).signed)
        pool = QuantizedAveragePool(quantizer, **operation.options)
        self._replace(operation, self._free_name(operation, "average_pool"), pool, quantizer)

    def _build_upsample(self, operation: Operation) -> None:
        quantizer = ActivationQuantizer(signed=self._source(operation).signed)
        module = QuantizedUpsample(quantizer, operation.options["factors"])
        self._replace(operation, self._free_name(operation, "upsample"), module, quantizer)

    def _build_max_pool(self, operation: Operation) -> None:
        name = self._free_name(operation, "max_pool")
        self._replace(operation, name, QuantizedMaxPool2d.of(operation.options["module"]), self._source(operation))

    def _build_relu(self, operation: Operation) -> None:
        module = QuantizedReLU(operation.activation, self._source(operation))
        self._replace(operation, self._free_name(operation, "relu"), module, self._source(operation))

    def _build_lookup(self, operation: Operation) -> None:
        function, source = operation.options["function"], self._source(operation)
        quantizer = ActivationQuantizer(signed=can_be_negative(function, source.signed))
        name = self._free_name(operation, "lookup")
        self._replace(operation, name, QuantizedLookup(function, source, quantizer), quantizer)

    def _build_flatten(self, operation: Operation) -> None:
        self._replace(operation, self._free_name(operation, "flatten"), nn.Flatten(), self._source(operation))

    def _build_matmul(self, operation: Operation) -> None:
        left, right = self._sources(operation)
        quantizer = ActivationQuantizer(signed=left.signed or right.signed)
        module = QuantizedMatmul(quantizer, (left, right))
        self._replace(operation, self._free_name(operation, "matmul"), module, quantizer)

    def _build_float(self, operation: Operation) -> None:
        function = operation.options["function"]
        quantizer = ActivationQuantizer(signed=not isinstance(function, nn.Softmax))
        name = self._free_name(operation, type(function).__name__.lower())
        module = QuantizedFloatOperator(function, self._source(operation), quantizer)
        self._replace(operation, name, module, quantizer)

    def _build_constant(self, operation: Operation) -> None:
        node = operation.node
        quantizer = ActivationQuantizer(signed=True)
        name = self._free_name(operation, "constant")
        with self.graph.inserting_after(node):
            quantized = self.graph.call_module(self._add_module(name, quantizer), (node,))
        for user in [user for user in node.users if user is not quantized and user not in self.constants]:
            user.replace_input_with(node, quantized)
        self.source[quantized] = quantizer

    def _build_movement(self, operation: Operation) -> None:
        self.source[operation.node] = self._source(operation)

    def _build_nothing(self, operation: Operation) -> None:
        if operation.node.op == "call_module":
            self.source[operation.node] = self._source(operation)
            return
        operation.node.replace_all_uses_with(_inputs(operation)[0])
        self.graph.erase_node(operation.node)

    def _source(self, operation: Operation) -> ActivationQuantizer:
        return self._sources(operation)[0]

    def _sources(self, operation: Operation) -> list[ActivationQuantizer]:
        return [self.source[node] for node in _inputs(operation)]

    def _shortcut(self, operation: Operation) -> fx.Node:
        """The shortcut's node as it is now."""
        inner = {operation.node, *operation.absorbed}
        return next(node for node in tensors_of(operation.anchor) if node not in inner)

    def _replace(
        self, operation: Operation, name: str, module: nn.Module, quantizer: ActivationQuantizer | None
    ) -> None:
        inputs = _inputs(operation)
        if operation.shortcut is not None:
            inputs.append(self._shortcut(operation))
        with self.graph.inserting_before(operation.anchor):
            node = self.graph.call_module(self._add_module(name, module), tuple(inputs))
        target = str(operation.node.target)
        called = {target: self.traced.get_submodule(target)} if operation.node.op == "call_module" else {}
        node.meta = {**operation.node.meta, DESCRIPTION: describe(operation.node, called)}
        operation.result.replace_all_uses_with(node)
        for old in reversed([operation.node, *operation.absorbed]):
            self.graph.erase_node(old)
            if old.op == "call_module" and str(old.target) != name:
                self._remove_module(str(old.target))
        if quantizer is not None:
            self.source[node] = quantizer

    def _remove_module(self, name: str) -> None:
        """Unless the graph calls it elsewhere; what it holds inside and the graph calls stays, under its name.

        fx finds unused modules by identity, so it would keep a batch norm that is its convolution's child now.
        """
        targets = {str(node.target) for node in self.graph.nodes if node.op == "call_module"}
        if name in targets:
            return
        inside = [target for target in targets if target.startswith(f"{name}.")]
        kept = {target: self.traced.get_submodule(target) for target in inside}
        self.traced.delete_submodule(name)
        for target, module in kept.items():
            self.traced.add_submodule(target, module)

    def _free_name(self, operation: Operation, kind: str) -> str:
        """The module's own name where the operation is one that is called once, else a new one beside it."""
        node = operation.node
        if node.op == "call_module":
            calls = [other for other in self.graph.nodes if other.op == "call_module" and other.target == node.target]
            if len(calls) == 1:
                return str(node.target)
        owner = module_path(node) if node.op != "call_module" else str(node.target).rpartition(".")[0]
        base = f"{owner}.{kind}" if owner else kind
        taken = {name for name, _ in self.traced.named_modules()}
        return next(name for name in [base, *(f"{base}_{index}" for index in range(1, 10_000))] if name not in taken)

    def _add_module(self, name: str, module: nn.Module) -> str:
        # Makes the containers on the way that tracing has left out because they held no module of their own.
        self.traced.add_submodule(name, module)
        return name


def _inputs(operation: Operation) -> list[fx.Node]:
    """The tensors' nodes as they are now: earlier replacements may have put others in the plan's place."""
    return tensors_of(operation.node)[: len(operation.inputs)]


def _check_rewritten(original: nn.Module, qmodel: fx.GraphModule, example_inputs: Tensor) -> None:
    if example_inputs.is_meta:
        return
    with full_precision(qmodel), evaluating(original), evaluating(qmodel), torch.no_grad():
        expected, found = original(example_inputs), qmodel(example_inputs)
    error = (expected - found).abs().max() / expected.abs().max().clamp(min=1e-30)
    if not error <= REWRITE_TOLERANCE:
        layers = ", ".join(name for name, _ in quantized_layers(qmodel))
        raise TracingError(
            f"the prepared graph computes something else in full precision (relative difference {float(error):.2g}); an "
            f"operation changes a tensor in place that others use. Layers found: {layers}"
        )
