"""Batch norms of their own: plain in training, an 8-bit factor and a bias for each channel in evaluation."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lowprec.layers import ActivationQuantizer, QuantizedBatchNorm2d, quantized_layers

GAINS = [1.0, -0.7, 0.0, 2.5, -1e-3, 30.0, -0.499, 1e-9]
SOURCE, OUTPUT = -6, -4


def make(activation: str = "", affine: bool = True, huge_bias: bool = False) -> QuantizedBatchNorm2d:
    """Of eight channels: negative, zero, tiny and large gains."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8, affine=affine)
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.1, 3)
        if affine:
            norm.weight.copy_(torch.tensor(GAINS))
            norm.bias.normal_()
            if huge_bias:
                norm.bias[0] = -1e7
    source, quantizer = ActivationQuantizer(signed=True), ActivationQuantizer(signed=not activation)
    source.set_exponent(SOURCE)
    quantizer.set_exponent(OUTPUT)
    return QuantizedBatchNorm2d(norm, source, activation, quantizer, "norm").eval()


def inputs() -> Tensor:
    codes = torch.randint(-128, 128, (3, 8, 5, 4), generator=torch.Generator().manual_seed(1))
    return codes.float() * 2.0**SOURCE


def least_exponent(value: Fraction, limit: int) -> int:
    """The smallest e with round(value / 2^e) ≤ limit."""
    exponent = -60
    while value and round(value / Fraction(2) ** exponent) > limit:
        exponent += 1
    return exponent


def expected_fold(gain: float, bias: float) -> tuple[int, int, int]:
    """Factor, exponent and bias of one channel, by hand: least squared error, but with room for bias and shift."""
    exact = Fraction(gain)
    fitting = least_exponent(abs(exact), 127)

    def code(exponent: int) -> int:
        return max(-128, min(127, round(exact / Fraction(2) ** exponent)))

    exponent = min((fitting, fitting - 1, fitting - 2), key=lambda e: float((code(e) * Fraction(2) ** e - exact) ** 2))
    exponent = max(exponent, least_exponent(abs(Fraction(bias)), 1 << 22) - SOURCE, OUTPUT - SOURCE - 15)
    return code(exponent), exponent, round(Fraction(bias) / Fraction(2) ** (SOURCE + exponent))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("huge_bias", [True, False])
@pytest.mark.parametrize("activation", ["", "relu", "relu6"])
def test_evaluation_by_hand_in_rational_numbers(activation: str, affine: bool, huge_bias: bool) -> None:
    layer = make(activation, affine, huge_bias)
    norm, values, found = layer.norm, inputs(), layer(inputs())
    codes = layer.quantizer.codes
    for channel in range(8):
        gain = 1.0 / (norm.running_var[channel].double() + norm.eps).sqrt().item()
        gain *= norm.weight[channel].item() if affine else 1.0
        bias = -norm.running_mean[channel].item() * gain + (norm.bias[channel].item() if affine else 0.0)
        factor, exponent, offset = expected_fold(gain, bias)
        weights, folded_bias = layer.fold()
        assert int(weights.effective[channel]) == factor
        assert int(weights.exponent[channel]) == exponent
        unit = Fraction(2) ** (SOURCE + exponent)
        assert Fraction(folded_bias[channel].item()) == offset * unit
        for value, result in zip(values[:, channel].flatten().tolist(), found[:, channel].flatten(), strict=True):
            total = (factor * Fraction(value) / Fraction(2) ** SOURCE + offset) * unit
            total = max(Fraction(0), total) if activation else total
            total = min(Fraction(6), total) if activation == "relu6" else total
            code = max(codes.low, min(codes.high, round(total / Fraction(2) ** OUTPUT)))
            assert float(result) == code * 2.0**OUTPUT


@pytest.mark.parametrize("activation", ["", "relu"])
def test_training_is_a_plain_batch_norm_and_the_quantizer(activation: str) -> None:
    layer = make(activation).train()
    reference = nn.BatchNorm2d(8).train()
    reference.load_state_dict(layer.norm.state_dict())
    ours, theirs = inputs().requires_grad_(), inputs().requires_grad_()
    found = layer(ours)
    plain = reference(theirs)
    expected = layer.quantizer(functional.relu(plain) if activation else plain)
    assert torch.equal(found, expected)
    assert torch.equal(layer.norm.running_mean, reference.running_mean)
    assert torch.equal(layer.norm.running_var, reference.running_var)
    found.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(ours.grad, theirs.grad)
    assert torch.equal(layer.norm.weight.grad, reference.weight.grad)
    assert torch.equal(layer.norm.bias.grad, reference.bias.grad)


def test_the_factor_of_one_is_no_parameter_and_in_no_checkpoint() -> None:
    layer = make()
    norms = {f"norm.{name}" for name in nn.BatchNorm2d(8).state_dict()}
    assert set(layer.state_dict()) == norms | {"quantizer.exponent"}
    assert {name for name, _ in layer.named_parameters()} == {"norm.weight", "norm.bias"}
    assert layer.weight.flatten().tolist() == [1.0] * 8
    # It has no weights that a recipe could quantize.
    assert list(quantized_layers(nn.Sequential(layer))) == []


def test_it_moves_with_dtype_and_device() -> None:
    layer = make()
    expected = layer(inputs())
    wide = layer.double()
    assert wide.weight.dtype == torch.float64
    assert torch.equal(wide(inputs().double()), expected.double())
    moved = layer.to("meta")
    assert moved.weight.is_meta
    assert moved.train()(inputs().double().to("meta")).is_meta
