"""How codes lie in memory between operators: one byte each, uint8 in channels_last order, signed ones raised by 128."""

from __future__ import annotations

import torch
from torch import Tensor

from lowprec.integer.operators import Grid

SIGNED_ZERO = 128


def is_byte(grid: Grid | None) -> bool:
    """Whether the codes of a grid fit one byte; others stay int32 tensors."""
    return grid is not None and grid.high - grid.low <= 255 and zero_point(grid) + grid.low >= 0 and grid.high <= 255


def zero_point(grid: Grid) -> int:
    """The byte that stands for code 0."""
    return SIGNED_ZERO if grid.signed else 0


def channels_last(tensor: Tensor) -> Tensor:
    """The same values with channels innermost; tensors of other than four axes come contiguous."""
    memory = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
    return tensor.contiguous(memory_format=memory)


def store(codes: Tensor, grid: Grid | None) -> Tensor:
    """Integer or whole-number float codes, any shape -> bytes of the same shape; int32 where the grid is no byte's."""
    if grid is None or not is_byte(grid):
        return codes
    zero = zero_point(grid)
    return channels_last((codes + zero if zero else codes).to(torch.uint8))


def load(stored: Tensor, grid: Grid | None) -> Tensor:
    """What :func:`store` keeps -> int32 codes; no copy of what is int32 already."""
    if stored.dtype != torch.uint8 or grid is None:
        return stored.to(torch.int32)
    codes = stored.to(torch.int32)
    return codes.sub_(SIGNED_ZERO) if grid.signed else codes
