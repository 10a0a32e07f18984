"""Where a prepared model's tensors lie on the grids of their quantizers in training, too."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx, nn

from lowprec.layers.activations import ActivationQuantizer
from lowprec.layers.attention import QuantizedFloatOperator, QuantizedMatmul
from lowprec.layers.elementwise import QuantizedReLU

KEEPS_GRID = (nn.Flatten, nn.Identity, nn.MaxPool2d)


def on_grid(qmodel: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a tensor is still on its quantizer's grid: a dropout drops, and scales up what is left."""
    if node.op == "call_module":
        module = qmodel.get_submodule(str(node.target))
        if isinstance(module, ActivationQuantizer | QuantizedReLU) or getattr(module, "quantizer", None) is not None:
            return True
        keeps = isinstance(module, KEEPS_GRID) or (isinstance(module, nn.Dropout) and module.p == 0)
        return keeps and on_grid(qmodel, node.all_input_nodes[0])
    # What is called without a module moves numbers about.
    return node.op != "placeholder" and all(on_grid(qmodel, used) for used in node.all_input_nodes)


def keep_codes_in_attention(qmodel: fx.GraphModule, devices: Iterable[str]) -> None:
    """On which kinds of devices products of activations and float operators (softmax, layer norm) keep 8-bit codes.

    For the backward pass, instead of their inputs, a quarter of the memory in float32, where all lie on grids; float operators
    also compute anew what else they would keep. Values and gradients are the same, bit by bit. It costs some percent of a step's
    time. devices: such as "cpu"; elsewhere all is kept as it is.
    """
    kinds = frozenset(devices)
    for node in qmodel.graph.nodes:
        module = qmodel.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, QuantizedMatmul | QuantizedFloatOperator):
            able = all(on_grid(qmodel, used) for used in node.all_input_nodes)
            module.keeps_codes_on = kinds if able else frozenset()
