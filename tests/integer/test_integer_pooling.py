"""Residual add and pooling of codes against rational arithmetic."""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lowprec.integer.operators import Grid, IntegerAdd, IntegerAveragePool, IntegerFlatten, IntegerMaxPool


def code_of(value: Fraction, grid: Grid, six: int | None = None) -> int:
    """Python rounds fractions half to even."""
    high = grid.high if six is None else min(six, grid.high)
    return max(grid.low, min(high, round(value / Fraction(2) ** grid.exponent)))


def grids(low: int, high: int) -> st.SearchStrategy[Grid]:
    ranges = st.sampled_from([(0, 255), (-128, 127)])
    return st.builds(lambda exponent, ends: Grid(exponent, *ends), st.integers(low, high), ranges)


def codes_on(grid: Grid, seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(grid.low, grid.high + 1, shape, generator=generator).to(torch.int32)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(grids(-9, 6), grids(-9, 6), grids(-12, 7), st.sampled_from([None, 5, 90]), st.integers(0, 2**31))
def test_add_is_exact(left: Grid, right: Grid, output: Grid, six: int | None, seed: int) -> None:
    a, b = codes_on(left, seed, 40), codes_on(right, seed + 1, 40)
    result = IntegerAdd(left, right, output, six)(a, b)
    for one, other, code in zip(a.tolist(), b.tolist(), result.tolist(), strict=True):
        value = one * Fraction(2) ** left.exponent + other * Fraction(2) ** right.exponent
        assert code == code_of(value, output, six)


def test_add_of_every_pair_of_codes_with_ties() -> None:
    left, right, output = Grid(0, -128, 127), Grid(-1, 0, 255), Grid(1, -128, 127)
    a, b = torch.meshgrid(torch.arange(-128, 128), torch.arange(256), indexing="ij")
    result = IntegerAdd(left, right, output)(a.to(torch.int32), b.to(torch.int32))
    expected = [code_of(i + Fraction(j, 2), output) for i, j in product(range(-128, 128), range(256))]
    assert result.flatten().tolist() == expected


def test_add_of_exponents_far_apart_is_refused() -> None:
    with pytest.raises(ValueError, match="exponents lie 16 apart"):
        IntegerAdd(Grid(0, 0, 255), Grid(-16, 0, 255), Grid(0, 0, 255))
    with pytest.raises(ValueError, match="output's exponent lies 17 above an operand's"):
        IntegerAdd(Grid(0, 0, 255), Grid(-15, 0, 255), Grid(2, 0, 255))


@st.composite
def geometries(draw: st.DrawFn) -> dict[str, object]:
    """Windows as torch allows them; padding at most half of the kernel."""
    kernel = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    return {
        "kernel_size": kernel,
        "stride": (draw(st.integers(1, 4)), draw(st.integers(1, 4))),
        "padding": tuple(draw(st.integers(0, side // 2)) for side in kernel),
        "ceil_mode": draw(st.booleans()),
    }


def windows(shape: torch.Size, geometry: dict, positions: tuple[int, int]) -> list[tuple[int, int]]:
    """(row, column) of the elements, padding included, of the window at an output position."""
    (height, width), (down, right), (top, left) = (geometry[key] for key in ("kernel_size", "stride", "padding"))
    rows = [positions[0] * down - top + y for y in range(height)]
    columns = [positions[1] * right - left + z for z in range(width)]
    # A window that ceil_mode lets hang over ends with the padded image.
    return [(r, c) for r in rows for c in columns if r < shape[2] + top and c < shape[3] + left]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(geometries(), st.booleans(), grids(-6, -3), grids(-8, 0), st.integers(0, 2**31))
def test_local_average_pool_is_exact(geometry: dict, counted: bool, source: Grid, output: Grid, seed: int) -> None:
    # prepare refuses windows that hang over padding which counts.
    assume(not (counted and geometry["ceil_mode"] and any(geometry["padding"])))
    output = Grid(output.exponent, source.low, source.high)
    x = codes_on(source, seed, 1, 2, 7, 5)
    pool = IntegerAveragePool(source, output, **geometry, count_include_pad=counted, keep_axes=True)
    result = pool(x)
    torch_pool = nn.AvgPool2d(**geometry, count_include_pad=counted)
    assert result.shape == torch_pool(x.float()).shape
    for channel, row, column in product(*map(range, result.shape[1:])):
        elements = windows(x.shape, geometry, (row, column))
        inside = [int(x[0, channel, r, c]) for r, c in elements if 0 <= r < 7 and 0 <= c < 5]
        mean = Fraction(sum(inside), len(elements) if counted else len(inside)) * Fraction(2) ** source.exponent
        assert int(result[0, channel, row, column]) == code_of(mean, output)


@pytest.mark.parametrize("keep_axes", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 3), (7, 7), (4, 3), (2, 8), (5, 6)])
@pytest.mark.parametrize("shift", [-3, -1, 0, 1, 4])
def test_global_average_pool_is_exact(size: tuple[int, int], shift: int, keep_axes: bool) -> None:
    source, output = Grid(-5, -128, 127), Grid(-5 - shift, -128, 127)
    x = codes_on(source, 3, 16, 8, *size)
    pool = IntegerAveragePool(source, output, None, None, (0, 0), False, True, keep_axes)
    result = pool(x)
    assert result.shape == ((16, 8, 1, 1) if keep_axes else (16, 8))
    for found, values in zip(result.flatten().tolist(), x.flatten(2).flatten(0, 1).tolist(), strict=True):
        mean = Fraction(sum(values), size[0] * size[1]) * Fraction(2) ** source.exponent
        assert found == code_of(mean, output)


def test_average_pool_of_exponents_too_far_apart_is_refused() -> None:
    for exponent in (-40, 40):
        with pytest.raises(ValueError, match="exponents lie 40 apart"):
            IntegerAveragePool(Grid(0, 0, 255), Grid(exponent, 0, 255), None, None, (0, 0), False, True, True)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(geometries(), st.integers(1, 2), grids(-6, -3), st.integers(0, 2**31))
def test_max_pool_is_exact(geometry: dict, dilation: int, grid: Grid, seed: int) -> None:
    (height, width), (down, right), (top, left) = (geometry[key] for key in ("kernel_size", "stride", "padding"))
    assume((max(height, width) - 1) * dilation < 5)
    x = codes_on(grid, seed, 1, 2, 7, 5)
    # Codes below zero everywhere would show padding that counts as zero.
    x = x.clamp(max=grid.low + 9)
    result = IntegerMaxPool(grid, **geometry, dilation=(dilation, dilation))(x)
    for channel, row, column in product(*map(range, result.shape[1:])):
        rows = [row * down - top + y * dilation for y in range(height)]
        columns = [column * right - left + z * dilation for z in range(width)]
        inside = [int(x[0, channel, r, c]) for r in rows for c in columns if 0 <= r < 7 and 0 <= c < 5]
        assert int(result[0, channel, row, column]) == max(inside)


def test_flatten_keeps_the_order_of_codes() -> None:
    codes = torch.arange(24, dtype=torch.int32).view(2, 3, 2, 2)
    assert IntegerFlatten(Grid(0, 0, 255))(codes).tolist() == [list(range(12)), list(range(12, 24))]
