"""Functions of one value: what becomes a lookup table of 256 entries in an integer model."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import activations
from torch import Tensor, fx, nn
from torch.nn import functional

from lowprec.graph.nodes import is_number

_MODULES = (
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.Mish,
    nn.PReLU,
    nn.SELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softplus,
    nn.Tanh,
    activations.GELU,
    activations.GELUTanh,
    activations.HardMish,
    activations.HardSigmoid,
    activations.HardSwish,
    activations.Mish,
    activations.QuickGELU,
    activations.Sigmoid,
    activations.Swish,
    activations.Tanh,
)
_NAMES = (
    "celu",
    "elu",
    "gelu",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "leaky_relu",
    "mish",
    "selu",
    "silu",
    "softplus",
)
# In-place calls compute the same: the quantized tensor is a new one anyway.
_FUNCTIONS: dict[Any, Any] = {
    **{getattr(functional, name): getattr(functional, name) for name in _NAMES},
    **{
        getattr(torch, name): getattr(torch, name)
        for name in ("sigmoid", "tanh", "clamp", "exp", "sqrt", "square", "neg")
    },
    **{name: getattr(torch, name) for name in ("sigmoid", "tanh", "clamp", "exp", "sqrt", "square", "neg")},
    **{f"{name}_": getattr(torch, name) for name in ("sigmoid", "tanh", "clamp", "exp", "sqrt", "square", "neg")},
    functional.sigmoid: torch.sigmoid,
    functional.tanh: torch.tanh,
    functional.leaky_relu_: functional.leaky_relu,
    functional.hardtanh_: functional.hardtanh,
    operator.neg: operator.neg,
}
# Of a tensor and a plain number.
_ARITHMETIC: dict[Any, Any] = {
    **{getattr(operator, name): getattr(operator, name) for name in ("add", "mul", "sub", "truediv", "pow")},
    **{getattr(operator, f"i{name}"): getattr(operator, name) for name in ("add", "mul", "sub", "truediv", "pow")},
    **{getattr(torch, name): getattr(torch, name) for name in ("add", "mul", "sub", "div", "pow")},
    **{name: getattr(torch, name) for name in ("add", "mul", "sub", "div", "pow")},
    **{f"{name}_": getattr(torch, name) for name in ("add", "mul", "sub", "div", "pow")},
}


class Pointwise(nn.Module):
    """A function as a module: ``function(*arguments, **keywords)`` with the tensor in place ``position``."""

    def __init__(
        self, function: Callable[..., Tensor], arguments: tuple[Any, ...], keywords: dict[str, Any], position: int
    ) -> None:
        super().__init__()
        self.function = function
        self.arguments = arguments
        self.keywords = keywords
        self.position = position

    def forward(self, values: Tensor) -> Tensor:
        """Any shape, unchanged."""
        before, after = self.arguments[: self.position], self.arguments[self.position + 1 :]
        return self.function(*before, values, *after, **self.keywords)

    def extra_repr(self) -> str:
        return getattr(self.function, "__name__", str(self.function))


def pointwise_module(module: nn.Module) -> nn.Module | None:
    """A module that computes the same function of each value and changes no tensor in place; None if it is no such one."""
    if not isinstance(module, _MODULES):
        return None
    if getattr(module, "inplace", False):
        # Shares its parameters, which the original model's names refer to.
        module = copy.copy(module)
        module.inplace = False
    return module


def pointwise_function(node: fx.Node) -> Pointwise | None:
    """A module for a call of a function of one tensor (and plain numbers), or None."""
    tensors = [index for index, item in enumerate(node.args) if isinstance(item, fx.Node)]
    others = [item for item in node.args if not isinstance(item, fx.Node)]
    known = node.target in _FUNCTIONS or (node.target in _ARITHMETIC and others and all(map(is_number, others)))
    if not known or len(tensors) != 1 or any(isinstance(value, fx.Node) for value in node.kwargs.values()):
        return None
    function = _FUNCTIONS.get(node.target) or _ARITHMETIC[node.target]
    arguments = tuple(None if isinstance(item, fx.Node) else item for item in node.args)
    keywords = {key: value for key, value in node.kwargs.items() if key != "inplace"}
    return Pointwise(function, arguments, keywords, tensors[0])


def can_be_negative(function: nn.Module, of_negatives: bool) -> bool:
    """Whether the function gives negative values, on a fine grid of inputs; of_negatives: inputs can be negative.

    Between the grid's points nothing is missed that matters: what is negative there only would be clipped at zero.
    """
    channels = max((parameter.numel() for parameter in function.parameters()), default=1)
    # On the CPU, whatever the default device is: a model may be prepared on the meta device, which has no values.
    magnitudes = torch.logspace(-6, 4, 2000, dtype=torch.float64, device="cpu")
    inputs = torch.cat([magnitudes.new_zeros(1), magnitudes, -magnitudes if of_negatives else magnitudes])
    copied = copy.deepcopy(function)
    if any(parameter.is_meta for parameter in copied.parameters()):
        return of_negatives
    with torch.no_grad():
        return bool((copied.cpu().double().eval()(inputs.view(-1, 1).repeat(1, channels)) < 0).any())
