"""The integer model on PyTorch's fast kernels: equal codes, many times the speed of :class:`IntegerModel`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowprec.images import check_images, other_sizes_refused
from lowprec.integer.fast.elementwise import (
    FastAdd,
    FastConcatenation,
    FastInput,
    FastLookup,
    FastMovement,
    FastMultiply,
    FastReLU,
)
from lowprec.integer.fast.layers import FastConvolution, FastLinear
from lowprec.integer.fast.pooling import FastAveragePool, FastMaxPool
from lowprec.integer.fast.storage import is_byte, load, store
from lowprec.integer.model import IntegerModel, Step, expect_integer_model
from lowprec.integer.operators import (
    Grid,
    IntegerAdd,
    IntegerAveragePool,
    IntegerConcatenation,
    IntegerConv2d,
    IntegerFlatten,
    IntegerGather,
    IntegerInput,
    IntegerLinear,
    IntegerLookup,
    IntegerMaxPool,
    IntegerMovement,
    IntegerMultiply,
    IntegerMultiplyAdd,
    IntegerOperator,
    IntegerPermute,
    IntegerReLU,
    IntegerReshape,
    IntegerSlice,
    IntegerUpsample,
    logits_of,
)

Kernel = Callable[..., Tensor]
KERNELS: dict[type[IntegerOperator], Callable[[Any], Kernel]] = {
    IntegerInput: FastInput,
    IntegerLinear: FastLinear,
    IntegerMaxPool: FastMaxPool,
    IntegerAveragePool: FastAveragePool,
    IntegerReLU: FastReLU,
    IntegerMultiply: FastMultiply,
    IntegerConcatenation: FastConcatenation,
    IntegerFlatten: FastMovement,
    IntegerReshape: FastMovement,
    IntegerPermute: FastMovement,
    IntegerSlice: FastMovement,
    IntegerGather: FastMovement,
    IntegerUpsample: FastMovement,
}


class Fallback:
    """Any operator: the reference on int32 codes, whose result is stored as bytes again.

    ``sources``: the grids of its inputs; none for the operator that takes the images.
    """

    def __init__(self, operator: IntegerOperator, sources: list[Grid | None]) -> None:
        self.operator = operator
        self.sources = sources

    def __call__(self, *stored: Tensor) -> Tensor:
        inputs = map(load, stored, self.sources) if self.sources else stored
        return store(self.operator(*inputs), self.operator.output)


@dataclass(frozen=True)
class FastStep:
    """A step of the model with its kernel, and whose results nobody needs after it."""

    name: str
    inputs: tuple[str, ...]
    kernel: Kernel
    dead: tuple[str, ...]


class FastModel(nn.Module):
    """Float images in, float logits out: equal (``==``) to those of the :class:`IntegerModel` that it is made from.

    Runs on the CPU. Between operators there are bytes alone, except where an operator has no fast kernel.
    """

    def __init__(self, model: IntegerModel) -> None:
        expect_integer_model(model, "FastModel")
        super().__init__()
        self.image_shape = model.image_shape
        self.any_size = model.any_size
        self.grids: dict[str, Grid | None] = {step.name: step.operator.output for step in model.steps}
        self.last = model.steps[-1]
        last_use = {name: step.name for step in model.steps for name in step.inputs}
        self.steps = []
        for step in model.steps:
            dead = tuple(sorted({name for name in step.inputs if last_use[name] == step.name}))
            self.steps.append(FastStep(step.name, step.inputs, self._kernel(step, model.steps, dead), dead))

    def _kernel(self, step: Step, steps: list[Step], dead: tuple[str, ...]) -> Kernel:
        operator = step.operator
        sources = [self.grids[name] for name in step.inputs]
        bytes_only = all(map(is_byte, sources)) and (operator.output is None or is_byte(operator.output))
        # Exact types: a subclass may compute something else.
        kind = type(operator)
        if not bytes_only or (isinstance(operator, IntegerLinear) and operator.shortcut is not None):
            return Fallback(operator, sources)
        if isinstance(operator, IntegerAveragePool) and operator.axes != (2, 3):
            return Fallback(operator, sources)
        if isinstance(operator, IntegerAdd) and kind is IntegerAdd:
            return FastAdd(operator, next((side for side in (1, 0) if _reusable(step, side, steps, dead)), None))
        if isinstance(operator, IntegerConv2d) and kind in (IntegerConv2d, IntegerMultiplyAdd):
            return FastConvolution(operator, operator.shortcut is not None and _reusable(step, 1, steps, dead))
        if isinstance(operator, IntegerLookup) and kind is IntegerLookup and operator.table.dim() == 1:
            return FastLookup(operator)
        return KERNELS[kind](operator) if kind in KERNELS else Fallback(operator, sources)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] float32 -> logits [B, classes] float32. Raises as :class:`IntegerModel` does."""
        check_images(images, self.image_shape, any_size=self.any_size)
        if not len(images):
            # Kernels take no empty batch.
            return self(images.new_zeros(1, *images.shape[1:]))[:0]
        results: dict[str, Tensor] = {}
        with other_sizes_refused(images, self.image_shape):
            for step in self.steps:
                results[step.name] = step.kernel(*([results[name] for name in step.inputs] or [images]))
                for name in step.dead:
                    del results[name]
        return logits_of(self._codes(results[self.last.name], self.last.name), self.last.operator)

    @torch.no_grad()
    def codes(self, images: Tensor) -> dict[str, Tensor]:
        """Every step's result by its name: int32 codes, the last one's 32-bit sums. Raises as the model does."""
        check_images(images, self.image_shape, any_size=self.any_size)
        results: dict[str, Tensor] = {}
        codes: dict[str, Tensor] = {}
        with other_sizes_refused(images, self.image_shape):
            for step in self.steps:
                results[step.name] = step.kernel(*([results[name] for name in step.inputs] or [images]))
                # Now: a later step may reuse the memory.
                codes[step.name] = self._codes(results[step.name], step.name)
                for name in step.dead:
                    del results[name]
        return codes

    def _codes(self, stored: Tensor, name: str) -> Tensor:
        codes = load(stored, self.grids[name])
        return codes.clone() if codes is stored else codes

    @property
    def paths(self) -> dict[str, str]:
        """How each step runs here: "integer", "float64", …, "reference" for operators without a fast kernel."""
        return {
            step.name: "reference" if isinstance(step.kernel, Fallback) else getattr(step.kernel, "path", "bytes")
            for step in self.steps
        }


def _reusable(step: Step, side: int, steps: list[Step], dead: tuple[str, ...]) -> bool:
    """Whether an operand may be overwritten: this is its last use, and no other result shares its memory."""
    name = step.inputs[side]
    moved = [other for other in steps if isinstance(other.operator, IntegerMovement)]
    views = {shared for other in moved for shared in (other.name, *other.inputs)}
    return name in dead and name not in views and step.inputs.count(name) == 1
