"""Products on tensor cores: the values and the gradients of the float products, in layers and networks."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from networks import awkward, images
from torch import Tensor, fx, nn
from triton_interpreter import PLACES, running

import lowprec
from lowprec.layers import quantized_layers
from lowprec.layers.integer_product import use_integer_kernels
from lowprec.layers.tensor_core_product import tensor_core_product, use_tensor_cores
from lowprec.numerics.triton_kernels import runs_triton
from lowprec.recipe import Recipe, Rule, WeightScheme

BATCH = images(1, 4, (3, 9, 7))
ALL_TERNARY = Recipe(weights=WeightScheme(2, cluster_size=4), rules=[Rule("*", bits=2)])


class Network(nn.Module):
    """Pointwise convolutions beside others, a linear layer with a bias on images' means, one behind a dropout."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.widen = nn.Sequential(nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU())
        self.strided = nn.Conv2d(24, 8, 1, stride=2)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.narrow = nn.Conv2d(8, 8, 1)
        self.hidden = nn.Linear(8, 12)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.narrow(torch.relu(self.grouped(self.strided(self.widen(self.stem(x))))))
        logits: Tensor = self.classifier(self.dropout(torch.relu(self.hidden(x.mean((2, 3))))))
        return logits


@pytest.fixture(params=PLACES, scope="module")
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the kernels run."""
    with running(request.param) as device, torch.backends.cudnn.flags(benchmark=False, deterministic=True):
        yield device


def prepared(recipe: str | Recipe = ALL_TERNARY, dropout: float = 0.0) -> fx.GraphModule:
    qmodel = lowprec.prepare(awkward(Network(dropout), seed=3, dead_channels=False), recipe, BATCH[:2])
    lowprec.calibrate(qmodel, [BATCH])
    return qmodel.to(memory_format=torch.channels_last)


def trained(qmodel: nn.Module, dtype: torch.dtype, device: str) -> tuple[Tensor, list[Tensor]]:
    """The result and all gradients of one step, by the same kernels each time."""
    given = BATCH.to(device, memory_format=torch.channels_last).clone().requires_grad_()
    with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
        result = qmodel(given)
    result.float().square().sum().backward()
    gradients = [parameter.grad for parameter in qmodel.parameters() if parameter.grad is not None]
    assert given.grad is not None
    return result.detach(), [given.grad, *gradients]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", [ALL_TERNARY, "w4a8_n4", "w8a8"], ids=["w2", "w4", "w8"])
def test_networks_are_equal(recipe: str | Recipe, dtype: torch.dtype, training: bool, device: str) -> None:
    if device == "cuda" and dtype == torch.bfloat16:
        pytest.skip("a GPU's float products in bfloat16 round more than once")
    floats = prepared(recipe).train(training)
    products = copy.deepcopy(floats).to(device)
    assert use_tensor_cores(products) == 4
    taken = {name for name, layer in quantized_layers(products) if layer.product is tensor_core_product}
    assert taken == {"widen.0", "narrow", "hidden", "classifier"}
    expected, gradients = trained(floats.to(device), dtype, device)
    found, others = trained(products, dtype, device)
    assert torch.equal(found, expected)
    # In evaluation the folded weights have none.
    assert len(gradients) == len(others) == (16 if training else 1)
    assert [place for place, pair in enumerate(zip(gradients, others, strict=True)) if not torch.equal(*pair)] == []


def test_a_layer_behind_a_dropout_multiplies_floats(device: str) -> None:
    qmodel = prepared(dropout=0.5)
    assert use_tensor_cores(qmodel) == 3
    assert dict(quantized_layers(qmodel))["classifier"].product is None
    assert use_integer_kernels(qmodel, False) == 0
    assert all(layer.product is None for _, layer in quantized_layers(qmodel))


def test_images_that_are_not_channels_last_are_left_to_floats(device: str) -> None:
    qmodel = prepared().to(device)
    layer = dict(quantized_layers(qmodel))["narrow"]
    values = torch.zeros(2, 8, 4, 4, device=device)
    weight, exponent = layer.weight_quantizer.with_exponents(layer.weight)
    assert tensor_core_product(layer, values, weight, exponent, layer.bias) is None
    values = values.contiguous(memory_format=torch.channels_last)
    result = tensor_core_product(layer, values, weight, exponent, layer.bias)
    assert result is not None
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_a_cpu_multiplies_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no kernel, not even an interpreted one."""
    monkeypatch.setattr("lowprec.layers.tensor_core_product.runs_triton", runs_triton)
    qmodel = prepared()
    use_tensor_cores(qmodel)
    layer = dict(quantized_layers(qmodel))["hidden"]
    weight, exponent = layer.weight_quantizer.with_exponents(layer.weight)
    assert tensor_core_product(layer, torch.zeros(2, 8), weight, exponent, layer.bias) is None
