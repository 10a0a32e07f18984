"""Activation exponents and batch-norm correction from a few batches of unlabelled images.

One walk over the graph, layer after layer, each with the inputs that the quantized network before it really gives: first
the batch norm is corrected, then the exponent of the output is chosen, then the output is quantized and handed on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from lowprec.images import check_images, image_batches
from lowprec.layers import ActivationQuantizer, QuantizedAdd, QuantizedLayer
from lowprec.numerics.calibrators import choose_exponent
from lowprec.numerics.fixed_point import dequantize, quantize
from lowprec.prepare import expect_prepared, full_precision
from lowprec.recipe import ActivationScheme

log = logging.getLogger(__name__)

# Variances below this are those of channels that are switched off: a ratio of two of them means nothing.
DEAD_VARIANCE = 1e-12
# Exponents of operands: the sum's own may lie two above the larger, and 16 above the smaller is what kernels add exactly.
ADD_REACH = 14
# Attention masks are added in front of a softmax: 0, or a number so low that nothing is left of e to its power. Down to
# -128 · 2^-3 = -16 is enough, and leaves the sums the resolution that -100 would take from them.
MASK_EXPONENT = -3
MASK_THRESHOLD = -32.0


class ChannelStatistics(NamedTuple):
    """Mean and variance of each channel [C], float64."""

    mean: Tensor
    variance: Tensor


@torch.no_grad()
def calibrate(qmodel: fx.GraphModule, batches: Iterable[Any], batch_norm_correction: bool = True) -> None:
    """Chooses the exponent of every activation tensor and corrects the batch norms of a prepared model, in place.

    batches: images [B, C, H, W], normalised as the model expects; of (images, labels) pairs the images are taken. A few
    hundred images do. With the recipe's calibrator. batch_norm_correction moves the running statistics by the difference
    that quantization makes (no re-estimation, which breaks networks whose statistics come from augmented images):
    mean' = mean + mean_q − mean_fp, var' = var · var_q / var_fp, with statistics of the same images.

    Raises:
        TypeError: a model that is not prepared, or batches that hold no float32 images.
        ValueError: no images, or of another number of channels; values that are infinite or NaN (the batch or the tensor is
            named); or a model calibrated already whose batch norms would be corrected twice.
    """
    expect_prepared(qmodel, "calibrate")
    images = []
    for name, batch in image_batches(batches, "calibrate"):
        check_images(batch, qmodel.meta["image_shape"], name, any_size=True)
        images.append(batch)
    if not images:
        raise ValueError("calibrate got no images: give at least one batch [B, C, H, W]")
    quantizers = [module for module in qmodel.modules() if isinstance(module, ActivationQuantizer)]
    if batch_norm_correction and any(quantizer.calibrated for quantizer in quantizers):
        raise ValueError(
            "the model is calibrated already and its batch norms would be corrected twice: prepare the full-precision "
            "model anew, or call calibrate(qmodel, batches, batch_norm_correction=False) to choose exponents alone"
        )
    device = next(qmodel.parameters()).device
    images = [batch.to(device) for batch in images]
    was_training = qmodel.training
    qmodel.eval()
    try:
        reference = _reference_statistics(qmodel, images) if batch_norm_correction else {}
        _Walk(qmodel, reference, qmodel.meta["recipe"].activations).run(images)
    finally:
        qmodel.train(was_training)


def _reference_statistics(qmodel: fx.GraphModule, images: list[Tensor]) -> dict[str, ChannelStatistics]:
    """Statistics of what goes into each batch norm in full precision, by the layer's name."""
    sums: dict[str, _ChannelSums] = {}
    handles = []
    for name, layer in qmodel.named_modules():
        if isinstance(layer, QuantizedLayer) and layer.norm is not None:
            sums[name] = _ChannelSums()
            handles.append(layer.norm.register_forward_pre_hook(_recorder(sums[name])))
    try:
        with full_precision(qmodel):
            for batch in images:
                qmodel(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: channel_sums.statistics() for name, channel_sums in sums.items()}


def _recorder(sums: _ChannelSums) -> Any:
    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        sums.add(inputs[0])

    return record


class _ChannelSums:
    """Count, sum and sum of squares of each channel, over batches."""

    def __init__(self) -> None:
        self.count = 0
        self.total: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def add(self, values: Tensor) -> None:
        wide = values.double().transpose(0, 1).flatten(1)
        self.count += wide.shape[1]
        self.total = self.total + wide.sum(1)
        self.squares = self.squares + wide.square().sum(1)

    def statistics(self) -> ChannelStatistics:
        mean = torch.as_tensor(self.total) / self.count
        return ChannelStatistics(mean, (torch.as_tensor(self.squares) / self.count - mean.square()).clamp(min=0))


class _Walk:
    """Goes through the graph node by node, all batches at a time; tensors are kept as 8-bit codes, and dropped early."""

    def __init__(
        self, qmodel: fx.GraphModule, reference: dict[str, ChannelStatistics], scheme: ActivationScheme
    ) -> None:
        self.qmodel = qmodel
        self.reference = reference
        self.scheme = scheme
        self.values: dict[fx.Node, list[Any]] = {}

    def run(self, images: list[Tensor]) -> None:
        last_use = {used: node for node in self.qmodel.graph.nodes for used in node.all_input_nodes}
        for node in self.qmodel.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = images
            elif node.op == "call_module":
                # Its arguments, not all_input_nodes: that names a tensor once that is added to itself.
                inputs = [self.values[used] for used in node.args if isinstance(used, fx.Node)]
                self.values[node] = self._visit(str(node.target), inputs)
            elif node.op == "get_attr":
                self.values[node] = [_attribute(self.qmodel, str(node.target))] * len(images)
            elif node.op in ("call_function", "call_method"):
                self.values[node] = [self._move(node, index) for index in range(len(images))]
            for used in node.all_input_nodes:
                if last_use[used] is node:
                    self.values.pop(used, None)

    def _visit(self, name: str, inputs: list[list[Any]]) -> list[Any]:
        module = self.qmodel.get_submodule(name)
        batches = list(zip(*inputs, strict=True))
        if isinstance(module, ActivationQuantizer):
            values = [batch[0] for batch in batches]
            if _is_mask(values[0]):
                module.set_exponent(MASK_EXPONENT)
                return [_coded(quantize(value, module.exponent, module.codes), module) for value in values]
            return self._quantized(name, module, values)
        if isinstance(module, QuantizedLayer) and name in self.reference:
            _correct(module, self.reference[name], [_unpacked(batch[0]) for batch in batches])
        if getattr(module, "quantizer", None) is None:
            # No quantizer of its own: it hands on the grid of its input, or its output is the network's.
            results = [module(*map(_unpacked, batch)) for batch in batches]
            if isinstance(module, QuantizedLayer) or not isinstance(batches[0][0], _Codes):
                return results
            quantizer = batches[0][0].quantizer
            return [_coded(quantize(result, quantizer.exponent, quantizer.codes), quantizer) for result in results]
        if isinstance(module, QuantizedAdd):
            batches = _within_reach(name, batches)
        outputs = [module.unquantized(*map(_unpacked, batch)) for batch in batches]  # type: ignore[operator]
        return self._quantized(name, module.quantizer, outputs)  # type: ignore[arg-type]

    def _move(self, node: fx.Node, batch: int) -> Any:
        """What a call without a module gives for one batch: numbers taken from shapes, or codes that are moved."""
        quantizers = []

        def tensor_of(stored: Any) -> Any:
            if isinstance(stored, _Codes):
                quantizers.append(stored.quantizer)
                return stored.codes.float()  # not all movements take 8-bit integers
            return tuple(map(tensor_of, stored)) if isinstance(stored, tuple) else stored

        arguments, keywords = fx.map_arg((node.args, node.kwargs), lambda used: tensor_of(self.values[used][batch]))
        if node.op == "call_method":
            result = getattr(arguments[0], str(node.target))(*arguments[1:], **keywords)
        else:
            result = node.target(*arguments, **keywords)  # type: ignore[operator]
        if not quantizers:
            return result  # a number, or a constant on its way to its quantizer
        if isinstance(result, Tensor):
            return _coded(result, quantizers[0])
        moved = isinstance(result, tuple | list) and any(isinstance(item, Tensor) for item in result)
        return tuple(_coded(item, quantizers[0]) for item in result) if moved else result

    def _quantized(self, name: str, quantizer: ActivationQuantizer, outputs: list[Tensor]) -> list[Any]:
        try:
            exponent = choose_exponent(outputs, quantizer.codes, self.scheme.calibrator, self.scheme.percentile)
        except ValueError as error:
            raise ValueError(f"calibrating the output of {name}: {error}") from error
        quantizer.set_exponent(exponent)
        log.debug("%s: exponent %d", name, exponent)
        return [_coded(quantize(output, quantizer.exponent, quantizer.codes), quantizer) for output in outputs]


def _attribute(module: nn.Module, path: str) -> Any:
    """A parameter or a buffer by its path."""
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner), name)


class _Codes(NamedTuple):
    """A tensor as calibration keeps it: 8-bit codes, and the quantizer on whose grid they lie."""

    codes: Tensor
    quantizer: ActivationQuantizer


def _coded(codes: Tensor, quantizer: ActivationQuantizer) -> _Codes:
    return _Codes(codes.to(torch.int8 if quantizer.signed else torch.uint8), quantizer)


def _is_mask(values: Tensor) -> bool:
    """Whether a tensor holds zeros and one very negative number alone."""
    lowest = values.amin()
    return bool(lowest <= MASK_THRESHOLD) and bool(((values == 0) | (values == lowest)).all())


def _within_reach(name: str, batches: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Operands of an add whose exponents lie at most ADD_REACH apart: the finer one is made coarser, which the sum hides.

    A branch that is scaled down to next to nothing, as ConvNeXt's are at first, would need more bits than kernels have.
    """
    quantizers = [stored.quantizer for stored in batches[0]]
    least = max(int(quantizer.exponent) for quantizer in quantizers) - ADD_REACH
    for quantizer in quantizers:
        if int(quantizer.exponent) < least:
            log.info("%s: an operand's exponent is raised from %d to %d", name, int(quantizer.exponent), least)
    before = [quantizer.exponent.clone() for quantizer in quantizers]
    for quantizer in quantizers:
        quantizer.set_exponent(max(int(quantizer.exponent), least))
    return [
        tuple(
            _coded(
                quantize(dequantize(stored.codes, old), stored.quantizer.exponent, stored.quantizer.codes),
                stored.quantizer,
            )
            for stored, old in zip(batch, before, strict=True)
        )
        for batch in batches
    ]


def _unpacked(stored: Any) -> Tensor:
    return dequantize(stored.codes, stored.quantizer.exponent) if isinstance(stored, _Codes) else stored


def _correct(layer: QuantizedLayer, reference: ChannelStatistics, inputs: list[Tensor]) -> None:
    """mean' = mean + mean_q − mean_fp; var' = var · var_q / var_fp, but for channels without variance."""
    sums = _ChannelSums()
    for batch in inputs:
        sums.add(layer.before_norm(batch))
    found = sums.statistics()
    norm = layer.norm
    assert norm is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    alive = (found.variance > DEAD_VARIANCE) & (reference.variance > DEAD_VARIANCE)
    ratio = torch.where(alive, found.variance / reference.variance.clamp(min=DEAD_VARIANCE), 1.0)
    norm.running_mean.add_((found.mean - reference.mean).to(norm.running_mean.dtype))
    norm.running_var.mul_(ratio.to(norm.running_var.dtype))
