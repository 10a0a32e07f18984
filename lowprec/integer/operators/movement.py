"""Operators that move codes and change none."""

from __future__ import annotations

from torch import Tensor

from lowprec.integer.operators.base import Grid, IntegerOperator


class IntegerFlatten(IntegerOperator):
    """[B, ...] -> [B, all the rest]."""

    KIND = "flatten"
    output: Grid

    def forward(self, codes: Tensor) -> Tensor:
        """int32 codes, unchanged but in shape."""
        return codes.flatten(1)
