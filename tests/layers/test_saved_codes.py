"""Activations kept for the backward pass as codes: equal gradients, less memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import SqueezeExcite, TinyTransformer, awkward, images
from torch import Tensor, nn

import lowprec
from lowprec.layers import ActivationQuantizer, QuantizedReLU
from lowprec.layers.attention import QuantizedFloatOperator
from lowprec.layers.saved_codes import saved_as_codes
from lowprec.models.cifar_mobilenet import CifarMobileNetV2
from lowprec.models.cifar_resnet import CifarResNet

BATCH = images(1, 8, (3, 8, 8))
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: CifarResNet(8, num_classes=10, in_channels=3, width=8),
    "mobilenet": lambda: CifarMobileNetV2(num_classes=10, in_channels=3, width=0.25),
    "squeeze-excite": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.SiLU(), SqueezeExcite(8, nn.Sigmoid(), nn.SiLU()), nn.Flatten(), nn.Linear(288, 3)
    ),
    "transformer": TinyTransformer,
}


def prepared(name: str) -> nn.Module:
    torch.manual_seed(0)
    qmodel = lowprec.prepare(awkward(NETWORKS[name](), seed=3, dead_channels=False), "w2a8_n4", BATCH[:2])
    lowprec.calibrate(qmodel, [BATCH])
    return qmodel.train()


def trained(qmodel: nn.Module, batch: Tensor, keep_codes: bool) -> tuple[Tensor, list[Tensor]]:
    """The result and all gradients of one step."""
    qmodel.zero_grad()
    inputs = batch.clone().requires_grad_()
    torch.manual_seed(1)
    with saved_as_codes(qmodel, keep_codes):
        result = qmodel(inputs)
    (result.float().square().sum()).backward()
    gradients = [parameter.grad for parameter in qmodel.parameters() if parameter.grad is not None]
    assert inputs.grad is not None
    return result.detach(), [inputs.grad, *gradients]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_equal(name: str, memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    qmodel = prepared(name).to(memory_format=memory_format)
    batch = BATCH.contiguous(memory_format=memory_format)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        # Two steps of each, so that the scales have come to rest.
        trained(qmodel, batch, False)
        expected, gradients = trained(qmodel, batch, False)
        found, others = trained(qmodel, batch, True)
    assert torch.equal(found, expected)
    assert len(gradients) > 5
    for gradient, other in zip(gradients, others, strict=True):
        assert gradient.abs().sum() > 0
        assert torch.equal(other, gradient)


def held(kept: list[Any]) -> int:
    """Bytes of all memory that a forward pass kept, each stretch once."""
    tensors = [item if isinstance(item, Tensor) else item.codes.codes for item in kept]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


@pytest.mark.parametrize(("name", "most"), [("resnet", 0.7), ("mobilenet", 0.7), ("transformer", 0.36)])
def test_less_is_kept(name: str, most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a convolution's memory the codes take a quarter; what its batch norm keeps stays as it is, as do bytes of a lookup."""
    batch = torch.cat([BATCH] * 8)  # so many that weights hardly count
    qmodel, hooks = prepared(name), torch.autograd.graph.saved_tensors_hooks
    kept: dict[bool, list[Any]] = {False: [], True: []}
    with hooks(lambda tensor: kept[False].append(tensor) or tensor, lambda tensor: tensor):
        qmodel(batch)

    def watched(pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> Any:
        return hooks(lambda tensor: kept[True].append(pack(tensor)) or kept[True][-1], unpack)

    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", watched)
    with saved_as_codes(qmodel):
        qmodel(batch)
    assert len(kept[True]) >= len(kept[False]) > 10  # attention keeps exponents, too
    assert held(kept[True]) < most * held(kept[False])


def quantizer(signed: bool = True) -> ActivationQuantizer:
    made = ActivationQuantizer(signed)
    made.set_exponent(-4)
    return made


def kept_of(
    model: nn.Module, use: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Any], Tensor]:
    """What ``use`` of the model's result keeps, and the gradient of the inputs."""
    kept: list[Any] = []
    hooks = torch.autograd.graph.saved_tensors_hooks
    monkeypatch.setattr(
        torch.autograd.graph,
        "saved_tensors_hooks",
        lambda pack, unpack: hooks(lambda tensor: kept.append(pack(tensor)) or kept[-1], unpack),
    )
    values = torch.linspace(-9, 9, 60).view(3, 20).requires_grad_()
    with saved_as_codes(model):
        result = use(model(values))
    result.sum().backward()
    assert values.grad is not None
    return [item for item in kept if not isinstance(item, Tensor) or item.shape == values.shape], values.grad


def test_what_two_operators_keep_is_coded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, gradient = kept_of(
        quantizer(), lambda values: values.square() + values.exp().detach() * values.t().sin().t(), monkeypatch
    )
    coded = [item for item in kept if not isinstance(item, Tensor)]
    assert len(coded) == 2
    assert coded[0].codes is coded[1].codes
    assert gradient.abs().sum() > 0


def test_what_was_changed_in_place_is_kept_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a step aside, on no grid any more."""
    kept, gradient = kept_of(quantizer(), lambda values: values.add_(1 / 32).square(), monkeypatch)
    assert all(isinstance(item, Tensor) for item in kept)
    values = torch.linspace(-9, 9, 60)
    inside = (values >= -8 - 1 / 32) & (values < 8 - 1 / 32)
    expected = 2 * (torch.round(values * 16).clamp(-128, 127) / 16 + 1 / 32) * inside
    assert torch.equal(gradient.flatten(), expected)


def test_another_tensor_in_freed_memory_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quantizer's result is gone when the next tensor of its size comes, which may get its memory."""
    model = nn.Sequential(quantizer(), nn.Flatten(0))
    kept, _ = kept_of(model, lambda values: (values.view(3, 20) * 1.0).sin(), monkeypatch)
    assert all(isinstance(item, Tensor) for item in kept)


@pytest.mark.parametrize("signed", [False, True])
def test_every_code_comes_back(signed: bool) -> None:
    made = quantizer(signed)
    grid = torch.arange(made.codes.low, made.codes.high + 1) / 16
    inputs = grid.clone().requires_grad_()
    with saved_as_codes(made):
        result = made(inputs).pow(2)
    result.sum().backward()
    assert torch.equal(inputs.grad, 2 * grid)


def test_a_relu_on_its_own_is_coded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    source = quantizer()
    kept, _ = kept_of(nn.Sequential(source, QuantizedReLU("relu", source)), lambda values: values.square(), monkeypatch)
    assert not isinstance(kept[-1], Tensor)


def test_nothing_stays_on_the_model() -> None:
    qmodel = prepared("transformer")
    softmaxes = [module for module in qmodel.modules() if isinstance(module, QuantizedFloatOperator)]
    with saved_as_codes(qmodel):
        with saved_as_codes(qmodel):
            pass
        assert all(module.keeps_codes_on == {"cpu"} for module in softmaxes)
    with pytest.raises(ZeroDivisionError), saved_as_codes(qmodel):
        raise ZeroDivisionError
    assert not any(module._forward_hooks for module in qmodel.modules())
    assert softmaxes
    assert not any(module.keeps_codes_on for module in softmaxes)
