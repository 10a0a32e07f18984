"""Integer operators: codes in, codes out, int32 tensors of 8-bit values; no floating-point arithmetic between them.

Obviously right rather than fast. Each operator's ``attributes`` are what a file needs, beside a layer's tensors, to build
it again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowprec.numerics.clusters import ClusterLayout
from lowprec.numerics.effective_codes import effective_codes
from lowprec.numerics.fixed_point import (
    CodeRange,
    dequantize,
    divide_round_half_even,
    quantize,
    shift_round_half_even,
)
from lowprec.numerics.pooling import window_sizes


@dataclass(frozen=True)
class Grid:
    """A tensor's dynamic fixed point: value = code · 2^exponent, low ≤ code ≤ high."""

    exponent: int
    low: int
    high: int

    @property
    def signed(self) -> bool:
        """Whether codes can be negative."""
        return self.low < 0

    @property
    def largest(self) -> int:
        """The largest magnitude of a code."""
        return max(-self.low, self.high)


class IntegerOperator(nn.Module):
    """An operator of an integer model. ``output`` is the grid of its codes; None for the network's 32-bit sums."""

    KIND: ClassVar[str]

    def __init__(self, output: Grid | None) -> None:
        super().__init__()
        self.output = output

    def attributes(self) -> dict[str, Any]:
        """Constructor arguments other than tensors, as JSON can hold them."""
        return {"output": None if self.output is None else asdict(self.output)}


class IntegerInput(IntegerOperator):
    """Float image -> codes: clamp(round_half_even(x / 2^e), low, high)."""

    KIND = "input"
    output: Grid

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] floats -> int32 codes."""
        exponent = torch.tensor(self.output.exponent, dtype=torch.int32, device=images.device)
        return quantize(images.float(), exponent, CodeRange(self.output.low, self.output.high)).to(torch.int32)


class IntegerLayer(IntegerOperator, ABC):
    """Convolution or matrix product of codes: int32 sums of code products, plus an int32 bias, then a shift.

    codes: int8, the weight's shape; mantissas: int8 [O, G, 1, 1 or P], absent for 8-bit weights; exponents: int8 [O];
    bias: int32 [O] in units of 2^(input exponent + weight exponent). Requantization: shift_round_half_even(sum, output
    exponent − input exponent − weight exponent), clamped to the output's grid (which is where a ReLU happens). ``six`` is
    ReLU6's 6 in output codes.

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
    ) -> None:
        super().__init__(output)
        self.bits = bits
        self.layout = ClusterLayout(tuple(codes.shape), cluster_size, layout)
        self.input = input
        self.six = six
        self.register_buffer("codes", codes)
        self.register_buffer("mantissas", mantissas)
        self.register_buffer("exponents", exponents)
        self.register_buffer("bias", bias)
        self.register_buffer("effective", self._effective(), persistent=False)
        bound = self.sum_bound
        if bound >= 1 << 31:
            raise ValueError(f"sums of up to {bound} overflow 32 bits: too many weights a channel, or too large a bias")

    def _effective(self) -> Tensor:
        if self.mantissas is None:
            return self.codes.to(torch.int32)
        w_OGNP = self.layout.split(self.codes.double())
        return self.layout.merge(effective_codes(w_OGNP, self.mantissas.double(), self.bits)).to(torch.int32)

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

    def forward(self, codes: Tensor) -> Tensor:
        """int32 codes -> int32 codes, channels on axis 1; the sums themselves where there is no output grid."""
        per_channel = (1, -1, *[1] * (codes.dim() - 2))
        # Cannot overflow int32: the constructor has checked the largest sum that any input can give.
        sums = self.sums(codes) + self.bias.view(per_channel)
        if self.output is None:
            return sums
        shifted = shift_round_half_even(sums, (self.output.exponent - self.sum_exponents).view(per_channel))
        high = self.output.high if self.six is None else min(self.six, self.output.high)
        return shifted.clamp(self.output.low, high).to(torch.int32)

    def attributes(self) -> dict[str, Any]:
        return {
            **super().attributes(),
            "bits": self.bits,
            "cluster_size": self.layout.cluster_size,
            "layout": self.layout.kind,
            "input": asdict(self.input),
            "six": self.six,
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


class IntegerLinear(IntegerLayer):
    """:class:`IntegerLayer` as a matrix product, [B, I] -> [B, O]."""

    KIND = "linear"

    def sums(self, codes: Tensor) -> Tensor:
        return codes @ self.effective.t()


class IntegerAdd(IntegerOperator):
    """Residual add: both codes at the smaller exponent, their sum shifted to the output's; clamping does the ReLU."""

    KIND = "add"
    output: Grid

    def __init__(self, left: Grid, right: Grid, output: Grid, six: int | None = None) -> None:
        super().__init__(output)
        self.left = left
        self.right = right
        self.six = six
        distance = abs(left.exponent - right.exponent)
        # Codes of 8 bits shifted by at most 15 places: sums stay below 2^24, exact in float32 kernels too.
        if distance > 15:
            raise ValueError(f"the operands' exponents lie {distance} apart; at most 15 can be added exactly")
        above = output.exponent - min(left.exponent, right.exponent)
        # Kernels add the output's zero point, 2^7 of its units, to the sum in float32 before they round: 24 bits in all.
        if above > 16:
            raise ValueError(
                f"the output's exponent lies {above} above an operand's; at most 16 can be rounded exactly"
            )

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Two int32 tensors of codes of equal shape -> int32 codes."""
        exponent = min(self.left.exponent, self.right.exponent)
        total = (left << (self.left.exponent - exponent)) + (right << (self.right.exponent - exponent))
        shifted = shift_round_half_even(total, self.output.exponent - exponent)
        high = self.output.high if self.six is None else min(self.six, self.output.high)
        return shifted.clamp(self.output.low, high).to(torch.int32)

    def attributes(self) -> dict[str, Any]:
        return {**super().attributes(), "left": asdict(self.left), "right": asdict(self.right), "six": self.six}


class IntegerAveragePool(IntegerOperator):
    """Average pooling: integer window sums, one division by the window's size, rounded half to even.

    kernel_size None pools globally; the other arguments are those of ``nn.AvgPool2d``.
    """

    KIND = "average_pool"
    output: Grid

    def __init__(
        self,
        input: Grid,
        output: Grid,
        kernel_size: tuple[int, int] | None,
        stride: tuple[int, int] | None,
        padding: tuple[int, int],
        ceil_mode: bool,
        count_include_pad: bool,
        keep_axes: bool,
    ) -> None:
        super().__init__(output)
        distance = abs(input.exponent - output.exponent)
        # Shifted by more, the averages of 8-bit codes would all be zero or out of range; sums stay far below 2^63.
        if distance > 31:
            raise ValueError(f"the exponents lie {distance} apart; averages can be shifted by at most 31 places")
        self.input = input
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding
        self.ceil_mode = ceil_mode
        self.count_include_pad = count_include_pad
        self.keep_axes = keep_axes

    def forward(self, codes: Tensor) -> Tensor:
        """[B, C, H, W] int32 codes -> int32 codes [B, C, H', W'], or [B, C] without keep_axes."""
        if self.kernel_size is None:
            totals = codes.sum((2, 3), keepdim=self.keep_axes, dtype=torch.int64)
            sizes = torch.tensor(codes.shape[2] * codes.shape[3], device=codes.device)
        else:
            totals, sizes = self._windows(codes)
        left = self.input.exponent - self.output.exponent
        averages = divide_round_half_even(totals << max(left, 0), sizes << max(-left, 0))
        return averages.clamp(self.output.low, self.output.high).to(torch.int32)

    def _windows(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        assert self.kernel_size is not None
        assert self.stride is not None
        # Sizes are small whole numbers, exact in float; their shape tells how many windows there are.
        ones = torch.ones(1, 1, *codes.shape[2:], device=codes.device)
        sizes = window_sizes(
            ones, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad
        ).to(torch.int64)
        height, width = (
            max(0, (windows - 1) * stride + kernel - side - padding)
            for windows, stride, kernel, side, padding in zip(
                sizes.shape[2:], self.stride, self.kernel_size, codes.shape[2:], self.padding, strict=True
            )
        )
        padded = functional.pad(codes, (self.padding[1], width, self.padding[0], height))
        windows = padded.unfold(2, self.kernel_size[0], self.stride[0]).unfold(3, self.kernel_size[1], self.stride[1])
        return windows[:, :, : sizes.shape[2], : sizes.shape[3]].sum((-2, -1), dtype=torch.int64), sizes

    def attributes(self) -> dict[str, Any]:
        names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "keep_axes")
        return {**super().attributes(), "input": asdict(self.input), **{name: getattr(self, name) for name in names}}


class IntegerMaxPool(IntegerOperator):
    """Max pooling of codes; the arguments are those of ``nn.MaxPool2d``, as (height, width)."""

    KIND = "max_pool"
    output: Grid

    def __init__(
        self,
        output: Grid,
        kernel_size: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        ceil_mode: bool,
    ) -> None:
        super().__init__(output)
        self.kernel_size = tuple(kernel_size)
        self.stride = tuple(stride)
        self.padding = tuple(padding)
        self.dilation = tuple(dilation)
        self.ceil_mode = ceil_mode

    def forward(self, codes: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H', W'], int32."""
        return functional.max_pool2d(codes, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)

    def attributes(self) -> dict[str, Any]:
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
        return {**super().attributes(), **{name: getattr(self, name) for name in names}}


class IntegerReLU(IntegerOperator):
    """A ReLU of its own, on codes; ``six`` is ReLU6's 6 in codes."""

    KIND = "relu"
    output: Grid

    def __init__(self, output: Grid, six: int | None = None) -> None:
        super().__init__(output)
        self.six = six

    def forward(self, codes: Tensor) -> Tensor:
        """Any shape, int32."""
        return codes.clamp(0, self.output.high if self.six is None else min(self.six, self.output.high))

    def attributes(self) -> dict[str, Any]:
        return {**super().attributes(), "six": self.six}


class IntegerFlatten(IntegerOperator):
    """[B, ...] -> [B, all the rest]."""

    KIND = "flatten"
    output: Grid

    def forward(self, codes: Tensor) -> Tensor:
        """int32 codes, unchanged but in shape."""
        return codes.flatten(1)


OPERATORS: dict[str, type[IntegerOperator]] = {
    operator.KIND: operator
    for operator in (
        IntegerInput,
        IntegerConv2d,
        IntegerLinear,
        IntegerAdd,
        IntegerAveragePool,
        IntegerMaxPool,
        IntegerReLU,
        IntegerFlatten,
    )
}


def logits_of(sums: Tensor, operator: IntegerOperator) -> Tensor:
    """Float values of the network's output: 32-bit sums [B, O] by their channels' exponents, or codes by their grid's."""
    if operator.output is not None:
        return dequantize(sums, torch.tensor(operator.output.exponent, dtype=torch.int32, device=sums.device))
    assert isinstance(operator, IntegerLayer)
    return dequantize(sums, operator.sum_exponents.view(1, -1, *[1] * (sums.dim() - 2)))
