"""Operators that move codes and change none. Shapes and axes count the batch, whose size -1 stands for any."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lowprec.integer.operators.base import Grid, IntegerOperator


class IntegerMovement(IntegerOperator):
    """int32 codes -> the same codes elsewhere, some left out, or zeros between them."""

    output: Grid


class IntegerConstant(IntegerOperator):
    """A tensor of codes that depends on no image, such as a position embedding: int16, of any shape."""

    KIND = "constant"
    output: Grid
    codes: Tensor

    def __init__(self, codes: Tensor, output: Grid) -> None:
        super().__init__(output)
        self.register_buffer("codes", codes)

    def forward(self, images: Tensor) -> Tensor:
        """Anything -> the codes, int32."""
        return self.codes.to(torch.int32)

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes}


class IntegerExpand(IntegerMovement):
    """The same codes for every image: sizes of 1 grow to ``shape``, whose -1 is the batch of a second input."""

    KIND = "expand"

    def __init__(self, output: Grid, shape: Sequence[int]) -> None:
        super().__init__(output)
        self.shape = tuple(shape)

    def forward(self, codes: Tensor, like: Tensor) -> Tensor:
        """int32 codes, repeated."""
        return codes.expand([len(like) if size == -1 else size for size in self.shape])

    def attributes(self) -> dict[str, Any]:
        return {**super().attributes(), "shape": self.shape}


class IntegerRoll(IntegerMovement):
    """Cyclic shift: along axis a by s places, for each (a, s)."""

    KIND = "roll"

    def __init__(self, output: Grid, shifts: Sequence[Sequence[int]]) -> None:
        super().__init__(output)
        self.shifts = tuple((axis, shift) for axis, shift in shifts)

    def forward(self, codes: Tensor) -> Tensor:
        """int32 codes, rolled."""
        axes, shifts = zip(*self.shifts, strict=True)
        return codes.roll(shifts, axes)

    def attributes(self) -> dict[str, Any]:
        return {**super().attributes(), "shifts": self.shifts}


class IntegerFlatten(IntegerMovement):
    """[B, ...] -> [B, all the rest]."""

    KIND = "flatten"

    def forward(self, codes: Tensor) -> Tensor:
        """int32 codes, unchanged but in shape."""
        return codes.flatten(1)


class IntegerReshape(IntegerMovement):
    """The same codes in another shape."""

    KIND = "reshape"

    def __init__(self, output: Grid, shape: Sequence[int]) -> None:
        super().__init__(output)
        self.shape = tuple(shape)

    def forward(self, codes: Tensor) -> Tensor:
        """int32 codes -> ``shape``."""
        return codes.reshape(self.shape)

    def attributes(self) -> dict[str, Any]:
        return {**super().attributes(), "shape": self.shape}


class IntegerPermute(IntegerMovement):
    """Axes in another order: axis i of the result is axis ``axes[i]`` of the input."""

    KIND = "permute"

    def __init__(self, output: Grid, axes: Sequence[int]) -> None:
        super().__init__(output)
        self.axes = tuple(axes)

    def forward(self, codes: Tensor) -> Tensor:
        """int32 codes, axes permuted."""
        return codes.permute(self.axes)

    def attributes(self) -> dict[str, Any]:
        return {**super().attributes(), "axes": self.axes}


class IntegerSlice(IntegerMovement):
    """Part of the codes: along axis a those from start to stop (exclusive) in steps, for each (a, start, stop, step)."""

    KIND = "slice"

    def __init__(self, output: Grid, slices: Sequence[Sequence[int]]) -> None:
        super().__init__(output)
        self.slices = tuple((axis, start, stop, step) for axis, start, stop, step in slices)

    def forward(self, codes: Tensor) -> Tensor:
        """int32 codes -> some of them, axes as they were."""
        index = [slice(None)] * codes.dim()
        for axis, start, stop, step in self.slices:
            index[axis] = slice(start, stop, step)
        return codes[tuple(index)]

    def attributes(self) -> dict[str, Any]:
        return {**super().attributes(), "slices": self.slices}


class IntegerGather(IntegerMovement):
    """Chosen places along ``axis``, in the order of ``indices`` (from 0, any of them often): place i is ``indices[i]``."""

    KIND = "gather"

    def __init__(self, output: Grid, axis: int, indices: Sequence[int]) -> None:
        super().__init__(output)
        self.axis = axis
        self.indices = tuple(indices)

    def forward(self, codes: Tensor) -> Tensor:
        """int32 codes -> some of them, in another order along one axis."""
        return codes.index_select(self.axis, torch.tensor(self.indices, device=codes.device))

    def attributes(self) -> dict[str, Any]:
        return {**super().attributes(), "axis": self.axis, "indices": self.indices}


class IntegerPad(IntegerMovement):
    """Zeros in front of and behind the codes: (before, after) for each axis."""

    KIND = "pad"

    def __init__(self, output: Grid, padding: Sequence[Sequence[int]]) -> None:
        super().__init__(output)
        self.padding = tuple((before, after) for before, after in padding)

    def forward(self, codes: Tensor) -> Tensor:
        """int32 codes, framed by zeros."""
        # torch counts from the last axis.
        return functional.pad(codes, [side for sides in reversed(self.padding) for side in sides])

    def attributes(self) -> dict[str, Any]:
        return {**super().attributes(), "padding": self.padding}


class IntegerUpsample(IntegerMovement):
    """Nearest neighbour: each code of [B, C, H, W] is repeated ``factors`` = (height, width) times."""

    KIND = "upsample"

    def __init__(self, output: Grid, factors: Sequence[int]) -> None:
        super().__init__(output)
        self.factors = tuple(factors)

    def forward(self, codes: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H · height, W · width], int32."""
        rows, columns = self.factors
        return codes.repeat_interleave(rows, 2).repeat_interleave(columns, 3)

    def attributes(self) -> dict[str, Any]:
        return {**super().attributes(), "factors": self.factors}
