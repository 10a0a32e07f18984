"""Fake-quant convolution and linear layers: one module is one integer operator, with its batch norm and activation.

In training: quantized unfolded weights, batch norm on batch statistics, activation, quantizer. In evaluation: weights and
bias with the batch norm folded in, rounded just as the integer model holds them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowprec.layers.activations import ActivationQuantizer, activate
from lowprec.layers.training_norm import normalize
from lowprec.layers.weights import FoldedWeights, WeightQuantizer, bias_exponent_floor
from lowprec.numerics.fixed_point import MINIMUM_EXPONENT, dequantize, quantize_to_grid
from lowprec.recipe import WeightScheme

if TYPE_CHECKING:
    from typing_extensions import Self

# A sum that is shifted by at most 15 places and then lies in the range of 8-bit codes is below 2^24, bias and zero point
# included: kernels that hold it in float32 before they round are exact. Larger sums are clamped whatever they are.
SHIFT_LIMIT = 15


class FoldedLayer(NamedTuple):
    """Weights and bias of a layer as the integer model has them; bias [O]: float64, on the grid of 2^(e_x + e_o)."""

    weights: FoldedWeights
    bias: Tensor


class QuantizedLayer(nn.Module, ABC):
    """What convolution and linear layers share.

    name: its place in the model, for messages. norm: the batch norm that follows, or None. activation: "", "relu" or
    "relu6". quantizer: of the output; None for the network's logits, which stay 32-bit sums. source: the quantizer of the
    input, whose exponent the bias needs. shortcut: that of a second input, which is added before the activation and the one
    rounding (the residual form ``accumulator``). flatten: the result is [B, all the rest].
    """

    def __init__(
        self,
        operator: nn.Conv2d | nn.Linear,
        scheme: WeightScheme,
        source: ActivationQuantizer,
        norm: nn.BatchNorm2d | nn.SyncBatchNorm | None = None,
        activation: str = "",
        quantizer: ActivationQuantizer | None = None,
        name: str = "",
        shortcut: ActivationQuantizer | None = None,
        flatten: bool = False,
    ) -> None:
        super().__init__()
        self.name = name
        self.scheme = scheme
        self.weight = operator.weight
        self.bias = operator.bias
        self.norm = norm
        self.activation = activation
        self.quantizer = quantizer
        self.quantizing = True
        self.flatten = flatten
        # In a tuple, so that the producers' quantizers are referred to and not registered a second time.
        self._sources = (source, shortcut)
        self.weight_quantizer = WeightQuantizer(tuple(operator.weight.shape), scheme)
        self.weight_quantizer.to(operator.weight.device)
        self.weight_quantizer.solve(operator.weight, name)
        # Another way to compute operate(values, weight, bias), from the exponents of the weight too: see use_integer_kernels.
        self.product: Callable[[QuantizedLayer, Tensor, Tensor, Tensor, Tensor | None], Tensor | None] | None = None
        self._keeping = False
        self._kept: tuple[Tensor, Tensor, Tensor] | None = None

    @abstractmethod
    def operate(self, values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution or matrix product with that weight and bias."""

    @abstractmethod
    def columns(self, values: Tensor) -> Tensor:
        """What each weight of an output channel is multiplied with: x_gKN, [groups, I · kernel, outputs of one channel]."""

    def by_image(self, output: Tensor) -> Tensor:
        """An output of :meth:`operate` as [B, O, positions], without a copy; a linear layer's B is 1."""
        return output.flatten(2)

    def by_channel(self, output: Tensor) -> Tensor:
        """An output of :meth:`operate` as [O, positions], in the order of the columns."""
        return self.by_image(output).transpose(0, 1).flatten(1)

    @property
    def source(self) -> ActivationQuantizer:
        """The quantizer of the input tensor."""
        return self._sources[0]

    @property
    def shortcut(self) -> ActivationQuantizer | None:
        """The quantizer of the second input, if there is one."""
        return self._sources[1]

    def forward(self, values: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """Convolution: [B, I, H, W] -> [B, O, H', W']; linear: [..., I] -> [..., O]; on the output quantizer's grid.

        shortcut: of the result's shape, for layers that take one.
        """
        if self.quantizer is None:
            return self.unquantized(values, shortcut)
        output, norm = self._multiplied_and_norm(values)
        if norm is not None and self.quantizer._forward_pre_hooks:
            # Who watches what is quantized is to see it.
            output, norm = normalize(norm, output), None
        # No operator, batch norm or sum keeps its result for the backward pass.
        output = self.quantizer(output, self.activation, overwrite=True, norm=norm, addend=shortcut)
        return output.flatten(1) if self.flatten else output

    def unquantized(self, values: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """The values that the output quantizer rounds."""
        return self.activated(self.normalized(values), shortcut)

    def activated(self, output: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """What :meth:`normalized` gave, with the second input, if there is one, and behind the activation function.

        The memory of ``output`` is used.
        """
        output = activate(output if shortcut is None else output + shortcut, self.activation, overwrite=True)
        return output.flatten(1) if self.flatten else output

    def normalized(self, values: Tensor) -> Tensor:
        """The output before the activation function."""
        output, norm = self._multiplied_and_norm(values)
        return output if norm is None else normalize(norm, output)

    def before_norm(self, values: Tensor) -> Tensor:
        """The output before batch norm, with quantized unfolded weights (full-precision ones while not quantizing)."""
        if not self.quantizing:
            return self.operate(values, self.weight, self.bias)
        return self._multiplied(values, *self.weight_quantizer.with_exponents(self.weight), self.bias)

    def gain_and_offset(self) -> tuple[Tensor, Tensor]:
        """What the batch norm multiplies each output channel by, and then adds, [O] each, float64.

        Raises:
            ValueError: it has no running statistics.
        """
        norm = self.norm
        if norm is None:
            ones = torch.ones(self.weight.shape[0], dtype=torch.float64, device=self.weight.device)
            return ones, torch.zeros_like(ones)
        if norm.running_mean is None or norm.running_var is None:
            raise ValueError("a batch norm without running statistics cannot be folded")
        gain = 1.0 / (norm.running_var.double() + norm.eps).sqrt()
        if norm.weight is not None:
            gain = gain * norm.weight.double()
        offset = -norm.running_mean.double() * gain
        return gain, offset if norm.bias is None else offset + norm.bias.double()

    def weight_codes(self) -> Tensor:
        """Codes of the weights, int8, of the weight's shape: -1 … 1, -4 … 4 (two planes), -7 … 7 or -128 … 127."""
        return self.weight_quantizer.codes(self.weight).to(torch.int8)

    @torch.no_grad()
    def fold(self) -> FoldedLayer:
        """Weights and bias with the batch norm's running statistics folded in, rounded as the integer model has them."""
        gain = None
        bias = torch.zeros(self.weight.shape[0], dtype=torch.float64, device=self.weight.device)
        if self.bias is not None:
            bias = self.bias.double()
        if self.norm is not None:
            gain, offset = self.gain_and_offset()
            bias = bias * gain + offset
        floor = torch.maximum(bias_exponent_floor(bias, self.source.exponent), self._shift_floor())
        weights = self.weight_quantizer.fold(self.weight, gain, floor)
        return FoldedLayer(weights, quantize_to_grid(bias, self.source.exponent + weights.exponent))

    def _shift_floor(self) -> Tensor:
        """The least weight exponents at which no sum is shifted by more than SHIFT_LIMIT places."""
        reached = [quantizer for quantizer in (self.quantizer, self.shortcut) if quantizer is not None]
        calibrated = [quantizer.exponent for quantizer in reached if quantizer.calibrated]
        if not calibrated:
            return self.source.exponent.new_full((), MINIMUM_EXPONENT)
        return torch.stack(calibrated).amax() - self.source.exponent - SHIFT_LIMIT

    def keep_folded(self, keeping: bool) -> None:
        """Whether evaluation folds once and keeps the result, see :func:`folded_once`; what is kept is dropped."""
        self._keeping, self._kept = keeping, None

    def train(self, mode: bool = True) -> Self:
        self._kept = None  # what is trained is folded anew
        return super().train(mode)

    def folded_values(self) -> tuple[Tensor, Tensor, Tensor]:
        """What evaluation multiplies with and adds: weight, float32 integers times 2^exponent, exponent [O] and bias [O]."""
        if self._kept is not None:
            return self._kept
        folded = self.fold()
        exponent = folded.weights.exponent
        weight = dequantize(folded.weights.effective.float(), exponent.view(-1, *[1] * (self.weight.dim() - 1)))
        if self._keeping and not torch.compiler.is_compiling():
            self._kept = weight, exponent, folded.bias
        return weight, exponent, folded.bias

    def _multiplied_and_norm(self, values: Tensor) -> tuple[Tensor, nn.Module | None]:
        """The output of the operator, and the batch norm that is still to come."""
        if self.quantizing and not self.training:
            return self._evaluate(values), None
        if self.quantizing:
            self.weight_quantizer.descend(self.weight)
        return self.before_norm(values), self.norm

    def _evaluate(self, values: Tensor) -> Tensor:
        weight, exponent, bias = self.folded_values()
        return self._multiplied(values, weight.to(values.dtype), exponent, bias.to(values.dtype))

    def _multiplied(self, values: Tensor, weight: Tensor, exponent: Tensor, bias: Tensor | None) -> Tensor:
        """:meth:`operate` with a weight of integers times 2^exponent [O]."""
        result = None if self.product is None else self.product(self, values, weight, exponent, bias)
        return self.operate(values, weight, bias) if result is None else result

    def extra_repr(self) -> str:
        return f"activation={self.activation}" if self.activation else ""


class QuantizedConv2d(QuantizedLayer):
    """Fake-quant ``nn.Conv2d``, grouped and depthwise too."""

    def __init__(self, operator: nn.Conv2d, *arguments: object, **keywords: object) -> None:
        super().__init__(operator, *arguments, **keywords)  # type: ignore[arg-type]
        self.stride = operator.stride
        self.padding = operator.padding
        self.dilation = operator.dilation
        self.groups = operator.groups

    def operate(self, values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.conv2d(values, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def columns(self, values: Tensor) -> Tensor:
        unfolded = functional.unfold(values, tuple(self.weight.shape[2:]), self.dilation, self.padding, self.stride)  # type: ignore[arg-type]
        return unfolded.unflatten(1, (self.groups, -1)).permute(1, 2, 0, 3).flatten(2)


class QuantizedLinear(QuantizedLayer):
    """Fake-quant ``nn.Linear``, over the last axis."""

    def operate(self, values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        output = functional.linear(values.flatten(0, -2), weight, bias)
        # Not a view: the matrix is a temporary, whose memory the quantizer may use.
        return torch.ops.aten._unsafe_view(output, [*values.shape[:-1], len(weight)])

    def columns(self, values: Tensor) -> Tensor:
        return self.by_channel(values).unsqueeze(0)

    def by_image(self, output: Tensor) -> Tensor:
        return output.reshape(-1, output.shape[-1]).T.unsqueeze(0)


class QuantizedBatchNorm2d(QuantizedLayer):
    """A batch norm that no convolution can take in: in the integer model an 8-bit factor and a bias for each channel.

    A layer whose weight is one, and stays it: in training a plain batch norm, in evaluation folded like any other.
    """

    def __init__(
        self,
        norm: nn.BatchNorm2d | nn.SyncBatchNorm,
        source: ActivationQuantizer,
        activation: str,
        quantizer: ActivationQuantizer,
        name: str,
    ) -> None:
        ones = nn.Conv2d(norm.num_features, norm.num_features, 1, groups=norm.num_features, bias=False)
        nn.init.ones_(ones.weight)
        device = None if norm.running_var is None else norm.running_var.device
        super().__init__(ones.to(device), WeightScheme(bits=8), source, norm, activation, quantizer, name)
        weight = self.weight.detach()
        del self.weight
        self.register_buffer("weight", weight, persistent=False)

    def operate(self, values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        scaled = values * weight.view(1, -1, 1, 1)
        return scaled if bias is None else scaled + bias.view(1, -1, 1, 1)

    def columns(self, values: Tensor) -> Tensor:
        return self.by_channel(values).unsqueeze(1)

    def _multiplied_and_norm(self, values: Tensor) -> tuple[Tensor, nn.Module | None]:
        # With a weight of one there is nothing to quantize until the batch norm is folded into it.
        return (self._evaluate(values), None) if self.quantizing and not self.training else (values, self.norm)


@contextmanager
def folded_once(model: nn.Module) -> Iterator[None]:
    """Within it, layers in evaluation mode fold weights and batch norm once, not for each batch: nothing may change them."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLayer)]
    for layer in layers:
        layer.keep_folded(True)
    try:
        yield
    finally:
        for layer in layers:
            layer.keep_folded(False)
