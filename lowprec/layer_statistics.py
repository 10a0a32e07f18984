"""What quantization does to each layer's weights and each tensor's values: figures for a report, or to look at.

>>> layer_statistics(qmodel, cost(qmodel, images))        # weights alone
>>> tensor_statistics(qmodel, [images])                   # activations, over batches
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, fx, nn

from lowprec.cost import Costs, LayerCost
from lowprec.layers import ActivationQuantizer, QuantizedLayer, quantized_layers
from lowprec.numerics.fixed_point import dequantize, round_half_even, scale_by_power_of_two
from lowprec.prepare import full_precision
from lowprec.report.measurements import Histogram, LayerStatistics, TensorStatistics, WeightStatistics

# Of a weight histogram, and of one tensor's range of codes.
WEIGHT_BINS, SCALE_BINS, RANGE_BINS = 81, 40, 64
_SCHEMES = {2: "ternary", 4: "4-bit", 8: "8-bit"}


@torch.no_grad()
def layer_statistics(
    qmodel: fx.GraphModule,
    costs: Costs,
    reference: nn.Module | None = None,
    codes_before: Mapping[str, Tensor] | None = None,
    output_signal_to_noise: Mapping[str, float | None] | None = None,
) -> list[LayerStatistics]:
    """The layers of a calibrated model with quantized weights, in the model's order.

    costs: of the model. reference: the same prepared model with full-precision weights. codes_before: of the weights by layer,
    with which those of now are compared. output_signal_to_noise: of :func:`output_signal_to_noise`, by layer.
    """
    cost_of = {layer.name: layer for layer in costs.layers}
    return [
        _layer(
            name,
            layer,
            cost_of[name],
            None if reference is None else reference.get_parameter(f"{name}.weight"),
            None if codes_before is None else codes_before[name],
            (output_signal_to_noise or {}).get(name),
        )
        for name, layer in quantized_layers(qmodel)
    ]


@torch.no_grad()
def tensor_statistics(qmodel: fx.GraphModule, batches: Iterable[Tensor]) -> list[TensorStatistics]:
    """All activation tensors of a calibrated model in eval mode, over batches of images [B, C, H, W], in the order in which
    they are computed.
    """
    sums: dict[str, _TensorSums] = {}

    def record(name: str, quantizer: nn.Module, values: Tensor) -> None:
        assert isinstance(quantizer, ActivationQuantizer)
        if name not in sums:
            sums[name] = _TensorSums(quantizer)
        sums[name].add(values)

    with _inputs_of(qmodel, ActivationQuantizer, record):
        for batch in batches:
            qmodel(batch)
    return [found.statistics(tensor_name(name)) for name, found in sums.items()]


@torch.no_grad()
def output_signal_to_noise(
    qmodel: fx.GraphModule, reference: fx.GraphModule, batches: Iterable[Tensor]
) -> dict[str, float | None]:
    """Σ y² / Σ (y − ŷ)² of each layer's outputs, dB: ŷ as the quantized network makes them, y as the reference does.

    reference: the same prepared model with full-precision weights, which computes in full precision here. None where a ratio
    has no value: no noise, or no signal.
    """
    expected: dict[str, Tensor] = {}
    power: dict[str, list[float]] = {}

    def keep(name: str, layer: nn.Module, output: Tensor) -> None:
        expected[name] = output

    def compare(name: str, layer: nn.Module, output: Tensor) -> None:
        signal = expected.pop(name).double()
        sums = power.setdefault(name, [0.0, 0.0])
        sums[0] += float(signal.square().sum())
        sums[1] += float((signal - output).square().sum())

    for batch in batches:
        with full_precision(reference), _outputs_of(reference, keep):
            reference(batch)
        with _outputs_of(qmodel, compare):
            qmodel(batch)
    return {name: decibels(signal, noise) for name, (signal, noise) in power.items()}


def weight_codes(qmodel: nn.Module) -> dict[str, Tensor]:
    """The weights' codes by layer, int8."""
    with torch.no_grad():
        return {name: layer.weight_codes() for name, layer in quantized_layers(qmodel)}


def decibels(signal: float, noise: float) -> float | None:
    """10 log10(signal / noise) of two powers; None where one of them is 0."""
    return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None


def tensor_name(quantizer: str) -> str:
    """What a tensor is called whose quantizer has this name: after the module that computes it."""
    return "input" if quantizer == "input_quantizer" else quantizer.removesuffix(".quantizer")


def histogram(values: Tensor, low: float, high: float, bins: int) -> Histogram:
    """The counts of values of any shape."""
    # On the CPU: a GPU counts in no fixed order.
    counts = torch.histc(values.detach().cpu().double().clamp(low, high), bins, low, high)
    return Histogram(low, high, [int(count) for count in counts])


def _layer(
    name: str,
    layer: QuantizedLayer,
    cost: LayerCost,
    reference: Tensor | None,
    codes_before: Tensor | None,
    output_ratio: float | None,
) -> LayerStatistics:
    codes = layer.weight_codes()
    ratio = None
    if reference is not None:
        wide = reference.double()
        noise = wide - layer.weight_quantizer(layer.weight)
        ratio = decibels(float(wide.square().sum()), float(noise.square().sum()))
    exponents = layer.fold().weights.exponent
    return LayerStatistics(
        name=name,
        shape=cost.weight_shape,
        scheme="2 × ternary" if cost.planes == 2 else _SCHEMES[cost.bits],
        cluster_size=cost.cluster_size,
        sparsity=float((codes == 0).double().mean()),
        flips=None if codes_before is None else float((codes != codes_before.to(codes.device)).double().mean()),
        weight_signal_to_noise=ratio,
        output_signal_to_noise=output_ratio,
        exponents=(int(exponents.min()), int(exponents.max())),
        macs=cost.macs,
        multiplications=cost.multiplications,
        bytes=math.ceil(cost.weight_storage_bits / 8),
        tensor=None if layer.quantizer is None else name,
        weights=_weights(layer, codes, reference),
    )


def _weights(layer: QuantizedLayer, codes: Tensor, reference: Tensor | None) -> WeightStatistics:
    weight, quantizer = layer.weight, layer.weight_quantizer
    scales = [getattr(quantizer, name) for name in ("scale", "residual_scale") if hasattr(quantizer, name)]
    largest = max(float(tensor.abs().max()) for tensor in (weight, *scales) if tensor.numel())
    # An all-zero layer has bins of some width too.
    end = largest or 1.0
    thresholds = quantizer.threshold if hasattr(quantizer, "threshold") else None
    if thresholds is not None:
        # Clusters without any weight but zeros have an infinite one.
        thresholds = thresholds[torch.isfinite(thresholds)]

    def of(values: Tensor) -> Histogram:
        return histogram(values, -end, end, WEIGHT_BINS)

    return WeightStatistics(
        negative=of(weight[codes < 0]),
        zero=of(weight[codes == 0]),
        positive=of(weight[codes > 0]),
        full_precision=None if reference is None else of(reference),
        scales=histogram(torch.cat([scale.flatten() for scale in scales]), 0.0, end, SCALE_BINS) if scales else None,
        thresholds=None if thresholds is None else histogram(thresholds, 0.0, end, SCALE_BINS),
    )


class _TensorSums:
    """What is added up of one tensor, batch by batch."""

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        self.exponent = int(quantizer.exponent)
        self.codes = quantizer.codes
        step = 2.0**self.exponent
        self.low, self.high = self.codes.low * step, self.codes.high * step
        # As much again is drawn beyond each end that values can pass.
        span = (self.codes.high - self.codes.low + 1) * step
        self.ends = (self.low - span if self.codes.low else 0.0, self.low + 2 * span)
        self.bins = RANGE_BINS * round((self.ends[1] - self.ends[0]) / span)
        self.counts = torch.zeros(self.bins, dtype=torch.int64)
        self.minimum, self.maximum = math.inf, -math.inf
        self.values = self.clipped = 0
        self.signal = self.noise = 0.0

    def add(self, values: Tensor) -> None:
        wide, exponent = values.detach().cpu().double(), torch.tensor(self.exponent)
        unlimited = round_half_even(scale_by_power_of_two(wide, -exponent))
        codes = unlimited.clamp(self.codes.low, self.codes.high)
        self.values += wide.numel()
        self.clipped += int((unlimited != codes).sum())
        self.signal += float(wide.square().sum())
        self.noise += float((wide - dequantize(codes, exponent)).square().sum())
        self.minimum, self.maximum = min(self.minimum, float(wide.min())), max(self.maximum, float(wide.max()))
        self.counts += torch.tensor(histogram(wide, *self.ends, self.bins).counts)

    def statistics(self, name: str) -> TensorStatistics:
        return TensorStatistics(
            name=name,
            exponent=self.exponent,
            low=self.low,
            high=self.high,
            minimum=self.minimum,
            maximum=self.maximum,
            clipped=self.clipped / self.values,
            signal_to_noise=decibels(self.signal, self.noise),
            histogram=Histogram(*self.ends, self.counts.tolist()),
        )


Record = Callable[[str, nn.Module, Tensor], None]


def _inputs_of(model: nn.Module, kind: type[nn.Module], record: Record) -> AbstractContextManager[None]:
    """Within it, ``record(name, module, input)`` is called for each call of a module of this kind."""

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], keywords: dict[str, Tensor]) -> None:
            # What a quantizer adds first is a part of its input.
            addend = keywords.get("addend")
            record(name, module, inputs[0] if addend is None else inputs[0] + addend)

        return hook

    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, kind)]
    return _hooked(module.register_forward_pre_hook(hook_of(name), with_kwargs=True) for name, module in modules)


def _outputs_of(model: nn.Module, record: Record) -> AbstractContextManager[None]:
    """Within it, ``record(name, layer, output)`` is called for each call of a layer with quantized weights."""

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda module, inputs, output: record(name, module, output)

    return _hooked(layer.register_forward_hook(hook_of(name)) for name, layer in quantized_layers(model))


@contextmanager
def _hooked(handles: Iterable[torch.utils.hooks.RemovableHandle]) -> Iterator[None]:
    taken = list(handles)
    try:
        yield
    finally:
        for handle in taken:
            handle.remove()
