"""Where a prepared model's tensors lie on the grids of their quantizers in training, too."""

from __future__ import annotations

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


def keep_codes_in_attention(qmodel: fx.GraphModule, enabled: bool = True) -> None:
    """Whether attention's products and softmaxes keep their inputs for the backward pass as 8-bit codes, where all are on grids."""
    for node in qmodel.graph.nodes:
        module = qmodel.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, QuantizedMatmul | QuantizedFloatOperator):
            module.keeps_codes = enabled and all(on_grid(qmodel, used) for used in node.all_input_nodes)
