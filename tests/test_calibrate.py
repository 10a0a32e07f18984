"""Calibration: exponents and batch-norm correction against independent computations, and what they are worth."""

import copy

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from lowprec.calibrate import calibrate
from lowprec.numerics.calibrators import choose_exponent
from lowprec.prepare import full_precision, prepare
from lowprec.recipe import ActivationScheme, Recipe, WeightScheme

BATCHES = list(torch.randn(3, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1)))


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    first, second = ([nn.Conv2d(i, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()] for i in (3, 6))
    model = nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    for batch in BATCHES:
        model(batch + 0.5)  # running statistics of other images than those of calibration
    return model.eval()


def statistics(batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    values = torch.cat(batches).double()
    return values.mean((0, 2, 3)), values.var((0, 2, 3), unbiased=False)


@torch.no_grad()
@pytest.mark.parametrize("calibrator", ["max", "percentile", "mse"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_layer_after_layer_against_an_independent_computation(bits: int, calibrator: str) -> None:
    model = chain()
    scheme = Recipe("test", WeightScheme(bits), ActivationScheme(8, calibrator, 99.0))
    qmodel = prepare(model, scheme, BATCHES[0])
    calibrate(qmodel, BATCHES)

    values, reference = list(BATCHES), list(BATCHES)
    quantizer = qmodel.input_quantizer
    for name, conv, norm in (("0", model[0], model[1]), ("3", model[3], model[4])):
        layer = qmodel.get_submodule(name)
        assert int(quantizer.exponent) == choose_exponent(values, quantizer.codes, calibrator, 99.0)
        values = [quantizer(batch) for batch in values]
        weight = layer.weight_quantizer(layer.weight)
        mean_q, var_q = statistics([functional.conv2d(batch, weight, padding=1) for batch in values])
        convolved = [conv(batch) for batch in reference]
        mean_fp, var_fp = statistics(convolved)
        torch.testing.assert_close(
            layer.norm.running_mean.double(), norm.running_mean + mean_q - mean_fp, rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(
            layer.norm.running_var.double(), norm.running_var * var_q / var_fp, rtol=1e-5, atol=0
        )
        values = [layer.unquantized(batch) for batch in values]
        reference = [functional.relu(norm(batch)) for batch in convolved]
        quantizer = layer.quantizer
    assert int(quantizer.exponent) == choose_exponent(values, quantizer.codes, calibrator, 99.0)


def test_without_correction_batch_norms_stay() -> None:
    qmodel = prepare(chain(), "w2a8_n4", BATCHES[0])
    before = copy.deepcopy(qmodel.state_dict())
    for _ in range(2):  # exponents alone may be chosen again
        calibrate(qmodel, BATCHES, batch_norm_correction=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in qmodel.state_dict().items() if "norm" in name)
    with pytest.raises(ValueError, match="calibrated already"):
        calibrate(qmodel, BATCHES)


def test_mode_weights_and_labels() -> None:
    qmodel = prepare(chain(), "w2a8_n4", BATCHES[0]).train()
    twin = copy.deepcopy(qmodel)
    weights = {name: parameter.clone() for name, parameter in qmodel.named_parameters()}
    calibrate(qmodel, BATCHES)
    assert qmodel.training
    assert all(torch.equal(weights[name], parameter) for name, parameter in qmodel.named_parameters())
    calibrate(twin, [(batch, torch.zeros(4)) for batch in BATCHES] + [(torch.empty(0, 3, 8, 8), torch.empty(0))])
    assert all(
        torch.equal(left, right) for left, right in zip(*(m.state_dict().values() for m in (qmodel, twin)), strict=True)
    )


def test_dead_channels_get_no_ratio() -> None:
    model = chain()
    with torch.no_grad():
        model[0].weight[2] = 0
        model[3].weight[1] = 1e-9
    qmodel = prepare(model, "w2a8_n4", BATCHES[0])
    calibrate(qmodel, BATCHES)
    assert qmodel.get_submodule("0").norm.running_var[2] == model[1].running_var[2]
    assert qmodel.get_submodule("3").norm.running_var[1] == model[4].running_var[1]
    assert bool(torch.isfinite(qmodel(BATCHES[0])).all())


def test_what_cannot_be_calibrated() -> None:
    qmodel = prepare(chain(), "w2a8_n4", BATCHES[0])
    for nothing in ([], [torch.empty(0, 3, 8, 8)]):
        with pytest.raises(ValueError, match="no images"):
            calibrate(qmodel, nothing)
    with pytest.raises(TypeError, match=r"give \[images\]"):
        calibrate(qmodel, BATCHES[0])
    with pytest.raises(ValueError, match="output of input_quantizer: values are infinite or NaN"):
        calibrate(qmodel, [BATCHES[0] * float("nan")])
    with pytest.raises(ValueError, match=r"made by lowprec\.prepare"):
        calibrate(torch.fx.symbolic_trace(chain()), BATCHES)


def test_gradients_reach_the_latent_weights() -> None:
    qmodel = prepare(chain(), "w2a8_n4", BATCHES[0])
    calibrate(qmodel, BATCHES)
    qmodel.train()(BATCHES[0]).square().sum().backward()
    for name, parameter in qmodel.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().sum()) > 0, name


@pytest.mark.slow
def test_correction_gains_on_a_trained_network() -> None:
    """Ternary weights without training, on digits: logits nearer to full precision's, and more of them right."""
    digits = load_digits()
    images = torch.tensor(digits.images / 8 - 1, dtype=torch.float32)[:, None]
    labels = torch.tensor(digits.target)
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for channels in ((1, 16), (16, 16), (16, 16), (16, 16)):
        layers += [nn.Conv2d(*channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels[1]), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(4):
        for part in torch.randperm(1200).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(model(images[part]), labels[part]).backward()
            optimizer.step()
    model.eval()
    ratios, accuracies = [], []
    for correction in (False, True):
        qmodel = prepare(model, "w2a8_n4", images[:4])
        calibrate(qmodel, [images[:256]], batch_norm_correction=correction)
        with torch.no_grad():
            found = qmodel(images[1200:])
            with full_precision(qmodel):
                expected = model(images[1200:])
        ratios.append(float(10 * (expected.square().sum() / (found - expected).square().sum()).log10()))
        accuracies.append(float((found.argmax(1) == labels[1200:]).float().mean()))
    assert ratios[1] > ratios[0]
    assert accuracies[1] > accuracies[0]
