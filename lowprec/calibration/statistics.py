"""Means and variances of channels, and batch norms that are moved by what quantization does to them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from lowprec.calibration.codes import Codes, products
from lowprec.layers import QuantizedLayer

# Variances below this are those of channels that are switched off: a ratio of two of them means nothing.
DEAD_VARIANCE = 1e-12
# Positions over which sums are of float32 alone.
POSITIONS = 1 << 12

# Batches of a layer's input.
Inputs: TypeAlias = Sequence[Codes | Tensor]


class ChannelStatistics(NamedTuple):
    """Mean and variance of each channel [C], float64."""

    mean: Tensor
    variance: Tensor


class ChannelSums:
    """Count, sum and sum of squares of each channel, over batches [B, C, positions].

    Float32 within an image and up to POSITIONS of several, about their mean; float64 beyond.
    """

    def __init__(self) -> None:
        self.count = 0
        self.total: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def add(self, values: Tensor) -> None:
        images = values.unsqueeze(3)
        for some in images.split(max(1, POSITIONS // values.shape[2])):
            count = some.shape[0] * some.shape[2]
            # What batch norm computes in training: one pass, if the channels of a position lie side by side.
            mean, variance = (found.double() for found in torch.batch_norm_update_stats(some, None, None, 0.0))
            self.count += count
            self.total = self.total + count * mean
            self.squares = self.squares + count * (variance + mean.square())

    def statistics(self) -> ChannelStatistics:
        mean = torch.as_tensor(self.total) / self.count
        return ChannelStatistics(mean, (torch.as_tensor(self.squares) / self.count - mean.square()).clamp(min=0))


def correct_norm(layer: QuantizedLayer, reference: ChannelStatistics, inputs: Inputs) -> list[Tensor]:
    """var' = var · var_q / var_fp, but for channels without variance, and then means as in :func:`correct_mean`.

    reference: statistics of what goes into the batch norm in full precision. inputs: of the layer, quantized. Returns the
    layer's outputs before the activation function, corrected, batch by batch.
    """
    weight, exponent = layer.weight_quantizer.with_exponents(layer.weight)
    found = statistics_of(layer, products(layer, inputs, weight, exponent, layer.bias))
    norm = layer.norm
    assert norm is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    wanted = _mean_behind(layer, reference)
    alive = (found.variance > DEAD_VARIANCE) & (reference.variance > DEAD_VARIANCE)
    ratio = torch.where(alive, found.variance / reference.variance.clamp(min=DEAD_VARIANCE), 1.0)
    norm.running_var.mul_(ratio.to(norm.running_var.dtype))
    return _correct_mean(layer, wanted, inputs)


def correct_mean(layer: QuantizedLayer, reference: ChannelStatistics, inputs: Inputs) -> list[Tensor]:
    """mean' = mean + (mean_q − mean_fp) / gain, or, in a layer without batch norm, bias' = bias − mean_q + mean_fp.

    mean_q: of the outputs behind the batch norm, with the folded, rounded weights that are shipped: their rounding moves
    means, too. The model must be in evaluation mode. Returns as :func:`correct_norm`.
    """
    return _correct_mean(layer, _mean_behind(layer, reference), inputs)


def _mean_behind(layer: QuantizedLayer, reference: ChannelStatistics) -> Tensor:
    """The mean of each channel [C] behind the batch norm, where the one before it is the reference's."""
    gain, offset = layer.gain_and_offset()
    return reference.mean * gain + offset


def _correct_mean(layer: QuantizedLayer, wanted: Tensor, inputs: Inputs) -> list[Tensor]:
    outputs = normalized(layer, inputs)
    excess = _mean_of(layer, outputs) - wanted
    before = layer.fold()
    if layer.norm is not None:
        assert layer.norm.running_mean is not None
        gain, _ = layer.gain_and_offset()
        # A channel that is switched off gives its offset whatever the mean.
        shift = torch.where(gain != 0, excess / torch.where(gain != 0, gain, 1.0), 0.0)
        layer.norm.running_mean.add_(shift.to(layer.norm.running_mean.dtype))
    elif layer.bias is not None:
        layer.bias.sub_(excess.to(layer.bias.dtype))
    after = layer.fold()
    if not torch.equal(after.weights.exponent, before.weights.exponent):
        return normalized(layer, inputs)  # a large bias makes the grid of the sums coarser, and the weights with it
    # The weights are what they were: the sums, integers on their grid, move by what the biases move.
    moved = (after.bias - before.bias).float().view(1, -1, 1)
    for output in outputs:
        layer.by_image(output).add_(moved)
    return outputs


def normalized(layer: QuantizedLayer, inputs: Inputs) -> list[Tensor]:
    """The layer's outputs before the activation function, batch by batch, in evaluation."""
    weight, exponent, bias = layer.folded_values()
    return list(products(layer, inputs, weight, exponent, bias.float()))


def statistics_of(layer: QuantizedLayer, outputs: Iterable[Tensor]) -> ChannelStatistics:
    """Statistics of the layer's output channels, before batch norm, over batches."""
    sums = ChannelSums()
    for output in outputs:
        sums.add(layer.by_image(output))
    return sums.statistics()


def _mean_of(layer: QuantizedLayer, outputs: Iterable[Tensor]) -> Tensor:
    """The mean of each of the layer's output channels [C] over batches: float32 in an image, float64 beyond."""
    count, total = 0, torch.zeros((), dtype=torch.float64)
    for output in outputs:
        values = layer.by_image(output)
        count += values.shape[0] * values.shape[2]
        total = total + values.sum(2).double().sum(0)
    return total / count
