"""The walk over a prepared model's graph that chooses exponents, layer after layer."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor, fx, nn

from lowprec.calibration.codes import Codes, values_of
from lowprec.calibration.statistics import Inputs, normalized
from lowprec.layers import ActivationQuantizer, QuantizedAdd, QuantizedLayer
from lowprec.numerics.calibrators import choose_exponent
from lowprec.recipe import ActivationScheme

log = logging.getLogger("lowprec.calibrate")

# Exponents of operands: the sum's own may lie two above the larger, and 16 above the smaller is what kernels add exactly.
ADD_REACH = 14
# Attention masks are added in front of a softmax: 0, or a number so low that nothing is left of e to its power. Down to
# -128 · 2^-3 = -16 is enough, and leaves the sums the resolution that -100 would take from them.
MASK_EXPONENT = -3
MASK_THRESHOLD = -32.0


class Walk:
    """Goes through the graph node by node, all batches at a time; tensors are kept as 8-bit codes, and dropped early.

    Images are channels_last, as integer kernels take them, but in the usual order where the model itself moves them about: it
    may call view, which cannot take them otherwise.
    """

    def __init__(self, qmodel: fx.GraphModule) -> None:
        self.qmodel = qmodel
        self.scheme: ActivationScheme = qmodel.meta["recipe"].activations
        self.values: dict[fx.Node, list[Any]] = {}

    def enter(self, node: fx.Node, images: list[Tensor]) -> None:
        """What is done at each node before its tensor is computed."""

    def normalized(self, node: fx.Node, layer: QuantizedLayer, inputs: Inputs) -> list[Tensor]:
        """What a layer gives before its activation function, batch by batch; here its weights and statistics may change."""
        return normalized(layer, inputs)

    def forget(self, node: fx.Node) -> None:
        """What is done with a tensor that no later node uses."""
        self.values.pop(node, None)

    def run(self, images: list[Tensor]) -> None:
        """Chooses the exponents of all tensors, in the order of the graph."""
        last_use = {used: node for node in self.qmodel.graph.nodes for used in node.all_input_nodes}
        for node in self.qmodel.graph.nodes:
            self.enter(node, images)
            if node.op == "placeholder":
                self.values[node] = images
            elif node.op == "call_module":
                # Its arguments, not all_input_nodes: that names a tensor once that is added to itself.
                inputs = [self.values[used] for used in node.args if isinstance(used, fx.Node)]
                self.values[node] = self._visit(node, inputs)
            elif node.op == "get_attr":
                self.values[node] = [attribute(self.qmodel, str(node.target))] * len(images)
            elif node.op in ("call_function", "call_method"):
                self.values[node] = [self._move(node, index) for index in range(len(images))]
            for used in node.all_input_nodes:
                if last_use[used] is node:
                    self.forget(used)

    def _visit(self, node: fx.Node, inputs: list[list[Any]]) -> list[Any]:
        name = str(node.target)
        module = self.qmodel.get_submodule(name)
        batches = list(zip(*inputs, strict=True))
        if isinstance(module, ActivationQuantizer):
            values = [batch[0] for batch in batches]
            if _is_mask(values[0]):
                module.set_exponent(MASK_EXPONENT)
            else:
                self._choose(name, module, values)
            return [Codes.of(module(value), module) for value in values]
        if isinstance(module, QuantizedLayer):
            return self._layer_outputs(node, module, batches)
        if getattr(module, "quantizer", None) is None:
            # No quantizer of its own: it hands on the grid of its input, or its output is the network's.
            results = [module(*map(values_of, batch)) for batch in batches]
            if not isinstance(batches[0][0], Codes):
                return results
            return [Codes.of(result, batches[0][0].quantizer) for result in results]
        if isinstance(module, QuantizedAdd):
            batches = self._within_reach(node)
        outputs = [module.unquantized(*map(values_of, batch)) for batch in batches]  # type: ignore[operator]
        return self._quantized(name, module.quantizer, outputs)  # type: ignore[arg-type]

    def _layer_outputs(self, node: fx.Node, layer: QuantizedLayer, batches: list[tuple[Any, ...]]) -> list[Any]:
        outputs = self.normalized(node, layer, [batch[0] for batch in batches])
        for index, batch in enumerate(batches):
            outputs[index] = layer.activated(outputs[index], *map(values_of, batch[1:]))
        return outputs if layer.quantizer is None else self._quantized(str(node.target), layer.quantizer, outputs)

    def _within_reach(self, node: fx.Node) -> list[tuple[Any, ...]]:
        """Operands of an add whose exponents lie at most ADD_REACH apart, batch by batch.

        The finer one is made coarser, which the sum hides. A branch that is scaled down to next to nothing, as ConvNeXt's are at
        first, would need more bits than kernels have.
        """
        operands = [used for used in node.args if isinstance(used, fx.Node)]
        quantizers = [self.values[used][0].quantizer for used in operands]
        least = max(int(quantizer.exponent) for quantizer in quantizers) - ADD_REACH
        for quantizer in quantizers:
            if int(quantizer.exponent) < least:
                log.info(
                    "%s: an operand's exponent is raised from %d to %d", node.target, int(quantizer.exponent), least
                )
                self._raise(quantizer, least)
        return list(zip(*(self.values[used] for used in operands), strict=True))

    def _raise(self, quantizer: ActivationQuantizer, exponent: int) -> None:
        """Makes a quantizer's grid coarser, and rounds to it all that is kept on it."""
        before = quantizer.exponent.clone()
        quantizer.set_exponent(exponent)

        def rounded(stored: Any) -> Any:
            if isinstance(stored, Codes):
                on_it = stored.quantizer is quantizer
                return Codes.of(quantizer(stored.values(before), overwrite=True), quantizer) if on_it else stored
            return tuple(map(rounded, stored)) if isinstance(stored, tuple) else stored

        self.values = {node: list(map(rounded, batches)) for node, batches in self.values.items()}

    def _move(self, node: fx.Node, batch: int) -> Any:
        """What a call without a module gives for one batch: numbers taken from shapes, or codes that are moved."""
        quantizers = []

        def tensor_of(stored: Any) -> Any:
            if isinstance(stored, Codes):
                quantizers.append(stored.quantizer)
                return stored.values().contiguous()
            if isinstance(stored, Tensor):
                return stored.contiguous()
            return tuple(map(tensor_of, stored)) if isinstance(stored, tuple) else stored

        arguments, keywords = fx.map_arg((node.args, node.kwargs), lambda used: tensor_of(self.values[used][batch]))
        result = call(node, arguments, keywords)
        if not quantizers:
            return result  # a number, or a constant on its way to its quantizer
        if isinstance(result, Tensor):
            return Codes.of(result, quantizers[0])
        moved = isinstance(result, tuple | list) and any(isinstance(item, Tensor) for item in result)
        return tuple(Codes.of(item, quantizers[0]) for item in result) if moved else result

    def _quantized(self, name: str, quantizer: ActivationQuantizer, outputs: list[Tensor]) -> list[Any]:
        """Codes of ``outputs``, whose memory is used."""
        self._choose(name, quantizer, outputs)
        return [Codes.of(quantizer(output, overwrite=True), quantizer) for output in outputs]

    def _choose(self, name: str, quantizer: ActivationQuantizer, outputs: list[Tensor]) -> None:
        try:
            exponent = choose_exponent(outputs, quantizer.codes, self.scheme.calibrator, self.scheme.percentile)
        except ValueError as error:
            raise ValueError(f"calibrating the output of {name}: {error}") from error
        quantizer.set_exponent(exponent)
        log.debug("%s: exponent %d", name, exponent)


def call(node: fx.Node, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """What a node gives that calls a function or a method."""
    if node.op == "call_method":
        return getattr(arguments[0], str(node.target))(*arguments[1:], **keywords)
    return node.target(*arguments, **keywords)  # type: ignore[operator]


def attribute(module: nn.Module, path: str) -> Any:
    """A parameter or a buffer by its path."""
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner), name)


def _is_mask(values: Tensor) -> bool:
    """Whether a tensor holds zeros and one very negative number alone."""
    lowest = values.amin()
    return bool(lowest <= MASK_THRESHOLD) and bool(((values == 0) | (values == lowest)).all())
