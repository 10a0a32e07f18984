"""C kernels of batch norm in training: statistics, quantized values and gradients of PyTorch's operators, bit by bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from native_kernels import needs_compiler
from torch import Tensor

from lowprec.numerics import native_activations, native_norms
from lowprec.numerics.fixed_point import SIGNED_8_BIT, UNSIGNED_8_BIT
from lowprec.numerics.straight_through import Ends

pytestmark = needs_compiler

DTYPES = [torch.float32, torch.bfloat16]
# Channels that fill registers, that leave eight lanes, and fewer than one holds; few rows and many.
SHAPES = [(4, 16, 33, 17), (2, 8, 7, 5), (3, 24, 9, 4), (2, 40, 5, 5), (5, 72, 3, 7), (2, 96, 4, 4)]


@pytest.fixture(params=[1, 2, 3], autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def values_of(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (3 * torch.randn(shape, generator=generator) + 1).to(dtype).contiguous(memory_format=torch.channels_last)


def parameters_of(channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight, bias, running mean and variance."""
    generator = torch.Generator().manual_seed(channels)
    weight, bias, mean, variance = torch.randn(4, channels, generator=generator).unbind()
    return weight.clone(), bias.clone(), mean.clone(), variance.abs()


@pytest.mark.parametrize("dtype", DTYPES)
def test_they_agree_with_the_operators_of_this_pytorch(dtype: torch.dtype) -> None:
    """Where another version rounds otherwise, all else here is bound to fail, and layers do without these kernels."""
    native_norms.agrees.cache_clear()
    assert native_norms.agrees(dtype, torch.get_num_threads())


def test_operators_that_round_otherwise_are_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """For each number of threads, once."""
    norm = torch.native_batch_norm

    def other(*arguments: object) -> tuple[Tensor, ...]:
        result, mean, inverse = norm(*arguments)
        return result, mean, inverse * (1 + 2**-20)

    monkeypatch.setattr(torch, "native_batch_norm", other)
    native_norms.agrees.cache_clear()
    values = values_of(2, 16, 5, 5, dtype=torch.float32)
    with caplog.at_level("INFO", logger="lowprec.kernels"):
        assert not native_norms.takes(values)
        assert not native_norms.takes(values)
    native_norms.agrees.cache_clear()
    assert caplog.text.count("batch norm and quantizer run apart") == 1


@pytest.mark.parametrize("momentum", [0.1, 0.37, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_statistics(shape: tuple[int, ...], dtype: torch.dtype, momentum: float) -> None:
    values = values_of(*shape, dtype=dtype)
    weight, bias, *running = parameters_of(shape[1])
    others = [tensor.clone() for tensor in running]
    _, mean, inverse = torch.native_batch_norm(values, weight, bias, *running, True, momentum, 1e-5)
    found = native_norms.statistics(values, weight, bias, *others, momentum, 1e-5)
    for one, other in zip((mean, inverse, *running), (found.mean, found.inverse, *others), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("activation", ["", "relu", "relu6"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_quantized_values(shape: tuple[int, ...], dtype: torch.dtype, activation: str, adds: bool) -> None:
    """Those of the quantizer's kernel behind the operator, and its masks."""
    values = values_of(*shape, dtype=dtype)
    addend = values_of(*shape, dtype=dtype, seed=1) if adds else None
    weight, bias, *running = parameters_of(shape[1])
    codes = UNSIGNED_8_BIT if activation else SIGNED_8_BIT
    ends, exponent = Ends.of(codes.low, codes.high, dtype), torch.tensor(-6, dtype=torch.int32)
    normalized = torch.native_batch_norm(values, weight, bias, *running, True, 0.1, 1e-5)[0]
    expected, found = torch.empty_like(values), torch.empty_like(values)
    mask = native_activations.quantize_activation(normalized, addend, exponent, ends, activation, expected, True)
    norm = native_norms.statistics(values, weight, bias, *running, 0.1, 1e-5)
    bits = native_norms.quantize_normalized(values, norm, addend, exponent, ends, activation, found)
    assert torch.equal(found, expected)
    assert torch.equal(bits, mask)
    assert int(bits.count_nonzero()) > 0
    assert len(expected.unique()) > 50


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("asked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(shape: tuple[int, ...], dtype: torch.dtype, asked: bool, in_place: bool) -> None:
    values = values_of(*shape, dtype=dtype)
    # Where the mask lets it through, next to nothing is left but what the last places of all factors make of it.
    gradient = values + values_of(*shape, dtype=dtype, seed=2) / 64
    weight, bias, *running = parameters_of(shape[1])
    generator = torch.Generator().manual_seed(3)
    mask = torch.randint(0, 256, (values.numel() // 8,), generator=generator, dtype=torch.uint8)
    mask[: len(mask) // 2] = 255
    _, mean, inverse = torch.native_batch_norm(values, weight, bias, *running, True, 0.1, 1e-5)
    within = torch.empty_like(gradient)
    native_activations.gradient_within(gradient, mask, within)
    expected = torch.ops.aten.native_batch_norm_backward(
        within, values, weight, None, None, mean, inverse, True, 1e-5, [True] * 3
    )
    masked = (gradient if in_place else torch.empty_like(values)) if asked else None
    out = gradient if in_place and not asked else torch.empty_like(values)
    found = native_norms.norm_gradient(gradient, mask, values, mean, inverse, weight, masked, out)
    for one, other in zip(expected, (out, *found), strict=True):
        assert torch.equal(one, other)
    if masked is not None:
        assert torch.equal(masked, within)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_spoils_its_channel_and_no_other(dtype: torch.dtype) -> None:
    values = values_of(2, 24, 5, 5, dtype=dtype)
    values[1, 20, 3, 2] = torch.nan
    weight, bias, *running = parameters_of(24)
    norm = native_norms.statistics(values, weight, bias, *running, 0.1, 1e-5)
    out = torch.empty_like(values)
    ends = Ends.of(SIGNED_8_BIT.low, SIGNED_8_BIT.high, dtype)
    native_norms.quantize_normalized(values, norm, None, torch.tensor(-5), ends, "", out)
    spoilt = torch.zeros(24, dtype=torch.bool)
    spoilt[20] = True
    for found in (
        norm.mean.isnan(),
        running[1].isnan(),
        out.isnan().any(3).any(2).any(0),
        out.isnan().all(3).all(2).all(0),
    ):
        assert torch.equal(found, spoilt)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_that_is_nan_is_not_lost(dtype: torch.dtype, bits: int) -> None:
    """GPUs make NaNs of ones alone, which rounding to bfloat16 must not carry over."""
    values = values_of(2, 24, 5, 5, dtype=dtype)
    weight, bias, *running = parameters_of(24)
    weight[20] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    norm = native_norms.statistics(values, weight, bias, *running, 0.1, 1e-5)
    out, gradient = torch.empty_like(values), torch.empty_like(values)
    ends = Ends.of(SIGNED_8_BIT.low, SIGNED_8_BIT.high, dtype)
    mask = native_norms.quantize_normalized(values, norm, None, torch.tensor(-5), ends, "", out)
    native_norms.norm_gradient(values, mask, values, norm.mean, norm.inverse, weight, None, gradient)
    for found in (out, gradient):
        assert found[:, 20].isnan().all()
        assert int(found.isnan().sum()) == found[:, 20].numel()


def test_what_they_take() -> None:
    values = values_of(2, 16, 5, 5, dtype=torch.float32)
    assert native_norms.takes(values)
    assert native_norms.takes(values.bfloat16())
    others = [values.double(), values.half(), values.contiguous(), values[:, :, :, :3], values.to("meta")]
    others += [values_of(2, 12, 5, 5, dtype=torch.float32), values_of(1, 16, 1, 1, dtype=torch.float32)]
    assert [native_norms.takes(other) for other in others] == [False] * len(others)
