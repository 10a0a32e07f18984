"""Costs from shapes alone, against the published table and figures computed by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from networks import TinyTransformer, awkward, images, quantize
from torch import nn

import lowprec
from lowprec.cost import Costs
from lowprec.models.cifar_resnet import CifarResNet
from lowprec.recipe import Recipe, Rule, WeightScheme

# N = 16 of ResNet-101 is 95.0486 %, so 95.0 after rounding once.
REPLACED = {
    "resnet101": {1: "43.5", 4: "84.7", 8: "91.6", 16: "95.0", 32: "96.8", 64: "97.6"},
    "resnet50": {1: "40.2", 4: "82.9", 8: "90.0", 16: "93.6", 32: "95.3", 64: "96.2"},
}


def meta_cost(model: nn.Module, recipe: Recipe, shape: tuple[int, int, int]) -> Costs:
    example = torch.empty(2, *shape, device="meta")
    return lowprec.cost(lowprec.prepare(model.to("meta").eval(), recipe, example), example)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "table"), REPLACED.items())
def test_published_shares_of_replaced_multiplications(name: str, table: dict[int, str]) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    found = {}
    for size in table:
        costs = meta_cost(model, Recipe(weights=WeightScheme(cluster_size=size)), (3, 224, 224))
        found[size] = f"{100 * costs.multiplications_replaced:.1f}"
    assert found == table


class TwoLayers(nn.Sequential):
    """A first convolution, one of 10 channels to 6, a classifier; images of 8 x 8."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 10, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(10, 6, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(96, 7),
        )


def test_layers_computed_by_hand() -> None:
    costs = meta_cost(TwoLayers(), Recipe(weights=WeightScheme(cluster_size=4)), (3, 8, 8))
    first, second, classifier = costs.layers
    assert (first.name, first.bits, first.macs, first.multiplications) == ("0", 8, 64 * 270, 64 * 270)
    # 3 clusters of 4, 4 and 2 kernels for each of 6 channels, at 4 x 4 positions.
    assert (second.bits, second.cluster_size, second.macs, second.multiplications) == (2, 4, 16 * 540, 16 * 6 * 3)
    assert second.weight_storage_bits == 2 * 540 + 8 * 6 * 3 + 8 * 6
    assert (classifier.macs, classifier.multiplications, classifier.weights) == (96 * 7, 24 * 7, 96 * 7)
    assert classifier.weight_storage_bits == 2 * 672 + 8 * 24 * 7 + 8 * 7
    assert first.weight_storage_bits == 8 * 270 + 8 * 10
    assert costs.macs == 64 * 270 + 16 * 540 + 96 * 7
    assert costs.multiplications_replaced == 1 - (64 * 270 + 16 * 18 + 24 * 7) / costs.macs
    assert costs.weight_bits == sum(layer.weight_storage_bits for layer in costs.layers) / (270 + 540 + 672)
    assert costs.integer_mac_share == 1.0


@pytest.mark.parametrize(("inputs", "kernel", "size"), [(64, 3, 4), (64, 3, 64), (128, 1, 4), (128, 1, 32)])
def test_bits_per_weight_follow_the_formula(inputs: int, kernel: int, size: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, inputs, 1), nn.Conv2d(inputs, 5, kernel))
    layer = meta_cost(model, Recipe(weights=WeightScheme(cluster_size=size)), (3, 8, 8)).layers[1]
    assert layer.weight_bits == pytest.approx(2 + 8 / (size * kernel**2) + 8 / (inputs * kernel**2), rel=1e-12)


def test_element_layout_has_a_scale_at_each_position() -> None:
    recipe = Recipe(weights=WeightScheme(cluster_size=4, layout="element"))
    second = meta_cost(TwoLayers(), recipe, (3, 8, 8)).layers[1]
    assert second.multiplications == 16 * 6 * 3 * 9
    assert second.weight_storage_bits == 2 * 540 + 8 * 6 * 3 * 9 + 8 * 6


def test_a_second_plane_doubles_codes_mantissas_and_multiplications() -> None:
    recipe = Recipe(weights=WeightScheme(cluster_size=4, planes=2), rules=[Rule("6", planes=1)])
    costs = meta_cost(TwoLayers(), recipe, (3, 8, 8))
    first, second, classifier = costs.layers
    assert (first.planes, second.planes, classifier.planes) == (1, 2, 1)
    # 3 clusters for each of 6 channels, at 4 x 4 positions, two scales each.
    assert (second.bits, second.macs, second.multiplications) == (2, 16 * 540, 16 * 6 * 3 * 2)
    assert second.weight_storage_bits == 2 * 2 * 540 + 2 * 8 * 6 * 3 + 8 * 6
    assert classifier.weight_storage_bits == 2 * 672 + 8 * 24 * 7 + 8 * 7
    assert costs.multiplications_replaced == 1 - (64 * 270 + 16 * 18 * 2 + 24 * 7) / costs.macs
    assert str(costs).splitlines()[2].split()[1:5] == ["6x10x3x3", "2+2", "4", "8,640"]


def test_four_bit_layers_replace_no_multiplication() -> None:
    costs = meta_cost(TwoLayers(), Recipe(weights=WeightScheme(bits=4)), (3, 8, 8))
    assert costs.multiplications_replaced == 0
    assert costs.layers[1].weight_storage_bits == 4 * 540 + 8 * 18 + 8 * 6


def test_macs_of_depthwise_and_grouped_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 3, groups=12), nn.Conv2d(12, 6, 3, groups=3))
    _, depthwise, grouped = meta_cost(model, Recipe(), (3, 8, 8)).layers
    assert (depthwise.macs, depthwise.multiplications) == (36 * 12 * 9, 36 * 12)
    assert (grouped.macs, grouped.multiplications) == (16 * 6 * 4 * 9, 16 * 6)


def test_products_of_attention_are_counted_and_have_no_weights() -> None:
    """Two products a head: [17, 6] · [6, 17] and [17, 17] · [17, 6]; softmax, layer norms and tables multiply nothing."""
    costs = meta_cost(TinyTransformer(), Recipe.load("w2a8_n4"), (3, 8, 8))
    by_name = {layer.name: layer for layer in costs.layers}
    products = [layer for layer in costs.layers if layer.weights == 0]
    assert [layer.macs for layer in products] == [2 * 17 * 17 * 6, 2 * 17 * 6 * 17]
    assert all((layer.bits, layer.multiplications, layer.weight_bits) == (8, layer.macs, 0.0) for layer in products)
    assert by_name["qkv"].macs == 17 * 12 * 36
    layers = 16 * 12 * 12 + 17 * 12 * 36 + 17 * 12 * 12 + 2 * 17 * 12 * 24 + 36 * 8 * 12 * 9 + 8 * 5
    assert costs.macs == layers + 4 * 17 * 17 * 6
    assert len(costs.layers) == 9
    assert costs.integer_mac_share == 1.0
    # Nothing but weights has bits.
    weights = sum(layer.weights for layer in costs.layers)
    assert costs.weight_bits == sum(layer.weight_storage_bits for layer in costs.layers) / weights


def test_batch_norms_of_their_own_are_no_macs() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1))
    costs = meta_cost(model, Recipe(), (3, 8, 8))
    assert [(layer.name, layer.macs) for layer in costs.layers] == [("0", 64 * 3 * 6 * 9), ("3", 64 * 24)]
    # But its parameters and statistics are bytes, in full precision and packed.
    assert costs.fp32_bytes == float_bytes(model)
    without = meta_cost(nn.Sequential(model[0], model[1], model[3]), Recipe(), (3, 8, 8))
    assert costs.fp32_bytes - without.fp32_bytes == 4 * 4 * 6
    assert costs.packed_bytes - without.packed_bytes > 6 * (1 + 1 + 4)


def float_bytes(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in model.state_dict().values() if tensor.is_floating_point())


def test_full_precision_bytes_are_those_of_the_checkpoint() -> None:
    assert meta_cost(TwoLayers(), Recipe(), (3, 8, 8)).fp32_bytes == float_bytes(TwoLayers())
    resnet = CifarResNet(8, num_classes=10, in_channels=1)
    assert meta_cost(resnet, Recipe(), (1, 28, 28)).fp32_bytes == float_bytes(resnet)


def test_the_table_names_layers_and_totals() -> None:
    costs = meta_cost(TwoLayers(), Recipe(), (3, 8, 8))
    lines = str(costs).splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["0", "2", "6"]
    assert lines[2].split()[1:5] == ["6x10x3x3", "2", "4", "8,640"]
    assert lines[-1].startswith("26,592 MACs, ")
    assert f"{costs.packed_bytes:,} bytes packed, {costs.fp32_bytes:,} in FP32" in lines[-1]


def test_cost_changes_nothing_and_needs_no_values() -> None:
    qmodel = lowprec.prepare(TwoLayers().eval(), "w2a8_n4", torch.zeros(2, 3, 8, 8))
    before = {name: tensor.clone() for name, tensor in qmodel.state_dict().items()}
    costs = lowprec.cost(qmodel, torch.zeros(2, 3, 8, 8))
    assert all(torch.equal(before[name], tensor) for name, tensor in qmodel.state_dict().items())
    assert costs == meta_cost(TwoLayers(), Recipe.load("w2a8_n4"), (3, 8, 8))


RECIPES = [
    "w2a8_n4",
    "w2a8_n64",
    "w4a8_n4",
    "w8a8",
    Recipe(weights=WeightScheme(layout="element"), rules=[Rule("@classifier", bits=8)]),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: getattr(recipe, "name", recipe))
@pytest.mark.parametrize("depth", [8, 20])
def test_predicted_bytes_of_the_packed_file(depth: int, recipe: Recipe | str, tmp_path: Path) -> None:
    model = awkward(CifarResNet(depth, num_classes=10, in_channels=1), seed=depth)
    compare_bytes(model, recipe, (1, 12, 12), tmp_path)


@pytest.mark.slow
def test_predicted_bytes_of_a_packed_resnet18(tmp_path: Path) -> None:
    compare_bytes(awkward(timm.create_model("resnet18"), seed=1), "w2a8_n4", (3, 32, 32), tmp_path)


def compare_bytes(model: nn.Module, recipe: Recipe | str, shape: tuple[int, int, int], folder: Path) -> None:
    qmodel, imodel = quantize(model, recipe, images(0, 2, shape))
    lowprec.save(imodel, folder / "model.safetensors")
    predicted = lowprec.cost(qmodel, torch.zeros(1, *shape)).packed_bytes
    assert abs((folder / "model.safetensors").stat().st_size / predicted - 1) <= 0.03
