"""The integer model: a list of operators and whose results each of them takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowprec.images import check_images, other_sizes_refused
from lowprec.integer.operators import (
    FloatOperator,
    IntegerConstant,
    IntegerExpand,
    IntegerGather,
    IntegerLayer,
    IntegerOperator,
    IntegerPermute,
    IntegerReshape,
    IntegerSlice,
    logits_of,
)

# Their numbers, or the axes of what follows, are those of one size of images: another would give something else, or fail.
_OF_ONE_SIZE = (IntegerConstant, IntegerExpand, IntegerReshape, IntegerPermute)


@dataclass(frozen=True)
class Step:
    """One operator of the model: its name (that of the module it comes from), kind, and its inputs' names."""

    name: str
    inputs: tuple[str, ...]
    operator: IntegerOperator


class IntegerModel(nn.Module):
    """Float images in, float logits out; between them integers alone. The last step's result is the output.

    image_shape: (channels, height, width) of the images that the model was prepared with. Others in height and width do
    here where no step is made for one size; the exported ONNX file is made for this one. metadata: what was known when it was
    converted (lowprec's version, the recipe), as JSON can hold it; it goes into every file.
    """

    def __init__(
        self, steps: list[Step], image_shape: tuple[int, int, int], metadata: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.metadata = metadata or {}
        self.image_shape = image_shape
        self.steps = steps
        self.operators = nn.ModuleList([step.operator for step in steps])
        last_use = {name: step.name for step in steps for name in step.inputs}
        # What may be forgotten after each step, so that memory holds live tensors only.
        self._dead = {step.name: [name for name in step.inputs if last_use[name] == step.name] for step in steps}

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] float32 -> logits [B, classes] float32.

        Raises:
            TypeError: not float32 images. ValueError: another shape, or NaN or infinite values.
        """
        check_images(images, self.image_shape, any_size=self.any_size)
        results: dict[str, Tensor] = {}
        with other_sizes_refused(images, self.image_shape):
            for step in self.steps:
                results[step.name] = self._run_step(step, images, results)
                for name in self._dead[step.name]:
                    results.pop(name, None)
        last = self.steps[-1]
        return logits_of(results[last.name], last.operator)

    @torch.no_grad()
    def codes(self, images: Tensor) -> dict[str, Tensor]:
        """Every step's result by its name: int32 codes, the last one's 32-bit sums. Raises as the model does."""
        check_images(images, self.image_shape, any_size=self.any_size)
        results: dict[str, Tensor] = {}
        with other_sizes_refused(images, self.image_shape):
            for step in self.steps:
                results[step.name] = self._run_step(step, images, results)
        return results

    @property
    def any_size(self) -> bool:
        """Whether no step is made for one height and width alone."""
        return not any(_is_of_one_size(step.operator) for step in self.steps)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every step's codes for one image, by its name."""
        return {name: tuple(codes.shape) for name, codes in self.codes(torch.zeros(1, *self.image_shape)).items()}

    @staticmethod
    def _run_step(step: Step, images: Tensor, results: dict[str, Tensor]) -> Tensor:
        inputs = [results[name] for name in step.inputs] or [images]
        result: Tensor = step.operator(*inputs)
        return result

    @property
    def inexact_steps(self) -> set[str]:
        """Steps that compute in float, and all that depend on one: codes that are not the same in every runtime."""
        inexact: set[str] = set()
        for step in self.steps:
            if isinstance(step.operator, FloatOperator) or any(name in inexact for name in step.inputs):
                inexact.add(step.name)
        return inexact

    @property
    def integer_operator_share(self) -> float:
        """Share of the operators that compute in integers."""
        return 1 - sum(isinstance(step.operator, FloatOperator) for step in self.steps) / len(self.steps)

    @property
    def sum_bound(self) -> int:
        """The largest magnitude that any 32-bit sum of the model can reach, whatever the image."""
        return max(step.operator.sum_bound for step in self.steps if isinstance(step.operator, IntegerLayer))


def _is_of_one_size(operator: IntegerOperator) -> bool:
    if isinstance(operator, IntegerSlice):
        return any(axis != 1 for axis, *_ in operator.slices)
    return isinstance(operator, _OF_ONE_SIZE) or (isinstance(operator, IntegerGather) and operator.axis != 1)


def expect_integer_model(model: object, function: str) -> None:
    """Raises TypeError, in the name of ``function``, if ``model`` is no integer model."""
    if not isinstance(model, IntegerModel):
        raise TypeError(
            f"{function} expects an integer model, from lowprec.convert(qmodel), not {type(model).__name__}"
        )
