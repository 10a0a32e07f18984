"""Reconstruction: layers come closer to their full-precision outputs, the number format stays, and so does equality."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from networks import TinyTransformer, images, random_network, random_recipe
from torch import Tensor, fx, nn

import lowprec
from lowprec.layers import quantized_layers
from lowprec.models import create_model
from lowprec.numerics.effective_codes import planes_of
from lowprec.prepare import full_precision
from lowprec.recipe import Recipe, Rule, WeightScheme

SHAPE = (3, 17, 14)


def noise(qmodel: fx.GraphModule, model: nn.Module, batch: Tensor) -> float:
    """Power of what quantization adds to the logits, relative to theirs."""
    with torch.no_grad():
        wanted = model(batch)
        return float((qmodel.eval()(batch) - wanted).square().sum() / wanted.square().sum())


def trained_resnet() -> nn.Module:
    """A ResNet whose statistics are those of the images that it is used on."""
    torch.manual_seed(0)
    model = create_model("cifar_resnet8", num_classes=10, in_channels=3, width=8, stem_stride=1)
    for seed in range(20):
        model(images(seed, 16, (3, 16, 16)))
    return model.eval()


@pytest.mark.parametrize("name", ["w2a8_n4", "w2a8_n64", "w4a8_n4", "w8a8"])
def test_outputs_come_closer_on_images_that_it_has_not_seen(name: str) -> None:
    model, batches = trained_resnet(), [images(seed, 32, (3, 16, 16)) for seed in (30, 31)]
    fitted, calibrated = (lowprec.prepare(model, name, batches[0][:2]) for _ in range(2))
    lowprec.reconstruct(fitted, batches)
    lowprec.calibrate(calibrated, batches)
    unseen = images(40, 64, (3, 16, 16))
    share = {"w2a8_n4": 0.5, "w2a8_n64": 0.5, "w4a8_n4": 0.7, "w8a8": 1.0}[name]
    assert noise(fitted, model, unseen) < share * noise(calibrated, model, unseen)


@pytest.mark.parametrize("seed", range(8))
def test_random_networks_are_equal_in_every_code(seed: int, tmp_path: Path) -> None:
    model, batch = random_network(seed), images(1, 8, SHAPE)
    qmodel = lowprec.prepare(model, random_recipe(seed), batch[:2])
    lowprec.reconstruct(qmodel, [batch])
    imodel = lowprec.convert(qmodel)
    lowprec.export_onnx(imodel, tmp_path / "model.onnx")
    report = lowprec.verify(qmodel, imodel, [images(2, 5, SHAPE)], onnx=tmp_path / "model.onnx")
    assert report.compared_codes > 0
    assert report.mismatched_codes == 0, report


def test_a_transformer_comes_closer() -> None:
    torch.manual_seed(0)
    model, batch = TinyTransformer().eval(), images(1, 32, (3, 8, 8))
    fitted, calibrated = (lowprec.prepare(model, "w2a8_n4", batch[:2]) for _ in range(2))
    lowprec.reconstruct(fitted, [batch])
    lowprec.calibrate(calibrated, [batch])
    unseen = images(2, 32, (3, 8, 8))
    assert noise(fitted, model, unseen) < noise(calibrated, model, unseen)


def test_latent_weights_are_the_quantized_ones_and_training_starts_there() -> None:
    model, batch = trained_resnet(), images(30, 32, (3, 16, 16))
    recipe = Recipe(weights=WeightScheme(2, 4), rules=[Rule("stage2.*", bits=4), Rule("stage3.*", planes=2)])
    qmodel = lowprec.prepare(model, recipe, batch[:2])
    before = copy.deepcopy(qmodel.state_dict())
    lowprec.reconstruct(qmodel, [batch])
    for name, layer in quantized_layers(qmodel):
        quantizer, scheme = layer.weight_quantizer, layer.scheme
        if scheme.bits == 8:
            continue
        codes = layer.weight_codes()
        if scheme.planes == 2:
            first, second = map(quantizer.layout.split, planes_of(codes))
            levels = quantizer.layout.merge(quantizer.scale * first + quantizer.residual_scale * second)
            torch.testing.assert_close(levels, layer.weight, rtol=1e-5, atol=1e-7)
            continue
        scales = quantizer.scale.clone()
        quantizer.descend(layer.weight)
        # The fit is where the descent stays: a training's first step starts from just these codes and scales.
        assert torch.equal(layer.weight_codes(), codes), name
        torch.testing.assert_close(quantizer.scale, scales, rtol=1e-5, atol=1e-8)
        if layer.norm is not None:
            assert torch.equal(layer.norm.running_var, before[f"{name}.norm.running_var"])
    again = lowprec.prepare(model, recipe, batch[:2])
    again.load_state_dict(qmodel.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval()(batch), qmodel.eval()(batch))


def test_the_full_precision_model_and_the_mode_stay_as_they_are() -> None:
    model, batch = trained_resnet(), images(30, 16, (3, 16, 16))
    state = copy.deepcopy(model.state_dict())
    qmodel = lowprec.prepare(model, "w2a8_n4", batch[:2]).train()
    with full_precision(qmodel):
        pass
    lowprec.reconstruct(qmodel, [batch])
    assert qmodel.training
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_twice_gives_the_same_bits() -> None:
    model, batch = trained_resnet(), images(30, 16, (3, 16, 16))
    found = []
    for _ in range(2):
        qmodel = lowprec.prepare(model, "w2a8_n64", batch[:2])
        lowprec.reconstruct(qmodel, [batch[:7], batch[7:]])
        found.append(qmodel.state_dict())
    assert all(torch.equal(found[0][name], tensor) for name, tensor in found[1].items())


def test_what_cannot_be_reconstructed_is_said() -> None:
    model, batch = trained_resnet(), images(30, 16, (3, 16, 16))
    qmodel = lowprec.prepare(model, "w2a8_n4", batch[:2])
    with pytest.raises(TypeError, match="reconstruct"):
        lowprec.reconstruct(model, [batch])
    with pytest.raises(ValueError, match="reconstruct got no images"):
        lowprec.reconstruct(qmodel, [])
    with pytest.raises(ValueError, match="batch 0 hold infinite values"):
        lowprec.reconstruct(qmodel, [batch * torch.inf])
    lowprec.calibrate(qmodel, [batch])
    with pytest.raises(ValueError, match="calibrated already: prepare the full-precision model anew"):
        lowprec.reconstruct(qmodel, [batch])
