"""Straight-through estimators: forward and gradient."""

from collections.abc import Iterator

import pytest
import torch
from native_kernels import NATIVE
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lowprec.numerics import straight_through
from lowprec.numerics.fixed_point import SIGNED_8_BIT, UNSIGNED_8_BIT, CodeRange
from lowprec.numerics.straight_through import straight_through_activation, straight_through_weight


@pytest.fixture(params=["operators", NATIVE], scope="module", autouse=True)
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """On a CPU PyTorch's operators quantize activations, or kernels in C."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "operators":
            patch.setattr(straight_through, "runs_native", lambda tensor: False)
        yield


def int32(exponent: int) -> Tensor:
    return torch.tensor(exponent, dtype=torch.int32)


def test_weight_forward_is_the_quantized_one_and_the_gradient_unclipped() -> None:
    weight = torch.tensor([-100.0, -0.1, 0.0, 0.7, 1e6], requires_grad=True)
    quantized = torch.tensor([-1.0, 0.0, 0.0, 1.0, 1.0], requires_grad=True)
    result = straight_through_weight(weight, quantized)
    assert torch.equal(result, quantized)
    upstream = torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0])
    result.backward(upstream)
    assert torch.equal(weight.grad, upstream)
    assert quantized.grad is None


@pytest.mark.parametrize("codes", [UNSIGNED_8_BIT, SIGNED_8_BIT])
@pytest.mark.parametrize("exponent", [-9, 0, 4])
def test_activation_forward_and_gradient(codes: CodeRange, exponent: int) -> None:
    unscaled = torch.arange(-600, 1200, dtype=torch.float32) / 4  # quarters: ties and both sides of the range
    values = (unscaled * 2.0**exponent).requires_grad_()
    result = straight_through_activation(values, int32(exponent), codes)
    expected = [min(max(round(value), codes.low), codes.high) * 2.0**exponent for value in unscaled.tolist()]
    assert result.tolist() == expected
    upstream = torch.arange(1.0, values.numel() + 1)
    result.backward(upstream)
    inside = torch.tensor([codes.low <= round(value) <= codes.high for value in unscaled.tolist()])
    assert torch.equal(values.grad, upstream * inside)


@pytest.mark.parametrize("codes", [UNSIGNED_8_BIT, SIGNED_8_BIT])
@pytest.mark.parametrize("exponent", [-40, -7, 0, 13])
def test_bfloat16_holds_every_code_exactly(codes: CodeRange, exponent: int) -> None:
    grid = torch.arange(codes.low, codes.high + 1).float() * 2.0**exponent
    result = straight_through_activation(grid.bfloat16(), int32(exponent), codes)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result.float(), straight_through_activation(grid, int32(exponent), codes))
    assert torch.equal(result.float(), grid)


def test_bfloat16_rounds_as_float32_does() -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    low = straight_through_activation(values, int32(-6), SIGNED_8_BIT)
    assert torch.equal(low.float(), straight_through_activation(values.float(), int32(-6), SIGNED_8_BIT))


def test_float16_is_computed_in_float32() -> None:
    values = torch.tensor([0.0, 3.0, 60000.0], dtype=torch.float16, requires_grad=True)
    result = straight_through_activation(values, int32(10), SIGNED_8_BIT)
    assert result.tolist() == [0.0, 0.0, 59 * 1024.0]
    result.sum().backward()
    assert values.grad.dtype == torch.float16
    assert values.grad.tolist() == [1.0, 1.0, 1.0]


ACTIVATIONS = {"": lambda values: values, "relu": functional.relu, "relu6": functional.relu6}


def expected(
    values: Tensor, exponent: int, codes: CodeRange, activation: str, upstream: Tensor
) -> tuple[Tensor, Tensor]:
    """Value and gradient, one operation after the other, from the definition."""
    values = values.detach().requires_grad_()
    activated = ACTIVATIONS[activation](values)
    code = torch.round(activated.detach() * 2.0**-exponent)
    inside = (code >= codes.low) & (code <= codes.high)
    (activated * inside).backward(upstream)
    assert values.grad is not None
    return code.clamp(codes.low, codes.high) * 2.0**exponent, values.grad


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("exponent", [-9, -5, -3, 0])
def test_activation_functions_and_blocks(
    exponent: int, activation: str, overwrite: bool, memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of a size that divides nothing; values on and beside ties, zero and six among them."""
    monkeypatch.setattr(straight_through, "BLOCK", 37)
    codes = UNSIGNED_8_BIT if activation else SIGNED_8_BIT
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-600, 1200, (3, 5, 7, 4), generator=generator) / 4 * 2.0**exponent
    values[0, 0, 0] = torch.tensor([0.0, -0.0, 6.0, 6.0 - 2.0**-20])
    values = values.contiguous(memory_format=memory_format)
    upstream = torch.randn(values.shape, generator=generator)
    wanted, gradient = expected(values, exponent, codes, activation, upstream)
    source = values.clone().requires_grad_()
    own = source * 1.0
    result = straight_through_activation(own, int32(exponent), codes, activation, overwrite)
    assert (result.data_ptr() == own.data_ptr()) == overwrite
    assert torch.equal(result, wanted)
    result.backward(upstream)  # in another memory format than channels-last values
    assert torch.equal(source.grad, gradient)
    with torch.no_grad():
        again = straight_through_activation(values.clone(), int32(exponent), codes, activation, overwrite)
    assert torch.equal(again, wanted)


def test_a_tensor_that_is_not_one_stretch_of_memory_is_left_alone() -> None:
    whole = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    before = whole.clone()
    for part in (whole[:, 1:4], whole.T):
        wanted, _ = expected(part, -3, SIGNED_8_BIT, "", torch.ones_like(part))
        assert torch.equal(straight_through_activation(part, int32(-3), SIGNED_8_BIT, overwrite=True), wanted)
    assert torch.equal(whole, before)


def test_no_values_at_all() -> None:
    empty = torch.zeros(0, 3, 4, 4, requires_grad=True)
    straight_through_activation(empty, int32(0), UNSIGNED_8_BIT, "relu").sum().backward()
    assert empty.grad.shape == empty.shape


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_an_addend_is_added_before_the_activation_function(
    dtypes: tuple[torch.dtype, torch.dtype], overwrite: bool
) -> None:
    """Result, and both gradients in their own dtypes, are those of a sum before the quantizer; the addend stays as it is."""
    generator = torch.Generator().manual_seed(0)
    pair = [torch.randn(3, 5, 4, generator=generator).to(dtype) for dtype in dtypes]
    upstream = torch.randn(3, 5, 4, generator=generator)
    found, wanted = ([tensor.clone().requires_grad_() for tensor in pair] for _ in range(2))
    summed = straight_through_activation(wanted[0] + wanted[1], int32(-5), UNSIGNED_8_BIT, "relu")
    result = straight_through_activation(found[0] * 1.0, int32(-5), UNSIGNED_8_BIT, "relu", overwrite, addend=found[1])
    assert torch.equal(result, summed)
    assert result.dtype == summed.dtype
    for output in (summed, result):
        output.backward(upstream.to(output.dtype))
    for mine, theirs, dtype in zip(found, wanted, dtypes, strict=True):
        assert mine.grad is not None
        assert mine.grad.dtype == dtype
        assert torch.equal(mine.grad, theirs.grad)
    assert torch.equal(found[1], pair[1])


def test_a_checkpoint_computes_again_what_it_did_not_keep() -> None:
    values = torch.randn(64, generator=torch.Generator().manual_seed(0))
    gradients = []
    for kept in (True, False):
        source = values.clone().requires_grad_()

        def quantized(tensor: Tensor) -> Tensor:
            return straight_through_activation(tensor * 1.0, int32(-6), SIGNED_8_BIT)

        result = quantized(source) if kept else checkpoint(quantized, source, use_reentrant=False)
        result.square().sum().backward()
        gradients.append(source.grad)
    assert torch.equal(*gradients)


def test_what_is_overwritten_and_was_kept_is_an_error() -> None:
    values = torch.linspace(-3, 3, 64, requires_grad=True)
    squared = values * values
    kept = squared.exp()  # keeps its result
    result = straight_through_activation(kept, int32(-3), UNSIGNED_8_BIT, overwrite=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()
