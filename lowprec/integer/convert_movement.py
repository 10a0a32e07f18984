"""From calls that move values to integer operators that do: by the shapes that go in and come out."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from math import ceil
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from lowprec.graph.movement import is_window_reverse
from lowprec.graph.nodes import argument, pair
from lowprec.graph.shapes import BATCHES, Shapes
from lowprec.integer.operators import (
    Grid,
    IntegerExpand,
    IntegerGather,
    IntegerMovement,
    IntegerPad,
    IntegerPermute,
    IntegerReshape,
    IntegerRoll,
    IntegerSlice,
    IntegerUpsample,
)

# Named operators in order; the last one's name is "" and so the step's own.
Movements = list[tuple[str, IntegerMovement]]


def convert_movement(node: fx.Node, module: nn.Module | None, grid: Grid, shapes: Shapes) -> Movements | None:
    """The integer operators of one node; none where the codes stay as they are; None for a call that gives a tuple.

    Raises:
        ValueError: the movement has no integer form, for instance because it reshapes across the batch.
    """
    if module is not None:
        return _module(node, module, grid, shapes)
    if node.target in _SEVERAL:
        return None
    if node.target in _NOTHING:
        return []
    if node.target is operator.getitem:
        return _getitem(node, grid, shapes)
    if is_window_reverse(node):
        return _window_reverse(node, grid, shapes)
    convert = _CALLS.get(node.target, _reshape)
    return convert(node, grid, shapes)


def _module(node: fx.Node, module: nn.Module, grid: Grid, shapes: Shapes) -> Movements:
    if isinstance(module, nn.Upsample):
        return [("", IntegerUpsample(grid, [int(factor) for factor in pair_of_factors(module.scale_factor)]))]
    if isinstance(module, nn.ZeroPad2d):
        left, right, top, bottom = module.padding
        return [("", IntegerPad(grid, [(0, 0), (0, 0), (top, bottom), (left, right)]))]
    if isinstance(module, nn.ChannelShuffle):
        _, channels, height, width = shapes.shape(node.all_input_nodes[0])
        grouped = (-1, module.groups, channels // module.groups, height, width)
        return [
            ("grouped", IntegerReshape(grid, grouped)),
            ("shuffled", IntegerPermute(grid, (0, 2, 1, 3, 4))),
            ("", IntegerReshape(grid, (-1, channels, height, width))),
        ]
    if isinstance(module, nn.PixelShuffle):
        _, channels, height, width = shapes.shape(node.all_input_nodes[0])
        factor = module.upscale_factor
        kept = channels // factor**2
        return [
            ("split", IntegerReshape(grid, (-1, kept, factor, factor, height, width))),
            ("shuffled", IntegerPermute(grid, (0, 1, 4, 2, 5, 3))),
            ("", IntegerReshape(grid, (-1, kept, height * factor, width * factor))),
        ]
    return _reshape(node, grid, shapes)


def pair_of_factors(factor: Any) -> tuple[float, float]:
    """An upsampling factor for height and width."""
    return pair(factor) if isinstance(factor, tuple | list) else (factor, factor)


def _reshape(node: fx.Node, grid: Grid, shapes: Shapes) -> Movements:
    shape = shapes.shape(node)
    if shape.count(-1) != 1:
        raise ValueError(f"the shape {shape} does not grow with the batch along one axis")
    return [("", IntegerReshape(grid, shape))]


def _transpose(node: fx.Node, grid: Grid, shapes: Shapes) -> Movements:
    axes = list(range(len(shapes.shape(node))))
    named = "axis" if node.target in ("swapaxes", torch.swapaxes) else "dim"
    first, second = (shapes.number(argument(node, place, f"{named}{place - 1}")) for place in (1, 2))
    axes[first], axes[second] = axes[second], axes[first]
    return [("", IntegerPermute(grid, axes))]


def _permute(node: fx.Node, grid: Grid, shapes: Shapes) -> Movements:
    given = node.args[1:] or (node.kwargs["dims"],)
    axes = given[0] if len(given) == 1 and isinstance(given[0], list | tuple) else given
    return [("", IntegerPermute(grid, [axis % len(axes) for axis in shapes.number(tuple(axes))]))]


def _pad(node: fx.Node, grid: Grid, shapes: Shapes) -> Movements:
    sides = list(shapes.number(argument(node, 1, "pad")))
    axes = len(shapes.shape(node))
    # torch counts from the last axis.
    given = [(sides[index], sides[index + 1]) for index in range(0, len(sides), 2)][::-1]
    padding = [(0, 0)] * (axes - len(given)) + given
    return [("", IntegerPad(grid, padding))] if any(map(any, padding)) else []


def _interpolate(node: fx.Node, grid: Grid, shapes: Shapes) -> Movements:
    return [("", IntegerUpsample(grid, [int(factor) for factor in pair_of_factors(argument(node, 2, "scale_factor"))]))]


def _expand(node: fx.Node, grid: Grid, shapes: Shapes) -> Movements:
    before, after = shapes.shape(node.all_input_nodes[0]), shapes.shape(node)
    # What does not count the batch yet is repeated for each image, no more and no less often.
    for_each_image = [found[node][0] for found in shapes.results] == list(BATCHES)
    if after.count(-1) != 1 or after[0] != -1 or not (before[0] == -1 or for_each_image):
        raise ValueError(
            f"expanding {before} to {after} has no integer form: only the first axis may grow with the batch"
        )
    return [("", IntegerExpand(grid, after))]


def _roll(node: fx.Node, grid: Grid, shapes: Shapes) -> Movements:
    shifts, axes = (shapes.number(argument(node, place, name)) for place, name in ((1, "shifts"), (2, "dims")))
    axes, shifts = (value if isinstance(value, list | tuple) else (value,) for value in (axes, shifts))
    pairs = list(zip(axes, shifts, strict=True))
    shape = shapes.shape(node)
    if None in axes or any(shape[axis] == -1 for axis, _ in pairs):
        raise ValueError("codes can be rolled along axes of one image alone: give dims, without that of the batch")
    return [("", IntegerRoll(grid, [(axis % len(shape), shift) for axis, shift in pairs]))]


def _window_reverse(node: fx.Node, grid: Grid, shapes: Shapes) -> Movements:
    _, height, width, channels = shapes.shape(node)
    rows, columns = shapes.number(node.args[1])
    split = (-1, height // rows, width // columns, rows, columns, channels)
    return [
        ("split", IntegerReshape(grid, split)),
        ("ordered", IntegerPermute(grid, (0, 1, 3, 2, 4, 5))),
        ("", IntegerReshape(grid, (-1, height, width, channels))),
    ]


def _getitem(node: fx.Node, grid: Grid, shapes: Shapes) -> Movements:
    source, index = node.args[0], shapes.number(node.args[1])
    assert isinstance(source, fx.Node)
    if source.target in _SEVERAL:
        unbound = source.target in ("unbind", torch.unbind)
        axis = shapes.number(argument(source, 1 if unbound else 2, "dim", 0))
        shape = shapes.shape(source.all_input_nodes[0])
        if not isinstance(index, int) or shape[axis] == -1:
            raise ValueError(
                "only single parts of a tensor can be taken, and none along the batch: an image's result may not depend on others"
            )
        if unbound:
            index = index % shape[axis]
            return _part(node, grid, shapes, [(axis % len(shape), index, index + 1, 1)])
        sizes = _part_sizes(source, shape[axis], shapes)
        start = sum(sizes[: index % len(sizes)])
        return _part(node, grid, shapes, [(axis % len(shape), start, start + sizes[index], 1)])
    shape = shapes.shape(source)
    index = tuple(index) if isinstance(index, tuple) else (index,)
    # By identity: == with a list of indices in a tensor's place would be a tensor.
    ellipsis = [place for place, item in enumerate(index) if item is Ellipsis]
    for place in ellipsis:
        missing = len(shape) - sum(item is not None for item in index) + 1
        index = (*index[:place], *[slice(None)] * missing, *index[place + 1 :])
    slices, order = [], None
    # None makes an axis of size 1, which the reshape at the end puts in.
    for axis, item in enumerate(item for item in index if item is not None):
        if isinstance(item, bool) or not isinstance(item, int | slice | list | tuple):
            raise ValueError(f"the index {item} is no number, slice or list of numbers")  # noqa: TRY004 (of the model)
        if shape[axis] == -1 and item != slice(None):
            raise ValueError(f"the index {item} picks images of the batch: an image's result may not depend on others")
        if isinstance(item, list | tuple):
            if order is not None or any(isinstance(other, int) for other in index):
                raise ValueError("a list of indices has an integer form beside slices alone: index in several steps")
            order = _order(axis, item, shape[axis])
        elif isinstance(item, int):
            slices.append((axis, item % shape[axis], item % shape[axis] + 1, 1))
        elif item != slice(None):
            slices.append((axis, *item.indices(shape[axis])))
    return _part(node, grid, shapes, slices, order)


def _order(axis: int, indices: Sequence[Any], size: int) -> tuple[int, list[int]]:
    """An axis and which of its places are taken, from 0."""
    if not indices or not all(isinstance(item, int) and not isinstance(item, bool) for item in indices):
        raise ValueError(f"the index {list(indices)} is no list of whole numbers")
    return axis, [item % size for item in indices]


def _part(
    node: fx.Node,
    grid: Grid,
    shapes: Shapes,
    slices: list[tuple[int, int, int, int]],
    order: tuple[int, list[int]] | None = None,
) -> Movements:
    """A slice, places in another order, and a reshape where axes were taken away or put in."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    while source.target in _SEVERAL:
        source = source.all_input_nodes[0]
    sizes = list(shapes.shape(source))
    slices = [item for item in slices if item[1:] != (0, sizes[item[0]], 1)]
    moved: Movements = []
    if slices:
        moved.append(("sliced", IntegerSlice(grid, slices)))
        for axis, *part in slices:
            sizes[axis] = len(range(*part))
    if order is not None:
        axis, places = order
        moved.append(("ordered", IntegerGather(grid, axis, places)))
        sizes[axis] = len(places)
    if tuple(sizes) != shapes.shape(node):
        moved += _reshape(node, grid, shapes)
    # The last one has the step's own name.
    return moved[:-1] + [("", operator_) for _, operator_ in moved[-1:]]


def _part_sizes(node: fx.Node, size: int, shapes: Shapes) -> list[int]:
    """Sizes of the parts that chunk or split makes of an axis of ``size``."""
    parts = shapes.number(argument(node, 1, "chunks" if node.target in ("chunk", torch.chunk) else "split_size"))
    if isinstance(parts, list | tuple):
        return list(parts)
    step = ceil(size / parts) if node.target in ("chunk", torch.chunk) else parts
    return [min(step, size - start) for start in range(0, size, step)]


_NOTHING: set[Any] = {"contiguous", "clone"}
_SEVERAL: set[Any] = {"chunk", "split", "unbind", torch.chunk, torch.split, torch.unbind}
_CALLS: dict[Any, Callable[[fx.Node, Grid, Shapes], Movements]] = {
    "transpose": _transpose,
    "swapaxes": _transpose,
    torch.transpose: _transpose,
    torch.swapaxes: _transpose,
    "permute": _permute,
    torch.permute: _permute,
    "expand": _expand,
    "roll": _roll,
    torch.roll: _roll,
    functional.pad: _pad,
    functional.interpolate: _interpolate,
}
