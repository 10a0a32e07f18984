"""Calls that move a tensor's values and change none: they stay as they are in a prepared model."""

from __future__ import annotations

import operator
from typing import Any, TypeGuard

import torch
from torch import fx, nn
from torch.nn import functional

from lowprec.graph.nodes import argument, is_number

# Weights are multiples of 1 / (2 · factor) in both directions: with 8-bit codes exact in float32 by far.
MAXIMUM_BILINEAR_FACTOR = 16

_CALLS: set[Any] = {
    operator.getitem,
    torch.chunk,
    torch.flatten,
    torch.roll,
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
    "expand",
    "flatten",
    "permute",
    "reshape",
    "roll",
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
    return node.target in _CALLS or is_window_reverse(node)


def is_window_reverse(node: fx.Node) -> bool:
    """timm's function of that name, which several of its files have: windows [B · N, h, w, C] back to images [B, H, W, C]."""
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "window_reverse"


def bilinear_factors(node: fx.Node, module: nn.Module | None) -> tuple[int, int] | None:
    """Height and width factors of bilinear upsampling whose weights are exact: powers of two, pixels' centres aligned."""
    if isinstance(module, nn.Upsample):
        mode, factor, corners = module.mode, module.scale_factor, module.align_corners
    elif node.target is functional.interpolate:
        mode, factor, corners = (
            argument(node, place, name) for place, name in ((3, "mode"), (2, "scale_factor"), (4, "align_corners"))
        )
    else:
        return None
    if mode != "bilinear" or corners or not _whole(factor):
        return None
    rows, columns = (int(item) for item in (factor if isinstance(factor, list | tuple) else (factor, factor)))
    exact = all(item & (item - 1) == 0 and item <= MAXIMUM_BILINEAR_FACTOR for item in (rows, columns))
    return (rows, columns) if exact else None


def _whole(factor: Any) -> TypeGuard[float | tuple[float, float]]:
    factors = factor if isinstance(factor, list | tuple) else [factor]
    return all(is_number(item) and item >= 1 and item == int(item) for item in factors)
