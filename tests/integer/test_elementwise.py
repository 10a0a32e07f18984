"""Products, concatenations, tables, matrix products, upsampling and shortcuts of codes against rational arithmetic."""

from __future__ import annotations

from fractions import Fraction
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowprec.integer.fast import FastModel
from lowprec.integer.model import IntegerModel, Step
from lowprec.integer.operators import (
    Grid,
    IntegerBilinear,
    IntegerConcatenation,
    IntegerConv2d,
    IntegerInput,
    IntegerLookup,
    IntegerMatmul,
    IntegerMultiply,
    IntegerOperator,
    IntegerSlice,
)
from lowprec.numerics.fixed_point import MAXIMUM_EXPONENT, MINIMUM_EXPONENT

ENDS = [(0, 255), (-128, 127)]
every = settings(max_examples=80, deadline=None, derandomize=True)


def grids(low: int = -12, high: int = 9) -> st.SearchStrategy[Grid]:
    return st.builds(lambda exponent, ends: Grid(exponent, *ends), st.integers(low, high), st.sampled_from(ENDS))


def code_of(value: Fraction, grid: Grid, six: int | None = None) -> int:
    """Python rounds fractions half to even."""
    high = grid.high if six is None else min(six, grid.high)
    return max(grid.low, min(high, round(value / Fraction(2) ** grid.exponent)))


def unit(grid: Grid) -> Fraction:
    return Fraction(2) ** grid.exponent


def codes_on(grid: Grid, seed: int, *shape: int) -> Tensor:
    """Random codes, the ends of the range among them."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(grid.low, grid.high + 1, shape, generator=generator)
    codes.view(-1)[:2] = torch.tensor([grid.low, grid.high])[: codes.numel()]
    return codes.to(torch.int32)


@every
@given(grids(), grids(), grids(-40, 30), st.integers(0, 2**31))
def test_multiply(left: Grid, right: Grid, output: Grid, seed: int) -> None:
    a, b = codes_on(left, seed, 60), codes_on(right, seed + 1, 60)
    found = IntegerMultiply(left, right, output)(a, b)
    assert found.dtype == torch.int32
    for one, other, code in zip(a.tolist(), b.tolist(), found.tolist(), strict=True):
        assert code == code_of(one * unit(left) * other * unit(right), output)


def test_multiply_every_pair_of_codes_with_ties() -> None:
    left, right, output = Grid(-2, -128, 127), Grid(-3, 0, 255), Grid(1, -128, 127)
    a, b = torch.arange(-128, 128).view(-1, 1), torch.arange(256).view(1, -1)
    found = IntegerMultiply(left, right, output)(a.int(), b.int())
    assert found.flatten().tolist() == [
        code_of(Fraction(i * j, 32), output) for i in range(-128, 128) for j in range(256)
    ]


def test_a_gate_is_broadcast() -> None:
    left, right, output = Grid(-3, -128, 127), Grid(-8, 0, 255), Grid(-3, -128, 127)
    x, gate = codes_on(left, 0, 2, 3, 4, 5), codes_on(right, 1, 2, 3, 1, 1)
    expected = IntegerMultiply(left, right, output)(x, gate.expand(2, 3, 4, 5).contiguous())
    assert torch.equal(IntegerMultiply(left, right, output)(x, gate), expected)


@every
@given(st.lists(grids(), min_size=1, max_size=4), grids(), st.sampled_from([1, -2, -1]), st.integers(0, 2**31))
def test_concatenation(sources: list[Grid], output: Grid, axis: int, seed: int) -> None:
    tensors = [codes_on(grid, seed + index, 2, 3, 4) for index, grid in enumerate(sources)]
    found = IntegerConcatenation(sources, output, axis)(*tensors)
    parts = found.split([3 if axis != -1 else 4] * len(sources), axis)
    for grid, codes, part in zip(sources, tensors, parts, strict=True):
        assert part.flatten().tolist() == [code_of(code * unit(grid), output) for code in codes.flatten().tolist()]


@every
@given(grids(), grids(), st.integers(0, 4), st.sampled_from([(), (3,), (3, 2)]), st.integers(0, 2**31))
def test_lookup(source: Grid, output: Grid, tables: int, shape: tuple[int, ...], seed: int) -> None:
    """No table of its own: all channels share one."""
    table = codes_on(output, seed, *([tables] if tables else []), 256).to(torch.int16)
    codes = codes_on(source, seed + 1, 2, tables or 3, *shape)
    found = IntegerLookup(table, source, output)(codes)
    for place in product(*map(range, codes.shape)):
        own = table[place[1]] if tables else table
        assert int(found[place]) == int(own[int(codes[place]) - source.low])


def test_a_table_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="a table of 255 entries for codes from 0 to 255"):
        IntegerLookup(torch.zeros(255, dtype=torch.int16), Grid(0, 0, 255), Grid(0, 0, 255))


@every
@given(grids(), grids(), grids(-60, 40), st.integers(1, 40), st.integers(0, 2**31))
def test_matmul(left: Grid, right: Grid, output: Grid, inner: int, seed: int) -> None:
    a, b = codes_on(left, seed, 2, 3, inner), codes_on(right, seed + 1, 2, inner, 2)
    found = IntegerMatmul(left, right, output)(a, b)
    assert found.dtype == torch.int32
    for image, row, column in product(range(2), range(3), range(2)):
        total = sum(int(i) * int(j) for i, j in zip(a[image, row], b[image, :, column], strict=True))
        assert int(found[image, row, column]) == code_of(total * unit(left) * unit(right), output)


def test_matmul_of_the_longest_rows_is_exact() -> None:
    """2^15 products of the largest magnitude: 2^29 in float64, with one unit less or more on both sides of a tie."""
    grid, output = Grid(0, -128, 127), Grid(23, -128, 127)
    left = torch.full((1, 1 << 15), -128, dtype=torch.int32)
    right = torch.full((1 << 15, 3), -128, dtype=torch.int32)
    right[0] = torch.tensor([-127, -128, 127])
    total = [(128 * 128 * ((1 << 15) - 1)) - 128 * int(code) for code in right[0]]
    assert IntegerMatmul(grid, grid, output)(left, right)[0].tolist() == [code_of(Fraction(t), output) for t in total]


@pytest.mark.parametrize("unit_off", [-1, 0, 1])
def test_matmul_on_both_sides_of_a_tie(unit_off: int) -> None:
    """Sums of 2^21 · 63.5 and one less or more: 63, 64, 64."""
    left = torch.full((1, 1 << 14), 127, dtype=torch.int32)
    right = torch.full((1 << 14, 1), 64, dtype=torch.int32)
    matmul = IntegerMatmul(Grid(0, -128, 127), Grid(0, -128, 127), Grid(21, -128, 127))
    row = torch.cat((left, torch.ones(1, 1, dtype=torch.int32)), 1)
    column = torch.cat((right, torch.full((1, 1), unit_off, dtype=torch.int32)), 0)
    assert matmul(row, column).item() == {-1: 63, 0: 64, 1: 64}[unit_off]


def bilinear(codes: list[list[int]], factors: tuple[int, int], row: int, column: int) -> Fraction:
    """The value of one output pixel: centres aligned, edges repeated."""

    def place(index: int, factor: int, size: int) -> tuple[int, int, Fraction]:
        centre = max(Fraction(0), Fraction(2 * index + 1, 2 * factor) - Fraction(1, 2))
        below = int(centre)
        return below, min(below + 1, size - 1), centre - below

    top, bottom, down = place(row, factors[0], len(codes))
    left, right, across = place(column, factors[1], len(codes[0]))
    upper = codes[top][left] * (1 - across) + codes[top][right] * across
    lower = codes[bottom][left] * (1 - across) + codes[bottom][right] * across
    return upper * (1 - down) + lower * down


@settings(max_examples=30, deadline=None, derandomize=True)
@given(grids(-6, -3), grids(-9, 0), st.sampled_from([1, 2, 4, 16]), st.sampled_from([1, 2, 8]), st.integers(0, 2**31))
def test_bilinear_upsampling(source: Grid, output: Grid, rows: int, columns: int, seed: int) -> None:
    codes = codes_on(source, seed, 1, 2, 3, 2)
    found = IntegerBilinear(source, output, (rows, columns))(codes)
    assert found.shape == (1, 2, 3 * rows, 2 * columns)
    for channel, row, column in product(*map(range, found.shape[1:])):
        value = bilinear(codes[0, channel].tolist(), (rows, columns), row, column)
        assert int(found[0, channel, row, column]) == code_of(value * unit(source), output)


@st.composite
def shortcut_layers(draw: st.DrawFn) -> tuple[IntegerConv2d, Tensor, Tensor]:
    """A 1×1 convolution of two channels in the residual form ``accumulator``, with exponents of any reach."""
    seed, source, shortcut = draw(st.integers(0, 2**31)), draw(grids(-6, 0)), draw(grids(-14, 6))
    wide = draw(st.booleans())
    output = draw(grids(MINIMUM_EXPONENT, MAXIMUM_EXPONENT) if wide else grids(-9, 9))
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-9, 3, (2,), generator=generator)
    sums = exponents + source.exponent
    assume(int((shortcut.exponent - sums).abs().max()) <= 15)
    largest = 1 << draw(st.sampled_from([1, 8, 16, 24, 30]))
    layer = IntegerConv2d(
        torch.randint(-128, 128, (2, 3, 1, 1), generator=generator).to(torch.int8),
        None,
        exponents.to(torch.int8),
        torch.randint(-largest, largest, (2,), generator=generator).to(torch.int32),
        8,
        4,
        "kernel",
        source,
        output,
        draw(st.sampled_from([None, 7, 100])),
        shortcut=shortcut,
        stride=(1, 1),
        padding=(0, 0),
        dilation=(1, 1),
        groups=1,
    )
    return layer, codes_on(source, seed, 2, 3, 3, 2), codes_on(shortcut, seed + 1, 2, 2, 3, 2)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(shortcut_layers())
def test_a_shortcut_is_added_exactly_and_rounded_once(case: tuple[IntegerConv2d, Tensor, Tensor]) -> None:
    layer, x, shortcut = case
    assert layer.shortcut is not None
    assert layer.output is not None
    found = layer(x, shortcut)
    for image, channel, row, column in product(*map(range, found.shape)):
        weights = layer.codes[channel, :, 0, 0].tolist()
        total = sum(int(code) * weight for code, weight in zip(x[image, :, row, column], weights, strict=True))
        value = (total + int(layer.bias[channel])) * Fraction(2) ** int(layer.sum_exponents[channel])
        value += int(shortcut[image, channel, row, column]) * unit(layer.shortcut)
        assert int(found[image, channel, row, column]) == code_of(value, layer.output, layer.six)


def test_sums_with_a_shortcut_saturate_on_an_output_that_is_finer_by_far() -> None:
    """Shifted as far to the left as the exponents lie apart, sums would leave 64 bits."""
    ones, zeros = torch.ones(1, 1, 1, 1, dtype=torch.int8), torch.zeros(1, dtype=torch.int8)
    geometry: dict[str, Any] = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
    code = torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    for bias, expected in ((3 << 17, 127), (-(3 << 17), -128), (0, 0)):
        layer = IntegerConv2d(
            ones,
            None,
            zeros,
            torch.tensor([bias], dtype=torch.int32),
            8,
            1,
            "kernel",
            Grid(0, 0, 255),
            Grid(MINIMUM_EXPONENT, -128, 127),
            shortcut=Grid(-15, 0, 255),
            **geometry,
        )
        assert layer(code, code).item() == expected


def test_a_shortcut_too_far_from_the_sums_is_refused() -> None:
    ones, zeros = torch.ones(1, 1, 1, 1, dtype=torch.int8), torch.zeros(1, dtype=torch.int8)
    geometry: dict[str, Any] = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
    grid = Grid(0, 0, 255)
    for exponent in (-16, 16):
        with pytest.raises(ValueError, match="the shortcut's exponent lies 16 from the sums'; at most 15"):
            IntegerConv2d(
                ones, None, zeros, zeros.int(), 8, 1, "kernel", grid, grid, shortcut=Grid(exponent, 0, 255), **geometry
            )


def two_inputs(operator: IntegerOperator, left: Grid, right: Grid) -> IntegerModel:
    """The operator on the first and the second channel of one image."""
    steps = [
        Step("x", (), IntegerInput(left)),
        Step("y", (), IntegerInput(right)),
        Step("left", ("x",), IntegerSlice(left, [(1, 0, 1, 1)])),
        Step("right", ("y",), IntegerSlice(right, [(1, 1, 2, 1)])),
        Step("operator", ("left", "right"), operator),
    ]
    return IntegerModel(steps, (2, 1, 1))


@every
@given(grids(), grids(), grids(MINIMUM_EXPONENT, MAXIMUM_EXPONENT), st.integers(0, 2**31))
def test_the_fast_backend_gives_the_same_codes(left: Grid, right: Grid, output: Grid, seed: int) -> None:
    """Also where all codes saturate or vanish."""
    images = torch.cat(
        [codes_on(grid, seed + index, 3, 1, 5, 4) * 2.0**grid.exponent for index, grid in enumerate((left, right))], 1
    )
    for operator in (IntegerMultiply(left, right, output), IntegerConcatenation([left, right], output, 1)):
        model = two_inputs(operator, left, right)
        assert torch.equal(FastModel(model).codes(images)["operator"], model.codes(images)["operator"])
