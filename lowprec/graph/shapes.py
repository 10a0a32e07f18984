"""Shapes of all nodes of a prepared graph, without computing a value, and which axis counts the batch."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

# Two sizes of the batch: what differs between them depends on it.
BATCHES = (2, 3)


class Shapes(fx.Interpreter):
    """Runs a graph on the meta device for two sizes of the batch; ``results`` holds every node's result, for both.

    model: computes in full precision (see :func:`lowprec.prepare.full_precision`).
    """

    def __init__(self, model: fx.GraphModule, image_shape: tuple[int, int, int]) -> None:
        super().__init__(copy.deepcopy(model).to("meta").eval())
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
        result = super().run_node(n)
        self.found[self.names[n.name]] = tree_map(lambda leaf: leaf.shape if isinstance(leaf, Tensor) else leaf, result)
        return result

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Shape of a node's tensor; -1 for the axis whose size depends on the batch."""
        first, second = (found[node] for found in self.results)
        return tuple(-1 if size != other else size for size, other in zip(first, second, strict=True))

    def number(self, value: Any) -> Any:
        """An argument of a call, or what a node that gives a number computes for the first batch size."""
        return fx.map_arg(value, lambda node: self.results[0][node])
