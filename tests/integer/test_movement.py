"""Operators that move codes: just what torch's operation does, and any number of images."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from lowprec.integer.operators import (
    OPERATORS,
    Grid,
    IntegerConstant,
    IntegerExpand,
    IntegerFlatten,
    IntegerMovement,
    IntegerPad,
    IntegerPermute,
    IntegerReshape,
    IntegerRoll,
    IntegerSlice,
    IntegerUpsample,
)

GRID = Grid(-3, -128, 127)
BATCHES = (1, 2, 5)


def codes(batch: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(GRID.low, GRID.high + 1, (batch, *shape), generator=generator).to(torch.int32)


def assert_moves(operator: IntegerMovement, shape: tuple[int, ...], expected: Callable[[Tensor], Tensor]) -> None:
    """For any batch, as int32, on the same grid; and once more after it was stored."""
    arguments = operator.attributes()
    arguments["output"] = Grid(**arguments["output"])
    copied = OPERATORS[operator.KIND](**arguments)
    for batch in BATCHES:
        x = codes(batch, *shape)
        found = operator(x)
        assert found.dtype == torch.int32
        assert torch.equal(found, expected(x))
        assert torch.equal(copied(x), found)
    assert operator.output == GRID


@pytest.mark.parametrize("shape", [(6,), (3, 4), (2, 3, 4), (2, 3, 4, 5)])
def test_flatten(shape: tuple[int, ...]) -> None:
    assert_moves(IntegerFlatten(GRID), shape, lambda x: x.flatten(1))


@pytest.mark.parametrize("shape", [(-1, 24), (-1, 2, 12), (-1, 4, 3, 2), (-1, 6), (-1, 1, 24, 1)])
def test_reshape(shape: tuple[int, ...]) -> None:
    assert_moves(IntegerReshape(GRID, shape), (2, 3, 4), lambda x: x.reshape(shape))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.permutations(range(4)))
def test_permute(axes: list[int]) -> None:
    assert_moves(IntegerPermute(GRID, axes), (2, 3, 4), lambda x: x.permute(axes))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.dictionaries(st.integers(1, 3), st.tuples(st.integers(0, 4), st.integers(1, 7), st.integers(1, 3)), min_size=1)
)
def test_slice(slices: dict[int, tuple[int, int, int]]) -> None:
    def expected(x: Tensor) -> Tensor:
        for axis, (start, stop, step) in slices.items():
            places = torch.arange(x.shape[axis])[start:stop:step]
            x = x.index_select(axis, places)
        return x

    operator = IntegerSlice(GRID, [(axis, *item) for axis, item in slices.items()])
    assert_moves(operator, (5, 6, 7), expected)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=3, max_size=3))
def test_pad(sides: list[tuple[int, int]]) -> None:
    def expected(x: Tensor) -> Tensor:
        shape = [size + before + after for size, (before, after) in zip(x.shape[1:], sides, strict=True)]
        framed = torch.zeros(len(x), *shape, dtype=torch.int32)
        middle = [slice(before, before + size) for size, (before, _) in zip(x.shape[1:], sides, strict=True)]
        framed[:, middle[0], middle[1], middle[2]] = x
        return framed

    assert_moves(IntegerPad(GRID, [(0, 0), *sides]), (2, 3, 4), expected)


def test_pad_of_negative_sides_cuts() -> None:
    operator = IntegerPad(GRID, [(0, 0), (0, 0), (-1, 2), (1, -3)])
    assert_moves(operator, (2, 5, 6), lambda x: functional.pad(x, (1, -3, -1, 2)))


@pytest.mark.parametrize("factors", [(1, 1), (2, 2), (1, 3), (4, 2)])
def test_upsample(factors: tuple[int, int]) -> None:
    def expected(x: Tensor) -> Tensor:
        return functional.interpolate(x.float(), scale_factor=factors, mode="nearest").int()

    assert_moves(IntegerUpsample(GRID, factors), (3, 4, 5), expected)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.dictionaries(st.integers(1, 3), st.integers(-9, 9), min_size=1))
def test_roll(shifts: dict[int, int]) -> None:
    operator = IntegerRoll(GRID, list(shifts.items()))
    assert_moves(operator, (2, 3, 4), lambda x: torch.roll(x, tuple(shifts.values()), tuple(shifts)))


@pytest.mark.parametrize("batch", BATCHES)
def test_a_constant_is_repeated_for_each_image(batch: int) -> None:
    values = codes(1, 3, 1).to(torch.int16)
    constant = IntegerConstant(values, GRID)
    image = codes(batch, 1, 2, 2)
    assert torch.equal(constant(image), values.int())
    assert constant(image).dtype == torch.int32
    expanded = IntegerExpand(GRID, (-1, 3, 4))(constant(image), image)
    assert torch.equal(expanded, values.int().repeat(batch, 1, 4))


@pytest.mark.parametrize("batch", BATCHES)
def test_codes_that_count_the_batch_grow_along_other_axes(batch: int) -> None:
    x = codes(batch, 3, 1, 1)
    assert torch.equal(IntegerExpand(GRID, (-1, 3, 4, 5))(x, x), x.repeat(1, 1, 4, 5))
