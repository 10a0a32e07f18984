"""Convolution and matrix product of codes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lowprec.integer.operators.base import Grid, IntegerOperator
from lowprec.numerics.clusters import ClusterLayout
from lowprec.numerics.effective_codes import effective_codes, plane_count
from lowprec.numerics.fixed_point import dequantize, shift_round_half_even


class IntegerLayer(IntegerOperator, ABC):
    """Convolution or matrix product of codes: int32 sums of code products, plus an int32 bias, then a shift.

    codes: int8, the weight's shape; mantissas: int8 [O, G, 1, 1 or P], of two ternary planes [2, O, G, 1, 1 or P], absent for
    8-bit weights; exponents: int8 [O]; bias: int32 [O] in units of 2^(input exponent + weight exponent). Requantization:
    shift_round_half_even(sum, output exponent − input exponent − weight exponent), clamped to the output's grid (which is
    where a ReLU happens). ``six`` is ReLU6's 6 in output codes. shortcut: the grid of a second input, added to the sums before
    their one requantization (the residual form ``accumulator``). flatten: the result is [B, all the rest], as a convolution's
    may be that gives logits.

    Raises:
        ValueError: the sums of a channel could leave int32, whatever the input: |bias| + Σ|c| · largest input code ≥ 2^31.
    """

    codes: Tensor
    mantissas: Tensor | None
    exponents: Tensor
    bias: Tensor
    effective: Tensor

    def __init__(
        self,
        codes: Tensor,
        mantissas: Tensor | None,
        exponents: Tensor,
        bias: Tensor,
        bits: int,
        cluster_size: int,
        layout: str,
        input: Grid,
        output: Grid | None,
        six: int | None = None,
        shortcut: Grid | None = None,
        flatten: bool = False,
    ) -> None:
        super().__init__(output)
        self.bits = bits
        self.layout = ClusterLayout(tuple(codes.shape), cluster_size, layout)
        self.input = input
        self.six = six
        self.shortcut = shortcut
        self.flatten = flatten
        self.register_buffer("codes", codes)
        self.register_buffer("mantissas", mantissas)
        self.register_buffer("exponents", exponents)
        self.register_buffer("bias", bias)
        self.register_buffer("effective", self._effective(), persistent=False)
        bound = self.sum_bound
        if bound >= 1 << 31:
            raise ValueError(f"sums of up to {bound} overflow 32 bits: too many weights a channel, or too large a bias")
        if shortcut is not None:
            self._check_shortcut(shortcut)

    def _effective(self) -> Tensor:
        if self.mantissas is None:
            return self.codes.to(torch.int32)
        w_OGNP = self.layout.split(self.codes.double())
        return self.layout.merge(effective_codes(w_OGNP, self.mantissas.double(), self.bits)).to(torch.int32)

    @property
    def planes(self) -> int:
        """Ternary planes of the weights: 1 or 2; 1 also where they have more bits."""
        return plane_count(self.mantissas)

    @property
    def sum_bound(self) -> int:
        """The largest magnitude that a sum can reach: max over channels of |bias| + Σ|c| · largest input code."""
        weights = self.effective.flatten(1).abs().sum(1, dtype=torch.int64) * self.input.largest
        return int((weights + self.bias.to(torch.int64).abs()).max())

    @property
    def sum_exponents(self) -> Tensor:
        """Exponents [O] (int32) of the sums: input exponent + weight exponent."""
        return self.exponents.to(torch.int32) + self.input.exponent

    @abstractmethod
    def sums(self, codes: Tensor) -> Tensor:
        """The int32 sums without the bias."""

    def forward(self, codes: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """int32 codes (and a shortcut's, of the result's shape) -> int32 codes, or the sums where there is no grid."""
        per_channel = self._per_channel(codes)
        # Cannot overflow int32: the constructor has checked the largest sum that any input can give.
        sums = self.sums(codes) + self.bias.view(per_channel)
        exponents = self.sum_exponents.view(per_channel)
        if self.output is None:
            return sums.flatten(1) if self.flatten else sums
        if self.shortcut is not None:
            assert shortcut is not None
            common = exponents.clamp(max=self.shortcut.exponent)
            # In int64, at the finer of the two exponents: :meth:`_check_shortcut` bounds the distance.
            sums = (sums.to(torch.int64) << (exponents - common)) + (shortcut << (self.shortcut.exponent - common))
            exponents = common
        # By 16 places to the left all codes but 0 saturate; by more, sums with a shortcut would leave 64 bits.
        shift = (self.output.exponent - exponents).clamp(min=-16)
        shifted = shift_round_half_even(sums, shift)
        high = self.output.high if self.six is None else min(self.six, self.output.high)
        return shifted.clamp(self.output.low, high).to(torch.int32)

    def _check_shortcut(self, shortcut: Grid) -> None:
        """Float32 kernels hold sums of both exactly within 15 places: see :class:`IntegerAdd`."""
        distances = (shortcut.exponent - self.sum_exponents).abs()
        if int(distances.max()) > 15:
            raise ValueError(f"the shortcut's exponent lies {int(distances.max())} from the sums'; at most 15 is exact")

    def _per_channel(self, codes: Tensor) -> tuple[int, ...]:
        """Shape in which values [O] broadcast against the sums: channels are on axis 1."""
        return (1, -1, *[1] * (codes.dim() - 2))

    def attributes(self) -> dict[str, Any]:
        return {
            **super().attributes(),
            "bits": self.bits,
            "cluster_size": self.layout.cluster_size,
            "layout": self.layout.kind,
            "input": asdict(self.input),
            "six": self.six,
            "shortcut": None if self.shortcut is None else asdict(self.shortcut),
            "flatten": self.flatten,
        }


class IntegerConv2d(IntegerLayer):
    """:class:`IntegerLayer` as a convolution, grouped and depthwise too; stride, padding, dilation are (height, width)."""

    KIND = "convolution"

    def __init__(
        self,
        *arguments: Any,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
        **keywords: Any,
    ) -> None:
        super().__init__(*arguments, **keywords)
        self.stride = tuple(stride)
        self.padding = tuple(padding)
        self.dilation = tuple(dilation)
        self.groups = groups

    def sums(self, codes: Tensor) -> Tensor:
        # torch has no dilated convolution of integers: the gaps are filled with zeros instead.
        weight, (rows, columns) = self.effective, self.dilation
        if (rows, columns) != (1, 1):
            height, width = ((side - 1) * gap + 1 for side, gap in zip(weight.shape[2:], self.dilation, strict=True))
            spread = weight.new_zeros(*weight.shape[:2], height, width)
            spread[:, :, ::rows, ::columns] = weight
            weight = spread
        return functional.conv2d(codes, weight, None, self.stride, self.padding, 1, self.groups)

    def attributes(self) -> dict[str, Any]:
        geometry = {name: list(getattr(self, name)) for name in ("stride", "padding", "dilation")}
        return {**super().attributes(), **geometry, "groups": self.groups}


class IntegerMultiplyAdd(IntegerConv2d):
    """A batch norm that no convolution could take in: an 8-bit factor and a bias for each channel.

    A depthwise 1×1 convolution in all but name: codes [C, 1, 1, 1], stride 1, no padding.
    """

    KIND = "multiply_add"

    def sums(self, codes: Tensor) -> Tensor:
        return codes * self.effective.view(1, -1, 1, 1)


class IntegerLinear(IntegerLayer):
    """:class:`IntegerLayer` as a matrix product over the last axis, [..., I] -> [..., O]."""

    KIND = "linear"

    def _per_channel(self, codes: Tensor) -> tuple[int, ...]:
        return (-1,)

    def sums(self, codes: Tensor) -> Tensor:
        return codes @ self.effective.t()


def logits_of(sums: Tensor, operator: IntegerOperator) -> Tensor:
    """Float values of the network's output: 32-bit sums [B, O] by their channels' exponents, or codes by their grid's."""
    if operator.output is not None:
        return dequantize(sums, torch.tensor(operator.output.exponent, dtype=torch.int32, device=sums.device))
    assert isinstance(operator, IntegerLayer)
    return dequantize(sums, sum_exponents_like(sums, operator))


def sum_exponents_like(sums: Tensor, layer: IntegerLayer) -> Tensor:
    """The exponents of a layer's sums, in a shape that broadcasts against them."""
    exponents = layer.sum_exponents
    if isinstance(layer, IntegerLinear):
        return exponents
    return exponents.repeat_interleave(sums.shape[1] // len(exponents)).view(1, -1, *[1] * (sums.dim() - 2))
