"""Where it hurts: the output error of each layer quantized alone, by each scheme that it could have.

One walk over the graph in full precision. At each layer its inputs are there, so a scheme costs the layer and what comes
after it, not the whole network.
"""

from __future__ import annotations

import csv
import io
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from lowprec.calibrate import calibrate, calibration_images
from lowprec.calibration.statistics import ChannelStatistics, correct_mean, correct_norm, statistics_of
from lowprec.candidates import CANDIDATES, Choices, LayerOption, scheme_choices, take_scheme
from lowprec.images import check_images, image_batches
from lowprec.layers import QuantizedLayer, quantized_layers
from lowprec.prepare import full_precision, prepare
from lowprec.recipe import Recipe

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OutputError:
    """What quantization does to the logits, against full precision on the same images.

    mean_squared_error: over images and logits. signal_to_noise: 10 log10(Σ logit² / Σ error²), dB; infinite without error.
    kl_divergence: of the quantized model's classes from full precision's, nats, mean over images. top1_difference: on the
    labelled images, a share, negative where accuracy is lost; None without any.
    """

    mean_squared_error: float
    signal_to_noise: float
    kl_divergence: float
    top1_difference: float | None = None


@dataclass(frozen=True)
class SensitivityRow:
    """One layer alone with one scheme, all else in full precision."""

    option: LayerOption
    error: OutputError

    def record(self) -> dict[str, Any]:
        """The row's figures, flat. What is infinite is None."""
        costs = {"weight_bits": self.option.cost.weight_bits, "macs": self.option.cost.macs}
        replaced = self.option.cost.multiplications_replaced
        scheme = {"layer": self.option.layer, "scheme": self.option.label, **asdict(self.option.scheme)}
        return {**scheme, **_finite(self.error), **costs, "multiplications_replaced": replaced}


@dataclass(frozen=True)
class Sensitivity:
    """What :func:`sensitivity` found; rows in the network's order, of each layer in the candidates' order.

    activations: all activations quantized, and weights in full precision. signal_power: mean of the squared logits.
    """

    choices: Choices
    rows: list[SensitivityRow]
    activations: OutputError
    signal_power: float
    images: int
    labelled_images: int
    top1: float | None

    def ranking(self) -> list[SensitivityRow]:
        """All rows, what hurts most first."""
        return sorted(self.rows, key=lambda row: -row.error.mean_squared_error)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain mappings and lists, for JSON."""
        return {
            "recipe": self.choices.recipe.to_dict(),
            "images": self.images,
            "labelled_images": self.labelled_images,
            "full_precision_top1": self.top1,
            "signal_power": self.signal_power,
            "activations": _finite(self.activations),
            "fixed": sorted(self.choices.fixed),
            "rows": [row.record() for row in self.rows],
        }

    def to_csv(self) -> str:
        """The rows as comma-separated values, with a line of names."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(self.rows[0].record()), lineterminator="\n")
        writer.writeheader()
        writer.writerows(row.record() for row in self.rows)
        return text.getvalue()

    def __str__(self) -> str:
        """A line for each layer, what hurts most first: signal-to-noise ratio and top-1 difference by scheme."""
        labels = list(dict.fromkeys(row.option.label for row in self.rows))
        layers = list(dict.fromkeys(row.option.layer for row in self.ranking()))
        found = {(row.option.layer, row.option.label): row for row in self.rows}
        names = {layer: f"{layer} *" if layer in self.choices.fixed else layer for layer in layers}
        width = max(map(len, [*names.values(), "layer"]))
        widths = [max(len(label), 8) for label in labels]
        measured = self.top1 is not None

        def line(name: str, weights: str, cells: list[str], more: list[str]) -> str:
            columns = [*zip(cells, widths, strict=True), *(zip(more, widths, strict=True) if measured else ())]
            return "  ".join([f"{name:{width}}", f"{weights:>11}", *(f"{cell:>{size}}" for cell, size in columns)])

        group = sum(widths) + 2 * (len(widths) - 1)
        titles = [f"{'signal-to-noise, dB':>{group}}", *([f"{'top-1 points':>{group}}"] if measured else [])]
        lines = ["  ".join([" " * width, " " * 11, *titles]), line("layer", "weights", labels, labels)]
        for layer in layers:
            rows = [found.get((layer, label)) for label in labels]
            weights = next(row.option.cost.weights for row in rows if row is not None)
            cells = ["" if row is None else f"{row.error.signal_to_noise:.1f}" for row in rows]
            lines.append(line(names[layer], f"{weights:,}", cells, [_points(row) for row in rows]))
        return "\n".join([*lines, *self._notes()])

    def _notes(self) -> list[str]:
        activations = f"activations alone: {self.activations.signal_to_noise:.1f} dB"
        if self.activations.top1_difference is not None:
            activations += f", top-1 {100 * self.activations.top1_difference:+.1f} points"
        images = f"{self.images:,} images"
        if self.top1 is not None:
            images += f"; top-1 on {self.labelled_images:,} labelled ones, {self.top1:.2%} in full precision"
        stars = ["* fixed by a rule: an assignment leaves it as the recipe has it"] if self.choices.fixed else []
        return [*stars, activations, images]


@torch.no_grad()
def sensitivity(
    model: nn.Module,
    recipe: Recipe | str | Path,
    batches: Iterable[Any],
    labelled: Iterable[tuple[Tensor, Tensor]] | None = None,
    candidates: Sequence[dict[str, Any]] = CANDIDATES,
    device: torch.device | str | None = None,
) -> Sensitivity:
    """Quantizes each layer of ``model`` alone, by each candidate, and measures what that does to the logits.

    model, recipe: as for :func:`lowprec.prepare`; the model is not changed. batches: unlabelled images [B, C, H, W], normalised;
    some dozens to hundreds do. labelled: (images, labels [B]) on which top-1 is measured as well. candidates: fields of a
    weight scheme and their values, as a rule sets them; a layer's own scheme of ``recipe`` is always measured too. device: where
    to compute, None for where the model is.

    The layer's weights are those of the integer model, batch norm folded and rounded, after its batch norm (or the mean that its
    bias adds) has been corrected for them on ``batches``, as calibration does.

    Raises:
        as :func:`lowprec.prepare` and :func:`lowprec.calibrate`; RecipeError: a candidate that cannot be.
        TypeError, ValueError: ``labelled`` holds no pairs of images and as many labels.
    """
    images = [batch for _, batch in image_batches(batches, "sensitivity")]
    if not images:
        raise ValueError("sensitivity got no images: give at least one batch [B, C, H, W]")
    first = images[0] if len(images[0]) > 1 else images[0].repeat(2, 1, 1, 1)
    qmodel = prepare(model, recipe, first[:2].to(next(model.parameters()).device)).eval()
    qmodel.to(device)
    images = calibration_images(qmodel, images, "sensitivity")
    judge = _Judge(qmodel, images, _labelled_batches(qmodel, labelled))
    choices = scheme_choices(qmodel, candidates)
    with _weights_in_full_precision(qmodel):
        calibrate(qmodel, images, batch_norm_correction=False)
        activations = judge.error([qmodel(batch) for batch in judge.batches])
    with full_precision(qmodel):
        rows = list(_layer_rows(qmodel, choices, judge))
    power = float(judge.expected.square().mean())
    return Sensitivity(choices, rows, activations, power, judge.images, len(judge.labels), judge.top1)


class Suffixes:
    """The graph node by node; of any node's tensors, with which the rest of the network can be run again."""

    def __init__(self, qmodel: fx.GraphModule) -> None:
        self._interpreter = fx.Interpreter(qmodel)
        self.nodes = list(qmodel.graph.nodes)
        self._position = {node: index for index, node in enumerate(self.nodes)}
        last_use = {used: node for node in self.nodes for used in node.all_input_nodes}
        self._unused_after: dict[fx.Node, list[fx.Node]] = {node: [] for node in self.nodes}
        for used, node in last_use.items():
            self._unused_after[node].append(used)

    def step(self, node: fx.Node, values: dict[fx.Node, Any]) -> None:
        """Adds the node's value to ``values``, which hold its inputs, and drops what no later node needs."""
        if node.op == "placeholder":
            return
        self._interpreter.env = values
        values[node] = self._interpreter.run_node(node)
        for used in self._unused_after[node]:
            del values[used]

    def output(self, node: fx.Node, values: dict[fx.Node, Any]) -> Tensor:
        """The network's output, computed from ``node`` on; ``values``, those before it, stay."""
        values = dict(values)
        for later in self.nodes[self._position[node] :]:
            self.step(later, values)
        return values[self.nodes[-1]]


class _Judge:
    """Compares logits with full precision's: on the unlabelled images, which come first, and on the labelled ones."""

    def __init__(self, qmodel: fx.GraphModule, images: list[Tensor], labelled: list[tuple[Tensor, Tensor]]) -> None:
        self.unlabelled = images
        self.batches = [*images, *(batch for batch, _ in labelled)]
        self.labels = torch.cat([labels for _, labels in labelled]) if labelled else torch.empty(0)
        self.images = sum(map(len, images))
        with full_precision(qmodel):
            logits = torch.cat([qmodel(batch) for batch in self.batches]).double()
        self.expected = logits[: self.images]
        self.top1 = self._top1(logits)

    def error(self, outputs: list[Tensor]) -> OutputError:
        """Of the logits of all batches."""
        logits = torch.cat(outputs).double()
        found, expected = logits[: self.images], self.expected
        noise, signal = float((found - expected).square().mean()), float(expected.square().mean())
        ratio = math.inf if noise == 0 else -math.inf if signal == 0 else 10 * math.log10(signal / noise)
        difference = expected.log_softmax(1) - found.log_softmax(1)
        divergence = float((expected.softmax(1) * difference).sum()) / self.images
        top1 = self._top1(logits)
        return OutputError(noise, ratio, divergence, None if self.top1 is None or top1 is None else top1 - self.top1)

    def _top1(self, logits: Tensor) -> float | None:
        if not len(self.labels):
            return None
        return float((logits[self.images :].argmax(1) == self.labels).double().mean())


def _layer_rows(qmodel: fx.GraphModule, choices: Choices, judge: _Judge) -> Iterator[SensitivityRow]:
    """The rows of all layers, of a model that computes in full precision."""
    suffixes = Suffixes(qmodel)
    placeholder = suffixes.nodes[0]
    values: list[dict[fx.Node, Any]] = [{placeholder: batch} for batch in judge.batches]
    for node in suffixes.nodes:
        if node.op == "call_module" and str(node.target) in choices.options:
            layer = qmodel.get_submodule(str(node.target))
            assert isinstance(layer, QuantizedLayer)
            inputs = [values[index][node.args[0]] for index in range(len(judge.unlabelled))]
            reference = statistics_of(layer, map(layer.before_norm, inputs))
            for option in choices.options[str(node.target)]:
                with quantized_alone(layer, option, reference, inputs):
                    error = judge.error([suffixes.output(node, held) for held in values])
                log.info("%s, %s: %.1f dB", option.layer, option.label, error.signal_to_noise)
                yield SensitivityRow(option, error)
        for held in values:
            suffixes.step(node, held)


@contextmanager
def quantized_alone(
    layer: QuantizedLayer, option: LayerOption, reference: ChannelStatistics, inputs: list[Tensor]
) -> Iterator[None]:
    """Within it, a layer of a network in full precision has the option's weights, and is corrected for them.

    reference: statistics of its outputs before batch norm in full precision. inputs: batches of its input.
    """
    scheme, quantizer = layer.scheme, layer.weight_quantizer
    norm = [] if layer.norm is None else [layer.norm.running_mean, layer.norm.running_var]
    corrected = [tensor for tensor in (*norm, layer.bias) if tensor is not None]
    before = [tensor.clone() for tensor in corrected]
    take_scheme(layer, option.scheme)
    layer.quantizing = True
    try:
        (correct_mean if layer.norm is None else correct_norm)(layer, reference, inputs)
        yield
    finally:
        layer.scheme, layer.weight_quantizer, layer.quantizing = scheme, quantizer, False
        for tensor, value in zip(corrected, before, strict=True):
            tensor.copy_(value)


@contextmanager
def _weights_in_full_precision(qmodel: fx.GraphModule) -> Iterator[None]:
    """Within it, the layers whose weights a recipe quantizes have latent weights; activations are quantized."""
    layers = [layer for _, layer in quantized_layers(qmodel)]
    for layer in layers:
        layer.quantizing = False
    try:
        yield
    finally:
        for layer in layers:
            layer.quantizing = True


def _labelled_batches(
    qmodel: fx.GraphModule, labelled: Iterable[tuple[Tensor, Tensor]] | None
) -> list[tuple[Tensor, Tensor]]:
    batches = []
    device = next(qmodel.parameters()).device
    for index, pair in enumerate(() if labelled is None else labelled):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not isinstance(pair[1], Tensor):
            raise TypeError(f"labelled: batch {index} is {type(pair).__name__}: give pairs (images, labels)")
        images, labels = pair
        check_images(images, qmodel.meta["image_shape"], f"the labelled images of batch {index}", any_size=True)
        if labels.shape != (len(images),):
            raise ValueError(f"labelled: batch {index} has {len(images)} images and labels of {list(labels.shape)}")
        batches.append((images.to(device), labels.to(device)))
    return batches


def _finite(error: OutputError) -> dict[str, float | None]:
    """JSON knows no infinity."""
    return {key: value if value is None or math.isfinite(value) else None for key, value in asdict(error).items()}


def _points(row: SensitivityRow | None) -> str:
    if row is None or row.error.top1_difference is None:
        return ""
    return f"{100 * row.error.top1_difference:+.1f}"
