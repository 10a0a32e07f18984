"""Batch norm in training: PyTorch's results, statistics and gradients, in other memory."""

from __future__ import annotations

import copy

import pytest
import torch
from native_kernels import needs_compiler
from networks import awkward, images
from torch import Tensor, nn

import lowprec
from lowprec.layers import ActivationQuantizer, quantized_layers, training_norm
from lowprec.layers.training_norm import normalize, quantized_norm
from lowprec.models.cifar_resnet import CifarResNet
from lowprec.numerics import native_norms
from lowprec.numerics.fixed_point import SIGNED_8_BIT, UNSIGNED_8_BIT
from lowprec.numerics.straight_through import straight_through_activation
from lowprec.recipe import ActivationScheme, Recipe, WeightScheme


def values_of(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (3 * torch.randn(shape, generator=generator) + 1).to(dtype).contiguous(memory_format=torch.channels_last)


def norm_of(channels: int, **keywords: object) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, **keywords)
    generator = torch.Generator().manual_seed(channels)
    with torch.no_grad():
        for tensor in (*norm.parameters(), norm.running_mean, norm.running_var):
            if tensor is not None:
                tensor.copy_(torch.rand(channels, generator=generator) + 0.1)
    return norm


def outcome(function: object, norm: nn.BatchNorm2d, values: Tensor) -> list[Tensor]:
    """The result, the gradients and the statistics after two steps."""
    norm, values = copy.deepcopy(norm), values.clone().requires_grad_()
    for step in range(2):
        result = function(norm, values)
        upstream = values_of(*result.shape, dtype=result.dtype) - step
        result.backward(upstream)
    return [result.detach(), values.grad, *(parameter.grad for parameter in norm.parameters()), *norm.buffers()]


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 16, 33, 17), (2, 3, 5, 5), (8, 5, 1, 1), (3, 1, 7, 2)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_it_is_equal(
    shape: tuple[int, ...], dtype: torch.dtype, momentum: float | None, memory_format: torch.memory_format
) -> None:
    values = values_of(*shape, dtype=dtype).contiguous(memory_format=memory_format)
    norm = norm_of(shape[1], momentum=momentum)
    assert training_norm._can_place(norm, values.requires_grad_())
    values = values.detach()
    expected = outcome(lambda norm, values: norm(values), norm, values)
    found = outcome(normalize, norm, values)
    assert len(found) == 7
    for one, other in zip(expected, found, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "norm",
    [
        norm_of(4).eval(),
        norm_of(4, affine=False),
        norm_of(4, track_running_stats=False),
        norm_of(4).bfloat16(),
        nn.Identity(),
        nn.GroupNorm(2, 4),
    ],
    ids=["evaluating", "without weights", "without statistics", "in bfloat16", "identity", "another norm"],
)
def test_others_are_called_as_they_are(norm: nn.Module) -> None:
    dtype = next((parameter.dtype for parameter in norm.parameters()), torch.float32)
    values = values_of(2, 4, 5, 5, dtype=dtype).requires_grad_()
    assert torch.equal(normalize(norm, values), copy.deepcopy(norm)(values))


def test_who_watches_a_norm_sees_its_calls() -> None:
    norm, values, seen = norm_of(4), values_of(2, 4, 5, 5).requires_grad_(), []
    norm.register_forward_hook(lambda module, arguments, result: seen.append(result))
    result = normalize(norm, values)
    assert seen[0] is result


def test_a_single_value_of_a_channel_is_an_error_as_ever() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        normalize(norm_of(4), values_of(1, 4, 1, 1).requires_grad_())


EXPONENT = torch.tensor(-6, dtype=torch.int32)


def quantized_outcome(
    fused: bool, norm: nn.BatchNorm2d, values: Tensor, addend: Tensor | None, activation: str, upstream: str
) -> list[Tensor]:
    """The result, all gradients and the statistics after two steps."""
    norm, values = copy.deepcopy(norm), values.clone().requires_grad_()
    addend = None if addend is None else addend.clone().requires_grad_()
    codes = UNSIGNED_8_BIT if activation else SIGNED_8_BIT
    for step in range(2):
        if fused:
            result = quantized_norm(norm, values, EXPONENT, codes, activation, addend)
            assert result is not None
            assert type(result.grad_fn).__name__ == "StraightThroughNormBackward"
        else:
            result = straight_through_activation(
                normalize(norm, values), EXPONENT, codes, activation, overwrite=True, addend=addend
            )
        gradient = values_of(*result.shape, dtype=result.dtype) - step
        if upstream == "contiguous":
            gradient = gradient.contiguous()
        # A gradient that is somebody else's, too, must stay as it is.
        given = gradient.clone(memory_format=torch.preserve_format)
        (result if upstream != "of an operator" else result * 1).backward(gradient)
        assert torch.equal(gradient, given)
    leaves = [values, *norm.parameters(), *([] if addend is None else [addend])]
    return [result.detach(), *(leaf.grad for leaf in leaves), *norm.buffers()]


@needs_compiler
@pytest.mark.parametrize("upstream", ["the caller's", "of an operator", "contiguous"])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("activation", ["", "relu", "relu6"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_its_quantizer_it_is_equal(dtype: torch.dtype, activation: str, adds: bool, upstream: str) -> None:
    values = values_of(4, 24, 9, 7, dtype=dtype)
    addend = values_of(4, 24, 9, 7, dtype=dtype).flip(0).contiguous(memory_format=torch.channels_last) if adds else None
    norm = norm_of(24, momentum=None)
    expected, found = (quantized_outcome(fused, norm, values, addend, activation, upstream) for fused in (False, True))
    assert len(found) == 7 + adds
    for one, other in zip(expected, found, strict=True):
        assert one.dtype == other.dtype
        assert one.abs().sum() > 0
        assert torch.equal(one, other)


@needs_compiler
def test_what_needs_no_gradient_gets_none() -> None:
    values, norm = values_of(2, 8, 5, 5).requires_grad_(), norm_of(8).requires_grad_(False)
    result = quantized_norm(norm, values, EXPONENT, SIGNED_8_BIT)
    assert result is not None
    result.sum().backward()
    assert values.grad is not None
    assert norm.weight.grad is norm.bias.grad is None


def watched(norm: nn.BatchNorm2d, how: str) -> nn.BatchNorm2d:
    getattr(norm, how)(lambda *arguments: None)
    return norm


def changed(norm: nn.BatchNorm2d, name: str, value: object) -> nn.BatchNorm2d:
    setattr(norm, name, value)
    return norm


@pytest.mark.parametrize(
    ("norm", "values", "addend"),
    [
        (norm_of(8).eval(), values_of(2, 8, 5, 5), None),
        (norm_of(8, affine=False), values_of(2, 8, 5, 5), None),
        (watched(norm_of(8), "register_forward_hook"), values_of(2, 8, 5, 5), None),
        (watched(norm_of(8), "register_forward_pre_hook"), values_of(2, 8, 5, 5), None),
        (watched(norm_of(8), "register_full_backward_hook"), values_of(2, 8, 5, 5), None),
        (watched(norm_of(8), "register_full_backward_pre_hook"), values_of(2, 8, 5, 5), None),
        (changed(norm_of(8), "forward", torch.square), values_of(2, 8, 5, 5), None),
        (changed(norm_of(8), "track_running_stats", False), values_of(2, 8, 5, 5), None),
        (norm_of(12), values_of(2, 12, 5, 5), None),
        (norm_of(8), values_of(2, 8, 5, 5).contiguous(), None),
        (norm_of(8), values_of(2, 8, 5, 5), values_of(2, 8, 5, 5).contiguous()),
        (norm_of(8), values_of(2, 8, 5, 5), values_of(2, 8, 5, 5).bfloat16()),
    ],
    ids=[
        *("evaluating", "without weights", "watched", "watched before", "watched backward", "watched before backward"),
        *("replaced", "tracking nothing", "12 channels", "another order", "an addend's", "an addend's dtype"),
    ],
)
def test_where_it_cannot_be_one_with_its_quantizer(norm: nn.BatchNorm2d, values: Tensor, addend: Tensor | None) -> None:
    values.requires_grad_()
    assert quantized_norm(norm, values, EXPONENT, SIGNED_8_BIT, "", addend) is None
    assert norm.num_batches_tracked == 0
    assert torch.equal(normalize(copy.deepcopy(norm), values), copy.deepcopy(norm)(values))
    quantizer = ActivationQuantizer(signed=True)
    quantizer.set_exponent(int(EXPONENT))
    found = quantizer(values, norm=copy.deepcopy(norm), addend=addend)
    assert torch.equal(found, quantizer(copy.deepcopy(norm)(values), addend=addend))


def test_hooks_of_all_modules_are_called() -> None:
    norm, values, seen = norm_of(8), values_of(2, 8, 5, 5).requires_grad_(), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        quantizer = ActivationQuantizer(signed=True)
        quantizer.set_exponent(int(EXPONENT))
        quantizer(values, norm=norm)
    finally:
        handle.remove()
    assert seen == [norm, quantizer]


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_default_dtype_and_device_are_nothing_to_it(dtype: torch.dtype) -> None:
    outcomes = []
    for default, device in ((torch.float32, "cpu"), (dtype, "meta")):
        native_norms.agrees.cache_clear()
        norm, values, upstream = norm_of(16), values_of(2, 16, 5, 5).requires_grad_(), values_of(2, 16, 5, 5).square()
        torch.set_default_dtype(default)
        try:
            with torch.device(device):
                result = quantized_norm(norm, values, EXPONENT, SIGNED_8_BIT)
                assert result is not None
                result.backward(upstream)
        finally:
            torch.set_default_dtype(torch.float32)
        outcomes.append([result.detach(), values.grad, norm.weight.grad, norm.bias.grad, *norm.buffers()])
    for one, other in zip(*outcomes, strict=True):
        assert torch.equal(one, other)


def test_what_does_not_fit_is_an_error_as_ever() -> None:
    for function in (
        normalize,
        lambda norm, values: quantized_norm(norm, values, EXPONENT, SIGNED_8_BIT) or norm(values),
    ):
        with pytest.raises(ValueError, match="eps must be positive"):
            function(norm_of(8, eps=0.0), values_of(2, 8, 5, 5).requires_grad_())
    with pytest.raises(RuntimeError, match="8"):
        ActivationQuantizer(signed=True)(values_of(2, 16, 5, 5).requires_grad_(), norm=norm_of(8))
    values, addend = values_of(4, 8, 5, 5).requires_grad_(), values_of(2, 8, 5, 5)
    assert quantized_norm(norm_of(8), values, EXPONENT, SIGNED_8_BIT, addend=addend) is None


@needs_compiler
def test_autograd_knows_of_the_statistics_change() -> None:
    norm, values = norm_of(8), values_of(2, 8, 5, 5).requires_grad_()
    kept = norm.running_var.requires_grad_().square()
    norm.running_var.detach_()
    quantized_norm(norm, values, EXPONENT, SIGNED_8_BIT)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.sum().backward()


def test_a_pytorch_that_rounds_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_norms, "agrees", lambda dtype, threads: False)
    assert quantized_norm(norm_of(8), values_of(2, 8, 5, 5).requires_grad_(), EXPONENT, SIGNED_8_BIT) is None


def test_a_quantizer_that_is_off_leaves_the_norm() -> None:
    quantizer, norm, values = ActivationQuantizer(signed=True), norm_of(8), values_of(2, 8, 5, 5).requires_grad_()
    quantizer.quantizing = False
    assert torch.equal(quantizer(values, norm=norm), copy.deepcopy(norm)(values))


@needs_compiler
@pytest.mark.parametrize("residual", ["requantized", "accumulator"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_trains_alike(dtype: torch.dtype, residual: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = awkward(CifarResNet(8, num_classes=10, in_channels=3, width=8), seed=3, dead_channels=False)
    batch = images(1, 8, (3, 28, 28)).contiguous(memory_format=torch.channels_last)
    qmodel = lowprec.prepare(
        model,
        Recipe(weights=WeightScheme(2, cluster_size=4), activations=ActivationScheme(residual=residual)),
        batch[:2],
    )
    lowprec.calibrate(qmodel, [batch])
    qmodel.to(memory_format=torch.channels_last).train()
    apart = copy.deepcopy(qmodel)
    fused = []
    takes = native_norms.takes
    monkeypatch.setattr(native_norms, "takes", lambda values: fused.append(takes(values)) or fused[-1])
    trained = step(qmodel, batch, dtype)
    assert len(fused) == 9
    assert all(fused)
    monkeypatch.setattr(native_norms, "takes", lambda values: False)
    expected = step(apart, batch, dtype)
    for one, other in zip(expected, trained, strict=True):
        assert torch.equal(one, other)


def test_who_watches_a_quantizer_sees_what_it_rounds() -> None:
    model = CifarResNet(8, num_classes=10, in_channels=3, width=8).eval()
    batch = images(1, 8, (3, 28, 28)).contiguous(memory_format=torch.channels_last)
    qmodel = lowprec.prepare(model, "w2a8_n4", batch[:2])
    lowprec.calibrate(qmodel, [batch])
    qmodel.to(memory_format=torch.channels_last).train()
    layer = next(layer for _, layer in quantized_layers(qmodel) if layer.norm is not None)
    seen: list[Tensor] = []
    layer.quantizer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().clone()))
    qmodel(batch)
    (normalized,) = seen
    torch.testing.assert_close(normalized.mean((0, 2, 3)), layer.norm.bias.detach(), rtol=0, atol=1e-5)


def step(qmodel: nn.Module, batch: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The logits, all gradients and all buffers after a step."""
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = qmodel(batch)
    logits.float().square().sum().backward()
    gradients = [parameter.grad for parameter in qmodel.parameters() if parameter.grad is not None]
    assert len(gradients) > 20
    return [logits.detach(), *gradients, *qmodel.buffers()]
