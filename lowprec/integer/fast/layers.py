"""Convolutions and matrix products on bytes: oneDNN's integer kernels where they are exact here, else float ones that are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lowprec.integer.fast.arithmetic import LayerArithmetic, Method, arithmetic_of
from lowprec.integer.fast.storage import channels_last, zero_point
from lowprec.integer.operators import IntegerConv2d, IntegerLinear
from lowprec.numerics import kernels
from lowprec.numerics.fixed_point import round_half_even_

# So many products of any 8-bit codes sum up to less than 2^24.
PART = 512


class FastConvolution:
    """An :class:`IntegerConv2d` on bytes [B, C, H, W] -> bytes, or exact float sums where it has no output grid.

    ``path`` names what runs: "integer", "integer twice as wide" (weights in two halves) or "float64".
    ``reuse``: whether the shortcut's memory may be overwritten.
    """

    def __init__(self, layer: IntegerConv2d, reuse: bool = False) -> None:
        self.layer = layer
        self.reuse = reuse
        arithmetic = arithmetic_of(layer, padded=any(layer.padding))
        self.arithmetic = arithmetic
        self.geometry = (list(layer.stride), list(layer.padding), list(layer.dilation), layer.groups)
        self.path = self._choose(layer)
        if self.path.startswith("integer"):
            self._prepare_integer()
        else:
            self._prepare_float()

    def _choose(self, layer: IntegerConv2d) -> str:
        arithmetic = self.arithmetic
        kind = _kind(layer)
        if arithmetic.method is Method.DOUBLE:
            return "float64"
        magnitude = kernels.SAFE_MAGNITUDE if arithmetic.magnitude <= kernels.SAFE_MAGNITUDE else 128
        if kernels.convolves_exactly(kind, magnitude):
            return "integer"
        wide = "dense" if layer.groups == 1 else "grouped"
        return "integer twice as wide" if kernels.convolves_exactly(wide, kernels.SAFE_MAGNITUDE) else "float64"

    def _prepare_integer(self) -> None:
        arithmetic = self.arithmetic
        weight = arithmetic.weight
        if self.path != "integer":
            weight = torch.cat(halves(weight), dim=1)
        self.weight = weight.to(torch.int8)
        self.packed: tuple[torch.Size, Tensor] | None = None
        self.scale = arithmetic.scale
        self.weight_zeros = torch.zeros(len(self.scale), dtype=torch.int32)
        self.bias = arithmetic.scaled_bias
        self.fused = arithmetic.method is Method.FUSED
        # oneDNN's sum takes no clamp: with a shortcut it comes after.
        clamps = self.fused and arithmetic.clamps and arithmetic.shortcut is None
        output: tuple[Any, ...] = (arithmetic.zero_out, torch.uint8) if self.fused else (0, torch.float32)
        bounds = [float(arithmetic.low), float(arithmetic.high)] if clamps else []
        # Clamping before or after rounding is the same: the ends are whole numbers.
        self.tail: tuple[Any, ...] = (*self.geometry, 1.0, *output, "hardtanh" if clamps else "none", bounds, "")
        if self.layer.shortcut is not None:
            assert arithmetic.shortcut is not None
            shortcut = (2.0**-arithmetic.shortcut, zero_point(self.layer.shortcut))
            self.tail = (*self.geometry, 1.0, *output, *shortcut, "sum", 1.0, None, [], None)

    def _prepare_float(self) -> None:
        arithmetic = self.arithmetic
        scale = arithmetic.scale.double()
        # Not float32, although often exact: oneDNN may be told to compute that in bfloat16.
        self.float_weight = channels_last(arithmetic.weight * scale.view(-1, 1, 1, 1))
        self.bias = arithmetic.bias * scale

    def __call__(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        arithmetic = self.arithmetic
        if not self.path.startswith("integer"):
            return self._float(x, shortcut)
        if self.path != "integer":
            x = _each_group_twice(x, self.layer.groups)
        arguments = (x, 1.0, arithmetic.zero_in, self._packed(x), self.scale, self.weight_zeros)
        if shortcut is not None:
            target = channels_last(shortcut)
            if not self.reuse and target is shortcut:
                target = target.clone()
            total: Tensor = torch.ops.onednn.qconv2d_pointwise.binary(*arguments, target, self.bias, *self.tail)
            return total.clamp_(*arithmetic.byte_range) if arithmetic.clamps else total
        result: Tensor = torch.ops.onednn.qconv2d_pointwise.default(*arguments, self.bias, *self.tail)
        return result if self.fused else self._finish(result)

    def _float(self, x: Tensor, shortcut: Tensor | None) -> Tensor:
        arithmetic = self.arithmetic
        values = x.double()
        if arithmetic.zero_in:
            values.sub_(arithmetic.zero_in)
        sums = functional.conv2d(values, self.float_weight, self.bias, *self.geometry)
        if shortcut is not None:
            assert self.layer.shortcut is not None
            assert arithmetic.shortcut is not None
            sums += (shortcut.double() - zero_point(self.layer.shortcut)) * 2.0**-arithmetic.shortcut
        return self._finish(sums)

    def _finish(self, sums: Tensor) -> Tensor:
        if self.arithmetic.sums_only and self.layer.flatten:
            return sums.flatten(1)
        return rounded(sums, self.arithmetic)

    def _packed(self, x: Tensor) -> Tensor:
        """The weights in the layout that oneDNN wants for images of this size: with another's it converts at every call."""
        shape = x.shape[1:]
        if self.packed is None or self.packed[0] != shape:
            packed = torch.ops.onednn.qconv_prepack.default(
                self.weight, self.scale, 1.0, self.arithmetic.zero_in, *self.geometry, list(x.shape)
            )
            self.packed = (shape, packed)
        return self.packed[1]


class FastLinear:
    """An :class:`IntegerLinear` on bytes [..., I] -> bytes [..., O], or exact float sums where it has no output grid.

    ``path`` as in :class:`FastConvolution`, and "integer in parts": inputs in slices whose sums are exact in float32 each.
    """

    def __init__(self, layer: IntegerLinear) -> None:
        arithmetic = arithmetic_of(layer, padded=False)
        self.arithmetic = arithmetic
        self.fused = arithmetic.method is Method.FUSED
        weight = arithmetic.weight
        self.twice = arithmetic.magnitude > kernels.SAFE_MAGNITUDE and not kernels.multiplies_exactly(128)
        self.path = "integer twice as wide" if self.twice else "integer"
        if not kernels.multiplies_exactly(kernels.SAFE_MAGNITUDE):
            self.path, self.float_weight = "float64", weight.double()
            return
        self.in_parts = arithmetic.method is Method.DOUBLE
        if self.in_parts:
            self.path = "integer in parts"
        slices = weight.split(PART, dim=1) if self.in_parts else (weight,)
        self.parts = [self._packed(part) for part in slices]
        self.weight_zeros = torch.zeros(len(weight), dtype=torch.int32)
        # Sums of parts stay whole: bias and shift come after.
        self.scale = torch.ones(len(weight)) if self.in_parts else arithmetic.scale
        self.bias = None if self.in_parts else arithmetic.scaled_bias
        output: tuple[Any, ...] = (arithmetic.zero_out, torch.uint8) if self.fused else (0, torch.float32)
        self.tail = (1.0, *output, "none", [], "")

    def _packed(self, weight: Tensor) -> Tensor:
        if self.twice:
            weight = torch.cat(halves(weight), dim=1)
        packed: Tensor = torch.ops.onednn.qlinear_prepack.default(weight.to(torch.int8).contiguous(), None)
        return packed

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return self._rows(rows).view(*x.shape[:-1], -1)

    def _rows(self, x: Tensor) -> Tensor:
        arithmetic = self.arithmetic
        if self.path == "float64":
            return self._shifted((x.double() - arithmetic.zero_in) @ self.float_weight.t())
        if self.in_parts:
            slices = zip(x.split(PART, dim=1), self.parts, strict=True)
            total = torch.stack([self._product(part.contiguous(), weight) for part, weight in slices])
            return self._shifted(total.sum(0, dtype=torch.float64))
        result = self._product(x.contiguous(), self.parts[0])
        if not self.fused:
            return rounded(result, arithmetic)
        return result.clamp_(*arithmetic.byte_range) if arithmetic.clamps else result

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.twice:
            x = torch.cat((x, x), dim=1)
        result: Tensor = torch.ops.onednn.qlinear_pointwise.default(
            x, 1.0, self.arithmetic.zero_in, weight, self.scale, self.weight_zeros, self.bias, *self.tail
        )
        return result

    def _shifted(self, sums: Tensor) -> Tensor:
        """Whole sums, float64 and without bias -> bytes."""
        arithmetic = self.arithmetic
        return rounded((sums + arithmetic.bias.double()) * arithmetic.scale.double(), arithmetic)


def rounded(values: Tensor, arithmetic: LayerArithmetic) -> Tensor:
    """Exact scaled sums (float, changed in place) -> bytes; the sums themselves where they are the network's output."""
    if arithmetic.sums_only:
        return values
    round_half_even_(values).clamp_(arithmetic.low, arithmetic.high)
    if arithmetic.zero_out:
        values.add_(arithmetic.zero_out)
    return values.to(torch.uint8)


def halves(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Two weights of magnitudes up to 64 whose sum is an 8-bit weight."""
    first = weight.clamp(-kernels.SAFE_MAGNITUDE, kernels.SAFE_MAGNITUDE)
    return first, weight - first


def _each_group_twice(x: Tensor, groups: int) -> Tensor:
    """[B, C, H, W] -> [B, 2C, H, W], channels_last: the channels of each group, and once more behind them."""
    x_BHWC = channels_last(x).permute(0, 2, 3, 1)
    split = x_BHWC.unflatten(3, (groups, -1))
    return torch.cat((split, split), dim=4).flatten(3).permute(0, 3, 1, 2)


def _kind(layer: IntegerConv2d) -> str:
    if layer.groups == 1:
        return "dense"
    outputs, inputs_per_group = layer.codes.shape[:2]
    return "depthwise" if inputs_per_group == 1 and outputs == layer.groups else "grouped"
