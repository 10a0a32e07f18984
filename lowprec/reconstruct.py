"""Calibration that also fits the weights: quantized so that each layer's outputs, not its weights, come closest.

The quantized network and the full-precision one walk side by side over unlabelled images. Each layer is given the inputs that
the quantized network before it really gives, and is fitted to the outputs of the full-precision layer on its own inputs, so
that errors of weights and activations before it are made up for as well (Li et al., GPTAQ, arXiv 2504.02692, do this with GPTQ).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from lowprec.calibrate import calibration_images, is_calibrated
from lowprec.calibration.moments import moments
from lowprec.calibration.statistics import Inputs, correct_mean, statistics_of
from lowprec.calibration.walk import Walk, attribute, call
from lowprec.layers import QuantizedBatchNorm2d, QuantizedLayer
from lowprec.numerics.compensation import (
    compensate_clusters,
    compensate_mantissas,
    compensate_steps,
    damped,
    ridge_target,
)
from lowprec.numerics.fixed_point import power_of_two
from lowprec.numerics.solvers import solve_eight_bit
from lowprec.prepare import full_precision

log = logging.getLogger(__name__)

# The ridge that holds weights near their full-precision values, relative to the inputs' mean square: a floor, and more where
# the moments of K inputs are known from few positions.
DAMPING = 0.01
# Layers with more inputs to an output channel keep the solver's codes: their moments would not fit into memory.
LARGEST_INPUTS = 8192


@torch.no_grad()
def reconstruct(qmodel: fx.GraphModule, batches: Iterable[Any]) -> None:
    """Calibrates a prepared model and fits its weights to what its layers compute in full precision, in place.

    Instead of :func:`lowprec.calibrate`, and takes the same batches: labels are not needed. Codes and scales are those of
    :mod:`lowprec.numerics.compensation`; latent weights become the quantized ones, so fine-tuning starts from these. Batch norms
    keep their variances, which the fit makes up for; means, and biases of layers without batch norm, are corrected. A second
    ternary plane is fitted to what the first one lacks.

    Raises:
        TypeError: a model that is not prepared, or batches that hold no float32 images.
        ValueError: no images, or of another number of channels; values that are infinite or NaN (the batch or the tensor is
            named); a model calibrated already.
    """
    images = calibration_images(qmodel, batches, "reconstruct")
    if is_calibrated(qmodel):
        raise ValueError("the model is calibrated already: prepare the full-precision model anew, then reconstruct")
    was_training = qmodel.training
    qmodel.eval()
    try:
        _ReconstructionWalk(qmodel).run(images)
    finally:
        qmodel.train(was_training)


class _ReconstructionWalk(Walk):
    """Beside the quantized tensors of each node, it has those of the full-precision network."""

    def __init__(self, qmodel: fx.GraphModule) -> None:
        super().__init__(qmodel)
        self.original = copy.deepcopy(qmodel)
        self.wanted: dict[fx.Node, list[Any]] = {}
        # What the layer at hand gives in full precision before its batch norm, batch by batch.
        self.outputs: list[Tensor] = []

    def enter(self, node: fx.Node, images: list[Tensor]) -> None:
        if node.op == "output":
            return
        with full_precision(self.original):
            self.wanted[node] = images if node.op == "placeholder" else self._computed(node, len(images))

    def forget(self, node: fx.Node) -> None:
        super().forget(node)
        self.wanted.pop(node, None)

    def _computed(self, node: fx.Node, count: int) -> list[Any]:
        if node.op == "get_attr":
            return [attribute(self.original, str(node.target))] * count
        arguments: list[Any] = [self._arguments(node, index) for index in range(count)]
        if node.op in ("call_method", "call_function"):
            return [call(node, positional, named) for positional, named in arguments]
        module = self.original.get_submodule(str(node.target))
        if isinstance(module, QuantizedLayer):
            self.outputs = [module.before_norm(positional[0]) for positional, _ in arguments]
        return [module(*positional, **named) for positional, named in arguments]

    def _arguments(self, node: fx.Node, batch: int) -> Any:
        return fx.map_arg((node.args, node.kwargs), lambda used: self.wanted[used][batch])

    def normalized(self, node: fx.Node, layer: QuantizedLayer, inputs: Inputs) -> list[Tensor]:
        if not isinstance(layer, QuantizedBatchNorm2d):
            if layer.weight[0].numel() <= LARGEST_INPUTS:
                fit_weights(layer, inputs, self.outputs)
            else:
                log.info("%s: %d inputs, kept as solved", node.target, layer.weight[0].numel())
        return correct_mean(layer, statistics_of(layer, self.outputs), inputs)


def fit_weights(layer: QuantizedLayer, inputs: Inputs, outputs: list[Tensor]) -> None:
    """Sets latent weights and scales of ``layer`` to those that best give ``outputs`` (before batch norm) from ``inputs``."""
    found = moments(layer, inputs, outputs)
    groups, inputs_of_channel, _ = found.h_gKK.shape
    damping = DAMPING + inputs_of_channel / found.positions
    w_gOK = layer.weight.double().reshape(groups, -1, inputs_of_channel)
    target = ridge_target(w_gOK, found.h_gKK, found.cross_gKO, damping).reshape(layer.weight.shape)
    h_gKK = damped(found.h_gKK, damping)
    quantizer = layer.weight_quantizer
    if layer.scheme.bits == 8:
        layer.weight.copy_(compensate_steps(target, h_gKK, _eight_bit_steps(layer, target)))
        return
    fitted = compensate_clusters(target, h_gKK, quantizer.layout, layer.scheme.bits)
    if layer.scheme.planes == 1:
        quantizer.keep_scale(fitted.scale)
        layer.weight.copy_(fitted.weight)
        if layer.scheme.bits == 4:
            _settle(layer, target, h_gKK)
        return
    # The second plane makes up for what the first one lacks.
    residual = compensate_clusters(target - fitted.weight, h_gKK, quantizer.layout, layer.scheme.bits)
    quantizer.keep_scale(fitted.scale, residual.scale)
    layer.weight.copy_(fitted.weight + residual.weight)


def _settle(layer: QuantizedLayer, target: Tensor, h_gKK: Tensor) -> None:
    """Moves 4-bit codes to where outputs are closest with the mantissas and effective codes that the layer ships."""
    folded, quantizer = layer.fold().weights, layer.weight_quantizer
    assert folded.mantissas is not None
    step = power_of_two(folded.exponent).double() / _gain(layer)
    codes = compensate_mantissas(target, h_gKK, step, folded.mantissas, folded.codes, quantizer.layout)
    layer.weight.copy_(quantizer.layout.merge(quantizer.layout.split(codes) * quantizer.scale))


def _gain(layer: QuantizedLayer) -> Tensor:
    """The batch norm's gain of each output channel [O]; 1 for a channel that is switched off."""
    gain, _ = layer.gain_and_offset()
    return torch.where(gain == 0, 1.0, gain)


def _eight_bit_steps(layer: QuantizedLayer, weight: Tensor) -> Tensor:
    """What one code is worth in each output channel [O], before the batch norm's gain is folded in: it may be negative."""
    gain = _gain(layer)
    folded = weight * gain.view(-1, *[1] * (weight.dim() - 1))
    return power_of_two(solve_eight_bit(folded)).double() / gain
