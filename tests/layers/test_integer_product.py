"""Training's products on integers: the values and the gradients of the float products."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from avx2_kernels import assert_passes_with_avx2
from networks import awkward, images
from torch import Tensor, fx, nn

import lowprec
from lowprec.layers import QuantizedLayer, quantized_layers
from lowprec.layers.integer_product import PackedProduct, integer_product, use_integer_kernels
from lowprec.models.cifar_mobilenet import CifarMobileNetV2
from lowprec.models.cifar_resnet import CifarResNet
from lowprec.numerics import kernels
from lowprec.recipe import Recipe, Rule, WeightScheme

BATCH = images(1, 8, (3, 28, 28))
LINEAR = 5
ALL_TERNARY = Recipe(weights=WeightScheme(2, cluster_size=4), rules=[Rule("*", bits=2)])
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: CifarResNet(8, num_classes=10, in_channels=3, width=8),
    "mobilenet": lambda: CifarMobileNetV2(num_classes=10, in_channels=3, width=0.25),
}


def prepared(model: nn.Module, recipe: str | Recipe, batch: Tensor = BATCH) -> fx.GraphModule:
    qmodel = lowprec.prepare(awkward(model, seed=3, dead_channels=False), recipe, batch[:2])
    lowprec.calibrate(qmodel, [batch])
    return qmodel.to(memory_format=torch.channels_last).train()


def trained(qmodel: nn.Module, batch: Tensor, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """The result and all gradients of one step."""
    inputs = batch.contiguous(memory_format=torch.channels_last).clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        result = qmodel(inputs)
    result.float().square().sum().backward()
    gradients = [parameter.grad for parameter in qmodel.parameters() if parameter.grad is not None]
    assert inputs.grad is not None
    return result.detach(), [inputs.grad, *gradients]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", ["w2a8_n4", "w2a8_n64", "w4a8_n4", "w8a8"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_equal(name: str, recipe: str, dtype: torch.dtype) -> None:
    floats = prepared(NETWORKS[name](), recipe)
    integers = copy.deepcopy(floats)
    used = use_integer_kernels(integers)
    assert used == expected_layers(floats, recipe)
    (expected, gradients), (found, others) = trained(floats, BATCH, dtype), trained(integers, BATCH, dtype)
    assert torch.equal(found, expected)
    assert len(gradients) > 10
    for gradient, other in zip(gradients, others, strict=True):
        assert gradient.abs().sum() > 0
        assert torch.equal(other, gradient)


def expected_layers(qmodel: nn.Module, recipe: str) -> int:
    """Dense layers for which this processor has exact kernels: all of them, but of 8-bit weights none without VNNI."""
    dense = [layer for _, layer in quantized_layers(qmodel) if getattr(layer, "groups", 1) == 1]
    few_bits = [layer for layer in dense if layer.scheme.bits < 8]
    assert few_bits or recipe == "w8a8"
    return len(dense if kernels.convolves_exactly("dense", 128) else few_bits)


@pytest.fixture(autouse=True)
def on_products_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowprec.layers.integer_product.LEAST_OF_AN_ELEMENT", 0)
    monkeypatch.setattr("lowprec.layers.integer_product.LEAST_MULTIPLICATIONS", 0)


class Signed(nn.Sequential):
    """Layers with biases; the inputs of two of them are negative too, that of the last has rows in two axes."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.Conv2d(16, 16, 3, stride=2, padding=2, dilation=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(2),
            nn.Linear(49, LINEAR),
        )


@pytest.mark.parametrize("bits", [2, 4])
def test_each_layer_with_its_bias(bits: int) -> None:
    """The bias comes after the sum; a float kernel may begin with it."""
    qmodel = prepared(Signed(), Recipe(weights=WeightScheme(bits, cluster_size=4), rules=[Rule("*", bits=bits)]))
    assert use_integer_kernels(qmodel) == 3
    seen = []
    for _, layer in quantized_layers(qmodel):

        def compare(
            layer: QuantizedLayer, values: Tensor, weight: Tensor, exponent: Tensor, bias: Tensor | None
        ) -> Tensor:
            found = integer_product(layer, values, weight, exponent, bias)
            assert found is not None
            seen.append(layer.name)
            shape = (-1, 1, 1) if found.dim() == 4 else (-1,)
            expected = layer.operate(values, weight, None) + layer.bias.view(shape)
            assert torch.equal(found, expected)
            upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(len(seen)))
            floats = layer.operate(values, weight, layer.bias)
            for gradient, other in zip(
                torch.autograd.grad(floats, [layer.weight, layer.bias, values], upstream, retain_graph=True),
                torch.autograd.grad(found, [layer.weight, layer.bias, values], upstream, retain_graph=True),
                strict=True,
            ):
                assert torch.equal(other, gradient)
            return found

        layer.product = compare
    trained(qmodel, BATCH, torch.float32)
    assert len(seen) == 3


def test_a_norm_behind_a_convolution_of_one_channel_sums_in_the_same_order() -> None:
    batch = images(1, 37, (1, 8, 8))
    qmodel = prepared(CifarResNet(8, num_classes=10, in_channels=1, width=8), ALL_TERNARY, batch)
    results = []
    for enabled in (False, True):
        changed = copy.deepcopy(qmodel)
        use_integer_kernels(changed, enabled)
        results.append(trained(changed, batch, torch.float32))
    assert torch.equal(results[0][0], results[1][0])
    assert all(map(torch.equal, results[0][1], results[1][1]))


def test_sums_beyond_24_bits_are_rounded_once() -> None:
    model = nn.Sequential(nn.Conv2d(1024, 8, 3, padding=1, bias=False), nn.ReLU())
    nn.init.ones_(model[0].weight)
    batch = torch.rand(2, 1024, 5, 5, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.9
    qmodel = lowprec.prepare(model, ALL_TERNARY, batch)
    lowprec.calibrate(qmodel, [batch])
    qmodel.to(memory_format=torch.channels_last).train()
    use_integer_kernels(qmodel)
    ((_, layer),) = quantized_layers(qmodel)
    values = layer.source(batch.contiguous(memory_format=torch.channels_last))
    weight, exponent = layer.weight_quantizer.with_exponents(layer.weight)
    found = integer_product(layer, values, weight, exponent, None)
    exact = layer.operate(values.double(), weight.double(), None)
    unit = 2.0 ** (layer.source.exponent + exponent[0])
    assert (exact / unit).abs().max() > 1 << 24
    assert torch.equal(found, exact.float())


class LastAxis(nn.Module):
    """A linear layer over the channels of images whose memory is that of channels-last tensors of another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.linear = nn.Conv2d(3, 8, 3), nn.Linear(26, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.convolution(images).relu()).flatten(1)


def test_rows_of_a_channels_last_tensor() -> None:
    qmodel = prepared(LastAxis(), ALL_TERNARY)
    expected = trained(qmodel, BATCH, torch.float32)[0]
    assert use_integer_kernels(qmodel) == 2
    layer = list(quantized_layers(qmodel))[1][1]
    arguments = (*layer.weight_quantizer.with_exponents(layer.weight), None)
    values = layer.source(torch.rand(2, 8, 26, 26).contiguous(memory_format=torch.channels_last))
    found = integer_product(layer, values, *arguments)
    assert torch.equal(found, layer.operate(values, arguments[0], None))
    assert trained(qmodel, BATCH, torch.float32)[0].shape == expected.shape


@pytest.mark.parametrize(("share", "used"), [(0.0, 2), (0.5, 1)])
def test_behind_a_dropout_the_grid_is_lost(share: float, used: int) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(share), nn.Linear(8, 4)
    )
    qmodel = prepared(model, ALL_TERNARY)
    assert use_integer_kernels(qmodel) == used
    assert bool(torch.isfinite(trained(qmodel, BATCH, torch.float32)[0]).all())


def test_float_kernels_where_integer_ones_are_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "convolves_exactly", lambda kind, magnitude: False)
    monkeypatch.setattr(kernels, "multiplies_exactly", lambda magnitude: False)
    qmodel = prepared(NETWORKS["resnet"](), "w2a8_n4")
    assert use_integer_kernels(qmodel) == 0
    assert all(layer.product is None for _, layer in quantized_layers(qmodel))


@pytest.mark.parametrize("recipe", ["w2a8_n4", "w4a8_n4"])
@pytest.mark.parametrize("name", NETWORKS)
def test_evaluation_is_equal_and_ends_as_it_began(name: str, recipe: str) -> None:
    qmodel = prepared(NETWORKS[name](), recipe).eval()
    batch = BATCH.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = qmodel(batch)
        assert use_integer_kernels(qmodel) > 0
        found = qmodel(batch)
    assert torch.equal(found, expected)
    assert use_integer_kernels(qmodel, enabled=False) == 0
    assert not any(layer.product for _, layer in quantized_layers(qmodel))


def test_calibration_on_integers_chooses_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    assert BATCH.is_contiguous()  # as data loaders give them; the kernels take channels_last ones
    shapes = []
    multiply = PackedProduct.__call__

    def watched(product: PackedProduct, codes: Tensor) -> Tensor:
        shapes.append(codes.shape)
        return multiply(product, codes)

    monkeypatch.setattr(PackedProduct, "__call__", watched)
    by_integers = prepared(NETWORKS["resnet"](), "w2a8_n4").state_dict()
    # Each layer twice, the first convolution, which is 8-bit, with VNNI alone.
    assert len(shapes) >= 2 * 8
    monkeypatch.setattr(PackedProduct, "takes", lambda layer, codes: False)
    by_floats = prepared(NETWORKS["resnet"](), "w2a8_n4").state_dict()
    assert all(torch.equal(by_integers[name], tensor) for name, tensor in by_floats.items())


def test_of_inputs_and_weights_bytes_are_kept() -> None:
    qmodel = prepared(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, bias=False)), ALL_TERNARY)
    assert use_integer_kernels(qmodel) == 2
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        qmodel(BATCH.contiguous(memory_format=torch.channels_last))
    floats = [tensor for tensor in kept if tensor.is_floating_point()]
    assert {tensor.dtype for tensor in kept if tensor.numel() >= 8 * 8 * 26 * 26} == {torch.uint8}
    assert sum(tensor.numel() for tensor in floats) < 100
    assert sum(tensor.numel() for tensor in kept) > BATCH.numel() + 8 * 8 * 26 * 26


def test_of_bfloat16_inputs_and_weights_bytes_are_kept() -> None:
    qmodel = prepared(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False)), ALL_TERNARY)
    assert use_integer_kernels(qmodel) == 2
    kept: list[Tensor] = []
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor),
    ):
        qmodel(BATCH.contiguous(memory_format=torch.channels_last))
    inputs = {tensor.shape: tensor.dtype for tensor in kept if tensor.numel() >= 4 * BATCH.shape[-1]}
    assert inputs[BATCH.shape] == inputs[torch.Size([len(BATCH), 8, 26, 26])] == torch.uint8
    assert {tensor.dtype for tensor in kept if tensor.shape[:1] == (8,)} >= {torch.int8}
    assert not any(tensor.is_floating_point() and tensor.numel() > 100 for tensor in kept)


def test_bfloat16_that_the_kernels_do_not_write_is_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "writes", lambda dtype: dtype == torch.float32)
    qmodel = prepared(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 26 * 26, 10)), ALL_TERNARY
    )
    images = BATCH.contiguous(memory_format=torch.channels_last)
    results = []
    for count in (0, 2):
        assert use_integer_kernels(qmodel, count > 0) == count
        with torch.autocast("cpu", torch.bfloat16):
            results.append(qmodel(images))
    assert results[0].dtype == torch.bfloat16
    assert torch.equal(*results)


def test_it_can_be_turned_off_again() -> None:
    qmodel = prepared(NETWORKS["resnet"](), "w2a8_n4")
    assert use_integer_kernels(qmodel) > 0
    assert use_integer_kernels(qmodel, False) == 0
    assert all(layer.product is None for _, layer in quantized_layers(qmodel))


@pytest.mark.parametrize("gain", [1, 4])
def test_small_products_and_full_precision_go_to_float_kernels(gain: int, monkeypatch: pytest.MonkeyPatch) -> None:
    qmodel = prepared(NETWORKS["resnet"](), "w2a8_n4")
    layer = list(quantized_layers(qmodel))[1][1]
    values = torch.zeros(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    arguments = (values, *layer.weight_quantizer.with_exponents(layer.weight), None)
    monkeypatch.setattr("lowprec.numerics.kernels.multiplies_exactly", lambda magnitude: gain > 1)
    # 8 outputs · 3 · 3 for each element of the input.
    for constant, own in (("LEAST_OF_AN_ELEMENT", 72), ("LEAST_MULTIPLICATIONS", 72 * values.numel())):
        assert integer_product(layer, *arguments) is not None
        monkeypatch.setattr(f"lowprec.layers.integer_product.{constant}", gain * own + 1)
        assert integer_product(layer, *arguments) is None
        monkeypatch.setattr(f"lowprec.layers.integer_product.{constant}", gain * own)
    assert integer_product(layer, *arguments) is not None
    layer.source.quantizing = False
    assert integer_product(layer, *arguments) is None


def test_a_stride_leaves_fewer_multiplications(monkeypatch: pytest.MonkeyPatch) -> None:
    qmodel = prepared(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3, stride=2)), ALL_TERNARY)
    layer = list(quantized_layers(qmodel))[1][1]
    values = torch.zeros(2, 8, 8, 8).contiguous(memory_format=torch.channels_last)
    arguments = (values, *layer.weight_quantizer.with_exponents(layer.weight), None)
    monkeypatch.setattr("lowprec.layers.integer_product.GAIN_OF_VNNI", 1)
    for least, taken in ((16 * 9 // 4, True), (16 * 9 // 4 + 1, False)):
        monkeypatch.setattr("lowprec.layers.integer_product.LEAST_OF_AN_ELEMENT", least)
        assert (integer_product(layer, *arguments) is not None) == taken


@pytest.mark.slow
def test_all_of_this_with_avx2_kernels() -> None:
    assert_passes_with_avx2(__file__)
