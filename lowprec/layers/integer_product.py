"""Products of the fake-quant model on the integers themselves: oneDNN's 8-bit kernels, twice and more as fast as float32.

Quantized activations and weights are integers times powers of two, x = 2^e_x · q and w = 2^e_w · c, so that a product of them is
2^(e_x + e_w) · Σ q·c. The kernels sum in 32 bits, which is exact, and give float32: what the float32 product gives, bit by bit,
while |Σ q·c| stays below 2^24; beyond, float32 rounds on the way and the integers once. The backward pass is the float one, on
values that the 8-bit codes give back exactly: of float32 these alone are kept for it, a quarter of the memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.function import once_differentiable

from lowprec.layers.activations import ActivationQuantizer
from lowprec.layers.autocast import dtype_of_products
from lowprec.layers.grids import keep_codes_in_attention, on_grid
from lowprec.layers.linear import QuantizedConv2d, QuantizedLayer, QuantizedLinear
from lowprec.numerics import kernels
from lowprec.numerics.fixed_point import EXACT_DTYPES, power_of_two, scale_of
from lowprec.numerics.memory import is_channels_last
from lowprec.numerics.pools import converted, kept_like, passing_like
from lowprec.numerics.straight_through import codes_of_multiples, multiples_of_codes
from lowprec.numerics.weight_integers import integers_of_weight, weight_of_integers

# Below these, in all and for each element of the input, coding and packing cost more than the kernel gives (forward and backward
# pass, two cores with AVX2). With VNNI kernels do about four times the work, and so much less is enough (not measured).
LEAST_MULTIPLICATIONS = 1 << 28
LEAST_OF_AN_ELEMENT = 256
GAIN_OF_VNNI = 4


def use_integer_kernels(qmodel: fx.GraphModule, enabled: bool = True) -> int:
    """Lets dense convolutions and linear layers of a prepared model compute their forward pass on integers.

    Where the processor's kernels are exact (found out by running them; for 8-bit weights they need VNNI) and the input is on its
    quantizer's grid in training too, which it is not behind a dropout; products that are too small to gain stay on float ones.
    Attention keeps bytes for the backward pass, as these layers do: see :func:`keep_codes_in_attention`. Returns the number of
    layers.
    """
    keep_codes_in_attention(qmodel, ("cpu",) if enabled else ())
    count = 0
    for node in qmodel.graph.nodes:
        layer = qmodel.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, QuantizedConv2d | QuantizedLinear):
            able = enabled and _is_exact(layer) and on_grid(qmodel, node.all_input_nodes[0])
            layer.product = integer_product if able else None
            count += able
    return count


def integer_product(
    layer: QuantizedLayer, values: Tensor, weight: Tensor, exponent: Tensor, bias: Tensor | None
) -> Tensor | None:
    """What ``layer.operate(values, weight, bias)`` gives, or None where that is to compute it.

    values: on the grid of the layer's source; weight: integers of -128 … 127 times 2^exponent, exponent: [O].
    """
    source = layer.source
    takes = (
        values.device.type == "cpu" and not torch.compiler.is_compiling() and source.quantizing and source.calibrated
    )
    if not takes or values.dtype not in EXACT_DTYPES:
        return None
    convolves = isinstance(layer, QuantizedConv2d)
    # Of one channel, or one position, the float product may be in the other order, in which a norm's sums differ.
    if convolves and not is_channels_last(values):
        return None
    if not _is_worth_it(layer, values.numel(), weight.numel() // values.shape[1 if convolves else -1]):
        return None
    result: Tensor = _IntegerProduct.apply(
        values, weight, bias, source, exponent, _geometry(layer), dtype_of_products(values)
    )
    return result


class PackedProduct:
    """x ∗ w + b, a dense convolution or a matrix product, from bytes: weights are packed once for inputs of one shape.

    Arguments as of :class:`_IntegerProduct`. integers: c, int8. dtype: of the results, float32 or bfloat16.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        source: ActivationQuantizer,
        exponent: Tensor,
        geometry: Sequence[Sequence[int]] | None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.dtype = dtype
        self.scale = power_of_two(exponent)
        self.integers = integers_of_weight(weight, exponent)
        self.bias = bias
        self.input = (scale_of(source.exponent), 128 - source.int8_offset)
        # A matrix product is the convolution of a row of pixels: weights are packed several times as fast for one.
        self.multiplies = geometry is None
        self.where = (*map(list, geometry or ((1, 1), (0, 0), (1, 1))), 1)
        self._packed: tuple[torch.Size, Tensor] | None = None

    @classmethod
    def of(cls, layer: QuantizedLayer, weight: Tensor, exponent: Tensor, bias: Tensor | None) -> PackedProduct:
        """``layer.operate`` with that weight and bias."""
        return cls(weight, bias, layer.source, exponent, _geometry(layer))

    @staticmethod
    def takes(layer: QuantizedLayer, codes: Tensor) -> bool:
        """Whether it computes what ``layer.operate`` does from these bytes, exactly."""
        if isinstance(layer, QuantizedConv2d) and not is_channels_last(codes):
            return False
        return isinstance(layer, QuantizedConv2d | QuantizedLinear) and codes.device.type == "cpu" and _is_exact(layer)

    def __call__(self, codes: Tensor) -> Tensor:
        """codes: [B, I, H, W] channels_last or [..., I], codes of x raised by 128 where they are signed."""
        pixels = codes.reshape(1, -1, 1, codes.shape[-1]).permute(0, 3, 1, 2) if self.multiplies else codes
        zeros = codes.new_zeros(len(self.scale), dtype=torch.int32)
        written = self.dtype if kernels.writes(self.dtype) else torch.float32
        result = torch.ops.onednn.qconv2d_pointwise.default(
            *(pixels, *self.input, self._pack(pixels.shape), self.scale, zeros, self.bias, *self.where),
            *(1.0, 0, written, "none", [], ""),
        ).to(self.dtype)
        if self.multiplies:
            # Not a view, so that the quantizer behind may use its memory.
            result = torch.ops.aten._unsafe_view(result.permute(0, 2, 3, 1), [*codes.shape[:-1], len(self.scale)])
        return result

    def _pack(self, shape: torch.Size) -> Tensor:
        if self._packed is None or self._packed[0] != shape:
            integers = self.integers[:, :, None, None] if self.multiplies else self.integers
            # The layout does not depend on the scales, of which packing reads one after the other.
            packed = torch.ops.onednn.qconv_prepack.default(
                integers, integers.new_ones((), dtype=torch.float32), *self.input, *self.where, list(shape)
            )
            self._packed = shape, packed
        return self._packed[1]


class _IntegerProduct(torch.autograd.Function):
    """y = x ∗ w + b, a dense convolution or a matrix product, from the codes of x and w.

    Gradients: ∂L/∂x, ∂L/∂w and ∂L/∂b of the float operator at the same values. x: on the grid of ``source``; w = c · 2^exponent,
    exponent [O]. geometry: stride, padding and dilation, or None for a matrix product. dtype: of the result and of the backward
    pass, in bfloat16 too exactly x and w.
    """

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        source: ActivationQuantizer,
        exponent: Tensor,
        geometry: Sequence[Sequence[int]] | None,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.geometry, ctx.dtype = geometry, dtype
        ctx.dtypes = values.dtype, weight.dtype
        ctx.biases = None if bias is None else len(bias)
        bias = None if bias is None else bias.to(dtype).float()  # as autocast would have it
        ctx.offset = source.int8_offset - 128
        codes = codes_of_multiples(values, source.exponent, ctx.offset, torch.uint8)
        product = PackedProduct(weight, bias, source, exponent, geometry, dtype)
        ctx.save_for_backward(codes, source.exponent.clone(), product.integers, exponent)
        return product(codes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        codes, input_exponent, integers, exponent = ctx.saved_tensors
        values = multiples_of_codes(codes, input_exponent, ctx.offset, ctx.dtype)
        return product_gradients(ctx, gradient, values, weight_of_integers(integers, exponent, ctx.dtype))


def product_gradients(ctx: Any, gradient: Tensor, values: Tensor, weight: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the float operator at these values, for the seven inputs of a product on integers.

    ctx: geometry, stride, padding and dilation of a convolution or None; dtypes, of the two gradients; biases, how many or None.
    """
    needs_input, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    of_input = of_weight = of_bias = None
    if ctx.geometry is None:
        rows = gradient.reshape(-1, gradient.shape[-1])
        if needs_input:
            # Not a view, so that the quantizer behind may use its memory.
            of_input = torch.ops.aten._unsafe_view(
                torch.mm(rows, weight, out=passing_like(rows, shape=(len(rows), weight.shape[1]))), values.shape
            )
        if needs_weight:
            empty = kept_like if rows.dtype == ctx.dtypes[1] else passing_like
            of_weight = empty(rows, shape=(rows.shape[1], values.shape[-1]))
            torch.mm(rows.t(), values.reshape(-1, values.shape[-1]), out=of_weight)
        if needs_bias:
            of_bias = rows.sum(0)
    else:
        of_input, of_weight, of_bias = torch.ops.aten.convolution_backward(
            gradient,
            values,
            weight,
            [ctx.biases] if needs_bias else None,
            *map(list, ctx.geometry),
            False,
            [0, 0],
            1,
            [needs_input, needs_weight, needs_bias],
        )
    of_input = None if of_input is None else converted(of_input, ctx.dtypes[0], passing_like)
    of_weight = None if of_weight is None else converted(of_weight, ctx.dtypes[1], kept_like)
    of_bias = None if of_bias is None else of_bias.float()
    return of_input, of_weight, of_bias, None, None, None, None


def _geometry(layer: QuantizedLayer) -> Sequence[Sequence[int]] | None:
    """Stride, padding and dilation of a convolution; None for a matrix product."""
    if not isinstance(layer, QuantizedConv2d):
        return None
    return layer.stride, layer.padding, layer.dilation  # type: ignore[return-value]


def _is_worth_it(layer: QuantizedLayer, elements: int, weights: int) -> bool:
    """Whether a product is large enough for ``elements`` of the input, each of whose channels has so many weights."""
    strides = math.prod(layer.stride) if isinstance(layer, QuantizedConv2d) else 1
    gain = GAIN_OF_VNNI if kernels.multiplies_exactly(128) else 1
    of_an_element = gain * weights // strides
    return of_an_element >= LEAST_OF_AN_ELEMENT and elements * of_an_element >= LEAST_MULTIPLICATIONS


def _is_exact(layer: QuantizedConv2d | QuantizedLinear) -> bool:
    """Whether this processor's kernels are, for weights as large as the layer's may be."""
    magnitude = 128 if layer.scheme.bits == 8 else kernels.SAFE_MAGNITUDE
    # Depthwise kernels are no quicker than float ones; padding may be a word.
    dense = isinstance(layer, QuantizedLinear) or (layer.groups == 1 and isinstance(layer.padding, tuple))
    return dense and kernels.convolves_exactly("dense", magnitude)
