"""Means and variances of channels, and batch norms that are moved by what quantization does to them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lowprec.layers import QuantizedLayer
from lowprec.layers.linear import folded_once

# Variances below this are those of channels that are switched off: a ratio of two of them means nothing.
DEAD_VARIANCE = 1e-12
# Squares of means this much larger than the variance leave too little of it in sums of float32.
CANCELLING = 1e3


class ChannelStatistics(NamedTuple):
    """Mean and variance of each channel [C], float64."""

    mean: Tensor
    variance: Tensor


class ChannelSums:
    """Count, sum and sum of squares of each channel, over batches [B, C, positions]: float32 in an image, float64 beyond."""

    def __init__(self) -> None:
        self.count = 0
        self.total: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def add(self, values: Tensor) -> None:
        count = values.shape[0] * values.shape[2]
        total = values.sum(2).double().sum(0)
        squares = _squares(values).sum(0)
        mean_square = (total / count).square()
        near_constant = mean_square > CANCELLING * (squares / count - mean_square)
        if near_constant.any():
            wide = values[:, near_constant].double()
            total[near_constant] = wide.sum((0, 2))
            squares[near_constant] = wide.square().sum((0, 2))
        self.count += count
        self.total = self.total + total
        self.squares = self.squares + squares

    def statistics(self) -> ChannelStatistics:
        mean = torch.as_tensor(self.total) / self.count
        return ChannelStatistics(mean, (torch.as_tensor(self.squares) / self.count - mean.square()).clamp(min=0))


def _squares(values: Tensor) -> Tensor:
    """Sums of squares over positions, [B, C], float64."""
    if values.stride(2) == 1:
        # A norm squares and adds without a tensor of squares, where positions lie side by side.
        return torch.linalg.vector_norm(values, dim=2).double().square()
    return torch.stack([image.square().sum(1) for image in values]).double()


def correct_norm(layer: QuantizedLayer, reference: ChannelStatistics, inputs: Sequence[Tensor]) -> list[Tensor]:
    """var' = var · var_q / var_fp, but for channels without variance, and then means as in :func:`correct_mean`.

    reference: statistics of what goes into the batch norm in full precision. inputs: of the layer, quantized. Returns the
    layer's outputs before the activation function, corrected, batch by batch.
    """
    found = statistics_of(layer, map(layer.before_norm, inputs))
    norm = layer.norm
    assert norm is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    wanted = _mean_behind(layer, reference)
    alive = (found.variance > DEAD_VARIANCE) & (reference.variance > DEAD_VARIANCE)
    ratio = torch.where(alive, found.variance / reference.variance.clamp(min=DEAD_VARIANCE), 1.0)
    norm.running_var.mul_(ratio.to(norm.running_var.dtype))
    return _correct_mean(layer, wanted, inputs)


def correct_mean(layer: QuantizedLayer, reference: ChannelStatistics, inputs: Sequence[Tensor]) -> list[Tensor]:
    """mean' = mean + (mean_q − mean_fp) / gain, or, in a layer without batch norm, bias' = bias − mean_q + mean_fp.

    mean_q: of the outputs behind the batch norm, with the folded, rounded weights that are shipped: their rounding moves
    means, too. The model must be in evaluation mode. Returns as :func:`correct_norm`.
    """
    return _correct_mean(layer, _mean_behind(layer, reference), inputs)


def _mean_behind(layer: QuantizedLayer, reference: ChannelStatistics) -> Tensor:
    """The mean of each channel [C] behind the batch norm, where the one before it is the reference's."""
    gain, offset = layer.gain_and_offset()
    return reference.mean * gain + offset


def _correct_mean(layer: QuantizedLayer, wanted: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    outputs = normalized(layer, inputs)
    excess = statistics_of(layer, outputs).mean - wanted
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


def normalized(layer: QuantizedLayer, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The layer's outputs before the activation function, batch by batch."""
    with folded_once(layer):
        return [layer.normalized(values) for values in inputs]


def statistics_of(layer: QuantizedLayer, outputs: Iterable[Tensor]) -> ChannelStatistics:
    """Statistics of the layer's output channels, before batch norm, over batches."""
    sums = ChannelSums()
    for output in outputs:
        sums.add(layer.by_image(output))
    return sums.statistics()
