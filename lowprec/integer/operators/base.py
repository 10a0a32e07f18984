"""What all integer operators share, and the grid that a tensor's codes lie on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from lowprec.numerics.fixed_point import CodeRange


@dataclass(frozen=True)
class Grid:
    """A tensor's dynamic fixed point: value = code · 2^exponent, low ≤ code ≤ high."""

    exponent: int
    low: int
    high: int

    @property
    def codes(self) -> CodeRange:
        """The codes that the tensor may take."""
        return CodeRange(self.low, self.high)

    @property
    def signed(self) -> bool:
        """Whether codes can be negative."""
        return self.low < 0

    @property
    def largest(self) -> int:
        """The largest magnitude of a code."""
        return max(-self.low, self.high)


class IntegerOperator(nn.Module):
    """An operator of an integer model. ``output`` is the grid of its codes; None for the network's 32-bit sums."""

    KIND: ClassVar[str]

    def __init__(self, output: Grid | None) -> None:
        super().__init__()
        self.output = output

    def attributes(self) -> dict[str, Any]:
        """Constructor arguments other than tensors, as JSON can hold them."""
        return {"output": None if self.output is None else asdict(self.output)}

    def tensors(self) -> dict[str, Tensor]:
        """Constructor arguments that are tensors, as they are stored; a layer's are packed instead."""
        return {}
