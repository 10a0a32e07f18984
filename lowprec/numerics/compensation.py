"""Error-compensated quantization: codes and scales that reproduce a layer's outputs rather than its weights.

For inputs x with second moments H = E[x xᵀ] and weights w of one output channel, the squared error of the output is
(ŵ − w) H (ŵ − w)ᵀ, which is least where the errors of correlated inputs cancel. The first pass quantizes column after column and
lets those to come make up for each error (Frantar et al., GPTQ, arXiv 2210.17323, in the order of the channels); further passes
are coordinate descent on the same error, cluster after cluster, codes and scale in turn, which never raise it.

Shapes: g groups of a convolution (1 for others), O output channels, K = I·P inputs of one output channel: weights are
w_gOK [g, O/g, K] and moments h_gKK. All in float64. Columns follow one another because each depends on those before it; all
output channels are done at once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lowprec.numerics.clusters import ClusterLayout
from lowprec.numerics.effective_codes import FOUR_BIT_SHIFT
from lowprec.numerics.fixed_point import SIGNED_8_BIT, round_half_even
from lowprec.numerics.solvers import four_bit_codes, solve_four_bit, solve_ternary, ternary_codes

# Passes of coordinate descent after the first one: more change little (1 % of the error).
PASSES = 6
# Columns after which errors are handed on to all other columns, at once; until then they reach those of the block alone.
COLUMNS_PER_BLOCK = 128
# Scales that are tried for a cluster, to the one at hand, by bits. Of ternary networks the logits come closer; of 4-bit ones
# layers' errors fall, too, but the logits' do not.
SCALE_RATIOS = {2: (1.0, 0.7, 0.8, 0.9, 1.1, 1.25, 1.4), 4: (1.0,)}
# Added to the diagonal, relative to its mean, where moments have to be inverted.
JITTER = 1e-10


# Real codes [g, O/g] of a column, and its number, to codes that it may have.
Rounding = Callable[[Tensor, int], Tensor]
# Columns of a block, and those of each cluster in it.
Block = tuple[slice, list[slice]]


class CompensatedWeights(NamedTuple):
    """weight [O, I, *kernel], float64: scale times code everywhere; scale: of ``layout.scale_shape``."""

    weight: Tensor
    scale: Tensor


def ridge_target(w_gOK: Tensor, h_gKK: Tensor, cross_gKO: Tensor, damping: float) -> Tensor:
    """The real weights [g, O/g, K] that best give the wanted outputs from the inputs at hand.

    w* = argmin E[(w*·x − y)²] + λ‖w* − w‖², so (H + λ)·w* = E[x y] + λ·w, with λ = damping · mean of H's diagonal.
    cross_gKO: E[x y], moments of inputs with wanted outputs.
    """
    ridge = damping * _mean_diagonal(h_gKK)
    factor = torch.linalg.cholesky(damped(h_gKK, damping))
    return torch.cholesky_solve(cross_gKO + ridge * w_gOK.transpose(1, 2), factor).transpose(1, 2)


def damped(h_gKK: Tensor, damping: float) -> Tensor:
    """H + damping · mean of its diagonal, on the diagonal."""
    identity = torch.eye(h_gKK.shape[-1], dtype=h_gKK.dtype, device=h_gKK.device)
    return h_gKK + damping * _mean_diagonal(h_gKK) * identity


def compensate_clusters(weight: Tensor, h_gKK: Tensor, layout: ClusterLayout, bits: int) -> CompensatedWeights:
    """Ternary (bits 2) or 4-bit codes and scales of ``weight`` [O, I, *kernel] for inputs with the moments ``h_gKK``.

    h_gKK: symmetric, positive semidefinite; inputs that are always zero have zero rows. A cluster of zeros keeps scale 0.
    """
    # In the order of the clusters, so that each is a run of columns.
    order, sizes = _cluster_columns(layout, weight.device)
    w_gOK = _grouped(weight.double(), h_gKK)[..., order]
    h_gKK = h_gKK[:, order][:, :, order]
    blocks = _blocks(sizes)
    scales, codes = _first_pass(w_gOK, h_gKK, blocks, bits)
    inverses = [[_inverse(h_gKK[:, own, own]) for own in clusters] for _, clusters in blocks]
    for _ in range(PASSES):
        residual = (w_gOK - scales * codes) @ h_gKK
        for (block, clusters), inverses_of_block in zip(blocks, inverses, strict=True):
            near, quantized = residual[..., block].clone(), scales[..., block] * codes[..., block]
            h_gBB = h_gKK[:, block, block]
            for own, inverse in zip(clusters, inverses_of_block, strict=True):
                place = slice(own.start - block.start, own.stop - block.start)
                before = scales[..., own] * codes[..., own]
                wanted = before + near[..., place] @ inverse
                scale, new = _fit_cluster(wanted, scales[..., own][..., :1], codes[..., own], h_gKK[:, own, own], bits)
                scales[..., own], codes[..., own] = scale, new
                near.baddbmm_(scale * new - before, h_gBB[:, place], alpha=-1)
            residual.baddbmm_(scales[..., block] * codes[..., block] - quantized, h_gKK[:, block], alpha=-1)
    starts = torch.tensor([own.start for _, clusters in blocks for own in clusters], device=weight.device)
    scale = scales.flatten(0, 1)[:, starts]
    quantized = torch.empty_like(codes)
    quantized[..., order] = scales * codes
    return CompensatedWeights(quantized.reshape(weight.shape), scale.reshape(layout.scale_shape))


def compensate_steps(weight: Tensor, h_gKK: Tensor, step: Tensor) -> Tensor:
    """``weight`` [O, I, *kernel] as 8-bit codes times the given steps [O] (of either sign), for moments ``h_gKK``; float64."""
    steps = step.double().view(-1, *[1] * (weight.dim() - 1))
    return steps * _descend_steps(weight, h_gKK, step, _eight_bit(weight.double() / steps, 0), _eight_bit)


def compensate_mantissas(
    weight: Tensor, h_gKK: Tensor, step: Tensor, mantissa: Tensor, codes: Tensor, layout: ClusterLayout
) -> Tensor:
    """4-bit codes [O, I, *kernel], from ``codes`` on, where each is worth round_half_even(a·q / 2^4) steps.

    That is what ships: the rounding of effective codes is among the errors that others make up for. step: [O], of one
    effective code, of either sign; mantissa a: [O, G, 1, 1 or P], a channel of zeros keeps its codes.
    """
    a_gOK = _grouped(layout.merge(mantissa.double().expand(layout.split(codes).shape)), h_gKK)
    shares = _inverse_or_zero(a_gOK) * 2.0**FOUR_BIT_SHIFT
    products = a_gOK * 2.0**-FOUR_BIT_SHIFT

    def rounded(values: Tensor, column: int) -> Tensor:
        return round_half_even(_limited(values * shares[..., column], 4) * products[..., column])

    start = round_half_even(_grouped(codes.double(), h_gKK) * products).reshape(codes.shape)
    effective = _descend_steps(weight, h_gKK, step, start, rounded)
    found = _limited(_grouped(effective, h_gKK) * shares, 4).reshape(codes.shape)
    return torch.where(a_gOK.reshape(codes.shape) != 0, found, codes)


def _descend_steps(weight: Tensor, h_gKK: Tensor, step: Tensor, start: Tensor, rounded: Rounding) -> Tensor:
    """Codes worth ``step`` [O] each, of the shape of ``weight``: passes of coordinate descent over all columns."""
    w_gOK, codes = _grouped(weight.double(), h_gKK), _grouped(start, h_gKK).clone()
    step_gO = step.double().reshape(w_gOK.shape[:2])
    for _ in range(PASSES):
        residual = (w_gOK - step_gO[..., None] * codes) @ h_gKK
        for first in range(0, w_gOK.shape[-1], COLUMNS_PER_BLOCK):
            block = slice(first, first + COLUMNS_PER_BLOCK)
            before = codes[..., block].clone()
            near = residual[..., block].clone()
            _descend(codes[..., block], near, h_gKK[:, block, block], step_gO, partial(_of_block, rounded, first))
            residual.baddbmm_(step_gO[..., None] * (codes[..., block] - before), h_gKK[:, block], alpha=-1)
    return codes.reshape(weight.shape)


def _of_block(rounded: Rounding, first: int, values: Tensor, column: int) -> Tensor:
    return rounded(values, first + column)


def _first_pass(w_gOK: Tensor, h_gKK: Tensor, blocks: list[Block], bits: int) -> tuple[Tensor, Tensor]:
    """Scales and codes, both w_gOK: a cluster's scale from its weights as they are when its turn comes."""
    remaining = w_gOK.clone()
    scales, codes = torch.zeros_like(w_gOK), torch.zeros_like(w_gOK)
    factor = _inverse_factor(h_gKK)
    for block, clusters in blocks:
        # Errors reach the later columns of the block cluster by cluster, those behind the block at its end.
        errors = torch.zeros_like(remaining[..., block])
        for own in clusters:
            place, later = own.start - block.start, slice(own.start, block.stop)
            scale = _solved_scale(remaining[..., own], bits)
            weights, f_gBB = remaining[..., own].clone(), factor[:, own, own]
            for index in range(own.stop - own.start):
                code = _code(weights[..., index], scale[..., 0], bits)
                error = (weights[..., index] - scale[..., 0] * code) / f_gBB[:, index, index, None]
                weights -= error[..., None] * f_gBB[:, None, index]
                errors[..., place + index] = error
                codes[..., own.start + index] = code
            scales[..., own] = scale
            remaining[..., later] -= errors[..., place : place + own.stop - own.start] @ factor[:, own, later]
        remaining[..., block.stop :] -= errors @ factor[:, block, block.stop :]
    return scales, codes


def _fit_cluster(wanted_gOB: Tensor, scale: Tensor, codes: Tensor, h_gBB: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes given the scale by coordinate descent, then the scale given the codes by least squares.

    From the codes at hand, and from those nearest to ``wanted_gOB`` at other scales (SCALE_RATIOS): the least error is kept.
    """
    tried = len(SCALE_RATIOS[bits])
    scales = torch.cat([scale * ratio for ratio in SCALE_RATIOS[bits]], 1)
    wanted = wanted_gOB.repeat(1, tried, 1)
    found = _limited(wanted * _inverse_or_zero(scales), bits)
    found[:, : codes.shape[1]] = codes
    residual = (wanted - scales * found) @ h_gBB
    _descend(found, residual, h_gBB, scales[..., 0], lambda values, _: _limited(values, bits))
    projected = found @ h_gBB
    power = (projected * found).sum(-1, keepdim=True)
    fitted = (projected * wanted).sum(-1, keepdim=True) / torch.where(power > 0, power, torch.inf)
    # A scale that came out as zero or negative would make codes of the wrong sign: the old one stays.
    scales = torch.where(fitted > 0, fitted, scales)
    errors = wanted - scales * found
    errors = ((errors @ h_gBB) * errors).sum(-1).unflatten(1, (tried, -1))
    best = errors.argmin(1)[:, None, :, None]
    return (
        scales.unflatten(1, (tried, -1)).gather(1, best)[:, 0],
        found.unflatten(1, (tried, -1)).gather(1, best.expand(-1, -1, -1, codes.shape[-1]))[:, 0],
    )


def _descend(codes: Tensor, residual: Tensor, h_gBB: Tensor, step_gO: Tensor, rounded: Rounding) -> None:
    """One pass of coordinate descent over the columns, in place: each code where the error is least given all others.

    residual: (w − step·codes) H. A column without moments, or of a step of zero, stays as it is.
    """
    moments = h_gBB.diagonal(dim1=1, dim2=2)
    shares_gOB = _inverse_or_zero(step_gO)[..., None] * _inverse_or_zero(moments.clamp(min=0))[:, None]
    # Columns first, so that each lies in one piece.
    codes_BgO, residual_BgO, shares_BgO = (part.movedim(-1, 0).contiguous() for part in (codes, residual, shares_gOB))
    h_BBg1 = h_gBB.permute(1, 2, 0)[..., None]
    for index in range(len(codes_BgO)):
        new = rounded(torch.addcmul(codes_BgO[index], residual_BgO[index], shares_BgO[index]), index)
        # The columns before are done, so their residuals are no longer needed.
        residual_BgO[index + 1 :].addcmul_(h_BBg1[index, index + 1 :], (new - codes_BgO[index]) * step_gO, value=-1)
        codes_BgO[index] = new
    codes.copy_(codes_BgO.movedim(0, -1))


def _inverse_or_zero(values: Tensor) -> Tensor:
    return torch.where(values != 0, 1 / torch.where(values != 0, values, 1.0), 0.0)


def _limited(values: Tensor, bits: int) -> Tensor:
    # Ternary codes round away from zero at one half, as everywhere: |w| >= scale / 2.
    return torch.sign(values) * (values.abs() >= 0.5) if bits == 2 else round_half_even(values).clamp(-7, 7)


def _eight_bit(values: Tensor, column: int) -> Tensor:
    return round_half_even(values).clamp(SIGNED_8_BIT.low, SIGNED_8_BIT.high)


def _code(values: Tensor, scale: Tensor, bits: int) -> Tensor:
    if bits == 4:
        return four_bit_codes(values, scale)
    return ternary_codes(values, torch.where(scale > 0, scale / 2, torch.inf))


def _solved_scale(w_gOB: Tensor, bits: int) -> Tensor:
    """The least-squares scale of each row, [g, O/g, 1]."""
    rows = w_gOB.flatten(0, 1)
    layout = ClusterLayout(tuple(rows.shape), rows.shape[1])
    scale = solve_ternary(rows, layout).scale if bits == 2 else solve_four_bit(rows, layout)
    return scale.double().reshape(*w_gOB.shape[:2], 1)


def _inverse_factor(h_gKK: Tensor) -> Tensor:
    """The upper triangular U of H⁻¹ = Uᵀ U, with ones for inputs that are always zero."""
    dead = h_gKK.diagonal(dim1=1, dim2=2) <= 0
    safe = damped(h_gKK, JITTER) + torch.diag_embed(dead.to(h_gKK.dtype))
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(safe)), upper=True)


def _inverse(h_gBB: Tensor) -> Tensor:
    """H⁻¹, where H may lack inputs."""
    dead = (h_gBB.diagonal(dim1=1, dim2=2) <= 0).to(h_gBB.dtype)
    return torch.linalg.inv(damped(h_gBB, 1e-6) + torch.diag_embed(dead))


def _blocks(sizes: list[int]) -> list[Block]:
    """Clusters one after the other, of so many columns each, in blocks of about COLUMNS_PER_BLOCK columns."""
    blocks: list[Block] = []
    start = 0
    for size in sizes:
        cluster = slice(start, start + size)
        if not blocks or cluster.stop - blocks[-1][0].start > COLUMNS_PER_BLOCK:
            blocks.append((cluster, []))
        blocks[-1] = (slice(blocks[-1][0].start, cluster.stop), [*blocks[-1][1], cluster])
        start += size
    return blocks


def _mean_diagonal(h_gKK: Tensor) -> Tensor:
    """[g, 1, 1], above zero."""
    mean = h_gKK.diagonal(dim1=1, dim2=2).mean(-1)
    return torch.where(mean > 0, mean, 1.0)[:, None, None]


def _grouped(weight: Tensor, h_gKK: Tensor) -> Tensor:
    return weight.reshape(h_gKK.shape[0], -1, h_gKK.shape[-1])


def _cluster_columns(layout: ClusterLayout, device: torch.device) -> tuple[Tensor, list[int]]:
    """The columns of w_gOK in the order of their clusters, and how many each cluster has, in the order of the scales."""
    inputs = torch.arange(layout.weight_shape[1] * layout.positions, device=device)
    kernels = inputs.reshape(layout.weight_shape[1], layout.positions).split(layout.members)
    if layout.shares_positions:
        clusters = [kernel.flatten() for kernel in kernels]
    else:
        clusters = [kernel[:, position] for kernel in kernels for position in range(layout.positions)]
    return torch.cat(clusters), [len(columns) for columns in clusters]
