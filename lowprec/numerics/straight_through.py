"""Straight-through estimators: quantized values forward, a simple gradient backward (Bengio et al., arXiv 1308.3432)."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lowprec.numerics import native_activations
from lowprec.numerics.fixed_point import CodeRange, power_of_two, round_to_multiples
from lowprec.numerics.memory import holders, holders_of_unshared, in_memory_order, is_dense
from lowprec.numerics.native_activations import runs_native
from lowprec.numerics.pools import kept_like, passing_like
from lowprec.numerics.triton_kernels import runs_triton

# Elements of a block for each thread: several passes over one find it in the processor's cache.
BLOCK = 1 << 19
# One place in so many, an int64 each, takes as much memory as a bit for every element.
FEW = 64
# Parts of a block that are added up before zeros are searched for: the search is that much shorter.
PARTS = 32


class StraightThroughWeight(torch.autograd.Function):
    """Stands a quantized weight in for its latent one.

    Equation: y = ŵ. Gradient: ∂L/∂w = ∂L/∂y in the dtype of w, unclipped, wherever w lies; nothing flows into ŵ. Source:
    arXiv 1705.01462.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, quantized: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return quantized.view_as(quantized)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.dtype), None


class StraightThroughActivation(torch.autograd.Function):
    """Adds a second tensor, applies an activation function and quantizes to dynamic fixed point.

    Equation: y = clamp(round_half_even(f(x + a) / s), low, high) · s with s = 2^exponent; f is the identity, ReLU or ReLU6, and a
    may be left out. Gradient: ∂L/∂x = ∂L/∂a = ∂L/∂y · f'(x + a) where the unclamped code lies in [low, high], else 0; none for
    the exponent. Exact in bfloat16 too, whose 8 significant bits hold every 8-bit code; float16, whose exponents do not reach, is
    computed in float32. Source: arXiv 1701.08978, with the gradient of PACT (arXiv 1805.06085). Saved for the backward pass is
    one bit an element, or less.
    """

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        addend: Tensor | None,
        exponent: Tensor,
        low: int,
        high: int,
        activation: str,
        overwrite: bool,
    ) -> Tensor:
        ctx.dtypes = values.dtype, None if addend is None else addend.dtype
        ctx.kernels = kernels = _kernels(values)
        given = values
        if addend is not None and not (kernels and values.dtype != torch.float16 and alike(values, addend)):
            in_place = overwrite and values.dtype == addend.dtype
            values, addend = values.add_(addend) if in_place else values + addend, None
        if values.dtype == torch.float16:
            values = values.float()
        if not is_dense(values):
            values = values.contiguous()
        if values is not given:
            overwrite = True  # what was made of the values is nobody else's
        elif overwrite:
            ctx.mark_dirty(values)
        needs_mask = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        result = values if overwrite else passing_like(values) if needs_mask else torch.empty_like(values)
        ctx.strides = values.stride()
        if kernels is not None:
            ends = Ends.of(low, high, values.dtype)
            mask = kernels.quantize_activation(values, addend, exponent, ends, activation, result, needs_mask)
            masks = [] if mask is None else [mask]
            ctx.unshared = holders_of_unshared() if values.device.type == "cpu" and mask is not None else None
        else:
            masks = _quantized_by_operators(ctx, values, exponent, low, high, activation, result, needs_mask)
        ctx.save_for_backward(*masks)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # Read once: what is unpacked, by hooks or a checkpoint, may not be so twice.
        masks = ctx.saved_tensors
        if not masks:
            return _of_inputs(ctx, gradient)
        # Memory that is nobody else's is used again.
        unshared = ctx.unshared is not None and holders(gradient) == ctx.unshared
        if gradient.stride() != ctx.strides:
            unshared = True
            gradient = torch.empty_strided(
                gradient.shape, ctx.strides, dtype=gradient.dtype, device=gradient.device
            ).copy_(gradient)
        passed = gradient if unshared else passing_like(gradient)
        if ctx.kernels is not None:
            ctx.kernels.gradient_within(gradient, masks[0], passed)
            return _of_inputs(ctx, passed)
        remaining = iter(masks)
        for to, incoming, clipped in zip(
            _blocks(passed, ctx.size), _blocks(gradient, ctx.size), ctx.clipped, strict=True
        ):
            mask = next(remaining) if clipped else None
            if mask is not None and mask.dtype == torch.int8:
                torch.mul(incoming, _unpacked(mask, incoming), out=to)
                continue
            if not unshared:
                to.copy_(incoming)
            if mask is not None:
                to.index_fill_(0, mask, 0)
        return _of_inputs(ctx, passed)


def _quantized_by_operators(
    ctx: Any, values: Tensor, exponent: Tensor, low: int, high: int, activation: str, result: Tensor, needs_mask: bool
) -> list[Tensor]:
    """Writes ``result``; what has a gradient, block by block. Sets what the backward pass needs to know besides."""
    limits = _Limits.of(values, power_of_two(exponent), low, high, activation)
    worth = _worth_of_bits(values.device)
    ctx.size, ctx.clipped, masks = _block_size(values), [], []
    for block, to in zip(_blocks(values, ctx.size), _blocks(result, ctx.size), strict=True):
        clipped = not limits.hold(block)
        if clipped and needs_mask:
            # Comparisons that give numbers are vectorized, those that give booleans are not.
            inside = block.clamp(limits.least, limits.most).eq_(block)
            places = _places_of_few_zeros(inside) if limits.watched else None
            masks.append(_packed(inside, worth) if places is None else places)
        ctx.clipped.append(clipped)
        round_to_multiples(
            torch.clamp(block, limits.low, limits.high, out=to) if clipped else block, limits.scale, out=to
        )
    ctx.unshared = holders_of_unshared() if masks and isinstance(limits.scale, float) else None
    return masks


def _kernels(values: Tensor) -> ModuleType | None:
    """The module of kernels that do it in one pass, or None where PyTorch's operators do."""
    if runs_triton(values) and values.dtype != torch.float64:
        from lowprec.numerics import triton_activations

        return triton_activations
    return native_activations if runs_native(values) else None


def alike(values: Tensor, addend: Tensor) -> bool:
    """Whether both are dense, and their elements lie in the same order, in one dtype."""
    same_order = values.shape == addend.shape and values.stride() == addend.stride()
    return is_dense(values) and same_order and values.dtype == addend.dtype


def _of_inputs(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of all inputs of :class:`StraightThroughActivation`."""
    of_values, of_addend = (None if dtype is None else gradient.to(dtype) for dtype in ctx.dtypes)
    return of_values, of_addend, None, None, None, None, None


def codes_of_multiples(values: Tensor, exponent: Tensor, offset: int, dtype: torch.dtype = torch.int8) -> Tensor:
    """values / 2^exponent - offset, in shape and strides of ``values``, multiples of 2^exponent; exponent: an int32.

    dtype: int8, or uint8 with an offset that leaves 0 … 255.
    """
    values = values if is_dense(values) else values.contiguous()
    codes = kept_like(values, dtype)
    kernels = _kernels(values)
    if kernels is not None:
        kernels.write_codes(values, exponent, offset, codes)
        return codes
    inverse = power_of_two(-exponent)
    size = _block_size(values)
    for block, to in zip(_blocks(values, size), _blocks(codes, size), strict=True):
        to.copy_((block * inverse).sub_(offset))
    return codes


def multiples_of_codes(codes: Tensor, exponent: Tensor, offset: int, dtype: torch.dtype) -> Tensor:
    """(codes + offset) · 2^exponent in ``dtype``, which holds each exactly; shape and strides of the ``codes``, int8 or uint8."""
    values = passing_like(codes, dtype)
    kernels = _kernels(values)
    if kernels is not None and is_dense(codes):
        kernels.write_values(codes, exponent, offset, values)
        return values
    scale = power_of_two(exponent)
    if not is_dense(codes):
        return values.copy_(codes).add_(offset).mul_(scale)
    size = _block_size(values)
    for to, block in zip(_blocks(values, size), _blocks(codes, size), strict=True):
        to.copy_(block).add_(offset).mul_(scale)
    return values


class Ends(NamedTuple):
    """Of the codes, in units of the scale. low, high: the grid's; least, most: what lies outside has no gradient."""

    low: float
    high: float
    least: float
    most: float

    @classmethod
    def of(cls, low: int, high: int, dtype: torch.dtype) -> Ends:
        # The spacing of numbers just below 2^n is 2^n · epsilon / 2. Ties go to even numbers: low is even, high is odd.
        spacing = (high + 1) * torch.finfo(dtype).eps / 2
        return cls(low, high, low - 0.5, high + 0.5 - spacing if spacing <= 0.5 else high)


class _Limits(NamedTuple):
    """Of an activation's values. low, high: the grid's ends; least, most: what lies outside has no gradient.

    Numbers on a CPU, where clamping by tensors is slow; tensors elsewhere, where numbers would have to be waited for.
    """

    scale: Tensor | float
    low: Any
    high: Any
    least: Any
    most: Any
    watched: bool

    @classmethod
    def of(cls, values: Tensor, scale: Tensor, low: int, high: int, activation: str) -> _Limits:
        numbers = values.device.type == "cpu" and not torch.compiler.is_compiling()
        unit: Any = float(scale) if numbers else scale
        ends = Ends.of(low, high, values.dtype)
        smallest, largest, least, most = (end * unit for end in ends)
        if activation == "relu6":
            below_six = 6 - 4 * torch.finfo(values.dtype).eps
            most = min(most, below_six) if numbers else most.clamp(max=below_six)
            largest = min(largest, 6.0) if numbers else largest.clamp(max=6.0)
        if activation:
            least, smallest = torch.finfo(values.dtype).smallest_normal, 0.0
            if not numbers:
                least, smallest = torch.full_like(unit, least), torch.zeros_like(unit)
        # Most tensors that are not rectified have next to nothing outside, which is worth a look.
        return cls(unit, smallest, largest, least, most, numbers and not activation)

    def hold(self, block: Tensor) -> bool:
        """Whether nothing of ``block`` is known to lie outside."""
        if not self.watched or not block.numel():
            return False
        smallest, largest = torch.aminmax(block)
        return bool(smallest >= self.least) and bool(largest <= self.most)


def straight_through_weight(weight: Tensor, quantized: Tensor) -> Tensor:
    """``quantized`` forward, its gradient to ``weight`` unchanged; equal shapes. See :class:`StraightThroughWeight`."""
    return StraightThroughWeight.apply(weight, quantized)


def straight_through_activation(
    values: Tensor,
    exponent: Tensor,
    codes: CodeRange,
    activation: str = "",
    overwrite: bool = False,
    addend: Tensor | None = None,
) -> Tensor:
    """Values on the grid of 2^exponent, within ``codes``. See :class:`StraightThroughActivation`.

    exponent: an int32. addend: of the shape of ``values``, added first. activation: "", "relu" or "relu6", applied next.
    overwrite: the result may take the memory of ``values``, which nobody else reads, not even the backward pass of what gave
    them.
    """
    # What is compiled is fused, and makes up its own mind on memory; views are not worth the trouble.
    overwrite = overwrite and not torch.compiler.is_compiling() and not values._is_view()
    return StraightThroughActivation.apply(values, addend, exponent, codes.low, codes.high, activation, overwrite)


def _block_size(tensor: Tensor) -> int:
    """Elements of a block that fits a cache; all of them where that is no gain."""
    if torch.compiler.is_compiling() or tensor.is_cuda:
        return max(1, tensor.numel())
    return BLOCK * torch.get_num_threads()


def _blocks(tensor: Tensor, size: int) -> Sequence[Tensor]:
    """Views of a tensor of ``size`` elements each, in the order of its memory; a compiler gets the whole."""
    if torch.compiler.is_compiling():
        return (tensor,)
    return in_memory_order(tensor).split(size)


def _places_of_few_zeros(ones: Tensor) -> Tensor | None:
    """Where ``ones`` [N], zeros and ones, holds zeros, if there are so few that bits would take more memory."""
    if ones.numel() % PARTS:
        return None
    # Sums over equal parts first: searching is slow, adding is not.
    parts = ones.view(PARTS, -1)
    zeros = PARTS - ones.new_ones(PARTS) @ parts
    if float(zeros.sum()) > ones.numel() / FEW:
        return None
    columns = zeros.nonzero().squeeze(1)
    rows, found = (parts.index_select(1, columns) - 1).nonzero().unbind(1)
    return rows * parts.shape[1] + columns[found]


def _packed(ones: Tensor, worth: Tensor) -> Tensor:
    """Zeros and ones as the bits of int8, filled up to eight equal parts, one for each bit; worth: :func:`_worth_of_bits`."""
    flat = ones.flatten().float()
    missing = -flat.numel() % 8
    if missing:
        flat = functional.pad(flat, (0, missing))
    return (worth @ flat.view(8, -1)).to(torch.int8)


def _worth_of_bits(device: torch.device) -> Tensor:
    """1, 2 … 64, -128: the eighth bit is the sign, for float to int8 is vectorized, to uint8 it is not."""
    place = torch.arange(8, device=device)
    return ((1 << place) - 256 * (place == 7)).float()


def _unpacked(packed: Tensor, like: Tensor) -> Tensor:
    """What :func:`_packed` was given, in dtype and shape of ``like``."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)[:, None]
    bits = (packed.view(torch.uint8) >> places).bitwise_and_(1).flatten()
    return bits[: like.numel()].to(like.dtype).view(like.shape)
