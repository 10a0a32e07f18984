"""The straight-through estimator uses a gradient's memory again, but never one that somebody else holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from lowprec.numerics import straight_through
from lowprec.numerics.fixed_point import SIGNED_8_BIT
from lowprec.numerics.memory import holders, holders_of_unshared
from lowprec.numerics.straight_through import straight_through_activation

EXPONENT = torch.tensor(-5, dtype=torch.int32)
KEPT: list[Tensor] = []


def quantized(values: Tensor) -> Tensor:
    return straight_through_activation(values, EXPONENT, SIGNED_8_BIT)


def keep(gradient: Tensor) -> None:
    KEPT.append(gradient)


def keep_view(gradient: Tensor) -> None:
    KEPT.append(gradient.view(-1))


def keep_detached(gradient: Tensor) -> None:
    KEPT.append(gradient.detach())


def keep_array(gradient: Tensor) -> None:
    KEPT.append(torch.from_numpy(gradient.numpy()))


def with_hook(hook: Callable[[Tensor], None]) -> Callable[[Tensor, Tensor], Tensor]:
    def compute(a: Tensor, b: Tensor) -> Tensor:
        output = quantized(a)
        output.register_hook(hook)
        return output * b

    return compute


def retained(a: Tensor, b: Tensor) -> Tensor:
    output = quantized(a)
    output.retain_grad()
    KEPT.append(output)
    return output * b


def twice(a: Tensor, b: Tensor) -> Tensor:
    output = quantized(a)
    return output * 2 + output * b


GRAPHS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "nobody else": lambda a, b: quantized(a) * b,
    "both operands of a sum": lambda a, b: (quantized(a) + quantized(b)) * 3,
    "a sum with itself": lambda a, b: (lambda output: output + output)(quantized(a * b)) * 3,
    "a difference": lambda a, b: (quantized(a) - quantized(b)) * 3,
    "a shortcut": lambda a, b: (quantized(quantized(a) * b) + quantized(a)) * 3,
    "one behind the other": lambda a, b: quantized(quantized(quantized(a))) * b,
    "used twice": twice,
    "parts of one": lambda a, b: torch.cat([quantized(a), quantized(b)]) * 3,
    "parts side by side": lambda a, b: torch.cat([quantized(a).split(2, 1)[0], quantized(b)], 1) * 3,
    "a view": lambda a, b: quantized(a).view(-1) * b.view(-1),
    "transposed": lambda a, b: quantized(a).transpose(0, 1) * b.transpose(0, 1),
    "expanded": lambda a, b: quantized(a).expand(3, *a.shape) * b,
    "mean": lambda a, b: quantized(a).mean(0) * b.mean(0),
    "product of matrices": lambda a, b: quantized(a) @ quantized(b).transpose(-1, -2),
    "kept by a hook": with_hook(keep),
    "kept as a view": with_hook(keep_view),
    "kept detached": with_hook(keep_detached),
    "kept as an array": with_hook(keep_array),
    "retained": retained,
}

SHARED = [
    "both operands of a sum",
    "a shortcut",
    "kept by a hook",
    "kept as a view",
    "kept detached",
    "kept as an array",
]


def gradients(compute: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
    """Of both inputs, and all that was kept on the way, after a backward pass from a gradient that the caller keeps."""
    KEPT.clear()
    generator = torch.Generator().manual_seed(0)
    # A few values far outside, so that places are kept rather than bits.
    a, b = (torch.randn(8, 4, 32, generator=generator) for _ in range(2))
    a.view(-1)[::97] = 9.0
    b.view(-1)[::89] = -9.0
    a.requires_grad_()
    b.requires_grad_()
    result = compute(a, b)
    upstream = torch.randn(result.shape, generator=generator)
    given = upstream.clone()
    result.backward(given)
    assert torch.equal(given, upstream)
    kept = [tensor.grad if tensor.requires_grad else tensor for tensor in KEPT]
    return [tensor.clone() for tensor in (a.grad, b.grad, *kept) if tensor is not None]


@pytest.mark.parametrize("name", GRAPHS)
def test_gradients_and_what_others_hold_are_those_of_a_copy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = gradients(GRAPHS[name])
    monkeypatch.setattr(straight_through, "holders", lambda gradient: None)
    copied = gradients(GRAPHS[name])
    assert len(found) == len(copied) >= 1
    assert all(map(torch.equal, found, copied))


@pytest.mark.skipif(holders(torch.zeros(1)) is None, reason="this PyTorch does not say who holds a tensor")
@pytest.mark.parametrize("name", SHARED)
def test_taken_for_nobody_elses_they_would_be_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = gradients(GRAPHS[name])
    monkeypatch.setattr(straight_through, "holders", lambda gradient: holders_of_unshared())
    assert not all(map(torch.equal, found, gradients(GRAPHS[name])))


@pytest.mark.parametrize("of_whom", ["the caller", "the graph"])
def test_the_root_of_a_backward_pass_is_left_alone(of_whom: str) -> None:
    values = torch.full((64,), 9.0, requires_grad=True)
    upstream = torch.ones(64)
    if of_whom == "the caller":
        quantized(values).backward(upstream)
        assert torch.equal(values.grad, torch.zeros(64))
    else:
        output = quantized(values)
        first, second = torch.autograd.grad(output * 2, [output, values], upstream)
        assert torch.equal(first, torch.full((64,), 2.0))
        assert torch.equal(second, torch.zeros(64))
    assert torch.equal(upstream, torch.ones(64))


class Address(torch.autograd.Function):
    """The identity, which notes where its gradient lies."""

    seen: ClassVar[list[int]] = []

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        Address.seen.append(gradient.data_ptr())
        return gradient


@pytest.mark.skipif(holders(torch.zeros(1)) is None, reason="this PyTorch does not say who holds a tensor")
def test_memory_that_nobody_else_holds_is_used_again() -> None:
    assert holders_of_unshared() is not None
    Address.seen.clear()
    values = torch.full((64,), 9.0, requires_grad=True)
    (Address.apply(quantized(Address.apply(values))) * 2).sum().backward()
    behind, before = Address.seen
    assert behind == before
    assert torch.equal(values.grad, torch.zeros(64))
