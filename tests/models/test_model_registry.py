"""Models are found by name in three places, and every wrong request says what would have been right."""

import pytest
import timm
import torch
import torchvision
from torch import nn

from lowprec.models import CheckpointError, create_model, list_models, pretrained_data_config
from lowprec.models.cifar_mobilenet import CifarMobileNetV2
from lowprec.models.cifar_resnet import CifarResNet


def test_own_model() -> None:
    model = create_model("cifar_resnet20", num_classes=4, in_channels=1, stem_stride=2)
    assert isinstance(model, CifarResNet)
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 4)


def test_own_mobilenet() -> None:
    model = create_model("cifar_mobilenetv2", num_classes=4, in_channels=1, width=0.5, stem_stride=2)
    assert isinstance(model, CifarMobileNetV2)
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 4)


def test_arguments_reach_timms_vision_transformer() -> None:
    size = {"img_size": 28, "patch_size": 7, "embed_dim": 12, "depth": 1, "num_heads": 2}
    model = create_model("timm:vit_tiny_patch16_224", num_classes=4, in_channels=1, **size)
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 4)


@pytest.mark.parametrize("arguments", [{"num_heads": 5}, {"embed_dim": "wide"}, {"patch_size": 0}])
def test_impossible_argument_names_model_and_arguments(arguments: dict) -> None:
    ((argument, value),) = arguments.items()
    with pytest.raises(ValueError, match=f"vit_tiny_patch16_224 cannot be built with .*'{argument}': {value!r}"):
        create_model("timm:vit_tiny_patch16_224", **arguments)


def test_bare_name_is_timms_first() -> None:
    assert type(create_model("resnet18", num_classes=3)).__module__.startswith("timm.")
    assert type(create_model("timm:resnet18.a1_in1k", num_classes=3)).__module__.startswith("timm.")
    assert type(create_model("torchvision:resnet18", num_classes=3)).__module__.startswith("torchvision.")
    assert type(create_model("shufflenet_v2_x0_5")).__module__.startswith("torchvision.")


def test_in_channels_and_classes_reach_timm() -> None:
    model = create_model("resnet18", num_classes=3, in_channels=1, drop_rate=0.25)
    assert model.drop_rate == 0.25
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 3)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_no_auxiliary_outputs(name: str) -> None:
    model = create_model(f"torchvision:{name}", num_classes=3).train()
    assert isinstance(model(torch.randn(2, 3, 80, 80)), torch.Tensor)


@pytest.mark.parametrize(
    ("name", "suggested"),
    [
        ("cifar_resnet21", "cifar_resnet20"),
        ("resnett50", "resnet50"),
        ("timm:resnet5O", "timm:resnet50"),
        ("torchvision:resnet51", "torchvision:resnet50"),
        ("timm:shufflenet_v2_x0_5", "timm:"),
    ],
)
def test_unknown_name_shows_the_closest(name: str, suggested: str) -> None:
    with pytest.raises(ValueError, match="unknown model") as caught:
        create_model(name)
    assert suggested in str(caught.value).split("closest")[-1]
    assert "list_models" in str(caught.value)


def test_unknown_tag_lists_the_tags() -> None:
    with pytest.raises(ValueError, match="a1_in1k"):
        create_model("resnet18.nonesuch")


@pytest.mark.parametrize("name", ["cifar_resnet8", "resnet18", "torchvision:resnet18"])
def test_unknown_argument_names_model_and_argument(name: str) -> None:
    with pytest.raises(ValueError, match=r"resnet\d+ has no such argument.*depht"):
        create_model(name, depht=3)


def test_unknown_argument_of_own_model_lists_the_valid() -> None:
    with pytest.raises(ValueError, match="num_classes, in_channels, width, stem_stride"):
        create_model("cifar_resnet8", depht=3)


def test_torchvision_limits() -> None:
    with pytest.raises(ValueError, match="3 channels, not 1"):
        create_model("torchvision:resnet18", in_channels=1)
    with pytest.raises(ValueError, match="1000 classes, not 10"):
        create_model("torchvision:resnet18", pretrained=True, num_classes=10)


@pytest.mark.parametrize(("library", "name"), [(timm, "timm:resnet18"), (torchvision.models, "torchvision:resnet18")])
def test_weights_out_of_reach(monkeypatch: pytest.MonkeyPatch, library: object, name: str) -> None:
    def unreachable(**arguments: object) -> nn.Module:
        assert arguments.get("pretrained") or arguments.get("weights")
        raise OSError("Name or service not known")

    monkeypatch.setattr(library, "create_model", unreachable, raising=False)
    monkeypatch.setattr(torchvision.models, "get_model_builder", lambda _: unreachable)
    with pytest.raises(CheckpointError, match=rf"{name}.*service not known.*model\.checkpoint=PATH"):
        create_model(name, pretrained=True)


def test_own_models_have_no_published_weights() -> None:
    with pytest.raises(CheckpointError, match=r"model\.checkpoint=PATH"):
        create_model("cifar_resnet8", pretrained=True)


def test_list_models() -> None:
    resnets = ["cifar_resnet8", "cifar_resnet20", "cifar_resnet32", "cifar_resnet56"]
    assert list_models("cifar_*") == [*resnets, "cifar_mobilenetv2"]
    names = list_models("*resnet18*")
    assert {"resnet18", "torchvision:resnet18"} <= set(names)
    everything = list_models()
    assert len(everything) == len(set(everything)) > 1000


def test_data_config_of_timm_is_the_pretrained_one() -> None:
    config = pretrained_data_config(create_model("resnet50.a1_in1k"))
    assert config["input_size"] == (3, 224, 224)
    assert config["interpolation"] == "bicubic"
    assert config["mean"] == timm.data.IMAGENET_DEFAULT_MEAN


def test_data_config_of_torchvision_is_its_weights() -> None:
    config = pretrained_data_config(create_model("torchvision:resnet18"))
    assert config["input_size"] == (3, 224, 224)
    assert config["interpolation"] == "bilinear"
    assert config["crop_pct"] == 224 / 256


def test_data_config_of_any_other_model() -> None:
    config = pretrained_data_config(nn.Linear(1, 1))
    assert set(config) == {"input_size", "mean", "std", "crop_pct", "interpolation"}
    assert config["std"] == timm.data.IMAGENET_DEFAULT_STD
