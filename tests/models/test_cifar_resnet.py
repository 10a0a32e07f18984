"""The CIFAR ResNets have the published sizes and consist of operators that trace."""

import pytest
import torch
from torch import fx, nn

from lowprec.models import cifar_resnet

BUILDERS = {8: cifar_resnet.resnet8, 20: cifar_resnet.resnet20, 32: cifar_resnet.resnet32, 56: cifar_resnet.resnet56}


def parameters_by_hand(depth: int, width: int = 16, in_channels: int = 3, num_classes: int = 10) -> int:
    """Counted from the paper's table: 3×3 convolutions, two per batch-norm channel, 1×1 shortcuts, one linear layer."""
    blocks = (depth - 2) // 6
    count = 9 * in_channels * width + 2 * width
    channels = width
    for stage_width in (width, 2 * width, 4 * width):
        for _ in range(blocks):
            count += 9 * channels * stage_width + 9 * stage_width**2 + 4 * stage_width
            if channels != stage_width:
                count += channels * stage_width + 2 * stage_width
            channels = stage_width
    return count + channels * num_classes + num_classes


# Option A (no parameters in the shortcuts) has 0.27, 0.46 and 0.85 M in the paper; the two projections add 2,752.
@pytest.mark.parametrize(("depth", "option_a_millions"), [(8, 0.08), (20, 0.27), (32, 0.46), (56, 0.85)])
def test_parameter_counts(depth: int, option_a_millions: float) -> None:
    count = sum(parameter.numel() for parameter in BUILDERS[depth]().parameters())
    assert count == parameters_by_hand(depth)
    projections = 16 * 32 + 32 * 64 + 2 * (32 + 64)
    assert round((count - projections) / 1e6, 2) == option_a_millions


def test_resnet20_has_the_known_count() -> None:
    assert sum(parameter.numel() for parameter in cifar_resnet.resnet20().parameters()) == 272_474


@pytest.mark.parametrize("depth", BUILDERS)
def test_depth_counts_convolutions_and_classifier(depth: int) -> None:
    model = BUILDERS[depth]()
    main_path = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and "shortcut" not in name
    ]
    assert len(main_path) == depth


@pytest.mark.parametrize("depth", BUILDERS)
def test_traces_and_reuses_no_module(depth: int) -> None:
    torch.manual_seed(0)
    model = BUILDERS[depth](num_classes=7, in_channels=1, width=8, stem_stride=2).eval()
    images = torch.randn(2, 1, 28, 28)
    traced = fx.symbolic_trace(model)
    assert torch.equal(traced(images), model(images))
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert len(called) == len(set(called))
    assert not any(isinstance(module, nn.Identity) for module in model.modules())


@pytest.mark.parametrize(("in_channels", "size", "stem_stride"), [(1, 28, 2), (3, 32, 1), (1, 8, 1)])
def test_shapes(in_channels: int, size: int, stem_stride: int) -> None:
    model = cifar_resnet.resnet8(num_classes=5, in_channels=in_channels, stem_stride=stem_stride)
    assert model(torch.randn(3, in_channels, size, size)).shape == (3, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 21}, "6n \\+ 2"),
        ({"depth": 2}, "6n \\+ 2"),
        ({"depth": 8, "in_channels": 2}, "1 or 3"),
        ({"depth": 8, "width": 0}, "width"),
        ({"depth": 8, "num_classes": 0}, "num_classes"),
    ],
)
def test_impossible_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cifar_resnet.CifarResNet(**arguments)
