"""Layers of two ternary planes: one set of codes in fake-quant, executor, fast backend, ONNX Runtime and packed files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from networks import images, quantize, random_network
from safetensors import safe_open
from torch import nn

import lowprec
from lowprec.integer import packed
from lowprec.integer.model import IntegerModel
from lowprec.integer.operators import IntegerLayer
from lowprec.integer.packed import PackedFileError
from lowprec.layers import quantized_layers
from lowprec.numerics.effective_codes import planes_of
from lowprec.numerics.fixed_point import power_of_two
from lowprec.recipe import RESIDUALS, ActivationScheme, Recipe, Rule, WeightScheme
from lowprec.verify import FAKE_QUANT, FAST, ONNX


def mixed_recipe(seed: int) -> Recipe:
    """Two planes, but in the classifier (4 bits, 8 bits or one plane) and in every other first convolution (8 bits)."""
    scheme = WeightScheme(2, (1, 3, 4, 64)[seed % 4], ("kernel", "element")[seed // 4 % 2], planes=2)
    classifier = (Rule("@classifier", bits=4), Rule("@classifier", bits=8), Rule("@classifier", planes=1))[seed % 3]
    rules = [classifier, Rule("@first_convolution", bits=2, planes=2)] if seed % 2 else [classifier]
    return Recipe(weights=scheme, activations=ActivationScheme(residual=RESIDUALS[seed % 2]), rules=rules)


def two_plane_layers(imodel: IntegerModel) -> list[IntegerLayer]:
    layers = [step.operator for step in imodel.steps if isinstance(step.operator, IntegerLayer)]
    return [layer for layer in layers if layer.planes == 2]


class Small(nn.Sequential):
    """Convolutions with batch norm whose gains are negative, ordinary and zero; then a classifier."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=2),
            nn.ReLU6(),
            nn.Conv2d(8, 4, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(4 * 16, 5),
        )


def small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = Small()
    with torch.no_grad():
        model[3].weight.copy_(torch.tensor([1.0, -0.7, 0.0, 2.5, -1e-3, 30.0, 0.5, -2.0]))
        model[2].weight[5] = 0
    return model.eval()


SHAPE = (3, 6, 6)
RECIPE = Recipe(weights=WeightScheme(planes=2), rules=[Rule("5", bits=4), Rule("7", planes=1)])


@pytest.mark.parametrize("seed", [500, 501, 502, 503, 504, 505, 506, 507])
def test_random_networks_agree_in_every_code_and_load_again(seed: int, tmp_path: Path) -> None:
    qmodel, imodel = quantize(random_network(seed), mixed_recipe(seed), images(seed))
    assert two_plane_layers(imodel)
    lowprec.export_onnx(imodel, tmp_path / "model.onnx")
    report = lowprec.verify(qmodel, imodel, [images(seed + 1, 3)], onnx=tmp_path / "model.onnx")
    assert {comparison.against for comparison in report.comparisons} == {FAKE_QUANT, FAST, ONNX}
    assert report.mismatched_codes == 0, report
    lowprec.save(imodel, tmp_path / "model.safetensors")
    loaded = lowprec.load(tmp_path / "model.safetensors")
    x = images(seed + 2, 2)
    expected, found = imodel.codes(x), loaded.codes(x)
    assert all(torch.equal(found[name], codes) for name, codes in expected.items())


def test_evaluation_is_integers_times_powers_of_two_and_folding_keeps_the_codes() -> None:
    qmodel, imodel = quantize(small(), RECIPE, images(0, 4, SHAPE))
    layers = dict(quantized_layers(qmodel))
    assert [layer.scheme.planes for layer in layers.values()] == [1, 2, 1, 1, 2]
    layer = layers["2"]
    weights, _ = layer.fold()
    assert torch.equal(weights.codes.to(torch.int8), layer.weight_codes())
    assert weights.mantissas is not None
    assert weights.mantissas.shape == (2, 8, 2, 1, 1)
    assert torch.equal(weights.mantissas, weights.mantissas.round())
    assert float(weights.mantissas.abs().sum(0).max()) <= 64
    assert bool((weights.mantissas[:, 1] <= 0).all())  # a negative gain
    assert bool((weights.mantissas[:, 2] == 0).all())  # a gain of zero
    assert bool((weights.mantissas[:, 5] == 0).all())  # no weights
    first, second = (layer.weight_quantizer.layout.split(plane) for plane in planes_of(weights.codes))
    effective = first * weights.mantissas[0] + second * weights.mantissas[1]
    assert torch.equal(weights.effective, layer.weight_quantizer.layout.merge(effective))
    (integer,) = [step.operator for step in imodel.steps if step.name == "2"]
    assert isinstance(integer, IntegerLayer)
    assert torch.equal(integer.effective, weights.effective.to(torch.int32))
    assert integer.codes.shape == layer.weight.shape


def test_training_multiplies_rounded_weights_and_follows_them() -> None:
    qmodel = lowprec.prepare(small(), RECIPE, images(0, 2, SHAPE))
    lowprec.calibrate(qmodel, [images(0, 4, SHAPE)])
    qmodel.train()
    layer = dict(quantized_layers(qmodel))["2"]
    optimizer = torch.optim.SGD(qmodel.parameters(), 0.05)
    before = layer.weight_quantizer.residual_scale.clone()
    for step in range(3):
        optimizer.zero_grad()
        qmodel(images(step, 4, SHAPE)).square().mean().backward()
        assert layer.weight.grad is not None
        assert float(layer.weight.grad.abs().sum()) > 0
        optimizer.step()
    assert not torch.equal(layer.weight_quantizer.residual_scale, before)
    folded = layer.weight_quantizer.fold(layer.weight, None, None)
    value = folded.effective * power_of_two(folded.exponent).view(-1, 1, 1, 1)
    assert torch.equal(layer.weight_quantizer(layer.weight), value)


def test_checkpoints_load_strictly_and_those_of_one_plane_keep_their_keys() -> None:
    example = images(0, 2, SHAPE)
    trained = lowprec.prepare(small(0), RECIPE, example)
    other = lowprec.prepare(small(1), RECIPE, example)
    other.load_state_dict(trained.state_dict(), strict=True)
    for name, layer in quantized_layers(other):
        assert torch.equal(layer.weight_codes(), dict(quantized_layers(trained))[name].weight_codes())
    keys = {key for key in trained.state_dict() if "weight_quantizer" in key}
    assert keys == {
        *("2.weight_quantizer.scale", "2.weight_quantizer.residual_scale", "5.weight_quantizer.scale"),
        *("7.weight_quantizer.scale", "7.weight_quantizer.threshold"),
        *("10.weight_quantizer.scale", "10.weight_quantizer.residual_scale"),
    }
    assert trained.state_dict()["2.weight_quantizer.residual_scale"].shape == (8, 2, 1, 1)


def test_packed_files_hold_two_bits_for_each_digit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.safetensors"
    _, imodel = quantize(small(), RECIPE, images(0, 4, SHAPE))
    lowprec.save(imodel, file)
    content = file.read_bytes()
    with safe_open(file, framework="pt") as stored:
        assert stored.metadata()["version"] == "3"
        assert stored.get_tensor("2.codes").shape == (8 * 6 * 9 // 2,)
        assert stored.get_tensor("2.mantissas").shape == (2, 8, 2, 1, 1)
        assert stored.get_tensor("7.codes").shape == (4 * 8 // 4,)
        assert stored.get_tensor("7.mantissas").shape == (4, 2, 1, 1)
    lowprec.save(lowprec.load(file), file)
    assert file.read_bytes() == content
    # A reader that knows one plane alone does not misread it.
    monkeypatch.setattr(packed, "VERSIONS", (packed.VERSION,))
    with pytest.raises(PackedFileError, match=r"version 3, this lowprec reads versions 2: update lowprec"):
        lowprec.load(file)


def test_packed_files_of_one_plane_are_as_they_were(tmp_path: Path) -> None:
    """Their version, tensors and recipe say nothing of planes, so files from before are written again byte for byte."""
    file = tmp_path / "model.safetensors"
    _, imodel = quantize(small(), Recipe(rules=[Rule("10", bits=8)]), images(0, 4, SHAPE))
    lowprec.save(imodel, file)
    with safe_open(file, framework="pt") as stored:
        assert stored.metadata()["version"] == "2"
        assert stored.get_tensor("2.mantissas").shape == (8, 2, 1, 1)
    loaded = lowprec.load(file)
    assert "planes" not in str(loaded.metadata)
    assert all("planes" not in step.operator.attributes() for step in loaded.steps)
