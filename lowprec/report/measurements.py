"""What a report shows of a model: figures of its layers, its tensors and its classes, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Histogram:
    """Counts in equal bins from ``low`` to ``high``; the outer bins also count what lies beyond them."""

    low: float
    high: float
    counts: list[int]


@dataclass(frozen=True)
class WeightStatistics:
    """The latent weights of one layer by the sign of their code, and what decides on it.

    negative, zero, positive: latent weights that got such a code. full_precision: the weights that the run began with, or
    None. scales, thresholds: clusters by their scale and by the magnitude up to which a weight becomes zero; None where the
    scheme has none. All have the same ends, but scales and thresholds begin at 0.
    """

    negative: Histogram
    zero: Histogram
    positive: Histogram
    full_precision: Histogram | None
    scales: Histogram | None
    thresholds: Histogram | None


@dataclass(frozen=True)
class LayerStatistics:
    """One layer with quantized weights.

    scheme: ``ternary``, ``2 × ternary``, ``4-bit`` or ``8-bit``. sparsity: share of zero codes. flips: share of the codes that
    training changed. weight_signal_to_noise: 10 log10(Σ w² / Σ (w − ŵ)²), dB, of quantized unfolded weights ŵ against
    full-precision ones w. output_signal_to_noise: the same of the layer's outputs, as the whole quantized network makes
    them. exponents: the least and the largest of the weights. tensor: the name of its output among the tensors, None for
    logits. What was not measured is None.
    """

    name: str
    shape: tuple[int, ...]
    scheme: str
    cluster_size: int
    sparsity: float
    flips: float | None
    weight_signal_to_noise: float | None
    output_signal_to_noise: float | None
    exponents: tuple[int, int]
    macs: int
    multiplications: int
    bytes: int
    tensor: str | None
    weights: WeightStatistics


@dataclass(frozen=True)
class TensorStatistics:
    """One activation tensor before it is rounded, over some images.

    low, high: the values that the least and the largest code stand for. minimum, maximum: of the values. clipped: the share
    of them that rounds to a code outside the range. signal_to_noise: of rounding and clipping this tensor alone, dB; None
    where there is no noise or no signal.
    """

    name: str
    exponent: int
    low: float
    high: float
    minimum: float
    maximum: float
    clipped: float
    signal_to_noise: float | None
    histogram: Histogram


@dataclass
class ClassStatistics:
    """Classes that the full-precision and the quantized model find in the same images.

    confusion: [label][class that the quantized model finds], counts. labels: those of the changed images, as
    (label, full precision's class, quantized class); pictures: of some of the changed images, in the order of ``changed``,
    PNG files.
    """

    images: int
    names: list[str]
    confusion: list[list[int]]
    agreed: int | None = None
    gained: int = 0
    lost: int = 0
    changed: list[tuple[int, int, int]] = field(default_factory=list)
    pictures: list[bytes] = field(default_factory=list)
