"""Tracing a full-precision model with torch.fx, and the proof that the traced model is the same model."""

from __future__ import annotations

import copy
import inspect
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from timm.layers import DropPath, Linear
from timm.models import get_notrace_functions, get_notrace_modules
from timm.models.mobilevit import MobileVitBlock
from timm.models.vgg import ConvMlp
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from lowprec.graph.float_operators import LAYER_NORMS
from lowprec.graph.nodes import argument, module_path

# Code that no user wrote: torch.fx and the modules that only call others.
_TORCH = str(Path(torch.__file__).parent)
# Key of a node's meta: file and line of the call in the model's code.
LINE = "lowprec_line"


class TracingError(ValueError):
    """The model cannot be traced, or the traced model computes something else."""


class _Tracer(fx.Tracer):
    """Keeps whole the modules and functions that timm registers as not to be traced into."""

    def __init__(self) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        # timm's own linear layers and layer norms do what torch's do; whole, they are these.
        self._leaves = (*get_notrace_modules(), DropPath, Linear, *LAYER_NORMS)

    def is_leaf_module(self, module: nn.Module, module_qualified_name: str) -> bool:
        if type(module) in _TRACEABLE_FORWARDS:
            return False
        return isinstance(module, self._leaves) or super().is_leaf_module(module, module_qualified_name)

    def call_module(
        self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        traceable = _TRACEABLE_FORWARDS.get(type(module))
        return super().call_module(module, partial(traceable, module) if traceable else forward, args, kwargs)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta[LINE] = _calling_line(sys._getframe(1)) if node.op.startswith("call") else ""
        return node


def _is_users(filename: str) -> bool:
    return filename != __file__ and not filename.startswith(_TORCH)


def _calling_line(frame: FrameType | None) -> str:
    """The innermost line of the model's code among the callers; "" where torch's containers alone stand between."""
    while frame is not None and frame.f_code is not trace.__code__:
        if _is_users(frame.f_code.co_filename):
            return f"{frame.f_code.co_filename}, line {frame.f_lineno}"
        frame = frame.f_back
    return ""


def _failing_line(error: Exception) -> str:
    """The innermost line of the model's code in an error's traceback, with its text."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
    return f" at {frames[-1].filename}, line {frames[-1].lineno}: {frames[-1].line}" if frames else ""


def _conv_mlp(module: ConvMlp, values: Tensor) -> Tensor:
    """Without the pooling that widens images smaller than the kernel: the comparison of the two models finds those."""
    hidden = module.drop(module.act1(module.fc1(values)))
    return module.act2(module.fc2(hidden))


def _mobile_vit(module: MobileVitBlock, images: Tensor) -> Tensor:
    """For images whose sides are multiples of the patches': the block scales others, which the comparison finds."""
    rows, columns = module.patch_size
    values = module.conv_1x1(module.conv_kxk(images))
    batch, channels, height, width = values.shape
    down, across = height // rows, width // columns
    # [B · C · down, rows, across, columns] -> [B · C · down, across, rows, columns], then patches as a batch of sequences.
    values = values.reshape(batch * channels * down, rows, across, columns).transpose(1, 2)
    values = values.reshape(batch, channels, down * across, module.patch_area).transpose(1, 3)
    values = values.reshape(batch * module.patch_area, down * across, -1)
    values = module.norm(module.transformer(values))
    values = values.contiguous().view(batch, module.patch_area, down * across, -1).transpose(1, 3)
    values = values.reshape(batch * channels * down, across, rows, columns).transpose(1, 2)
    values = module.conv_proj(values.reshape(batch, channels, down * rows, across * columns))
    fusion = module.conv_fusion
    return values if fusion is None else fusion(torch.cat((images, values), dim=1))


# What timm's modules compute where the branch that they take does not depend on data.
_TRACEABLE_FORWARDS: dict[type[nn.Module], Callable[..., Tensor]] = {
    ConvMlp: _conv_mlp,
    MobileVitBlock: _mobile_vit,
}


def trace(model: nn.Module) -> fx.GraphModule:
    """The model as a graph of operators; module names are kept and parameters shared.

    ``model`` computes attention step by step from here on (timm's ``fused_attn`` is switched off).

    Raises:
        TracingError: torch.fx cannot trace it, for instance because its control flow depends on data.
    """
    # Attention as one function hides its products and its softmax; timm's modules compute it step by step if told to.
    for module in model.modules():
        if isinstance(getattr(module, "fused_attn", None), bool):
            module.fused_attn = False  # type: ignore[assignment]
    modes = [(module, module.training) for module in model.modules()]
    try:
        graphs = {training: _Tracer().trace(model.train(training), _defaults(model)) for training in (True, False)}
    except Exception as error:  # torch.fx raises whatever the model's own code raises on proxies
        raise TracingError(
            f"{type(model).__name__} cannot be traced by torch.fx{_failing_line(error)} ({error}). A graph holds no branch, "
            "loop or Python number that depends on an image or its shape: write that line without one"
        ) from error
    finally:
        for module, training in modes:
            module.training = training
    traced = fx.GraphModule(model, graphs[False], type(model).__name__)
    _restore_dropout(traced, graphs[True])
    _remove_absent_masks(traced)
    _remove_checks(traced)
    return traced


def _defaults(model: nn.Module) -> dict[str, Any]:
    """Values of the arguments that nobody gives, such as an attention mask: they are fixed while tracing."""
    parameters = list(inspect.signature(model.forward).parameters.values())[1:]
    return {item.name: item.default for item in parameters if item.default is not item.empty}


def _remove_checks(traced: fx.GraphModule) -> None:
    """Assertions about sizes and about arguments that nobody gives, and the inputs of those."""
    for node in reversed(traced.graph.nodes):
        if getattr(node.target, "__name__", "") in ("_assert", "_assert_is_none") and not node.users:
            traced.graph.erase_node(node)
    traced.graph.eliminate_dead_code()
    for node in [node for node in traced.graph.nodes if node.op == "placeholder"][1:]:
        if not node.users:
            traced.graph.erase_node(node)
    traced.recompile()


def _remove_absent_masks(traced: fx.GraphModule) -> None:
    """timm's attention adds a mask by a function that is not traced into; without a mask it adds nothing."""
    for node in list(traced.graph.nodes):
        if getattr(node.target, "__name__", "") == "maybe_add_mask":
            scores, mask = node.args[:2]
            absent = mask is None or (
                getattr(mask.target, "__name__", "") == "resolve_self_attn_mask"
                and tuple(mask.args[2:]) == (None, False)
            )
            if absent:
                node.replace_all_uses_with(scores)
                traced.graph.erase_node(node)
                if mask is not None and not mask.users:
                    traced.graph.erase_node(mask)
    traced.recompile()


def _restore_dropout(traced: fx.GraphModule, in_training: fx.Graph) -> None:
    """Calls of functional.dropout(..., training=self.training) become modules, which follow the mode as the calls did."""
    pairs = list(zip(traced.graph.nodes, in_training.nodes, strict=False))
    if len(traced.graph.nodes) != len(in_training.nodes) or any(one.target != other.target for one, other in pairs):
        return  # The mode changes more than dropout: comparing the two models will show it.
    for node, other in pairs:
        if node.target is functional.dropout and not argument(node, 2, "training", True):
            if not argument(other, 2, "training", True):
                continue
            path = module_path(node)
            names = {name for name, _ in traced.named_modules()}
            base = f"{path}.dropout" if path else "dropout"
            name = next(free for free in (base, *(f"{base}_{index}" for index in range(1, 1000))) if free not in names)
            traced.add_submodule(name, nn.Dropout(argument(node, 1, "p", 0.5)))
            with traced.graph.inserting_before(node):
                module_node = traced.graph.call_module(name, (node.all_input_nodes[0],))
            node.replace_all_uses_with(module_node)
            traced.graph.erase_node(node)
    traced.recompile()


def check_same_function(model: nn.Module, traced: nn.Module, example_inputs: Tensor) -> None:
    """Runs both models on ``example_inputs``, in train and in eval mode with equal seeds, and compares bit for bit.

    Models on the meta device have no values: they only have to take images of that shape. Neither model's state changes.

    Raises:
        TracingError: the outputs differ, or the model itself fails or gives infinite or NaN outputs.
    """
    for training in (False, True):
        mode = "train" if training else "eval"
        given = f"example_inputs of the shape {list(example_inputs.shape)}"
        try:
            expected = _outputs(model, example_inputs, training)
        except (RuntimeError, ValueError, IndexError, AssertionError) as error:
            raise TracingError(f"{type(model).__name__} itself fails in {mode} mode on {given}: {error}") from error
        if example_inputs.is_meta:
            return
        if not all(bool(torch.isfinite(output).all()) for output in expected):
            raise TracingError(
                f"{type(model).__name__} itself gives infinite or NaN outputs in {mode} mode on {given}: its weights or its "
                "batch norms' statistics are damaged, or the images are not normalised"
            )
        try:
            found = _outputs(traced, example_inputs, training)
        except RuntimeError as error:
            raise TracingError(
                f"{type(model).__name__}: the traced model cannot take images of the shape {list(example_inputs.shape[1:])}: "
                f"{error}. Give the size that the model was made for, or one that its patches divide"
            ) from error
        same = len(expected) == len(found) and all(
            torch.equal(left, right) for left, right in zip(expected, found, strict=True)
        )
        if not same:
            raise TracingError(
                f"{type(model).__name__}: the traced model differs from the original in {mode} mode; a value that "
                "depends on self.training or on data was fixed while tracing"
            )


def _outputs(model: nn.Module, example_inputs: Tensor, training: bool) -> list[Tensor]:
    candidate = copy.deepcopy(model).train(training)
    devices = [example_inputs.device] if example_inputs.is_cuda else []
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(0)
            return [leaf for leaf in tree_leaves(candidate(example_inputs)) if isinstance(leaf, Tensor)]
    finally:
        if isinstance(candidate, fx.GraphModule):
            # Graph and module refer to each other, which would keep the copy's weights until the next garbage collection.
            candidate.graph.owning_module = None


def describe(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    """An operation as a user knows it: the kind of module or function, and where it stands in the model and its code."""
    line = f" ({node.meta[LINE]})" if node.meta.get(LINE) else ""
    if node.op == "call_module":
        module = modules[str(node.target)]
        inner = [type(child).__name__ for name, child in module.named_children() if name == "act"]
        return f"{type(module).__name__}{f' with {inner[0]}' if inner else ''} at {node.target}{line}"
    target: Callable[..., Any] | str = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    return f"{name}() in {module_path(node) or 'the model itself'}{line}"
