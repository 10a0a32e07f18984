"""Shapes of all nodes of a prepared graph, without computing a value, and which axis counts the batch."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from lowprec.graph.nodes import step_name

# Two sizes of the batch: what differs between them depends on it.
BATCHES = (2, 3)


class ShapeError(ValueError):
    """A model computes for one size of the batch alone; the message names the operation."""


class Shapes(fx.Interpreter):
    """Runs a graph on the meta device for two sizes of the batch; ``results`` holds every node's result, for both.

    model: computes in full precision (see :func:`lowprec.prepare.full_precision`).

    Raises:
        ShapeError: an operation fails for one of the two sizes.
    """

    def __init__(self, model: fx.GraphModule, image_shape: tuple[int, int, int]) -> None:
        super().__init__(copy.deepcopy(model).to("meta").eval())
        self.extra_traceback = False  # errors name the operation themselves
        names = {node.name: node for node in model.graph.nodes}
        self.results: list[dict[fx.Node, Any]] = []
        for batch in BATCHES:
            found: dict[fx.Node, Any] = {}
            self.found = found
            self.names = names
            self.run(torch.empty(batch, *image_shape, device="meta"))
            self.results.append(found)

    def run_node(self, n: fx.Node) -> Any:
        """Keeps the node's result, tensors as their shapes."""
        try:
            result = super().run_node(n)
        except (RuntimeError, IndexError, ValueError) as error:
            raise ShapeError(
                f"{step_name(n)} does not take any size of the batch: {error}. Take sizes from x.shape, or give -1"
            ) from error
        self.found[self.names[n.name]] = tree_map(lambda leaf: leaf.shape if isinstance(leaf, Tensor) else leaf, result)
        return result

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Shape of a node's tensor; -1 for the axis whose size depends on the batch."""
        first, second = (found[node] for found in self.results)
        return tuple(-1 if size != other else size for size, other in zip(first, second, strict=True))

    def number(self, value: Any) -> Any:
        """An argument of a call, or what a node that gives a number computes for the first batch size."""
        return fx.map_arg(value, lambda node: self.results[0][node])
