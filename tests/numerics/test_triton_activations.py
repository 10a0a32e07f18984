"""Kernels of activations, Triton's and those in C, give what PyTorch's operators give: values and gradients, ``==``."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_kernels import NATIVE
from torch import Tensor
from triton_interpreter import PLACES, operators_only, running

from lowprec.numerics.fixed_point import MAXIMUM_EXPONENT, MINIMUM_EXPONENT, SIGNED_8_BIT, UNSIGNED_8_BIT, CodeRange
from lowprec.numerics.straight_through import codes_of_multiples, multiples_of_codes, straight_through_activation


@pytest.fixture(params=[*PLACES, NATIVE], scope="module")
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the kernels run."""
    with running(request.param) as device:
        yield device


def quantized(
    values: Tensor,
    upstream: Tensor,
    exponent: int,
    codes: CodeRange,
    activation: str,
    overwrite: bool = False,
    addend: Tensor | None = None,
) -> list[Tensor]:
    """Result, gradient, and the addend's where there is one."""
    sources = [tensor.clone().requires_grad_() for tensor in (values, addend) if tensor is not None]
    whole = torch.tensor(exponent, dtype=torch.int32, device=values.device)
    added = sources[1] if addend is not None else None
    result = straight_through_activation(sources[0] * 1.0, whole, codes, activation, overwrite, added)
    result.backward(upstream.to(result.dtype))
    gradients = [source.grad for source in sources if source.grad is not None]
    assert len(gradients) == len(sources)
    return [result.detach(), *gradients]


def by_operators(*arguments: object) -> list[Tensor]:
    with operators_only():
        return quantized(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("codes", [UNSIGNED_8_BIT, SIGNED_8_BIT])
@pytest.mark.parametrize("activation", ["", "relu", "relu6"])
@pytest.mark.parametrize("exponent", [-9, -5, -3, 0])
def test_values_and_gradients_are_those_of_operators(
    exponent: int,
    activation: str,
    codes: CodeRange,
    memory_format: torch.memory_format,
    dtype: torch.dtype,
    device: str,
) -> None:
    """Eighths of a code: ties, both ends and far beyond them; more than one program, and one that is not full."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-1200, 2400, (3, 5, 21, 17), generator=generator) / 8 * 2.0**exponent
    values[0, 0, 0, :6] = torch.tensor([0.0, -0.0, 6.0, 6.0 - 2.0**-20, 6.0 - 2.0**-6, 2.0**-140])
    values = values.to(dtype).contiguous(memory_format=memory_format)
    upstream = torch.randn(values.shape, generator=generator).to(dtype)  # in another memory format than channels-last
    wanted = by_operators(values, upstream, exponent, codes, activation)
    for overwrite in (False, True):
        on_device = (values.to(device), upstream.to(device))
        found = quantized(*on_device, exponent, codes, activation, overwrite)
        for tensor, expected in zip(found, wanted, strict=True):
            assert tensor.dtype == expected.dtype
            assert torch.equal(tensor.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("same_format", [False, True])
def test_sums_and_their_gradients_are_those_of_operators(
    same_format: bool, overwrite: bool, dtype: torch.dtype, device: str
) -> None:
    """In bfloat16 a sum is rounded before it is quantized; an addend that lies otherwise in memory is added before."""
    generator = torch.Generator().manual_seed(0)
    values, addend, upstream = (torch.randn(2, 5, 21, 17, generator=generator).mul_(2).to(dtype) for _ in range(3))
    if not same_format:
        addend = addend.contiguous(memory_format=torch.channels_last)
    wanted = by_operators(values, upstream, -6, UNSIGNED_8_BIT, "relu", overwrite, addend)
    on_device = (tensor.to(device) for tensor in (values, upstream))
    found = quantized(*on_device, -6, UNSIGNED_8_BIT, "relu", overwrite, addend.to(device))
    for tensor, expected in zip(found, wanted, strict=True):
        assert torch.equal(tensor.cpu(), expected)


@settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    values=st.lists(st.floats(width=32, allow_nan=True, allow_infinity=False), min_size=1, max_size=40),
    exponent=st.integers(-30, 20),
    signed=st.booleans(),
    activation=st.sampled_from(["", "relu", "relu6"]),
)
def test_any_values(values: list[float], exponent: int, signed: bool, activation: str, device: str) -> None:
    tensor = torch.tensor(values, device=device)
    codes = SIGNED_8_BIT if signed else UNSIGNED_8_BIT
    upstream = torch.arange(1.0, len(values) + 1, device=device)
    found = quantized(tensor, upstream, exponent, codes, activation)
    wanted = by_operators(tensor.cpu(), upstream.cpu(), exponent, codes, activation)
    # NaN equals NaN here.
    for got, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=0, equal_nan=True)


def test_an_infinite_gradient_outside_is_none(device: str) -> None:
    """What the values outside get does not depend on what comes back to them."""
    values = torch.tensor([-1.0, 1.0, 300.0], device=device)
    upstream = torch.tensor([math.inf, 1.0, math.nan], device=device)
    gradient = quantized(values, upstream, 0, UNSIGNED_8_BIT, "relu")[1]
    assert gradient.tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("codes", [UNSIGNED_8_BIT, SIGNED_8_BIT])
@pytest.mark.parametrize("exponent", [MINIMUM_EXPONENT, -9, 0, MAXIMUM_EXPONENT])
def test_codes_of_values_and_values_of_codes(
    exponent: int, codes: CodeRange, memory_format: torch.memory_format, dtype: torch.dtype, device: str
) -> None:
    """All codes; more than one program, and one that is not full."""
    integers = torch.arange(3 * 5 * 21 * 17).remainder_(256).add_(codes.low).view(3, 5, 21, 17)
    values = (integers * 2.0**exponent).to(dtype).contiguous(memory_format=memory_format)
    whole = torch.tensor(exponent, dtype=torch.int32)
    offset = codes.low + 128
    with operators_only():
        wanted = codes_of_multiples(values, whole, offset)
    assert torch.equal(wanted.int() + offset, integers)
    on_device = values.to(device), whole.to(device)
    found = codes_of_multiples(*on_device, offset)
    assert found.stride() == wanted.stride()
    assert torch.equal(found.cpu(), wanted)
    raised = codes_of_multiples(*on_device, offset - 128, torch.uint8)
    assert torch.equal(raised.cpu().int() - 128, wanted.int())
    with operators_only():
        assert torch.equal(codes_of_multiples(values, whole, offset - 128, torch.uint8), raised.cpu())
    for kept, less in ((found, offset), (raised, offset - 128)):
        back = multiples_of_codes(kept, on_device[1], less, dtype)
        assert back.stride() == values.stride()
        assert torch.equal(back.cpu(), values)


def test_no_values_and_no_gradient(device: str) -> None:
    whole = torch.tensor(0, dtype=torch.int32, device=device)
    empty = torch.zeros(0, 3, device=device, requires_grad=True)
    straight_through_activation(empty, whole, UNSIGNED_8_BIT, "relu").sum().backward()
    assert empty.grad is not None
    assert empty.grad.shape == empty.shape
    values = torch.tensor([-3.2, 1.5, 2.5, 300.0], device=device)
    assert straight_through_activation(values, whole, UNSIGNED_8_BIT).tolist() == [0.0, 2.0, 2.0, 255.0]
