"""Functions of one value: their tables, their gradients, their signs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lowprec.graph.pointwise import Pointwise, can_be_negative
from lowprec.layers import ActivationQuantizer, QuantizedLookup


def prelu(channels: int) -> nn.PReLU:
    module = nn.PReLU(channels)
    with torch.no_grad():
        module.weight.copy_(torch.linspace(-0.3, 0.6, channels))
    return module


FUNCTIONS: dict[str, nn.Module] = {
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "hardswish": nn.Hardswish(),
    "hardsigmoid": nn.Hardsigmoid(),
    "leaky": nn.LeakyReLU(0.1),
    "tanh": nn.Tanh(),
    "prelu": prelu(1),
    "eighth": Pointwise(torch.mul, (None, 0.125), {}, 0),
    "reversed": Pointwise(torch.sub, (2, None), {}, 1),
}


def lookup(function: nn.Module, signed: bool = True, source_exponent: int = -5, exponent: int = -6) -> QuantizedLookup:
    source = ActivationQuantizer(signed)
    source.set_exponent(source_exponent)
    quantizer = ActivationQuantizer(can_be_negative(function, signed))
    quantizer.set_exponent(exponent)
    return QuantizedLookup(function, source, quantizer)


def inputs(layer: QuantizedLookup) -> Tensor:
    codes = layer.source.codes
    return torch.arange(codes.low, codes.high + 1).double() * 2.0 ** int(layer.source.exponent)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_table_holds_the_rounded_function_of_every_code(name: str, signed: bool) -> None:
    layer = lookup(FUNCTIONS[name], signed)
    values = FUNCTIONS[name].double()(inputs(layer)) * 2.0**6
    FUNCTIONS[name].float()
    expected = [
        max(layer.quantizer.codes.low, min(layer.quantizer.codes.high, round(float(value)))) for value in values
    ]
    assert layer.table().tolist() == expected
    assert layer.table().shape == layer.table_shape == (256,)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_evaluation_looks_up_and_training_computes(name: str) -> None:
    layer = lookup(FUNCTIONS[name])
    values = inputs(layer).float().view(2, 2, 8, 8)
    found = layer.eval()(values)
    assert torch.equal(found, (layer.table().float() * 2.0**-6)[torch.arange(256)].view(2, 2, 8, 8))
    values.requires_grad_()
    layer.train()(values).sum().backward()
    plain = values.detach().clone().requires_grad_()
    inside = layer.quantizer.codes
    result = layer.function(plain)
    rounded = (result / 2.0**-6).round()
    (result * ((rounded >= inside.low) & (rounded <= inside.high))).sum().backward()
    assert torch.equal(values.grad, plain.grad)


def test_each_channel_has_its_own_table() -> None:
    layer = lookup(prelu(3)).eval()
    assert layer.table().shape == layer.table_shape == (3, 256)
    values = inputs(layer).float()[torch.randint(0, 256, (2, 3, 5, 4), generator=torch.Generator().manual_seed(0))]
    expected = torch.nn.functional.prelu(values.double(), layer.function.weight.double())
    assert torch.equal(layer(values), ((expected * 2.0**6).round().clamp(-128, 127) * 2.0**-6).float())


@pytest.mark.parametrize(
    ("function", "of_negatives", "expected"),
    [
        (nn.Sigmoid(), True, False),
        (nn.Hardsigmoid(), True, False),
        (nn.SiLU(), True, True),
        (nn.SiLU(), False, False),
        (nn.Tanh(), True, True),
        (nn.Softplus(), True, False),
        (Pointwise(torch.sub, (2, None), {}, 1), False, True),
    ],
)
def test_signs(function: nn.Module, of_negatives: bool, expected: bool) -> None:
    assert can_be_negative(function, of_negatives) is expected
