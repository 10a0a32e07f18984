"""Calibration: exponents and batch-norm correction against independent computations, and what they are worth."""

import copy
import logging
import sys
from pathlib import Path

import pytest
import torch
from networks import awkward, images
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

import lowprec
from lowprec.calibrate import _ChannelsLast, calibrate
from lowprec.calibration.walk import ADD_REACH, MASK_EXPONENT
from lowprec.integer.operators import IntegerAdd
from lowprec.layers import QuantizedAveragePool
from lowprec.models.cifar_resnet import CifarResNet
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
        _, var_q = statistics([functional.conv2d(batch, weight, padding=1) for batch in values])
        convolved = [conv(batch) for batch in reference]
        mean_fp, var_fp = statistics(convolved)
        # Behind the batch norm, with the weights that are shipped: two roundings of the bias are what is left.
        mean, _ = statistics([layer.normalized(batch) for batch in values])
        gain = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        wanted = (mean_fp - norm.running_mean) * gain + norm.bias
        unit = 2.0 ** (layer.source.exponent + layer.fold().weights.exponent)
        assert ((mean - wanted).abs() <= unit + 1e-6).all()
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
    with pytest.raises(ValueError, match="the images of batch 0 hold NaN"):
        calibrate(qmodel, [BATCHES[0] * float("nan")])
    with pytest.raises(TypeError, match=r"from lowprec\.prepare"):
        calibrate(torch.fx.symbolic_trace(chain()), BATCHES)


def test_gradients_reach_the_latent_weights() -> None:
    qmodel = prepare(chain(), "w2a8_n4", BATCHES[0])
    calibrate(qmodel, BATCHES)
    qmodel.train()(BATCHES[0]).square().sum().backward()
    for name, parameter in qmodel.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().sum()) > 0, name


class Faint(nn.Module):
    """A branch that is scaled down to next to nothing, as ConvNeXt's are at first."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.branch, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1), nn.Linear(6, 4)
        with torch.no_grad():
            for parameter in self.branch.parameters():
                parameter.mul_(scale)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv(images)
        return self.head((x + self.branch(x)).mean((2, 3)))


@pytest.mark.parametrize(("scale", "raised"), [(1.0, False), (2.0**-30, True), (0.0, False)])
def test_operands_far_apart_are_brought_within_reach(
    scale: float, raised: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    qmodel = prepare(Faint(scale).eval(), "w8a8", BATCHES[0])
    with caplog.at_level(logging.INFO, "lowprec.calibrate"):
        calibrate(qmodel, BATCHES)
    larger, smaller = (int(qmodel.get_submodule(name).quantizer.exponent) for name in ("conv", "branch"))
    assert ("an operand's exponent is raised" in caplog.text) == raised
    assert (larger - smaller == ADD_REACH) == raised
    imodel = lowprec.convert(qmodel)
    add = next(step.operator for step in imodel.steps if isinstance(step.operator, IntegerAdd))
    assert (add.left.exponent, add.right.exponent) == (larger, smaller)
    for runtime in ("onnxruntime", "openvino"):
        lowprec.export_onnx(imodel, tmp_path / "model.onnx", lowprec.ExportOptions(runtime=runtime))
        report = lowprec.verify(qmodel, imodel, [3 * BATCHES[1], BATCHES[2]], onnx=tmp_path / "model.onnx")
        assert report.equal, report


def test_the_output_of_operands_brought_within_reach_is_that_of_their_new_codes() -> None:
    """The finer operand's codes are rounded again before the sum's exponent is chosen."""
    qmodel = prepare(Faint(2.0**-30).eval(), "w8a8", BATCHES[0])
    calibrate(qmodel, BATCHES)
    conv, branch = (qmodel.get_submodule(name) for name in ("conv", "branch"))
    with torch.no_grad():
        sums = [
            (x := conv(qmodel.input_quantizer(batch))) + branch.quantizer(branch.unquantized(x)) for batch in BATCHES
        ]
    add = qmodel.get_submodule("add").quantizer
    scheme = qmodel.meta["recipe"].activations
    assert int(add.exponent) == choose_exponent(sums, add.codes, scheme.calibrator, scheme.percentile)


class Masked(nn.Module):
    """Scores, a constant that is added to them, and a softmax."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 6, 1), nn.Linear(64, 4)
        self.register_buffer("mask", mask)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv(images).flatten(2)
        return self.head((x + self.mask).softmax(-1).mean(1))


@pytest.mark.parametrize(
    ("low", "other", "exponent"),
    [
        (-100.0, 0.0, MASK_EXPONENT),
        (-1e9, 0.0, MASK_EXPONENT),
        (-32.0, 0.0, MASK_EXPONENT),
        (-31.0, 0.0, None),
        (-100.0, 1.0, None),
    ],
)
def test_masks_keep_the_resolution_of_the_sums(low: float, other: float, exponent: int | None) -> None:
    """Constants of zeros and one very negative number; others are quantized by their own range."""
    mask = torch.zeros(6, 64)
    mask[:, ::3], mask[0, 1] = low, other
    qmodel = prepare(Masked(mask).eval(), "w8a8", BATCHES[0])
    calibrate(qmodel, BATCHES)
    quantizer = qmodel.get_submodule("constant")
    scheme = qmodel.meta["recipe"].activations
    own = choose_exponent([mask], quantizer.codes, scheme.calibrator, scheme.percentile)
    assert int(quantizer.exponent) == (own if exponent is None else exponent)
    constant = next(step.operator for step in lowprec.convert(qmodel).steps if step.operator.KIND == "constant")
    expected = (mask.double() * 2.0 ** -int(quantizer.exponent)).round().clamp(-128, 127)
    assert torch.equal(constant.codes.double(), expected)


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


class FaintTwice(Faint):
    """The branch is used once more, behind the sum, moved about."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv(images)
        y = self.branch(x)
        moved = y.transpose(2, 3)
        return self.head((x + y).mean((2, 3)) + moved.mean((2, 3)))


def test_another_user_of_an_operand_brought_within_reach_sees_its_new_codes() -> None:
    qmodel = prepare(FaintTwice(2.0**-30).eval(), "w8a8", BATCHES[0])
    calibrate(qmodel, BATCHES)
    pools = [module for module in qmodel.modules() if isinstance(module, QuantizedAveragePool)]
    assert len(pools) == 2
    seen: dict[nn.Module, list[Tensor]] = {pool: [] for pool in pools}
    for pool in pools:
        pool.register_forward_pre_hook(lambda module, inputs: seen[module].append(inputs[0]))
    with torch.no_grad():
        for batch in BATCHES:
            qmodel(batch)
    scheme = qmodel.meta["recipe"].activations
    for pool, inputs in seen.items():
        means = [pool.unquantized(values) for values in inputs]
        quantizer = pool.quantizer
        assert int(quantizer.exponent) == choose_exponent(means, quantizer.codes, scheme.calibrator, scheme.percentile)


def test_large_batches_are_calibrated_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 images, at most 4 at a time: as if they had been given so."""
    model, batch = awkward(CifarResNet(8, num_classes=10, in_channels=3, width=8), seed=3), images(1, 16, (3, 12, 12))
    sizes = []
    run = _ChannelsLast.run
    monkeypatch.setattr(_ChannelsLast, "run", lambda walk, part: (sizes.append(len(part)), run(walk, part))[1])
    monkeypatch.setattr(sys.modules[calibrate.__module__], "PIXELS", 4 * 12 * 12)
    whole, parts = (lowprec.prepare(model, "w2a8_n4", batch[:2]) for _ in range(2))
    lowprec.calibrate(whole, [batch])
    lowprec.calibrate(parts, batch.split(4))
    assert sizes == [4] * 8
    wanted = parts.state_dict()
    assert [name for name, tensor in whole.state_dict().items() if not torch.equal(tensor, wanted[name])] == []
