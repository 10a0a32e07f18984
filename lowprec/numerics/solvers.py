"""Solvers: the scales and codes of clusters of weights, from the weights alone.

All work on w_OGNP (see :mod:`lowprec.numerics.clusters`), vectorized over clusters. A ternary solution is a scale s and a
threshold t per cluster: code = sign(w) where |w| ≥ t, else 0. Solvers and their sources: arXiv 1701.08978 (`paper`),
1705.01462, 1605.04711 (`twn`); figures in tests/numerics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lowprec.numerics.clusters import ClusterLayout
from lowprec.numerics.fixed_point import SIGNED_8_BIT as EIGHT_BIT_CODES
from lowprec.numerics.fixed_point import (
    exponent_for,
    power_of_two,
    quantize,
    round_half_even_,
    scale_by_power_of_two,
)

FOUR_BIT_LIMIT = 7
# Starting points of the 4-bit solver, as shares of the scale that just fits the largest weight: below 1, where clipping
# pays, and above, where the weights come closer to their grid. With few weights the error has more valleys, so more of
# them are tried (four weights: 1.3 times less error).
FOUR_BIT_STARTS = (1.05, *(share / 100 for share in range(100, 24, -5)), 1.1, 1.2, 1.3, 1.4, 1.55, 1.75)
FEW_WEIGHTS = 16
FOUR_BIT_STARTS_OF_FEW = (*FOUR_BIT_STARTS, *(share / 100 for share in (*range(97, 57, -5), *range(115, 185, 5))))

# Clusters are solved in blocks of this many weights, so that the temporaries stay in the processor's cache.
WEIGHTS_PER_BLOCK = 1 << 20


class ClusterScales(NamedTuple):
    """scale and threshold of each cluster, float32, of :attr:`ClusterLayout.scale_shape`; thresholds are ternary only."""

    scale: Tensor
    threshold: Tensor


def check_finite(weight: Tensor, name: str) -> None:
    """Raises ValueError, naming the tensor, where ``weight`` holds an infinity or NaN (a weight without data passes)."""
    if weight.is_meta:
        return
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise ValueError(
            f"layer {name}: {bad} of {weight.numel()} weights are infinite or NaN; the checkpoint is damaged or training diverged"
        )


def solve_ternary(weight: Tensor, layout: ClusterLayout, solver: str = "exact") -> ClusterScales:
    """Scales and thresholds of ternary clusters of ``weight`` [O, I, *kernel], any floating-point dtype.

    `exact` minimises Σ (w − s·c)² over all s and all codes c; the others are kept for comparison. A cluster of zeros gets
    scale 0 and codes 0.
    """
    rows = layout.rows(layout.split(weight)).abs()
    counts = layout.members_of_rows(weight.device)
    per_block = max(1, WEIGHTS_PER_BLOCK // (rows.shape[1] * rows.shape[2]))
    solve = TERNARY_SOLVERS[solver]
    parts = [
        solve(block.to(torch.float32 if block.dtype != torch.float64 else torch.float64), count)
        for block, count in zip(rows.split(per_block), counts.split(per_block), strict=True)
    ]
    scale = torch.cat([part[0] for part in parts]).to(torch.float32)
    threshold = torch.cat([part[1] for part in parts])
    # An empty support must stay empty: no magnitude reaches infinity.
    threshold = torch.where(scale > 0, threshold, torch.inf).to(torch.float32)
    return ClusterScales(_to_scale_shape(scale, layout), _to_scale_shape(threshold, layout))


def ternary_codes(w_OGNP: Tensor, threshold: Tensor) -> Tensor:
    """-1, 0, 1 of each weight: its sign where its magnitude reaches the threshold of its cluster."""
    # In place: comparisons that give numbers are vectorized, those that give booleans are not.
    return torch.sign(w_OGNP).mul_(w_OGNP.abs().ge_(threshold))


def descend_ternary(w_OGNP: Tensor, scales: ClusterScales, layout: ClusterLayout) -> ClusterScales:
    """One descent step: the support |w| ≥ s/2, then s = mean |w| over it. The squared error never rises.

    At the exact optimum the threshold is half the scale, so the step leaves it where it is; while weights move a little
    per training step it follows the optimum. A cluster whose scale is 0 or whose support is empty restarts at mean |w|.
    """
    magnitude = w_OGNP.detach().abs()
    counts = layout.members_of_clusters(w_OGNP.device).view(1, -1, 1, 1)
    counts = counts * (layout.positions if layout.shares_positions else 1)
    mean = _sum(magnitude, layout) / counts
    support = magnitude.clone().ge_(torch.where(scales.scale > 0, scales.scale, mean) / 2)
    size = support.sum(layout.shared_axes, keepdim=True)
    support_mean = _sum(support.mul_(magnitude), layout) / size.clamp(min=1)
    scale = torch.where(size > 0, support_mean, mean).to(torch.float32)
    threshold = torch.where(scale > 0, scale / 2, torch.inf)
    return ClusterScales(scale, threshold)


def solve_four_bit(weight: Tensor, layout: ClusterLayout) -> Tensor:
    """Scales (float32, of ``layout.scale_shape``) of 4-bit clusters, by least squares against their codes -7 ... 7.

    The best of several starting points, then alternately q = clamp(round(w/s), -7, 7) and s = Σ w·q / Σ q², which cannot
    raise the squared error. Magnitudes suffice: the codes take the signs of the weights.
    """
    rows = layout.rows(layout.split(weight)).abs().flatten(1)
    blocks = rows.split(max(1, WEIGHTS_PER_BLOCK // rows.shape[1]))
    # Clusters as columns: sums over a handful of members are many times quicker along the first axis.
    scales = [_four_bit_columns(block.T.to(torch.float32).contiguous()) for block in blocks]
    return _to_scale_shape(torch.cat(scales), layout)


def four_bit_codes(w_OGNP: Tensor, scale: Tensor) -> Tensor:
    """-7 ... 7 of each weight: clamp(round_half_even(w / s)), 0 in a cluster of scale 0."""
    codes = round_half_even_(w_OGNP / torch.where(scale > 0, scale, torch.inf))
    return codes.clamp_(-FOUR_BIT_LIMIT, FOUR_BIT_LIMIT)


def descend_four_bit(w_OGNP: Tensor, scale: Tensor, layout: ClusterLayout) -> Tensor:
    """One descent step of :func:`solve_four_bit`; a cluster whose codes are all zero restarts at max |w| / 7."""
    weights = w_OGNP.detach()
    codes = four_bit_codes(weights, scale)
    explained = _sum(weights * codes, layout)
    power = codes.square_().sum(layout.shared_axes, keepdim=True)
    fitted = explained / power.clamp(min=1)
    restart = weights.abs().amax(layout.shared_axes, keepdim=True) / FOUR_BIT_LIMIT
    return torch.where(power > 0, fitted, restart).to(torch.float32)


def solve_eight_bit(weight: Tensor) -> Tensor:
    """Exponents [O] (int32) of 8-bit weights [O, ...]: the power of two of least squared error, clipping allowed."""
    rows = weight.detach().flatten(1)
    rows = rows if rows.dtype == torch.float64 else rows.to(torch.float32)
    fitting = exponent_for(rows.abs().amax(1), EIGHT_BIT_CODES.high)
    candidates = torch.stack([fitting, fitting - 1, fitting - 2])
    errors = torch.stack([_eight_bit_error(rows, exponent[:, None]) for exponent in candidates])
    return candidates.gather(0, errors.argmin(0, keepdim=True))[0]


def _eight_bit_error(rows: Tensor, exponent: Tensor) -> Tensor:
    codes = round_half_even_(scale_by_power_of_two(rows, -exponent))
    codes.clamp_(EIGHT_BIT_CODES.low, EIGHT_BIT_CODES.high)
    return codes.mul_(power_of_two(exponent, codes.dtype)).sub_(rows).square_().sum(1, dtype=torch.float64)


def eight_bit_codes(weight: Tensor, exponent: Tensor) -> Tensor:
    """-128 ... 127 of each weight [O, ...] at the exponents [O] of its output channels, as floating-point integers."""
    return quantize(weight, exponent.view(-1, *[1] * (weight.dim() - 1)), EIGHT_BIT_CODES)


def _sum(values: Tensor, layout: ClusterLayout) -> Tensor:
    """Over clusters, rounded once: in float64 the sum of float32 weights is exact but for freaks, in whatever order it is taken.

    So all devices and kernels come to the same scales.
    """
    return values.sum(layout.shared_axes, keepdim=True, dtype=torch.float64).to(values.dtype)


def _to_scale_shape(rows: Tensor, layout: ClusterLayout) -> Tensor:
    output_channels, groups, _, positions = layout.scale_shape
    return rows.reshape(output_channels, groups, 1, positions)


def _pick(candidates: Tensor, index: Tensor) -> Tensor:
    return candidates.gather(-1, index.unsqueeze(-1)).squeeze(-1)


def _sorted_prefixes(w_CN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Magnitudes sorted downwards, their prefix sums (float64), and the prefix lengths 1 ... n."""
    ordered = w_CN.sort(-1, descending=True).values
    sizes = torch.arange(1, w_CN.shape[-1] + 1, dtype=torch.float64, device=w_CN.device)
    return ordered, ordered.cumsum(-1, dtype=torch.float64), sizes


def _exact(w_CNP: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """k* = argmax S_k²/k, s = S_k*/k*; the support is exactly where |w| ≥ s/2 (no magnitude lies near s/2)."""
    _, sums, sizes = _sorted_prefixes(w_CNP.flatten(1))
    best = (sums.square() / sizes).argmax(-1)
    scale = _pick(sums, best) / (best + 1)
    return scale, scale / 2


def _rms(w_CNP: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """s = root of the mean square of the prefix, support = the prefix, the prefix by least error."""
    ordered, sums, sizes = _sorted_prefixes(w_CNP.flatten(1))
    squares = ordered.double().square().cumsum(-1)
    scales = (squares / sizes).sqrt()
    # error = Σ w² − 2 s S_k + k s², and k s² = Q_k
    best = (squares - 2 * scales * sums).argmin(-1)
    return _pick(scales, best), _pick(ordered, best)


def _twn(w_CNP: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Threshold 0.7 · mean |w|, scale = mean |w| over the support (arXiv 1605.04711)."""
    rows = w_CNP.flatten(1).to(torch.float64)
    threshold = 0.7 * rows.sum(-1) / (counts * w_CNP.shape[2])
    support = rows >= threshold.unsqueeze(-1)
    return (rows * support).sum(-1) / support.sum(-1).clamp(min=1), threshold


def _paper(w_CNP: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Algorithms 1 and 2 of arXiv 1701.08978: candidates that are their own thresholds, per kernel, then per cluster."""
    kernels = w_CNP.flatten(0, 1)
    kernel_scales = _best_own_threshold(kernels, _root_mean_squares(kernels)).reshape(w_CNP.shape[:2])
    candidates = _root_mean_squares(kernel_scales)
    # A cluster that is not full has no candidates beyond its last kernel.
    candidates = torch.where(
        torch.arange(1, w_CNP.shape[1] + 1, device=counts.device) <= counts[:, None], candidates, candidates[:, :1]
    )
    scale = _best_own_threshold(w_CNP.flatten(1), candidates)
    return scale, scale


def _root_mean_squares(values: Tensor) -> Tensor:
    """sqrt of the mean square of the t largest of each row, t = 1 ... n (float64)."""
    ordered, _, sizes = _sorted_prefixes(values)
    return (ordered.double().square().cumsum(-1) / sizes).sqrt()


def _best_own_threshold(rows: Tensor, candidates: Tensor) -> Tensor:
    """Of each row's candidate scales, used as their own thresholds, the one of least squared error."""
    ordered, sums, _ = _sorted_prefixes(rows)
    candidates = candidates.to(rows.dtype)
    # How many magnitudes reach each candidate: the rows are sorted downwards, searchsorted wants them upwards.
    upwards = ordered.flip(-1).contiguous()
    sizes = rows.shape[-1] - torch.searchsorted(upwards, candidates.contiguous())
    support_sums = torch.where(sizes > 0, sums.gather(-1, (sizes - 1).clamp(min=0)), 0.0)
    wide = candidates.to(torch.float64)
    best = (sizes * wide.square() - 2 * wide * support_sums).argmin(-1)
    return _pick(candidates, best)


def _four_bit_columns(w_NC: Tensor) -> Tensor:
    largest = w_NC.amax(0)
    best_scale = torch.zeros_like(largest)
    best_gain = torch.zeros_like(largest, dtype=torch.float64)
    for share in FOUR_BIT_STARTS if len(w_NC) > FEW_WEIGHTS else FOUR_BIT_STARTS_OF_FEW:
        scale, gain = _fit_four_bit(w_NC, largest * (share / FOUR_BIT_LIMIT))
        best_scale = torch.where(gain > best_gain, scale, best_scale)
        best_gain = torch.maximum(gain, best_gain)
    for _ in range(2):
        best_scale, _ = _fit_four_bit(w_NC, best_scale)
    return best_scale


def _fit_four_bit(w_NC: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The least-squares scale for the codes of ``scale``, and the part of Σ w² that it explains, (Σ w·q)² / Σ q²."""
    codes = four_bit_codes(w_NC, scale)
    product = (w_NC * codes).sum(0)
    power = codes.square().sum(0).clamp(min=1)
    # In float64: the square of a small weight would vanish.
    return product / power, product.double().square() / power


TERNARY_SOLVERS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "exact": _exact,
    "rms": _rms,
    "paper": _paper,
    "twn": _twn,
}
