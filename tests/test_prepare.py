"""Preparation: the same model, its names kept, its weights solved, the original as it was."""

import copy
import gc
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from lowprec.calibrate import calibrate
from lowprec.graph.planning import UnsupportedModelError
from lowprec.graph.tracing import TracingError, check_same_function, trace
from lowprec.layers import ActivationQuantizer, QuantizedLayer, QuantizedReLU, quantized_layers
from lowprec.numerics import pools
from lowprec.prepare import describe_assignment, full_precision, prepare
from lowprec.recipe import Recipe, RecipeError, Rule, WeightScheme

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A residual network with one ReLU module for all places, dropout, and a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 8, 1)
        self.bn3 = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.3)
        self.fc = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        stem = self.relu(self.bn1(self.conv1(images)))
        inner = self.relu(self.bn2(self.conv2(stem)))
        joined = self.relu(self.bn3(self.conv3(inner)) + stem)
        return self.fc(self.drop(functional.adaptive_avg_pool2d(joined, 1).flatten(1)))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    for _ in range(3):
        model(IMAGES)
    return model.eval()


def bytes_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("recipe", Recipe.names())
def test_full_precision_is_the_original_and_the_original_unchanged(net: nn.Module, recipe: str) -> None:
    before, expected = bytes_of(net), net(IMAGES)
    qmodel = prepare(net, recipe, IMAGES)
    with full_precision(qmodel):
        torch.testing.assert_close(qmodel(IMAGES), expected, rtol=1e-4, atol=1e-5)
    assert before.keys() == net.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert not any(isinstance(module, QuantizedLayer) for module in net.modules())


def test_modes_of_single_modules_are_kept(net: nn.Module) -> None:
    net.train()
    net.bn2.eval()
    prepare(net, "w2a8_n4", IMAGES)
    assert net.training
    assert net.bn1.training
    assert not net.bn2.training


def test_names_are_kept_and_norms_are_children(net: nn.Module) -> None:
    qmodel = prepare(net, "w2a8_n4", IMAGES)
    state, original = qmodel.state_dict(), net.state_dict()
    for name, tensor in original.items():
        kept = name.replace("bn1.", "conv1.norm.").replace("bn2.", "conv2.norm.").replace("bn3.", "conv3.norm.")
        assert torch.equal(state[kept], tensor)
    assert [name for name, _ in quantized_layers(qmodel)] == ["conv1", "conv2", "conv3", "fc"]
    assert {name for name in state if "bn" in name} == set()


def test_one_quantizer_a_tensor_whatever_its_users(net: nn.Module) -> None:
    qmodel = prepare(net, "w2a8_n4", IMAGES)
    assert qmodel.conv2.source is qmodel.conv1.quantizer  # the stem feeds conv2 and the add
    assert qmodel.conv3.source is qmodel.conv2.quantizer
    assert qmodel.fc.quantizer is None
    quantizers = {name: module for name, module in qmodel.named_modules() if isinstance(module, ActivationQuantizer)}
    assert len(quantizers) == 6  # input, three convolutions, add, pooling
    signed = {name for name, module in quantizers.items() if module.signed}
    assert signed == {"input_quantizer", "conv3.quantizer"}


def test_no_copy_of_the_weights_waits_for_a_garbage_collection(net: nn.Module) -> None:
    shape = net.conv2.weight.shape

    def weights() -> int:
        return sum(isinstance(o, nn.Parameter) and o.shape == shape and not o.is_meta for o in gc.get_objects())

    gc.collect()
    before = weights()
    gc.disable()
    try:
        qmodel = prepare(net, "w2a8_n4", IMAGES)
        assert weights() == before + sum(parameter.shape == shape for parameter in qmodel.parameters())
    finally:
        gc.enable()


def test_memory_of_training_steps_goes_with_the_model(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pools._Pool()
    monkeypatch.setattr(pools, "_pool", pool)
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    qmodel = prepare(net, "w2a8_n4", images)
    calibrate(qmodel, [images])
    qmodel.train()(images).sum().backward()
    assert pool.passing
    qmodel.zero_grad()
    del qmodel
    gc.collect()
    assert not pool.passing
    assert not pool.kept


def test_deepcopy_keeps_the_references_within_the_copy(net: nn.Module) -> None:
    qmodel = prepare(net, "w2a8_n4", IMAGES)
    twin = copy.deepcopy(qmodel)
    assert twin.conv2.source is twin.conv1.quantizer
    assert twin.conv2.source is not qmodel.conv2.source
    calibrate(twin, [IMAGES])
    assert not qmodel.conv1.quantizer.calibrated
    again = copy.deepcopy(twin)
    assert torch.equal(again(IMAGES), twin(IMAGES))


def test_state_dict_loads_strictly_calibration_included(net: nn.Module, tmp_path: Path) -> None:
    qmodel = prepare(net, "w2a8_n4", IMAGES)
    calibrate(qmodel, [IMAGES])
    torch.save(qmodel.state_dict(), tmp_path / "state.pt")
    torch.manual_seed(1)
    fresh = prepare(Net(), "w2a8_n4", IMAGES)
    with pytest.raises(RuntimeError, match="calibrate"):
        fresh(IMAGES)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True)
    assert torch.equal(fresh.eval()(IMAGES), qmodel.eval()(IMAGES))
    with pytest.raises(ValueError, match="calibrated already"):
        calibrate(fresh, [IMAGES])


def test_rules_and_roles(net: nn.Module) -> None:
    recipe = Recipe(weights=WeightScheme(4, 2), rules=[Rule("@depthwise", bits=8), Rule("@classifier", bits=2)])
    qmodel = prepare(net, recipe, IMAGES)
    assert {name: layer.scheme.bits for name, layer in quantized_layers(qmodel)} == {
        "conv1": 8,
        "conv2": 8,
        "conv3": 4,
        "fc": 2,
    }
    lines = [describe_assignment(assignment) for assignment in qmodel.meta["assignments"]]
    assert lines[0] == "conv1: 8-bit weights by @first_convolution"
    assert lines[3] == "fc: 2-bit weights, clusters of 2 (kernel, exact) by @classifier"
    with pytest.raises(RecipeError, match="layer7"):
        prepare(net, Recipe(rules=[Rule("layer7", bits=8)]), IMAGES)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["conv3.weight", "fc.bias", "bn2.running_var"])
def test_damaged_weights_name_the_layer(net: nn.Module, bad: float, name: str) -> None:
    net.state_dict()[name].view(-1)[1] = bad
    with pytest.raises(ValueError, match=rf"layer {name}: 1 of .* infinite or NaN"):
        prepare(net, "w2a8_n4", IMAGES)


def test_from_shapes_alone() -> None:
    with torch.device("meta"):
        qmodel = prepare(Net(), "w2a8_n64", torch.empty(2, 3, 16, 16))
    assert qmodel.conv3.weight_quantizer.layout.clusters == 8
    assert qmodel.conv3.weight.is_meta


@pytest.mark.parametrize("argument", [(IMAGES,), [IMAGES], None])
def test_example_inputs_are_one_tensor(net: nn.Module, argument: object) -> None:
    with pytest.raises(TypeError, match="example_inputs must be one tensor"):
        prepare(net, "w2a8_n4", argument)  # type: ignore[arg-type]


def test_prepared_models_are_refused(net: nn.Module) -> None:
    with pytest.raises(ValueError, match="prepared already"):
        prepare(prepare(net, "w2a8_n4", IMAGES), "w2a8_n4", IMAGES)


class DataDependent(Net):
    """Branches on values."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) if images.sum() > 0 else super().forward(-images)


class ModeDependent(Net):
    """Does something else in train mode."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images * 2 if self.training else images)


class InPlace(Net):
    """Changes a tensor that is used again."""

    def forward(self, images: Tensor) -> Tensor:
        stem = self.conv1(images)
        inner = self.conv2(functional.relu(stem, inplace=True))
        return self.fc((inner + stem).mean((2, 3)))


def test_what_cannot_be_traced_faithfully() -> None:
    with pytest.raises(TracingError, match="DataDependent cannot be traced"):
        prepare(DataDependent(), "w2a8_n4", IMAGES)
    with pytest.raises(TracingError, match="differs from the original in train mode"):
        prepare(ModeDependent().eval(), "w2a8_n4", IMAGES)
    with pytest.raises(TracingError, match="in place"):
        prepare(InPlace().eval(), "w2a8_n4", IMAGES)


def test_check_same_function_changes_no_state(net: nn.Module) -> None:
    before = bytes_of(net)
    check_same_function(net, trace(net), IMAGES)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_unsupported_operations_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4), nn.Conv2d(4, 4, 3, padding="same"), nn.Softmin(1))
    with pytest.raises(UnsupportedModelError) as caught:
        prepare(model, "w2a8_n4", IMAGES)
    for word in ("InstanceNorm2d at 1", "Conv2d at 2", "Softmin at 3"):
        assert word in str(caught.value)


def test_a_functional_dropout_that_drops_nothing_goes() -> None:
    class Dropping(Net):
        def forward(self, images: Tensor) -> Tensor:
            return functional.dropout(functional.dropout(super().forward(images), 0.0), 0.5, False)

    model = Dropping().eval()
    qmodel = prepare(model, "w2a8_n4", IMAGES)
    calibrate(qmodel, [IMAGES])
    assert qmodel(IMAGES).shape == (4, 5)


def test_a_relu_that_nothing_can_take_in() -> None:
    class TwoUsers(Net):
        def forward(self, images: Tensor) -> Tensor:
            stem = self.conv1(images)
            return self.fc((torch.relu(stem) + functional.relu6(stem) + stem).mean((2, 3)))

    qmodel = prepare(TwoUsers().eval(), "w8a8", IMAGES)
    assert sum(isinstance(module, QuantizedReLU) for module in qmodel.modules()) == 2
    calibrate(qmodel, [IMAGES])
    with full_precision(qmodel):
        expected = qmodel(IMAGES)
    error = (qmodel(IMAGES) - expected).detach()
    assert float(error.norm() / expected.detach().norm()) < 0.1


ZOO = {
    "torchvision resnet18": lambda: torchvision.models.resnet18(num_classes=10),
    "timm resnet18": lambda: timm.create_model("resnet18", num_classes=10, channels=(8, 16, 16, 32)),
    "timm resnet50d": lambda: timm.create_model("resnet50d", num_classes=10, channels=(8, 8, 16, 16)),
    "timm efficientnet_lite0": lambda: timm.create_model("efficientnet_lite0", num_classes=10),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_networks_of_timm_and_torchvision(name: str) -> None:
    torch.manual_seed(0)
    model = ZOO[name]().eval()
    images = torch.randn(2, 3, 40, 40)
    qmodel = prepare(model, "w2a8_n4", images)
    expected = model(images)
    with full_precision(qmodel):
        difference = (qmodel(images) - expected).abs().max() / expected.abs().max()
    assert float(difference.detach()) < 1e-4
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    assert {name for name, _ in quantized_layers(qmodel)} == layers
    calibrate(qmodel, [images])
    assert bool(torch.isfinite(qmodel(images)).all())


class AddModule(nn.Module):
    """A module without children: tracing keeps no container for it."""

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return left + right


class AddInContainer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 3, padding=1)
        self.tail = nn.ModuleDict({"add": AddModule()})

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.tail["add"](self.convolution(images), images)


def test_an_add_in_a_module_of_its_own_gets_its_place() -> None:
    qmodel = prepare(AddInContainer(), "w8a8", torch.randn(2, 3, 8, 8))
    assert "tail.add.add" in dict(qmodel.named_modules())


def test_a_model_without_weights_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no convolution and no linear layer"):
        prepare(nn.ReLU(), "w8a8", torch.randn(2, 3, 8, 8))


def test_a_functional_dropout_follows_the_mode_as_its_call_did() -> None:
    class Dropping(Net):
        def forward(self, images: Tensor) -> Tensor:
            return functional.dropout(super().forward(images), 0.5, self.training)

    qmodel = prepare(Dropping().train(), "w2a8_n4", IMAGES)
    assert isinstance(qmodel.get_submodule("dropout"), nn.Dropout)
    assert qmodel.get_submodule("dropout").p == 0.5
