"""Figures of layers and tensors against what is computed by hand on small cases."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, fx, nn

import lowprec
from lowprec.cost import Costs, LayerCost, cost
from lowprec.estimates import estimates
from lowprec.layer_statistics import (
    decibels,
    histogram,
    layer_statistics,
    output_signal_to_noise,
    tensor_statistics,
    weight_codes,
)
from lowprec.layers import quantized_layers
from lowprec.prepare import full_precision
from lowprec.recipe import Recipe, Rule, WeightScheme
from lowprec.report.measurements import Histogram, LayerStatistics


def small_model(recipe: Recipe | str = "w2a8_n4") -> tuple[fx.GraphModule, Tensor]:
    """A first convolution, a second one and a classifier, calibrated on the images that are returned."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)),
    )
    images = torch.randn(8, 3, 8, 8)
    qmodel = lowprec.prepare(model.eval(), recipe, images)
    lowprec.calibrate(qmodel, [images])
    return qmodel.eval(), images


def statistics_of(qmodel: fx.GraphModule, images: Tensor, **more: object) -> dict[str, LayerStatistics]:
    found = layer_statistics(qmodel, cost(qmodel, images), **more)  # type: ignore[arg-type]
    return {layer.name: layer for layer in found}


def test_histogram_counts_every_value_also_those_beyond_its_ends() -> None:
    found = histogram(torch.tensor([-9.0, -1.0, -0.6, 0.1, 0.9, 1.0, 7.0]), -1.0, 1.0, 4)
    assert found == Histogram(-1.0, 1.0, [3, 0, 1, 3])


@pytest.mark.parametrize(("signal", "noise", "expected"), [(100.0, 1.0, 20.0), (1.0, 0.0, None), (0.0, 1.0, None)])
def test_decibels(signal: float, noise: float, expected: float | None) -> None:
    assert decibels(signal, noise) == expected


def test_weights_of_a_layer_are_what_its_codes_and_scales_say() -> None:
    qmodel, images = small_model()
    reference = copy.deepcopy(qmodel)
    before = weight_codes(qmodel)
    layer = dict(quantized_layers(qmodel))["3"]
    with torch.no_grad():
        # Two weights of the 432 get another sign, so another code; one of them was not zero before.
        flat = layer.weight.view(-1)
        large = before["3"].view(-1).nonzero().flatten()[:2]
        flat[large] = -flat[large]
    found = statistics_of(qmodel, images, reference=reference, codes_before=before)["3"]
    codes = layer.weight_codes()
    assert (found.shape, found.scheme, found.cluster_size) == ((6, 8, 3, 3), "ternary", 4)
    assert found.sparsity == float((codes == 0).double().mean())
    assert found.flips == 2 / 432
    weight, quantized = reference.get_submodule("3").weight.double(), layer.weight_quantizer(layer.weight).double()  # type: ignore[union-attr, operator]
    weight, quantized = weight.detach(), quantized.detach()
    expected = 10 * math.log10(float(weight.square().sum()) / float((weight - quantized).square().sum()))
    assert found.weight_signal_to_noise == pytest.approx(expected, rel=1e-12)
    parts = (found.weights.negative, found.weights.zero, found.weights.positive)
    assert [sum(part.counts) for part in parts] == [int((codes.sign() == sign).sum()) for sign in (-1, 0, 1)]
    assert found.weights.full_precision is not None
    assert sum(found.weights.full_precision.counts) == 432
    assert found.weights.scales is not None
    assert sum(found.weights.scales.counts) == 6 * 2
    exponents = layer.fold().weights.exponent
    assert found.exponents == (int(exponents.min()), int(exponents.max()))


def test_schemes_have_their_names_and_only_clusters_have_scales() -> None:
    rules = (Rule("3", planes=2), Rule("8", bits=4))
    qmodel, images = small_model(Recipe(weights=WeightScheme(), rules=list(rules)))
    found = statistics_of(qmodel, images)
    assert {name: layer.scheme for name, layer in found.items()} == {"0": "8-bit", "3": "2 × ternary", "8": "4-bit"}
    assert found["0"].weights.scales is None
    assert found["0"].weights.thresholds is None
    assert found["8"].weights.thresholds is None
    planes = found["3"].weights
    assert planes.scales is not None
    # Both planes' scales.
    assert sum(planes.scales.counts) == 2 * 6 * 2
    assert (found["0"].flips, found["0"].weight_signal_to_noise, found["0"].output_signal_to_noise) == (
        None,
        None,
        None,
    )
    assert (found["3"].tensor, found["8"].tensor) == ("3", None)


def test_tensors_are_measured_as_they_are_rounded_over_all_batches() -> None:
    qmodel, images = small_model()
    images = images.clone()
    images[0, 0, 0, 0] = 1e3
    whole = {tensor.name: tensor for tensor in tensor_statistics(qmodel, [images])}
    parts = {tensor.name: tensor for tensor in tensor_statistics(qmodel, images.split(3))}
    assert list(whole) == ["input", "0", "3", "6"]
    found, quantizer = whole["input"], qmodel.get_submodule("input_quantizer")
    step = 2.0**found.exponent
    assert found.exponent == int(quantizer.exponent)  # type: ignore[arg-type]
    assert (found.low, found.high) == (-128 * step, 127 * step)
    assert (found.minimum, found.maximum) == (float(images.min()), 1e3)
    rounded = torch.round(images.double() / step)
    clipped = (rounded < -128) | (rounded > 127)
    assert found.clipped == int(clipped.sum()) / images.numel() > 0
    noise = float((images.double() - rounded.clamp(-128, 127) * step).square().sum())
    assert found.signal_to_noise == pytest.approx(
        10 * math.log10(float(images.double().square().sum()) / noise), rel=1e-9
    )
    for name, tensor in whole.items():
        assert parts[name].histogram == tensor.histogram
        assert (parts[name].clipped, parts[name].minimum) == (tensor.clipped, tensor.minimum)
    assert sum(found.histogram.counts) == images.numel()
    assert whole["0"].low == 0


def test_outputs_are_compared_with_those_of_full_precision() -> None:
    qmodel, images = small_model()
    reference = copy.deepcopy(qmodel)
    found = output_signal_to_noise(qmodel, reference, images.split(4))
    assert list(found) == ["0", "3", "8"]
    with torch.no_grad(), full_precision(reference):
        expected = reference(images).double()
    with torch.no_grad():
        error = expected - qmodel(images)
    ratio = 10 * math.log10(float(expected.square().sum()) / float(error.square().sum()))
    assert found["8"] == pytest.approx(ratio, rel=1e-6)
    # The reference is as it was: it quantizes again.
    assert torch.equal(reference(images), qmodel(images))


def test_estimates_of_two_layers_by_hand() -> None:
    layers = [
        LayerCost("first", (4, 3, 3, 3), 8, 1, 1000, 1000, 108, 900),
        LayerCost("ternary", (4, 4, 3, 3), 2, 4, 3600, 100, 144, 320),
        LayerCost("float", (4, 4), 32, 1, 50, 50, 16, 512),
    ]
    found = estimates(Costs(layers, 0, 0))
    assert found.float32_energy == pytest.approx(4650 * 4.6)
    assert found.energy == pytest.approx(1000 * 0.3 + 3600 * 0.1 + 100 * 0.2 + 50 * 4.6)
    assert found.speed_up == pytest.approx(4650 / (1000 / 4 + 3600 / 16 + 100 / 4 + 50))
