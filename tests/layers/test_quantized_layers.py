"""Fake-quant layers: eval weights are c · 2^e exactly, folding leaves the codes alone, gradients reach the weights."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lowprec
from lowprec.layers import ActivationQuantizer, QuantizedConv2d, QuantizedLayer, QuantizedLinear
from lowprec.layers.linear import folded_once
from lowprec.numerics.fixed_point import power_of_two
from lowprec.recipe import WeightScheme

SCHEMES = [
    WeightScheme(2, 4),
    WeightScheme(2, 4, "element"),
    WeightScheme(2, 64, solver="twn"),
    WeightScheme(4, 3),
    WeightScheme(4, 4, "element"),
    WeightScheme(2, 4, planes=2),
    WeightScheme(8),
]
LIMITS = {2: 64, 4: 64, 8: 128}


def make(scheme: WeightScheme, groups: int = 1, damage: str = "", seed: int = 0) -> QuantizedConv2d:
    """A convolution of 6 channels with a batch norm: negative, zero and ordinary gains."""
    torch.manual_seed(seed)
    operator, norm = nn.Conv2d(6, 6, 3, padding=1, groups=groups), nn.BatchNorm2d(6)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -0.7, 0.0, 2.5, -1e-3, 30.0]))
        norm.bias.normal_()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.1, 3)
        if damage == "dead":
            operator.weight[3] = 0
        if damage == "huge":
            norm.bias[0] = 1e7
    source = ActivationQuantizer(signed=False)
    source.set_exponent(-6)
    layer = QuantizedConv2d(operator, scheme, source, norm, "relu", ActivationQuantizer(signed=False), "conv")
    assert layer.quantizer is not None
    layer.quantizer.set_exponent(-4)
    return layer.eval()


def inputs() -> Tensor:
    codes = torch.randint(0, 256, (2, 6, 5, 5), generator=torch.Generator().manual_seed(0))
    return codes.float() * 2.0**-6


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("damage", ["", "dead", "huge"])
def test_evaluation_is_integers_times_powers_of_two(scheme: WeightScheme, groups: int, damage: str) -> None:
    layer = make(scheme, groups, damage)
    weights, bias = layer.fold()
    assert torch.equal(weights.effective, weights.effective.round())
    assert float(weights.effective.abs().max()) <= LIMITS[scheme.bits]
    if weights.mantissas is not None:
        assert torch.equal(weights.mantissas, weights.mantissas.round())
        assert float(weights.mantissas.abs().max()) <= 127
    unit = power_of_two(layer.source.exponent + weights.exponent, torch.float64)
    bias_codes = bias / unit
    assert torch.equal(bias_codes, bias_codes.round())
    assert float(bias_codes.abs().max()) <= 1 << 22
    value = weights.effective.double() * power_of_two(weights.exponent, torch.float64).view(-1, 1, 1, 1)
    expected = functional.conv2d(inputs().double(), value, bias, padding=1, groups=groups)
    assert torch.equal(layer.double().normalized(inputs().double()), expected)


@pytest.mark.parametrize("scheme", SCHEMES[:5], ids=str)
@pytest.mark.parametrize("damage", ["", "dead", "huge"])
def test_codes_do_not_change_by_folding(scheme: WeightScheme, damage: str) -> None:
    layer = make(scheme, damage=damage)
    weights, _ = layer.fold()
    assert torch.equal(weights.codes.to(torch.int8), layer.weight_codes())
    assert weights.mantissas is not None
    assert bool((weights.mantissas[1] <= 0).all())  # a negative gain
    assert bool((weights.mantissas[2] == 0).all())  # a gain of zero


@pytest.mark.parametrize("scheme", SCHEMES[:5], ids=str)
def test_folding_multiplies_scales_by_gains_and_moves_the_bias(scheme: WeightScheme) -> None:
    """Within the roundings of mantissa (and, with 4 bits, of the effective code) and of the bias: nothing else is lost."""
    layer = make(scheme)
    norm, quantizer = layer.norm, layer.weight_quantizer
    weights, bias = layer.fold()
    gain = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    scaled = quantizer.layout.split(weights.codes.double()) * quantizer.scale.double()
    expected = quantizer.layout.merge(scaled) * gain.view(-1, 1, 1, 1)
    unit = power_of_two(weights.exponent, torch.float64)
    found = weights.effective.double() * unit.view(-1, 1, 1, 1)
    units_off = (found - expected).detach().abs() / unit.view(-1, 1, 1, 1)
    # Half a mantissa, which a 4-bit weight multiplies by up to 7/16 before half a code more.
    assert float(units_off.max()) <= (0.5 if scheme.bits == 2 else 0.5 * 7 / 16 + 0.5) + 1e-9
    expected_bias = (layer.bias.double() - norm.running_mean.double()) * gain + norm.bias.double()
    assert bool(((bias - expected_bias).abs() <= 0.5 * unit * 2.0**-6 + 1e-12).all())


def test_eight_bit_weights_are_folded_before_they_are_rounded() -> None:
    layer = make(WeightScheme(8))
    weights, _ = layer.fold()
    gain = layer.norm.weight.double() / (layer.norm.running_var.double() + layer.norm.eps).sqrt()
    folded = (
        layer.weight.double() * gain.view(-1, 1, 1, 1) / power_of_two(weights.exponent, torch.float64).view(-1, 1, 1, 1)
    )
    assert torch.equal(weights.effective, folded.round().clamp(-128, 127))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_training_uses_unfolded_integers_and_batch_statistics(scheme: WeightScheme) -> None:
    layer = make(scheme).train()
    reference = nn.BatchNorm2d(6).train()
    reference.load_state_dict(layer.norm.state_dict())
    output = layer(inputs())
    folded = layer.weight_quantizer.fold(layer.weight, None, None)
    weight = folded.effective * power_of_two(folded.exponent).view(-1, 1, 1, 1)
    assert torch.equal(weight, layer.weight_quantizer(layer.weight))
    normalized = reference(functional.conv2d(inputs(), weight, layer.bias, padding=1))
    torch.testing.assert_close(output, layer.quantizer(functional.relu(normalized)), rtol=0, atol=0)
    assert torch.equal(layer.norm.running_mean, reference.running_mean)
    layer(inputs()).sum().backward()
    assert layer.weight.grad is not None
    assert float(layer.weight.grad.abs().sum()) > 0
    assert layer.norm.weight.grad is not None


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_linear(scheme: WeightScheme) -> None:
    torch.manual_seed(0)
    source = ActivationQuantizer(signed=True)
    source.set_exponent(-5)
    layer = QuantizedLinear(nn.Linear(10, 3), scheme, source, name="fc").eval()
    weights, bias = layer.fold()
    values = torch.randint(-128, 128, (4, 10)).float() * 2.0**-5
    value = weights.effective * power_of_two(weights.exponent).view(-1, 1)
    assert torch.equal(layer(values), functional.linear(values, value, bias.float()))


def test_an_uncalibrated_quantizer_says_what_to_call() -> None:
    quantizer = ActivationQuantizer(signed=True)
    with pytest.raises(RuntimeError, match=r"lowprec\.calibrate"):
        quantizer(torch.ones(2))
    quantizer.set_exponent(-3)
    other = ActivationQuantizer(signed=True)
    other.load_state_dict(quantizer.state_dict())
    assert other.calibrated
    assert torch.equal(other(torch.tensor([0.3])), torch.tensor([0.25]))
    other.load_state_dict(ActivationQuantizer(signed=True).state_dict())
    assert not other.calibrated


def test_folded_once_folds_once_and_forgets_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    images = torch.randn(5, 1, 6, 6)
    qmodel = lowprec.prepare(model, "w2a8_n4", images)
    lowprec.calibrate(qmodel, [images])
    qmodel.eval()
    expected, folds = qmodel(images), []
    fold = QuantizedLayer.fold
    monkeypatch.setattr(QuantizedLayer, "fold", lambda layer: folds.append(layer) or fold(layer))
    with folded_once(qmodel):
        assert all(torch.equal(qmodel(images), expected) for _ in range(3))
    assert len(folds) == 2
    with torch.no_grad():
        for parameter in qmodel.parameters():
            parameter.mul_(-1)
    assert not torch.equal(qmodel(images), expected)
    assert len(folds) == 4
    with folded_once(qmodel):
        qmodel(images)
        qmodel.train()
        qmodel(images)
        qmodel.eval()
        qmodel(images)
    assert len(folds) == 8
