"""Products of the fake-quant model on a GPU's 8-bit tensor cores: linear layers and 1x1 convolutions.

Values are the exact sums of the float product, rounded once (with |Σ q·c| below 2^24), where a GPU's float product in bfloat16
may round more often, with a bias or partial sums; the backward pass is the float one. The kernel makes codes of the values as it
loads them, so nothing more is written or kept. It has not been timed on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.function import once_differentiable

from lowprec.layers.activations import ActivationQuantizer
from lowprec.layers.autocast import dtype_of_products
from lowprec.layers.grids import on_grid
from lowprec.layers.integer_product import product_gradients
from lowprec.layers.linear import QuantizedConv2d, QuantizedLayer, QuantizedLinear
from lowprec.numerics.fixed_point import EXACT_DTYPES
from lowprec.numerics.memory import is_channels_last
from lowprec.numerics.triton_kernels import multiplies, runs_triton


def use_tensor_cores(qmodel: fx.GraphModule) -> int:
    """Lets linear layers and 1x1 convolutions of a prepared model multiply on a GPU's 8-bit tensor cores.

    Where the input is on its quantizer's grid in training too, which it is not behind a dropout; on a CPU, compiled, and for
    images that are not channels-last, products are float ones. It takes the place of
    :func:`lowprec.layers.integer_product.use_integer_kernels`, which also undoes it. Returns the number of layers.
    """
    count = 0
    for node in qmodel.graph.nodes:
        layer = qmodel.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, QuantizedLinear | QuantizedConv2d):
            able = _is_matrix_product(layer) and on_grid(qmodel, node.all_input_nodes[0])
            layer.product = tensor_core_product if able else None
            count += able
    return count


def tensor_core_product(
    layer: QuantizedLayer, values: Tensor, weight: Tensor, exponent: Tensor, bias: Tensor | None
) -> Tensor | None:
    """What ``layer.operate(values, weight, bias)`` gives, or None where that is to compute it.

    values: on the grid of the layer's source; weight: integers of -128 … 127 times 2^exponent, exponent: [O].
    """
    source = layer.source
    if not runs_triton(values) or not multiplies(values.device) or not source.quantizing or not source.calibrated:
        return None
    # A matrix of positions is a view of channels-last images alone.
    if isinstance(layer, QuantizedConv2d) and not (is_channels_last(values) or values.shape[2:].numel() == 1):
        return None
    dtype = dtype_of_products(values)
    if not {dtype, values.dtype} <= set(EXACT_DTYPES):
        return None
    geometry = (layer.stride, layer.padding, layer.dilation) if isinstance(layer, QuantizedConv2d) else None
    result: Tensor = _TensorCoreProduct.apply(values, weight, bias, source, exponent, geometry, dtype)
    return result


class _TensorCoreProduct(torch.autograd.Function):
    """y = x · wᵀ + b over the channels, from the codes of x and w.

    Gradients: ∂L/∂x, ∂L/∂w and ∂L/∂b of the float operator at the same values. x: [B, I, H, W] or [..., I], on the grid of
    ``source``; w = c · 2^exponent, exponent [O]. geometry: stride, padding and dilation of a 1x1 convolution, or None. dtype: of
    the result and of the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        source: ActivationQuantizer,
        exponent: Tensor,
        geometry: tuple[Any, ...] | None,
        dtype: torch.dtype,
    ) -> Tensor:
        from lowprec.numerics.triton_products import multiply_codes

        ctx.geometry = geometry
        ctx.dtypes = values.dtype, weight.dtype
        ctx.biases = None if bias is None else len(bias)
        # Both dtypes hold codes and weights exactly; the backward pass is in this one.
        values, weight = values.to(dtype), weight.to(dtype)
        ctx.save_for_backward(values, weight)
        outputs = len(weight)
        if geometry is None:
            result = values.new_empty(*values.shape[:-1], outputs)
            rows, out = values.reshape(-1, values.shape[-1]), result.view(-1, outputs)
        else:
            shape = (len(values), outputs, *values.shape[2:])
            result = torch.empty(shape, dtype=dtype, device=values.device, memory_format=torch.channels_last)
            rows, out = (images.permute(0, 2, 3, 1).flatten(0, 2) for images in (values, result))
        bias = None if bias is None else bias.to(dtype).float()  # as autocast would have it
        multiply_codes(rows, weight.flatten(1), bias, source.exponent, exponent, source.int8_offset, out)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return product_gradients(ctx, gradient, *ctx.saved_tensors)


def _is_matrix_product(layer: QuantizedLinear | QuantizedConv2d) -> bool:
    """Whether each position's outputs are of its own inputs, all of them."""
    if isinstance(layer, QuantizedLinear):
        return True
    alone = layer.weight.shape[2:].numel() == 1 and layer.groups == 1
    return alone and layer.stride == (1, 1) and layer.padding == (0, 0)
