"""Calls that move a tensor's values and change none: they stay as they are in a prepared model."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from lowprec.graph.nodes import argument, is_number

_CALLS: set[Any] = {
    operator.getitem,
    torch.chunk,
    torch.flatten,
    torch.permute,
    torch.reshape,
    torch.split,
    torch.squeeze,
    torch.swapaxes,
    torch.transpose,
    torch.unbind,
    torch.unflatten,
    torch.unsqueeze,
    "chunk",
    "clone",
    "contiguous",
    "flatten",
    "permute",
    "reshape",
    "split",
    "squeeze",
    "swapaxes",
    "transpose",
    "unbind",
    "unflatten",
    "unsqueeze",
    "view",
}


def is_movement(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a call moves values only; ``module`` is that of a call of a module."""
    if module is not None:
        if isinstance(module, nn.Upsample):
            return module.mode == "nearest" and _whole(module.scale_factor)
        return isinstance(module, nn.ZeroPad2d | nn.Flatten | nn.Unflatten | nn.ChannelShuffle | nn.PixelShuffle)
    if node.target is functional.pad:
        return argument(node, 2, "mode", "constant") == "constant" and argument(node, 3, "value") in (None, 0)
    if node.target is functional.interpolate:
        return argument(node, 3, "mode", "nearest") == "nearest" and _whole(argument(node, 2, "scale_factor"))
    return node.target in _CALLS


def _whole(factor: Any) -> bool:
    factors = factor if isinstance(factor, list | tuple) else [factor]
    return all(is_number(item) and item >= 1 and item == int(item) for item in factors)
