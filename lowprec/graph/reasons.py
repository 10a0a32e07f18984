"""Why an operation has no integer form: the argument that is at fault, where its kind is one that has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.layers import Linear
from torch import fx, nn
from torch.nn.utils import parametrize

from lowprec.graph.float_operators import LAYER_NORMS
from lowprec.graph.movement import MAXIMUM_BILINEAR_FACTOR
from lowprec.graph.nodes import argument, tensors_of

# Functions whose modules have an integer form, or whose parts have.
_INSTEAD = {
    "conv2d": "call it as a module, nn.Conv2d",
    "linear": "call it as a module, nn.Linear",
    "batch_norm": "call it as a module, nn.BatchNorm2d",
    "layer_norm": "call it as a module, nn.LayerNorm",
    "prelu": "call it as a module, nn.PReLU",
    "einsum": "write it with matmul, permute and reshape",
    "scaled_dot_product_attention": "write it with matmul and softmax",
    "sub": "of a tensor and a number only; a + b * -1 is a difference of two",
    "isub": "of a tensor and a number only; a + b * -1 is a difference of two",
    "div": "of a tensor and a number only",
    "truediv": "of a tensor and a number only",
    "pow": "of a tensor and a number only",
    "mean": "give dim, without that of the batch",
    "cat": "give dim as a number",
    "concat": "give dim as a number",
    "dropout": "training=True drops in evaluation too; give training=self.training",
    "softmax": "give dim as a number",
    "max_pool2d": "return_indices",
}


def reason(node: fx.Node, modules: dict[str, nn.Module], numbers: set[fx.Node], constants: set[fx.Node]) -> str:
    """Which argument keeps an unsupported operation from an integer form, "" where it is the operation itself.

    numbers, constants: nodes that give numbers, and those that depend on parameters alone.
    """
    if node.op == "call_module":
        module = modules[str(node.target)]
        return next((explain(module) for kind, explain in _MODULES if isinstance(module, kind)), "")
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    name = name.rstrip("_")
    if name == "getitem" and any(used in constants for used in node.all_input_nodes[1:]):
        return "indices that are a tensor; write them as a list of numbers"
    explain = _FUNCTIONS.get(name)
    if explain and (found := explain(node)):
        return found
    if any(tensor in numbers for tensor in tensors_of(node)):
        return "a number that is taken from the image's shape; write it as a number"
    return _INSTEAD.get(name, "")


def _layer(module: nn.Module) -> str:
    if parametrize.is_parametrized(module):
        return "parametrized; call torch.nn.utils.parametrize.remove_parametrizations(module, 'weight') first"
    if "weight" not in module._parameters:
        return "its weight is computed by a hook (weight_norm, spectral_norm); remove it first"
    if isinstance(module, nn.Conv2d):
        if type(module) is not nn.Conv2d:
            return "a kind of Conv2d that computes something of its own"
        if isinstance(module.padding, str):
            return f"padding={module.padding!r}; give numbers"
        if module.padding_mode != "zeros":
            return f"padding_mode={module.padding_mode!r}; only 'zeros'"
        return ""
    return "" if type(module) in (nn.Linear, Linear) else "a kind of Linear that computes something of its own"


def _max_pool(module: nn.MaxPool2d) -> str:
    return "return_indices=True" if module.return_indices else "a kind of MaxPool2d that computes something of its own"


def _batch_norm(module: nn.Module) -> str:
    if type(module) not in (nn.BatchNorm2d, nn.SyncBatchNorm):
        return "a kind of BatchNorm2d that computes something of its own"
    return "track_running_stats=False; only with running statistics"


def _average_pool_module(module: Any) -> str:
    return _average_pool(module.divisor_override, module.ceil_mode)


def _average_pool(divisor_override: Any, ceil_mode: Any) -> str:
    if divisor_override is not None:
        return f"divisor_override={divisor_override}"
    return "ceil_mode=True with padding that counts; give count_include_pad=False" if ceil_mode else ""


def _average_pool_function(node: fx.Node) -> str:
    places = ((1, "kernel_size"), (2, "stride"), (3, "padding"))
    computed = [name for place, name in places if isinstance(argument(node, place, name), fx.Node)]
    if computed:
        return f"{computed[0]} is taken from the image's shape; write it as a number, or average by adaptive_avg_pool2d(x, 1)"
    return _average_pool(argument(node, 6, "divisor_override"), argument(node, 4, "ceil_mode", False))


def _upsample_module(module: Any) -> str:
    return _upsample(module.size, module.scale_factor, module.mode, module.align_corners)


def _upsample_function(node: fx.Node) -> str:
    names = ("size", "scale_factor", "mode", "align_corners")
    size, factor, mode, corners = (argument(node, place, name) for place, name in enumerate(names, 1))
    return _upsample(size, factor, mode or "nearest", corners)


def _upsample(size: Any, factor: Any, mode: str, align_corners: Any) -> str:
    if mode not in ("nearest", "bilinear"):
        return f"mode={mode!r}; only 'nearest' and 'bilinear'"
    if size is not None:
        return "size; give scale_factor"
    if align_corners:
        return "align_corners=True"
    powers = f"powers of two up to {MAXIMUM_BILINEAR_FACTOR}"
    return f"scale_factor={factor}; only {'whole numbers' if mode == 'nearest' else powers}"


def _add(node: fx.Node) -> str:
    if "alpha" in node.kwargs:
        return f"alpha={node.kwargs['alpha']}; multiply first"
    return f"{', '.join(node.kwargs)} by name; give it by position" if node.kwargs else ""


def _pad(node: fx.Node) -> str:
    mode, value = argument(node, 2, "mode", "constant"), argument(node, 3, "value")
    return f"mode={mode!r}; only 'constant'" if mode != "constant" else f"value={value}; only 0"


def _adaptive(size: Any) -> str:
    return f"output_size={size}; only 1"


def _layer_norm(module: Any) -> str:
    if len(module.normalized_shape) != 1:
        return f"normalized_shape={list(module.normalized_shape)}; only over one axis"
    return "only with a weight and a bias"


_MODULES: tuple[tuple[Any, Callable[[Any], str]], ...] = (
    ((nn.Conv2d, nn.Linear), _layer),
    ((nn.BatchNorm2d, nn.SyncBatchNorm), _batch_norm),
    (nn.AvgPool2d, _average_pool_module),
    (nn.MaxPool2d, _max_pool),
    (nn.AdaptiveAvgPool2d, lambda module: _adaptive(module.output_size)),
    (nn.Upsample, _upsample_module),
    (LAYER_NORMS, _layer_norm),
    (nn.Softmax, lambda module: "give dim as a number"),
    (nn.MultiheadAttention, lambda module: "timm.layers.Attention has an integer form"),
)
_FUNCTIONS: dict[str, Callable[[fx.Node], str]] = {
    "avg_pool2d": _average_pool_function,
    "interpolate": _upsample_function,
    "add": _add,
    "mul": _add,
    "pad": _pad,
    "adaptive_avg_pool2d": lambda node: _adaptive(argument(node, 1, "output_size")),
}
