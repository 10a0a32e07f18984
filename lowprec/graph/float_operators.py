"""Operations without an integer form that run in float between dequantize and quantize: softmax and layer norm."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import LayerNorm, LayerNorm2d
from torch import fx, nn
from torch.nn import functional

from lowprec.graph.nodes import argument, is_number

_SOFTMAX: set[Any] = {functional.softmax, torch.softmax, "softmax"}
LAYER_NORMS = (nn.LayerNorm, LayerNorm, LayerNorm2d)


def float_module(module: nn.Module) -> nn.Module | None:
    """The module itself if it is a softmax or a layer norm over one axis with a weight and a bias; else None."""
    if isinstance(module, nn.Softmax) and is_number(module.dim):
        return module
    if type(module) in LAYER_NORMS:
        plain = len(module.normalized_shape) == 1 and module.weight is not None and module.bias is not None  # type: ignore[arg-type]
        return module if plain else None
    return None


def float_function(node: fx.Node) -> nn.Module | None:
    """A module for a call of softmax, or None."""
    axis = argument(node, 1, "dim")
    return nn.Softmax(int(axis)) if node.target in _SOFTMAX and is_number(axis) else None
