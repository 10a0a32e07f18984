"""MobileNetV2 for small images: sizes, operators that trace, and equal codes once it is integers."""

from pathlib import Path

import pytest
import torch
from networks import awkward, images, quantize
from torch import fx, nn

import lowprec
from lowprec.models.cifar_mobilenet import CifarMobileNetV2


def parameters_by_hand(width: float, in_channels: int, num_classes: int) -> int:
    """From the table of blocks: weights and two parameters for each channel of a batch norm."""
    rows = [(1, 16), (6, 24), (6, 32), (6, 32), (6, 64), (6, 64)]
    channels = round(32 * width)
    count = 9 * in_channels * channels + 2 * channels
    for expansion, base in rows:
        wide, out = expansion * channels, {0.5: {24: 16}}.get(width, {}).get(base, round(base * width))
        count += 0 if expansion == 1 else channels * wide + 2 * wide
        count += 9 * wide + 2 * wide + wide * out + 2 * out
        channels = out
    last = round(256 * max(width, 1))
    return count + channels * last + 2 * last + last * num_classes + num_classes


@pytest.mark.parametrize(("width", "thousands"), [(0.5, 43), (1.0, 127), (2.0, 471)])
def test_parameter_counts(width: float, thousands: int) -> None:
    count = sum(parameter.numel() for parameter in CifarMobileNetV2(width=width).parameters())
    assert count == parameters_by_hand(width, 3, 10)
    assert round(count / 1000) == thousands


def test_blocks_are_depthwise_and_linear_at_their_ends() -> None:
    model = CifarMobileNetV2(width=0.5)
    depthwise = [module for module in model.modules() if isinstance(module, nn.Conv2d) and module.groups > 1]
    assert len(depthwise) == 6
    assert all(layer.groups == layer.in_channels == layer.out_channels for layer in depthwise)
    projections = [module for name, module in model.named_modules() if name.endswith(".project")]
    assert len(projections) == 6
    assert not any(isinstance(child, nn.ReLU6) for projection in projections for child in projection)
    assert {type(module) for module in model.modules() if not list(module.children())} == {
        *(nn.Conv2d, nn.BatchNorm2d, nn.ReLU6, nn.AdaptiveAvgPool2d, nn.Linear)
    }


def test_traces_and_reuses_no_module() -> None:
    torch.manual_seed(0)
    model = CifarMobileNetV2(num_classes=7, in_channels=1, width=0.25, stem_stride=2).eval()
    batch = torch.randn(2, 1, 28, 28)
    traced = fx.symbolic_trace(model)
    assert torch.equal(traced(batch), model(batch))
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert len(called) == len(set(called))


@pytest.mark.parametrize(
    ("in_channels", "size", "stem_stride", "end"), [(1, 28, 2, 4), (1, 28, 1, 7), (3, 32, 2, 4), (3, 32, 1, 8)]
)
def test_shapes(in_channels: int, size: int, stem_stride: int, end: int) -> None:
    model = CifarMobileNetV2(num_classes=5, in_channels=in_channels, width=0.25, stem_stride=stem_stride)
    batch = torch.randn(3, in_channels, size, size)
    assert model.stages(model.stem(batch)).shape[2:] == (end, end)
    assert model(batch).shape == (3, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": 2}, "1 or 3"),
        ({"width": 0.0}, "width"),
        ({"width": float("nan")}, "width"),
        ({"num_classes": 0}, "num_classes"),
        ({"stem_stride": 0}, "stem_stride"),
    ],
)
def test_impossible_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CifarMobileNetV2(**arguments)


@pytest.mark.parametrize("recipe", ["w2a8_n4", "w2a8_n64", "w4a8_n4", "w8a8"])
def test_all_codes_agree(recipe: str, tmp_path: Path) -> None:
    model = awkward(CifarMobileNetV2(in_channels=1, width=0.25, stem_stride=2), seed=1)
    qmodel, imodel = quantize(model, recipe, images(1, 8, (1, 28, 28)))
    lowprec.export_onnx(imodel, tmp_path / "model.onnx")
    report = lowprec.verify(qmodel, imodel, [images(2, 4, (1, 28, 28))], onnx=tmp_path / "model.onnx")
    assert report.compared_codes > 0
    assert report.mismatched_codes == 0, report
