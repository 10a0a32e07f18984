"""Convolution and linear layers on codes against rational arithmetic, product by product."""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowprec.integer.operators import Grid, IntegerConv2d, IntegerInput, IntegerLinear, IntegerReLU

LIMITS = {2: 1, 4: 7, 8: 127}


def random_codes(generator: torch.Generator, low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=generator)


def requantized(total: Fraction, grid: Grid, six: int | None) -> int:
    """The code of a value on a grid: Python rounds fractions half to even."""
    high = grid.high if six is None else min(six, grid.high)
    return max(grid.low, min(high, round(total / Fraction(2) ** grid.exponent)))


def effective(code: int, mantissa: int | None, bits: int) -> int:
    """a·t, a·q / 2^4 rounded half to even, or the code itself."""
    if mantissa is None:
        return code
    return code * mantissa if bits == 2 else round(Fraction(code * mantissa, 16))


def mantissa_of(layer: IntegerConv2d | IntegerLinear, o: int, i: int, position: int) -> int | None:
    if layer.mantissas is None:
        return None
    cluster = layer.mantissas[o, i // min(layer.layout.cluster_size, layer.codes.shape[1]), 0]
    return int(cluster[position if len(cluster) > 1 else 0])


def expected_convolution(layer: IntegerConv2d, x: Tensor, b: int, o: int, row: int, column: int) -> int:
    """One output code: every product of a value and a weight as exact fractions, added up."""
    _, inputs, height, width = layer.codes.shape
    group = o // (layer.codes.shape[0] // layer.groups)
    exponent = layer.input.exponent + int(layer.exponents[o])
    total = int(layer.bias[o]) * Fraction(2) ** exponent
    for i, y, z in product(range(inputs), range(height), range(width)):
        at_row = row * layer.stride[0] - layer.padding[0] + y * layer.dilation[0]
        at_column = column * layer.stride[1] - layer.padding[1] + z * layer.dilation[1]
        if 0 <= at_row < x.shape[2] and 0 <= at_column < x.shape[3]:
            weight = effective(int(layer.codes[o, i, y, z]), mantissa_of(layer, o, i, y * width + z), layer.bits)
            value = int(x[b, group * inputs + i, at_row, at_column]) * Fraction(2) ** layer.input.exponent
            total += value * weight * Fraction(2) ** int(layer.exponents[o])
    if layer.output is None:
        return int(total / Fraction(2) ** exponent)
    return requantized(total, layer.output, layer.six)


@st.composite
def layers(draw: st.DrawFn, linear: bool = False) -> tuple[IntegerConv2d | IntegerLinear, Tensor]:
    """A layer of any geometry, bits, layout and grids, and codes for it."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    bits, layout = draw(st.sampled_from([2, 4, 8])), draw(st.sampled_from(["kernel", "element"]))
    groups = 1 if linear else draw(st.sampled_from([1, 1, 2, 3]))
    per_group, inputs = draw(st.integers(1, 2)), draw(st.integers(1, 4))
    kernel = () if linear else (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    shape = (per_group * groups, inputs, *kernel)
    size = draw(st.integers(1, 5))
    scale = (shape[0], -(-inputs // min(size, inputs)), 1, 1)
    if layout == "element" and inputs > 1 and not linear:
        scale = (*scale[:3], kernel[0] * kernel[1])
    limit = 64 if bits == 2 else 127
    source = draw(st.sampled_from([Grid(-4, 0, 255), Grid(-9, -128, 127), Grid(3, -128, 127)]))
    output = draw(
        st.sampled_from([Grid(e, low, high) for e in (-14, -8, -3, 0, 6) for low, high in [(0, 255), (-128, 127)]])
    )
    if draw(st.booleans()) and draw(st.booleans()):
        output = None
    arguments = (
        random_codes(generator, -LIMITS[bits], LIMITS[bits], *shape).to(torch.int8),
        None if bits == 8 else random_codes(generator, -limit, limit, *scale).to(torch.int8),
        random_codes(generator, -9, 3, shape[0]).to(torch.int8),
        random_codes(generator, -(1 << draw(st.sampled_from([3, 12, 22]))), 1 << 12, shape[0]).to(torch.int32),
        bits,
        size,
        layout,
        source,
        output,
        draw(st.sampled_from([None, 3, 100, 200])) if output is not None else None,
    )
    if linear:
        return IntegerLinear(*arguments), random_codes(generator, source.low, source.high, 2, inputs).to(torch.int32)
    layer = IntegerConv2d(
        *arguments,
        stride=(draw(st.integers(1, 3)), draw(st.integers(1, 2))),
        padding=(draw(st.integers(0, 2)), draw(st.integers(0, 2))),
        dilation=(draw(st.integers(1, 2)), draw(st.integers(1, 3))),
        groups=groups,
    )
    x = random_codes(generator, source.low, source.high, 2, groups * inputs, 5, 7).to(torch.int32)
    return layer, x


@settings(max_examples=60, deadline=None, derandomize=True)
@given(layers())
def test_convolution_is_exact(case: tuple[IntegerConv2d, Tensor]) -> None:
    layer, x = case
    result = layer(x)
    assert result.dtype == torch.int32
    # All output channels and the corners and centre of the first image: there padding and strides show.
    rows, columns = ({0, size // 2, size - 1} for size in result.shape[2:])
    for o, row, column in product(range(result.shape[1]), rows, columns):
        assert int(result[0, o, row, column]) == expected_convolution(layer, x, 0, o, row, column)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(layers(linear=True))
def test_linear_layer_is_exact(case: tuple[IntegerLinear, Tensor]) -> None:
    layer, x = case
    result = layer(x)
    for b, o in product(range(2), range(result.shape[1])):
        weights = [
            effective(int(layer.codes[o, i]), mantissa_of(layer, o, i, 0), layer.bits) for i in range(x.shape[1])
        ]
        total = sum(weight * int(code) for weight, code in zip(weights, x[b], strict=True)) + int(layer.bias[o])
        if layer.output is None:
            assert int(result[b, o]) == total
        else:
            value = total * Fraction(2) ** (layer.input.exponent + int(layer.exponents[o]))
            assert int(result[b, o]) == requantized(value, layer.output, layer.six)


def layer_with(bias: int, weights: list[int], source: Grid, output: Grid | None = None) -> IntegerLinear:
    codes = torch.tensor([weights], dtype=torch.int8)
    bias_codes = torch.tensor([bias], dtype=torch.int32)
    return IntegerLinear(codes, None, torch.zeros(1, dtype=torch.int8), bias_codes, 8, 4, "kernel", source, output)


@pytest.mark.parametrize("total", [-6, -5, -3, -2, -1, 0, 1, 2, 3, 5, 6])
def test_ties_go_to_the_even_code(total: int) -> None:
    layer = layer_with(0, [1], Grid(0, -128, 127), Grid(1, -128, 127))
    assert layer(torch.tensor([[total]], dtype=torch.int32)).tolist() == [[round(Fraction(total, 2))]]


@pytest.mark.parametrize("bias", [(1 << 31) - 255, -(1 << 31) + 255, -(1 << 31)])
def test_sums_that_could_overflow_are_refused(bias: int) -> None:
    with pytest.raises(ValueError, match=r"sums of up to 2147483\d+ overflow 32 bits"):
        layer_with(bias, [1], Grid(0, 0, 255))


def test_the_largest_sum_that_fits_is_reached_and_right() -> None:
    layer = layer_with((1 << 31) - 1 - 255 * 127, [127], Grid(0, 0, 255))
    assert layer.sum_bound == (1 << 31) - 1
    assert layer(torch.tensor([[255]], dtype=torch.int32)).tolist() == [[(1 << 31) - 1]]


def test_sum_bound_counts_the_worst_image() -> None:
    assert layer_with(-7, [3, -5], Grid(0, 0, 255)).sum_bound == 7 + 8 * 255
    assert layer_with(7, [3, -5], Grid(0, -128, 127)).sum_bound == 7 + 8 * 128


@pytest.mark.parametrize("six", [None, 0, 37, 127, 300])
@pytest.mark.parametrize("low", [0, -128])
def test_relu_of_every_code(six: int | None, low: int) -> None:
    grid = Grid(-3, low, low + 255)
    codes = torch.arange(grid.low, grid.high + 1, dtype=torch.int32)
    expected = [max(0, code) if six is None else min(max(0, code), six) for code in codes.tolist()]
    assert IntegerReLU(grid, six)(codes).tolist() == expected


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20), st.integers(-12, 5))
def test_input_is_quantized_exactly(values: list[float], exponent: int) -> None:
    grid = Grid(exponent, -128, 127)
    codes = IntegerInput(grid)(torch.tensor(values))
    unit = Fraction(2) ** exponent
    finite = [max(-1e9, min(1e9, value)) for value in values]
    assert codes.tolist() == [max(-128, min(127, round(Fraction(value) / unit))) for value in finite]
