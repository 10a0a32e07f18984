"""One operation of a plan: what :mod:`lowprec.prepare` makes one module of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn


@dataclass
class Operation:
    """One future fake-quant module.

    kind: input, constant, convolution, linear, batch_norm, add, multiply, matmul, concatenation, average_pool, max_pool,
    upsample, relu, lookup, float, flatten, movement or nothing. node: whose place it takes; absorbed: nodes after it that
    go into it (batch norm, shortcut, activation), the last of them last. inputs: nodes of its tensors; shortcut: the node
    that is added to a layer's sums.
    """

    kind: str
    node: fx.Node
    inputs: list[fx.Node] = field(default_factory=list)
    absorbed: list[fx.Node] = field(default_factory=list)
    activation: str = ""
    norm: nn.BatchNorm2d | nn.SyncBatchNorm | None = None
    shortcut: fx.Node | None = None
    options: dict[str, Any] = field(default_factory=dict)
    # Where the module can stand at the earliest: after all that it takes.
    anchor: fx.Node = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self.anchor = self.anchor or self.node

    @property
    def result(self) -> fx.Node:
        """The node whose value the module gives."""
        return self.absorbed[-1] if self.absorbed else self.node
