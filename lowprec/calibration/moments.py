"""Second moments of a layer's inputs, with which its weights are fitted to its full-precision outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lowprec.calibration.codes import Codes, values_of
from lowprec.layers import QuantizedLayer

# Positions of the feature maps that are used, evenly spaced: so many for each input of an output channel, and at least so
# many in all; more change the moments little.
POSITIONS_PER_INPUT = 32
LEAST_POSITIONS = 1 << 16


class Moments(NamedTuple):
    """Of a layer's inputs x and wanted outputs y, about their means, float64: h_gKK = E[x xᵀ], cross_gKO = E[x y].

    positions: how many they are taken from.
    """

    h_gKK: Tensor
    cross_gKO: Tensor
    positions: int


def moments(layer: QuantizedLayer, inputs: Sequence[Codes | Tensor], outputs: list[Tensor]) -> Moments:
    """Moments over batches of inputs and of wanted outputs, [B, C, H, W] or [..., C] each."""
    channels = layer.weight.shape[0]
    positions = sum(output.numel() // channels for output in outputs)
    inputs_of_channel = layer.weight[0].numel()
    step = max(1, positions // max(LEAST_POSITIONS, POSITIONS_PER_INPUT * inputs_of_channel))
    count = 0
    sums: list[Tensor | float] = [0.0, 0.0, 0.0, 0.0]
    for values, output in zip(inputs, outputs, strict=True):
        x_gKN = layer.columns(values_of(values))[..., ::step]
        y_gON = layer.by_channel(output).unflatten(0, (x_gKN.shape[0], -1))[..., ::step]
        count += x_gKN.shape[-1]
        products = (x_gKN.sum(-1), y_gON.sum(-1), x_gKN @ x_gKN.transpose(1, 2), x_gKN @ y_gON.transpose(1, 2))
        # Products of one batch in float32, which is quick; sums over batches in float64.
        sums = [total + product.double() for total, product in zip(sums, products, strict=True)]
    x_gK, y_gO, xx_gKK, xy_gKO = (torch.as_tensor(total) / count for total in sums)
    return Moments(xx_gKK - x_gK[:, :, None] * x_gK[:, None, :], xy_gKO - x_gK[:, :, None] * y_gO[:, None, :], count)
