"""Functions looked up in training: what is looked up is what they compute, and so are the gradients."""

from __future__ import annotations

import pytest
import torch
from native_kernels import needs_compiler
from torch import Tensor, nn
from triton_interpreter import operators_only

from lowprec.layers import ActivationQuantizer, QuantizedLookup
from lowprec.layers.lookup import KEEP_NO_RESULT
from lowprec.numerics.table_lookup import look_up

pytestmark = needs_compiler
# One part of the kernel's, several, and places left over behind groups of eight.
SHAPES = [(3, 5, 7), (2, 6, 4, 4), (40, 1031)]


def quantizer_of(exponent: int, signed: bool) -> ActivationQuantizer:
    quantizer = ActivationQuantizer(signed)
    quantizer.set_exponent(exponent)
    return quantizer


def prepared(function: nn.Module, signed: bool = True) -> QuantizedLookup:
    # So fine a grid that the largest results are clipped.
    return QuantizedLookup(function, quantizer_of(-5, signed), quantizer_of(-7, True)).train()


def values_of(layer: QuantizedLookup, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(layer.source.codes.low, layer.source.codes.high + 1, shape, generator=generator)
    return (codes * 2.0**-5).to(dtype)


def result_and_gradient(layer: QuantizedLookup, values: Tensor) -> tuple[Tensor, Tensor]:
    source = values.clone(memory_format=torch.preserve_format).requires_grad_()
    result = layer(source)
    upstream = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(result.dtype)
    (gradient,) = torch.autograd.grad(result, source, upstream)
    return result.detach(), gradient


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("function", [kind() for kind in KEEP_NO_RESULT], ids=str)
def test_results_are_those_of_the_function(
    function: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, signed: bool
) -> None:
    layer = prepared(function, signed)
    values = values_of(layer, shape, dtype)
    if values.dim() == 4:
        values = values.contiguous(memory_format=torch.channels_last)
    with operators_only():
        expected, expected_gradient = result_and_gradient(layer, values)
    found, gradient = result_and_gradient(layer, values)
    assert layer(values.clone().requires_grad_()).grad_fn.name() == "StraightThroughLookupBackward"
    assert torch.equal(found, expected)
    assert found.dtype == dtype
    assert found.stride() == expected.stride()
    # Products in another order: a few roundings, of slopes near one.
    epsilon = torch.finfo(dtype).eps
    torch.testing.assert_close(gradient, expected_gradient, rtol=4 * epsilon, atol=16 * torch.finfo(torch.float32).eps)
    assert torch.equal(gradient == 0, expected_gradient == 0)
    with torch.no_grad():
        assert torch.equal(layer(values), expected)


@pytest.mark.parametrize("at", [0, 7, 1000, 41239])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, 2.0**-6, 4.0, -4.0 - 2.0**-5])
def test_one_value_off_the_grid_is_seen(wrong: float, at: int) -> None:
    """The function takes it, as it takes what a dropout leaves."""
    layer = prepared(nn.GELU())
    values = values_of(layer, (40, 1031), torch.float32)
    table, exponent = torch.zeros(256), layer.source.exponent
    assert look_up(values, exponent, -128, table) is not None
    values.view(-1)[at] = wrong
    assert look_up(values, exponent, -128, table) is None
    with operators_only():
        expected, expected_gradient = result_and_gradient(layer, values)
    found, gradient = result_and_gradient(layer, values)
    assert torch.equal(found.nan_to_num(99.0), expected.nan_to_num(99.0))
    assert torch.equal(gradient.nan_to_num(99.0), expected_gradient.nan_to_num(99.0))


def test_gradients_with_other_strides_and_of_two_users() -> None:
    layer = prepared(nn.GELU())
    values = values_of(layer, (2, 6, 4, 4), torch.float32).contiguous(memory_format=torch.channels_last)
    source = values.clone(memory_format=torch.preserve_format).requires_grad_()
    result = layer(source)
    upstream = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(1))
    kept = upstream.clone()
    (once,) = torch.autograd.grad(result, source, upstream, retain_graph=True)
    assert torch.equal(upstream, kept)  # the caller's own
    (twice,) = torch.autograd.grad((result + result) / 2, source, upstream)
    assert torch.equal(twice, once)
    assert once.stride() == source.stride()


def test_one_byte_an_element_is_saved() -> None:
    layer = prepared(nn.GELU())
    values = values_of(layer, (40, 1031), torch.float32).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(values)
    assert {tensor.dtype for tensor in kept if tensor.numel() == values.numel()} == {torch.uint8}
    assert sum(tensor.numel() for tensor in kept if tensor.dtype != torch.uint8) <= 4 * 256
