"""What the candidates of accuracy.py share: where they start, what they hand back, and where others' layers are rounded.

Brevitas' layers and those of LSQ are put at the same places, which are lowprec's: weights of every convolution and linear
layer; 8-bit activations before each of these, before each pooling, and on both sides of each residual add.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from lowprec.graph.tracing import trace
from lowprec.training.evaluation import Predictor

Weighted = nn.Conv2d | nn.Linear
# Of the first convolution and the classifier, for all who can choose.
END_BITS = 8
# Of others' scales, which are float32.
SCALE_BITS = 32

_ADDS = (operator.add, operator.iadd, torch.add)
_POOLS = (nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.MaxPool2d)
_RECTIFIERS = (nn.ReLU, nn.ReLU6, functional.relu, functional.relu6, torch.relu)
# What gives no negative value where it gets none.
_MOVES = (*_POOLS, nn.Flatten, nn.Dropout, nn.Identity, torch.flatten, "flatten")


@dataclass(frozen=True)
class Start:
    """Where all candidates of a seed start. model: full precision, in eval mode, not to be changed.

    calibration: training images, [B, C, H, W] each, not augmented.
    """

    model: nn.Module
    calibration: list[Tensor]


@dataclass(frozen=True)
class Quantized:
    """A model that learns in train mode and is judged in eval mode. weight_bits: per weight, scales included."""

    model: nn.Module
    weight_bits: float


def as_it_is(model: nn.Module) -> Predictor:
    """The fake-quant model itself, in eval mode, of those who have no integer model."""
    return model


@dataclass(frozen=True)
class Candidate:
    """One line of the table. shipped: what the trained model's test accuracy is measured on."""

    name: str
    quantize: Callable[[Start], Quantized]
    shipped: Callable[[nn.Module], Predictor] = field(default=as_it_is)


def bits_per_weight(layers: Iterable[tuple[int, int, int]]) -> float:
    """(Σ bits · weights + 32 · scales) / Σ weights of layers (bits of a weight, weights, float32 scales)."""
    layers = list(layers)
    stored = sum(bits * weights + SCALE_BITS * scales for bits, weights, scales in layers)
    return stored / sum(weights for _, weights, _ in layers)


def weighted_layers(model: nn.Module) -> dict[str, Weighted]:
    """The convolutions and linear layers by name, in the order of the model's definition."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Weighted)}


def rounded(
    model: nn.Module, layer: Callable[[Weighted, bool], nn.Module], activation: Callable[[bool], nn.Module]
) -> fx.GraphModule:
    """A copy of ``model`` with others' layers and activation quantizers in it.

    layer: of a convolution or linear layer, and whether it is the first or the last of these. activation: of whether the
    tensor can be negative; a tensor is rounded once for all its users.

    Raises:
        ValueError: the model has no convolution or linear layer.
    """
    traced = trace(copy.deepcopy(model))
    modules = dict(traced.named_modules())

    def kind(node: fx.Node) -> object:
        return type(modules[str(node.target)]) if node.op == "call_module" else node.target

    def non_negative(node: fx.Node) -> bool:
        if kind(node) in _MOVES:
            return non_negative(node.all_input_nodes[0])
        return kind(node) in _RECTIFIERS

    layers = [node for node in traced.graph.nodes if kind(node) in (nn.Conv2d, nn.Linear)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no nn.Conv2d or nn.Linear to quantize")
    users = [node for node in traced.graph.nodes if node in layers or kind(node) in (*_ADDS, *_POOLS)]
    # All known before the first quantizer stands between the tensors.
    signed = {source: not non_negative(source) for node in users for source in node.all_input_nodes}
    for producer, negative in signed.items():
        name = f"{producer.name}_quantizer"
        traced.add_submodule(name, activation(negative))
        with traced.graph.inserting_after(producer):
            quantizer = traced.graph.call_module(name, (producer,))
        for user in [user for user in producer.users if user in users]:
            user.replace_input_with(producer, quantizer)
    for node in layers:
        path = str(node.target)
        traced.set_submodule(path, layer(modules[path], node in (layers[0], layers[-1])))
    traced.recompile()
    return traced


@torch.no_grad()
def run_calibration(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Shows the model the calibration images, in eval mode."""
    model.eval()
    for images in batches:
        model(images)
