"""Moments of inputs and wanted outputs, against the operation itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lowprec
from lowprec.calibration import moments as moments_module
from lowprec.calibration.moments import moments
from lowprec.layers import QuantizedLayer
from lowprec.recipe import Recipe

OPERATORS = [
    nn.Conv2d(6, 8, 3, padding=1),
    nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(0, 2), bias=False),
    nn.Conv2d(6, 12, 3, groups=3, dilation=2),
    nn.Conv2d(6, 6, 5, padding=2, groups=6),
    nn.Linear(9, 4),
]


def layer_of(operator: nn.Module) -> tuple[QuantizedLayer, Tensor]:
    torch.manual_seed(0)
    shape = (6, 11, 9)
    model = nn.Sequential(operator, nn.Flatten(), nn.LazyLinear(3))
    model(torch.zeros(1, *shape))
    qmodel = lowprec.prepare(model.eval(), Recipe.load("w2a8_n4"), torch.randn(2, *shape))
    return qmodel.get_submodule("0"), torch.randn(5, *shape)


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_columns_times_weights_are_the_operation(operator: nn.Module) -> None:
    layer, values = layer_of(operator)
    x_gKN = layer.columns(values)
    w_gOK = layer.weight.reshape(x_gKN.shape[0], -1, x_gKN.shape[1])
    output = layer.operate(values, layer.weight, None)
    channels_first = output.transpose(0, 1) if isinstance(operator, nn.Conv2d) else output.movedim(-1, 0)
    torch.testing.assert_close((w_gOK @ x_gKN).flatten(0, 1), channels_first.flatten(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_moments_of_exact_outputs_are_those_of_the_weights(operator: nn.Module) -> None:
    layer, values = layer_of(operator)
    batches = list(values.split(2))
    found = moments(layer, batches, [layer.operate(batch, layer.weight, layer.bias) for batch in batches])
    x_gKN = layer.columns(values).double()
    centred = x_gKN - x_gKN.mean(-1, keepdim=True)
    assert found.positions == x_gKN.shape[-1]
    torch.testing.assert_close(found.h_gKK, centred @ centred.transpose(1, 2) / x_gKN.shape[-1], rtol=1e-4, atol=1e-5)
    # y = w·x + b, so that E[x y] = H w about the means, whatever the bias.
    w_gOK = layer.weight.detach().double().reshape(x_gKN.shape[0], -1, x_gKN.shape[1])
    torch.testing.assert_close(found.cross_gKO, found.h_gKK @ w_gOK.transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_of_large_maps_positions_are_left_out_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments_module, "LEAST_POSITIONS", 64)
    monkeypatch.setattr(moments_module, "POSITIONS_PER_INPUT", 1)
    layer, values = layer_of(OPERATORS[0])
    output = layer.operate(values, layer.weight, None)
    found = moments(layer, [values], [output])
    assert found.positions == -(-5 * 11 * 9 // (5 * 11 * 9 // 64))
