"""Tracing: the traced model is the same function in both modes, and an error says so where it cannot be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from timm.layers import DropPath
from timm.models.mobilevit import MobileVitBlock
from timm.models.vgg import ConvMlp
from timm.models.vision_transformer import Attention
from torch import Tensor, fx, nn
from torch.nn import functional

from lowprec.graph.tracing import TracingError, check_same_function, trace

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Body(nn.Module):
    """A convolution of 8 channels and what comes behind."""

    def __init__(self, after: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.after = nn.Conv2d(3, 8, 3, padding=1), after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.conv(x))


class OnTokens(nn.Module):
    """timm's attention, whose forward takes a mask that nobody gives."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(8, num_heads=2)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, scale: float = 2.0) -> Tensor:
        return scale * self.attention(x.flatten(2).transpose(1, 2), attn_mask=attn_mask)


class Residual(nn.Module):
    """A branch that is dropped for whole images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.drop = nn.Conv2d(8, 8, 1), DropPath(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.conv(x))


class Dropping(nn.Module):
    """Dropout as a function, twice, as ``p`` is by position and by name."""

    def forward(self, x: Tensor) -> Tensor:
        x = functional.dropout(x, 0.3, self.training)
        return functional.dropout(x.relu(), p=0.6, training=self.training)


def conv_mlp() -> nn.Module:
    return ConvMlp(8, 12, kernel_size=3, drop_rate=0.4, act_layer=nn.ReLU, conv_layer=nn.Conv2d)


def mobile_vit(fusion: bool = True) -> nn.Module:
    return MobileVitBlock(8, transformer_dim=16, transformer_depth=1, num_heads=2, patch_size=2, no_fusion=not fusion)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "drop path": Residual,
    "functional dropout": Dropping,
    "absent mask": OnTokens,
    "vgg's ConvMlp": conv_mlp,
    "MobileViT block": mobile_vit,
    "MobileViT block without fusion": lambda: mobile_vit(fusion=False),
}


@pytest.mark.parametrize("name", MODULES)
def test_the_traced_model_is_the_same_function(name: str) -> None:
    model = Body(MODULES[name]())
    traced = trace(model)
    check_same_function(model, traced, IMAGES)
    for training in (False, True):
        model.train(training)
        traced.train(training)
        results = []
        for candidate in (model, traced):
            torch.manual_seed(5)
            results.append(candidate(IMAGES))
        assert torch.equal(*results)
    # What drops does drop.
    traced.train()
    drops = name in ("drop path", "functional dropout", "vgg's ConvMlp")
    assert torch.equal(traced(IMAGES), traced(IMAGES)) != drops


def test_functional_dropout_becomes_modules_with_its_shares() -> None:
    traced = trace(Body(Dropping()))
    dropouts = {name: module.p for name, module in traced.named_modules() if isinstance(module, nn.Dropout)}
    assert dropouts == {"after.dropout": 0.3, "after.dropout_1": 0.6}
    assert not [node for node in traced.graph.nodes if node.target is functional.dropout]


def names_of(traced: fx.GraphModule) -> list[str]:
    return [getattr(node.target, "__name__", str(node.target)) for node in traced.graph.nodes]


def test_masks_and_checks_that_nobody_gives_are_gone() -> None:
    traced = trace(Body(OnTokens()))
    assert [node.name for node in traced.graph.nodes if node.op == "placeholder"] == ["x"]
    assert not {"maybe_add_mask", "resolve_self_attn_mask", "_assert", "_assert_is_none"} & set(names_of(traced))
    # Attention step by step, not as one function.
    assert "scaled_dot_product_attention" not in names_of(traced)
    assert "softmax" in names_of(traced)


def test_tracing_leaves_modes_and_parameters_as_they_are() -> None:
    model = Body(nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(8)))
    model.after[0].train()
    model.after[1].eval()
    modes = [module.training for module in model.modules()]
    traced = trace(model)
    assert [module.training for module in model.modules()] == modes
    assert dict(traced.named_parameters()).keys() == dict(model.named_parameters()).keys()
    assert all(own is other for own, other in zip(traced.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("side", [7, 9])
def test_images_that_the_patches_do_not_divide(side: int) -> None:
    model = Body(mobile_vit()).eval()
    with pytest.raises(TracingError, match=rf"cannot take images of the shape \[3, {side}, {side}\].*patches divide"):
        check_same_function(model, trace(model), torch.randn(2, 3, side, side))


def test_images_smaller_than_the_kernel_of_vggs_head() -> None:
    """timm widens them, which the traced model does not."""
    model = Body(ConvMlp(8, 12, kernel_size=9, act_layer=nn.ReLU, conv_layer=nn.Conv2d)).eval()
    with pytest.raises(TracingError, match=r"cannot take images of the shape \[3, 8, 8\]"):
        check_same_function(model, trace(model), IMAGES)


def test_a_branch_on_the_mode_is_found() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x if self.training else x

    model = Body(Branch())
    with pytest.raises(TracingError, match="differs from the original in train mode"):
        check_same_function(model, trace(model), IMAGES)


def test_a_branch_on_data_cannot_be_traced() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(
        TracingError, match=r"Body cannot .* at .*test_tracing\.py, line \d+: return x if x\.sum\(\) > 0"
    ):
        trace(Body(Branch()))
