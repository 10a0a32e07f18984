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

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lowprec.numerics.clusters import ClusterLayout
from lowprec.numerics.fixed_point import SIGNED_8_BIT, round_half_even
from lowprec.numerics.solvers import four_bit_codes, solve_four_bit, solve_ternary

# Passes of coordinate descent after the first one: more change little (less than 1 % of the error).
PASSES = 3
# Codes and scale of a cluster in turn, within a pass.
ALTERNATIONS = 2
# Columns that 8-bit weights, which have no clusters, are done in.
COLUMNS_PER_BLOCK = 64
# Added to the diagonal, relative to its mean, where moments have to be inverted.
JITTER = 1e-10


Rounding = Callable[[Tensor], Tensor]


class CompensatedWeights(NamedTuple):
    """weight [O, I, *kernel], float64: scale times code everywhere; scale: of ``layout.scale_shape``, or of the steps."""

    weight: Tensor
    scale: Tensor


def ridge_target(w_gOK: Tensor, h_gKK: Tensor, cross_gKO: Tensor, damping: float) -> Tensor:
    """The real weights [g, O/g, K] that best give the wanted outputs from the inputs at hand.

    w* = argmin E[(w*·x − y)²] + λ‖w* − w‖², so (H + λ)·w* = E[x y] + λ·w, with λ = damping · mean of H's diagonal.
    cross_gKO: E[x y], moments of inputs with wanted outputs.
    """
    ridge = damping * _mean_diagonal(h_gKK)
    return torch.linalg.solve(damped(h_gKK, damping), cross_gKO + ridge * w_gOK.transpose(1, 2)).transpose(1, 2)


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
    blocks = torch.arange(len(order), device=weight.device).split(sizes)
    scales, codes = _first_pass(w_gOK, h_gKK, blocks, bits)
    for _ in range(PASSES):
        residual = (w_gOK - scales * codes) @ h_gKK
        for columns in blocks:
            h_gBB = h_gKK[:, columns][:, :, columns]
            before = scales[..., columns] * codes[..., columns]
            wanted = before + _solved(h_gBB, residual[..., columns])
            scale, new = _fit_cluster(wanted, scales[..., columns[:1]], codes[..., columns], h_gBB, bits)
            scales[..., columns], codes[..., columns] = scale, new
            residual = residual - (scale * new - before) @ h_gKK[:, columns]
    scale = scales.flatten(0, 1)[:, torch.stack([columns[0] for columns in blocks])]
    quantized = torch.empty_like(codes)
    quantized[..., order] = scales * codes
    return CompensatedWeights(quantized.reshape(weight.shape), scale.reshape(layout.scale_shape))


def compensate_steps(weight: Tensor, h_gKK: Tensor, step: Tensor) -> CompensatedWeights:
    """8-bit codes of ``weight`` [O, I, *kernel] on the given steps [O] (of either sign), for moments ``h_gKK``."""
    w_gOK = _grouped(weight.double(), h_gKK)
    step_gO = step.double().reshape(w_gOK.shape[:2])
    codes = _eight_bit(w_gOK / step_gO[..., None])
    blocks = torch.arange(w_gOK.shape[-1], device=weight.device).split(COLUMNS_PER_BLOCK)
    for _ in range(PASSES):
        residual = (w_gOK - step_gO[..., None] * codes) @ h_gKK
        for columns in blocks:
            before = codes[..., columns]
            new = before.clone()
            # Within the block the residual follows each column; outside, the whole block at once.
            _descend(new, residual[..., columns].clone(), h_gKK[:, columns][:, :, columns], step_gO, _eight_bit)
            codes[..., columns] = new
            residual = residual - (step_gO[..., None] * (new - before)) @ h_gKK[:, columns]
    return CompensatedWeights((step_gO[..., None] * codes).reshape(weight.shape), step)


def _first_pass(w_gOK: Tensor, h_gKK: Tensor, blocks: Sequence[Tensor], bits: int) -> tuple[Tensor, Tensor]:
    """Scales and codes, both w_gOK: a cluster's scale from its weights as they are when its turn comes."""
    remaining = w_gOK.clone()
    scales, codes = torch.zeros_like(w_gOK), torch.zeros_like(w_gOK)
    factor = _inverse_factor(h_gKK)
    for columns in blocks:
        scale = _solved_scale(remaining[..., columns], bits)
        # The errors of this cluster, by its own columns at once and by all later ones at its end.
        errors = torch.zeros_like(remaining[..., columns])
        own = remaining[..., columns].clone()
        f_gBB = factor[:, columns][:, :, columns]
        for index in range(len(columns)):
            code = _code(own[..., index], scale[..., 0], bits)
            error = (own[..., index] - scale[..., 0] * code) / f_gBB[:, index, index, None]
            own -= error[..., None] * f_gBB[:, None, index]
            errors[..., index] = error
            codes[..., columns[index]] = code
        scales[..., columns] = scale
        remaining -= errors @ factor[:, columns]
    return scales, codes


def _fit_cluster(wanted_gOB: Tensor, scale: Tensor, codes: Tensor, h_gBB: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes given the scale by coordinate descent, then the scale given the codes by least squares, in turn."""
    codes = codes.clone()
    for _ in range(ALTERNATIONS):
        residual = (wanted_gOB - scale * codes) @ h_gBB
        _descend(codes, residual, h_gBB, scale[..., 0], lambda values: _limited(values, bits))
        projected = codes @ h_gBB
        power = (projected * codes).sum(-1, keepdim=True)
        fitted = (projected * wanted_gOB).sum(-1, keepdim=True) / torch.where(power > 0, power, torch.inf)
        # A scale that came out as zero or negative would make codes of the wrong sign: the old one stays.
        scale = torch.where(fitted > 0, fitted, scale)
    return scale, codes


def _descend(codes: Tensor, residual: Tensor, h_gBB: Tensor, step_gO: Tensor, rounded: Rounding) -> None:
    """One pass of coordinate descent over the columns, in place: each code where the error is least given all others.

    residual: (w − step·codes) H, which follows. A column without moments, or of a step of zero, stays as it is.
    """
    usable = step_gO != 0
    inverse_step = torch.where(usable, 1 / torch.where(usable, step_gO, 1.0), 0.0)
    for index in range(codes.shape[-1]):
        moment = h_gBB[:, index, index, None]
        alive = usable & (moment > 0)
        best = codes[..., index] + residual[..., index] / torch.where(moment > 0, moment, torch.inf) * inverse_step
        new = torch.where(alive, rounded(best), codes[..., index])
        residual -= (step_gO * (new - codes[..., index]))[..., None] * h_gBB[:, None, index]
        codes[..., index] = new


def _limited(values: Tensor, bits: int) -> Tensor:
    # Ternary codes round away from zero at one half, as everywhere: |w| >= scale / 2.
    return torch.sign(values) * (values.abs() >= 0.5) if bits == 2 else round_half_even(values).clamp(-7, 7)


def _eight_bit(values: Tensor) -> Tensor:
    return round_half_even(values).clamp(SIGNED_8_BIT.low, SIGNED_8_BIT.high)


def _code(values: Tensor, scale: Tensor, bits: int) -> Tensor:
    if bits == 4:
        return four_bit_codes(values, scale)
    return torch.sign(values) * ((values.abs() >= scale / 2) & (scale > 0))


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


def _solved(h_gBB: Tensor, residual: Tensor) -> Tensor:
    """residual · H⁻¹, where H may lack inputs."""
    dead = (h_gBB.diagonal(dim1=1, dim2=2) <= 0).to(h_gBB.dtype)
    safe = damped(h_gBB, 1e-6) + torch.diag_embed(dead)
    return torch.linalg.solve(safe, residual.transpose(1, 2)).transpose(1, 2)


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
