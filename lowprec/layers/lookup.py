"""Fake-quant functions of one value, such as SiLU, GELU, hard-swish or PReLU: a table of 256 entries on 8-bit inputs."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from lowprec.layers.activations import ActivationQuantizer
from lowprec.numerics.fixed_point import dequantize, quantize, scale_by_power_of_two
from lowprec.numerics.native_activations import runs_native
from lowprec.numerics.table_lookup import look_up

# Functions whose gradient is computed from their inputs alone, so that nobody else reads their results.
KEEP_NO_RESULT = (nn.GELU, nn.Hardsigmoid, nn.Hardswish, nn.Mish, nn.SiLU)


class QuantizedLookup(nn.Module):
    """A function of each 8-bit value, rounded to 8 bits.

    function: a module that maps each element on its own, or each channel of axis 1 by its own parameters (PReLU). In
    training it is computed as it is, with its own gradient, or looked up in a table of just that, where there is a kernel for it.
    In evaluation the result is looked up in the table that the integer model holds: computed in float64 on the CPU for all
    input codes, so that it is the same on every device.
    """

    def __init__(self, function: nn.Module, source: ActivationQuantizer, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        self.function = function
        self.quantizer = quantizer
        # In a tuple, so that the producer's quantizer is referred to and not registered a second time.
        self._source = (source,)

    @property
    def source(self) -> ActivationQuantizer:
        """The quantizer of the input tensor."""
        return self._source[0]

    @property
    def channels(self) -> int:
        """How many channels have a table of their own; 1 where all share one."""
        return max((parameter.numel() for parameter in self.function.parameters()), default=1)

    @property
    def table_shape(self) -> tuple[int, ...]:
        """[T], or [C, T] with one table for each channel; T is the number of input codes."""
        entries = self.source.codes.high - self.source.codes.low + 1
        return (self.channels, entries) if self.channels > 1 else (entries,)

    def unquantized(self, values: Tensor) -> Tensor:
        """The values that the quantizer rounds."""
        return self.function(values)

    @torch.no_grad()
    def table(self) -> Tensor:
        """Output codes of all input codes from the lowest on: int16, of the shape ``table_shape``."""
        codes = self.source.codes
        inputs = torch.arange(codes.low, codes.high + 1, dtype=torch.float64)
        values = dequantize(inputs, self.source.exponent.cpu()).view(-1, 1).repeat(1, self.channels)
        function = _in_float64(self.function)
        outputs = quantize(function(values), self.quantizer.exponent.cpu(), self.quantizer.codes).to(torch.int16)
        return outputs.t().reshape(self.table_shape)

    def forward(self, values: Tensor) -> Tensor:
        """Any shape (channels on axis 1); the function's values on the output's grid."""
        if self.training or not self.quantizer.quantizing:
            found = self._looked_up(values) if self.quantizer.quantizing else None
            if found is not None:
                return found
            return self.quantizer(self.unquantized(values), overwrite=isinstance(self.function, KEEP_NO_RESULT))
        table = dequantize(self.table().to(values.device), self.quantizer.exponent)
        found = look_up(values, self.source.exponent, self.source.codes.low, table) if table.dim() == 1 else None
        if found is not None:
            return found
        table = table.to(values.dtype)
        entries = scale_by_power_of_two(values, -self.source.exponent).to(torch.int64) - self.source.codes.low
        if table.dim() == 2:
            offsets = torch.arange(len(table), device=values.device) * table.shape[1]
            entries = entries + offsets.view(1, -1, *[1] * (values.dim() - 2))
        return table.flatten()[entries]

    def _looked_up(self, values: Tensor) -> Tensor | None:
        """What training computes, from tables of the function's results and gradients, or None where it is to be computed."""
        if not (isinstance(self.function, KEEP_NO_RESULT) and self.source.calibrated and runs_native(values)):
            return None
        low, exponent = self.source.codes.low, self.source.exponent
        grid = dequantize(torch.arange(low, low + 256), exponent)
        results = self.function(grid.to(values.dtype))
        if not values.requires_grad:
            return look_up(values, exponent, low, self.quantizer(results).float())
        with torch.enable_grad():
            table = self.quantizer(results.requires_grad_())
            (kept,) = torch.autograd.grad(table.sum(), results)
            (slopes,) = torch.autograd.grad(self.function(grid.requires_grad_()).sum(), grid)
        return look_up(values, exponent, low, table.detach().float(), slopes * kept.float())


def _in_float64(function: nn.Module) -> nn.Module:
    """A copy on the CPU, in eval mode, whose parameters are float64."""
    copied = copy.deepcopy(function)
    return copied.double().cpu().eval()
