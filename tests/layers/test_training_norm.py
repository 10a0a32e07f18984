"""Batch norm in training: PyTorch's results, statistics and gradients, in other memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lowprec.layers import training_norm
from lowprec.layers.training_norm import normalize


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
