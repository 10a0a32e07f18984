"""The quantizer of a weight tensor: cluster scales as state, codes that follow the latent weights."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lowprec.layers.autocast import dtype_of_products
from lowprec.numerics import native_weights
from lowprec.numerics.clusters import ClusterLayout
from lowprec.numerics.effective_codes import channel_exponents, effective_codes, mantissas
from lowprec.numerics.fixed_point import dequantize, exponent_for
from lowprec.numerics.native_activations import runs_native
from lowprec.numerics.residual_planes import PlaneScales, descend_two_planes, ordered, solve_two_planes, two_plane_codes
from lowprec.numerics.solvers import (
    ClusterScales,
    check_finite,
    descend_four_bit,
    descend_ternary,
    eight_bit_codes,
    four_bit_codes,
    solve_eight_bit,
    solve_four_bit,
    solve_ternary,
    ternary_codes,
)
from lowprec.numerics.straight_through import BLOCK, straight_through_weight
from lowprec.numerics.triton_kernels import runs_triton
from lowprec.recipe import WeightScheme

# |bias| stays below 2^22 units, far from the 2^24 up to which float32 holds every integer.
BIAS_LIMIT = 1 << 22
ALL = slice(None)


class FoldedWeights(NamedTuple):
    """What an integer layer holds, as floating-point integers: value of a weight = effective · 2^exponent.

    codes and effective: [O, I, *kernel]; mantissas: [O, G, 1, 1 or P], of two planes [2, O, G, 1, 1 or P], none for 8-bit
    weights; exponent: [O], int32.
    """

    codes: Tensor
    mantissas: Tensor | None
    exponent: Tensor
    effective: Tensor


class WeightQuantizer(nn.Module):
    """Quantizes the weight of one layer by its scheme.

    Scales and thresholds are buffers of full shape from the start, so checkpoints load strictly. They follow the latent
    weights: :meth:`solve` finds them anew, :meth:`descend` takes one step of least squares. 8-bit weights have no state. Codes
    of two planes are the nearest levels, so there is a second scale instead of a threshold.
    """

    scale: Tensor
    threshold: Tensor
    residual_scale: Tensor

    def __init__(self, weight_shape: tuple[int, ...], scheme: WeightScheme) -> None:
        super().__init__()
        self.scheme = scheme
        self.layout = ClusterLayout(tuple(weight_shape), scheme.cluster_size, scheme.layout)
        if scheme.bits != 8:
            self.register_buffer("scale", torch.zeros(self.layout.scale_shape, dtype=torch.float32))
        if scheme.planes == 2:
            self.register_buffer("residual_scale", torch.zeros(self.layout.scale_shape, dtype=torch.float32))
        elif scheme.bits == 2:
            self.register_buffer("threshold", torch.full(self.layout.scale_shape, torch.inf, dtype=torch.float32))

    @torch.no_grad()
    def solve(self, weight: Tensor, name: str) -> None:
        """Finds the scales of ``weight`` with the scheme's solver; ``name`` is the layer's, for errors.

        Raises:
            ValueError: the weight holds an infinity or NaN.
        """
        check_finite(weight, name)
        if self.scheme.planes == 2:
            self._keep_planes(solve_two_planes(weight, self.layout, self.scheme.solver))
        elif self.scheme.bits == 2:
            self._keep(solve_ternary(weight, self.layout, self.scheme.solver))
        elif self.scheme.bits == 4:
            self.scale.copy_(solve_four_bit(weight, self.layout))

    @torch.no_grad()
    def descend(self, weight: Tensor) -> None:
        """Follows ``weight``, which moved a little: one descent step on the squared error."""
        if self.scheme.bits == 8:
            return
        kernels = self._kernels(weight)
        if kernels is not None:
            kernels.descend(weight, self.scale, self._threshold, self.layout)
        else:
            for rows in self._blocks(weight):
                self._descend(self.layout.split_for_arithmetic(weight.detach()[rows].float()), rows)

    @torch.no_grad()
    def keep_scale(self, scale: Tensor, residual: Tensor | None = None) -> None:
        """Takes scales [O, G, 1, 1 or P] that were found elsewhere, of the second plane too where there is one.

        A ternary threshold is half the scale.
        """
        if residual is not None:
            self._keep_planes(ordered(scale, residual))
            return
        self.scale.copy_(scale)
        if self.scheme.bits == 2:
            self.threshold.copy_(torch.where(self.scale > 0, self.scale / 2, torch.inf))

    def codes(self, weight: Tensor) -> Tensor:
        """Codes of ``weight`` as floating-point integers, same shape: -1 … 1, -4 … 4 (two planes), -7 … 7 or -128 … 127.

        Of two planes they are 3·t1 + t2, so 0 where both digits are.
        """
        if self.scheme.bits == 8:
            return eight_bit_codes(weight, solve_eight_bit(weight))
        return self.layout.merge(self._cluster_codes(self.layout.split(weight.detach().float()), ALL))

    def forward(self, weight: Tensor) -> Tensor:
        """c · 2^e, the weights with rounded mantissas that training multiplies; shape of ``weight``.

        In its dtype, or under autocast to bfloat16, which holds them exactly, in that of the products. Gradient: straight
        through to ``weight``, unclipped.
        """
        return self.with_exponents(weight)[0]

    def with_exponents(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """What :meth:`forward` gives, and its exponents e [O], int32: c are integers of -128 … 127."""
        dtype = _dtype_of_products(weight)
        with torch.no_grad():
            kernels = self._kernels(weight)
            if kernels is not None and self.scheme.bits == 8:
                quantized, exponent = kernels.quantize_eight_bit(weight, dtype)
            elif kernels is not None:
                quantized, exponent = kernels.quantize_weight(weight, self.scale, self._threshold, self.layout, dtype)
            else:
                quantized = torch.empty_like(weight, dtype=dtype)
                blocks = self._blocks(weight)
                exponent = torch.cat([self._quantize(weight.detach()[rows], rows, quantized[rows]) for rows in blocks])
        return straight_through_weight(weight, quantized), exponent

    def fold(self, weight: Tensor, gain: Tensor | None, exponent_floor: Tensor | None) -> FoldedWeights:
        """Codes, mantissas and exponents with a gain per output channel [O] folded into the scales.

        The codes of ternary and 4-bit weights do not change by folding. exponent_floor [O] keeps exponents from falling
        below what the bias needs. In float64 where a gain is folded, so that every device rounds alike.
        """
        wide = torch.float32 if gain is None else torch.float64
        if self.scheme.bits == 8:
            folded = weight.to(wide) if gain is None else weight.to(wide) * gain.view(-1, *[1] * (weight.dim() - 1))
            exponent = solve_eight_bit(folded)
            if exponent_floor is not None:
                exponent = torch.maximum(exponent, exponent_floor)
            codes = eight_bit_codes(folded, exponent)
            return FoldedWeights(codes, None, exponent, codes)
        scale = self._all_scales(ALL).to(wide)
        if gain is not None:
            scale = scale * gain.view(-1, 1, 1, 1)
        exponent = channel_exponents(scale, self.scheme.bits, exponent_floor)
        mantissa = mantissas(scale, exponent, self.scheme.bits)
        codes = self._cluster_codes(self.layout.split(weight.detach().float()), ALL)
        effective = self.layout.merge(effective_codes(codes, mantissa, self.scheme.bits))
        return FoldedWeights(self.layout.merge(codes), mantissa, exponent, effective)

    def _kernels(self, weight: Tensor) -> ModuleType | None:
        """The module of kernels that do it in one pass or two, or None where PyTorch's operators do."""
        if self.scheme.planes == 2:
            return None
        if weight.dtype != torch.float64 and runs_triton(weight):
            from lowprec.numerics import triton_weights

            return triton_weights if self.scheme.bits == 8 or triton_weights.fits(self.layout) else None
        return native_weights if weight.dtype == torch.float32 and runs_native(weight) else None

    @property
    def _threshold(self) -> Tensor | None:
        return self.threshold if self.scheme.bits == 2 else None

    def _blocks(self, weight: Tensor) -> list[slice]:
        """Output channels in parts whose temporaries stay in a processor's cache; all at once where that is no gain."""
        if torch.compiler.is_compiling() or weight.is_cuda:
            return [ALL]
        channels = max(1, BLOCK * torch.get_num_threads() // weight[0].numel())
        return [slice(first, first + channels) for first in range(0, len(weight), channels)]

    def _quantize(self, weight: Tensor, rows: slice, quantized: Tensor) -> Tensor:
        """Writes the values of some output channels into ``quantized``, as unfolded mantissas give them; their exponents."""
        if self.scheme.bits == 8:
            exponent = solve_eight_bit(weight)
            codes = eight_bit_codes(weight, exponent)
            quantized.copy_(dequantize(codes, exponent.view(-1, *[1] * (weight.dim() - 1))))
            return exponent
        w_OGNP = self.layout.split_for_arithmetic(weight.float())
        scale = self._all_scales(rows)
        exponent = channel_exponents(scale, self.scheme.bits)
        mantissa = mantissas(scale, exponent, self.scheme.bits)
        effective = effective_codes(self._cluster_codes(w_OGNP, rows), mantissa, self.scheme.bits)
        self.layout.merge_into(dequantize(effective, exponent.view(-1, 1, 1, 1)), quantized)
        return exponent

    def _descend(self, w_OGNP: Tensor, rows: slice) -> None:
        if self.scheme.planes == 2:
            self._keep_planes(descend_two_planes(w_OGNP, self._plane_scales(rows), self.layout), rows)
        elif self.scheme.bits == 2:
            scales = ClusterScales(self.scale[rows], self.threshold[rows])
            self._keep(descend_ternary(w_OGNP, scales, self.layout), rows)
        else:
            self.scale[rows] = descend_four_bit(w_OGNP, self.scale[rows], self.layout)

    def _cluster_codes(self, w_OGNP: Tensor, rows: slice) -> Tensor:
        if self.scheme.planes == 2:
            return two_plane_codes(w_OGNP, self._plane_scales(rows))
        if self.scheme.bits == 2:
            return ternary_codes(w_OGNP, self.threshold[rows])
        return four_bit_codes(w_OGNP, self.scale[rows])

    def _all_scales(self, rows: slice) -> Tensor:
        """[O, G, 1, 1 or P], of two planes [2, O, G, 1, 1 or P]."""
        return torch.stack(self._plane_scales(rows)) if self.scheme.planes == 2 else self.scale[rows]

    def _plane_scales(self, rows: slice) -> PlaneScales:
        return PlaneScales(self.scale[rows], self.residual_scale[rows])

    def _keep_planes(self, scales: PlaneScales, rows: slice = ALL) -> None:
        self.scale[rows] = scales.scale
        self.residual_scale[rows] = scales.residual

    def _keep(self, scales: ClusterScales, rows: slice = ALL) -> None:
        self.scale[rows] = scales.scale
        self.threshold[rows] = scales.threshold

    def extra_repr(self) -> str:
        if self.scheme.bits == 8:
            return "8 bits, an exponent per output channel"
        clusters = f"{self.layout.clusters} clusters of {self.layout.weights_per_cluster}"
        bits = "2 + 2" if self.scheme.planes == 2 else str(self.scheme.bits)
        return f"{bits} bits, {clusters} ({self.scheme.layout}, {self.scheme.solver})"


def _dtype_of_products(weight: Tensor) -> torch.dtype:
    """That of ``weight``, or where autocast would round it to bfloat16, bfloat16, which saves a copy for each layer."""
    dtype = dtype_of_products(weight)
    return dtype if weight.dtype == torch.float32 and dtype == torch.bfloat16 else weight.dtype


def bias_exponent_floor(bias: Tensor, input_exponent: Tensor) -> Tensor:
    """The least weight exponents [O] (int32) at which the bias [O], in units of 2^(input + weight exponent), fits."""
    return exponent_for(bias.abs(), BIAS_LIMIT) - input_exponent
