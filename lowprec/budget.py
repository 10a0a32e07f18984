"""What a mixed assignment of weight schemes has to meet. Imports no torch, so that an impossible value is found at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Optional

from lowprec.recipe import RecipeError


# Optional[...] rather than "| None": OmegaConf reads these annotations as its schema.
@dataclass
class Budget:
    """One of the two: bits per weight at most, scales included, or the share of multiplications replaced at least.

    Both are meant as :class:`lowprec.cost.Costs` gives them, over the whole model.
    """

    weight_bits: Optional[float] = None  # noqa: UP045
    multiplications_replaced: Optional[float] = None  # noqa: UP045

    @property
    def given(self) -> bool:
        """Whether there is a budget at all."""
        return self.weight_bits is not None or self.multiplications_replaced is not None

    @property
    def name(self) -> str:
        """Which of the two is given."""
        return "weight_bits" if self.weight_bits is not None else "multiplications_replaced"

    @property
    def value(self) -> float:
        """Its number."""
        value = getattr(self, self.name)
        assert value is not None, "there is no budget"
        return float(value)

    def validate(self) -> None:
        """Raises RecipeError, with the key, for a budget that no model can have, or for two of them."""
        bits, replaced = self.weight_bits, self.multiplications_replaced
        if bits is not None and replaced is not None:
            raise RecipeError(
                f"budget.weight_bits={bits} and budget.multiplications_replaced={replaced}: give one of the two"
            )
        if bits is not None and not (math.isfinite(bits) and bits > 0):
            raise RecipeError(f"budget.weight_bits={bits}: give bits per weight above 0, such as 3.0")
        if replaced is not None and not 0 <= replaced < 1:
            raise RecipeError(f"budget.multiplications_replaced={replaced}: give a share in [0, 1), such as 0.8")
