"""Statistics of channels, and what their correction leaves a layer with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lowprec
from lowprec.calibration.statistics import (
    ChannelStatistics,
    ChannelSums,
    correct_mean,
    correct_norm,
    normalized,
    statistics_of,
)
from lowprec.layers import QuantizedLayer
from lowprec.recipe import Recipe

OPERATORS = [
    nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)),
    nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6)),
    nn.Sequential(nn.Conv2d(3, 8, 1)),
    nn.Sequential(nn.Linear(9, 4)),
]


def calibrated_layer(operator: nn.Sequential) -> tuple[QuantizedLayer, list[Tensor]]:
    """The layer in evaluation mode, and batches on the grid of its input."""
    torch.manual_seed(0)
    shape = (3, 11, 9)
    model = nn.Sequential(operator, nn.Flatten(), nn.LazyLinear(3))
    model(torch.zeros(2, *shape))
    qmodel = lowprec.prepare(model.eval(), Recipe.load("w2a8_n4"), torch.randn(2, *shape))
    batches = [torch.randn(4, *shape) for _ in range(3)]
    lowprec.calibrate(qmodel, batches)
    layer = qmodel.get_submodule("0.0")
    return layer, [layer.source(batch) for batch in batches]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_sums_are_those_of_float64(memory_format: torch.memory_format) -> None:
    torch.manual_seed(1)
    batches = [torch.randn(count, 5, 13, 7).to(memory_format=memory_format) * 3 + 1 for count in (4, 1, 3)]
    sums = ChannelSums()
    for batch in batches:
        sums.add(batch.flatten(2))
    every = torch.cat(batches).double().transpose(0, 1).flatten(1)
    found = sums.statistics()
    torch.testing.assert_close(found.mean, every.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.variance, every.var(1, unbiased=False), rtol=1e-5, atol=0)


def test_variance_next_to_a_large_mean_is_not_lost() -> None:
    torch.manual_seed(2)
    values = torch.randn(6, 3, 400)
    values[:, 1] = values[:, 1] * 1e-3 + 8  # in float32 nothing is left of it once it is squared
    values[:, 2] = 5  # no variance at all
    sums = ChannelSums()
    sums.add(values)
    every = values.double().transpose(0, 1).flatten(1)
    found = sums.statistics()
    torch.testing.assert_close(found.variance[:2], every.var(1, unbiased=False)[:2], rtol=1e-5, atol=0)
    assert found.variance[2] == 0


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_corrected_outputs_are_those_of_the_corrected_layer(operator: nn.Sequential) -> None:
    layer, inputs = calibrated_layer(operator)
    channels = layer.weight.shape[0]
    reference = ChannelStatistics(
        torch.linspace(-0.5, 0.5, channels, dtype=torch.float64), torch.ones(channels, dtype=torch.float64)
    )
    gain, offset = layer.gain_and_offset()
    wanted = reference.mean * gain + offset
    with torch.no_grad():
        outputs = (correct_mean if layer.norm is None else correct_norm)(layer, reference, inputs)
        again = normalized(layer, inputs)
    assert all(torch.equal(one, other) for one, other in zip(outputs, again, strict=True))
    step = 2.0 ** (layer.source.exponent + layer.fold().weights.exponent.max())
    difference = statistics_of(layer, outputs).mean - wanted
    # Biases are rounded to the grid of the sums, before and after; the batch norm's mean to float32.
    assert (difference.abs() <= step + 1e-6).all()


def test_a_bias_that_makes_the_grid_coarser_is_seen() -> None:
    layer, inputs = calibrated_layer(nn.Sequential(nn.Conv2d(3, 8, 1)))
    before = layer.fold().weights.exponent
    far = ChannelStatistics(torch.full((8,), 1e6, dtype=torch.float64), torch.ones(8, dtype=torch.float64))
    with torch.no_grad():
        outputs = correct_mean(layer, far, inputs)
        again = normalized(layer, inputs)
    assert not torch.equal(layer.fold().weights.exponent, before)
    assert all(torch.equal(one, other) for one, other in zip(outputs, again, strict=True))
