"""Accumulators at their proven bound: the largest sums that any input can give are exact, one unit more is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lowprec.integer.fast import FastModel
from lowprec.integer.model import IntegerModel, Step
from lowprec.integer.operators import Grid, IntegerConv2d, IntegerInput, IntegerLayer, IntegerLinear

LIMIT = 1 << 31
GEOMETRY: dict[str, Any] = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}


def layer(linear: bool, codes: Tensor, bias: Tensor, source: Grid, shortcut: Grid | None = None) -> IntegerLayer:
    exponents = torch.zeros(len(codes), dtype=torch.int8)
    arguments: list[Any] = [codes, None, exponents, bias.to(torch.int32), 8, 1, "kernel", source]
    if linear:
        return IntegerLinear(*arguments, None)
    output = None if shortcut is None else Grid(12, -128, 127)
    return IntegerConv2d(*arguments, output, shortcut=shortcut, **GEOMETRY)


def extremes(linear: bool, source: Grid, inputs: int, bias: Tensor) -> tuple[IntegerLayer, Tensor]:
    """A layer of two channels whose sums one input drives to plus and minus the bound."""
    signs = torch.where(torch.arange(inputs) % 2 == 0, 1, -1) if source.signed else torch.ones(inputs)
    codes = torch.stack([127 * signs, -127 * signs]).to(torch.int8)
    # The largest magnitude of a signed code is -128.
    image = torch.where(codes[0] > 0, source.low, source.high) if source.signed else torch.full((inputs,), source.high)
    shape = (2, inputs) if linear else (2, inputs, 1, 1)
    return layer(linear, codes.view(shape), bias, source), image.int().view(1, *shape[1:])


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("inputs", [64, 4096, 60_000])
def test_sums_at_the_bound_are_exact(linear: bool, inputs: int) -> None:
    source = Grid(0, 0, 255)
    products = 127 * 255 * inputs
    bias = torch.tensor([LIMIT - 1 - products, products - LIMIT + 1])
    operator, image = extremes(linear, source, inputs, bias)
    assert operator.sum_bound == LIMIT - 1
    assert operator(image).flatten().tolist() == [LIMIT - 1, 1 - LIMIT]
    with pytest.raises(ValueError, match=rf"sums of up to {LIMIT} overflow 32 bits"):
        extremes(linear, source, inputs, bias + torch.tensor([1, -1]))


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("source", [Grid(0, 0, 255), Grid(0, -128, 127)])
def test_the_fast_backend_is_exact_at_the_bound(linear: bool, source: Grid) -> None:
    bias = torch.tensor([LIMIT - 1 - 127 * source.largest * 1024, 1000])
    operator, image = extremes(linear, source, 1024, bias)
    # A linear layer takes the last axis, a convolution the channels.
    shape = (1, 1, 1024) if linear else (1024, 1, 1)
    model = IntegerModel([Step("input", (), IntegerInput(source)), Step("layer", ("input",), operator)], shape)
    image = image.view(1, *shape)
    expected = operator(image)
    assert torch.equal(model.codes(image.float())["layer"], expected)
    assert torch.equal(FastModel(model).codes(image.float())["layer"], expected)


def test_a_shortcut_is_added_to_sums_at_the_bound_without_overflow() -> None:
    products = 127 * 255 * 512
    bias = torch.tensor([LIMIT - 1 - products, 0])
    codes = torch.stack([torch.full((512,), 127), torch.full((512,), -127)]).to(torch.int8).view(2, 512, 1, 1)
    operator = layer(False, codes, bias, Grid(0, 0, 255), shortcut=Grid(15, -128, 127))
    image, shortcut = (
        torch.full((1, 512, 1, 1), 255, dtype=torch.int32),
        torch.full((1, 2, 1, 1), 127, dtype=torch.int32),
    )
    totals = [LIMIT - 1 + (127 << 15), -products + (127 << 15)]
    expected = [max(-128, min(127, round(total / (1 << 12)))) for total in totals]
    assert operator(image, shortcut).flatten().tolist() == expected
