"""The plots, as Vega-Lite specifications; colours and fonts are the page's, in light and in dark."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lowprec.report.measurements import ClassStatistics, Histogram, LayerStatistics, TensorStatistics

Row = dict[str, Any]
Rows = list[Row]
Datasets = dict[str, Rows]
# Names of more layers than these would lie on each other.
_LABELLED_LAYERS = 40


@dataclass(frozen=True)
class Chart:
    """A plot. spec: Vega-Lite's, with data by name. description: for those who do not see it.

    select: the id of the page's select element that chooses one of ``variants``: data that take the place of those of the
    same name, and a caption; one whose first data are empty has no plot. parameter: of the specification, set to what is chosen.
    """

    spec: Row
    description: str
    select: str | None = None
    variants: Mapping[str, tuple[Datasets, str]] = field(default_factory=dict)
    parameter: str | None = None

    def content(self) -> Row:
        """What the page's script reads."""
        variants = {
            name: {"datasets": data, "caption": caption, "empty": not next(iter(data.values()))}
            for name, (data, caption) in self.variants.items()
        }
        return {"spec": self.spec, "select": self.select, "variants": variants, "parameter": self.parameter}


def ladder_chart(rows: Sequence[tuple[str, float]]) -> Chart:
    """Top-1 of the forms of a model, in the order in which they come about."""
    names = [name for name, _ in rows]
    x = {"field": "stage", "type": "nominal", "sort": names, "title": None, "axis": {"labelAngle": -25}}
    y = {**quantitative("top1", "top-1"), "axis": {"format": ".2%"}, "scale": {"zero": False, "padding": 14}}
    label = {"mark": {"type": "text", "dy": -12}, "encoding": {"text": {"field": "top1", "format": ".2%"}}}
    spec = {
        "data": {"name": "rows"},
        "datasets": {"rows": [{"stage": name, "top1": value} for name, value in rows]},
        "height": 200,
        "encoding": {"x": x, "y": y},
        "layer": [
            {"mark": {"type": "line", "opacity": 0.4}},
            {"mark": {"type": "point", "filled": True, "size": 80}},
            label,
        ],
    }
    return Chart(spec, "Top-1 by stage: " + ", ".join(f"{name} {value:.2%}" for name, value in rows))


def ladder_comparison_chart(rows: Rows, stages: Sequence[str]) -> Chart:
    """Top-1 by stage of several runs: rows of ``run``, ``stage`` and ``top1``."""
    spec = {
        "data": {"name": "rows"},
        "datasets": {"rows": rows},
        "height": 300,
        "mark": {"type": "line", "point": {"size": 80}, "strokeWidth": 1.5},
        "encoding": {
            "x": {
                "field": "stage",
                "type": "nominal",
                "sort": list(stages),
                "title": None,
                "axis": {"labelAngle": -25},
            },
            "y": {**quantitative("top1", "top-1"), "axis": {"format": ".2%"}, "scale": {"zero": False, "padding": 14}},
            "color": {"field": "run", "type": "nominal", "title": None},
            "strokeDash": {"field": "run", "type": "nominal", "title": None},
            "tooltip": tooltips("run", "stage", ("top1", ".2%")),
        },
    }
    return Chart(spec, "Top-1 by stage of both runs")


def depth_chart(layers: Sequence[LayerStatistics]) -> Chart:
    """Signal-to-noise of weights and outputs along the network."""
    rows = [
        {"layer": layer.name, "of": of, "dB": ratio}
        for layer in layers
        for of, ratio in (("weights", layer.weight_signal_to_noise), ("outputs", layer.output_signal_to_noise))
        if ratio is not None
    ]
    order = [layer.name for layer in layers]
    spec = {
        "data": {"name": "rows"},
        "datasets": {"rows": rows},
        "height": 220,
        "mark": {"type": "line", "point": True},
        "encoding": {
            "x": {"field": "layer", "type": "nominal", "sort": order, "title": None, "axis": _layer_axis(len(order))},
            "y": quantitative("dB", "signal-to-noise, dB"),
            "color": {"field": "of", "type": "nominal", "title": None},
            "strokeDash": {"field": "of", "type": "nominal", "title": None},
            "tooltip": tooltips("layer", "of", ("dB", ".1f")),
        },
    }
    return Chart(spec, "Signal-to-noise ratio of weights and outputs, layer by layer")


def weight_chart(layers: Sequence[LayerStatistics]) -> Chart:
    """Histogram of a chosen layer's latent weights by the sign of their codes, with the full-precision ones as a line."""
    variants = {}
    for layer in layers:
        found = layer.weights
        parts = (("negative", found.negative), ("zero", found.zero), ("positive", found.positive))
        data = {
            "weights": [row for name, part in parts for row in bins(part, code=name)],
            "full_precision": [] if found.full_precision is None else bins(found.full_precision, zeros=True),
        }
        variants[layer.name] = (data, _weight_caption(layer))
    weight = {"field": "low", "bin": {"binned": True}, "type": "quantitative", "title": "latent weight"}
    bars = {
        "data": {"name": "weights"},
        "mark": {"type": "bar", "binSpacing": 0, "tooltip": True},
        "encoding": {
            "x": {**weight, "axis": {"format": "~g"}},
            "x2": {"field": "high"},
            "y": {**quantitative("count", "weights"), "stack": "zero"},
            "color": _codes_colour(["negative", "zero", "positive"], "code"),
        },
    }
    line = {
        "data": {"name": "full_precision"},
        "mark": {"type": "line", "interpolate": "step-after", "strokeWidth": 1.5, "style": "text-line"},
        "encoding": {"x": quantitative("low", "latent weight"), "y": quantitative("count", "weights")},
    }
    spec = {"datasets": {"weights": [], "full_precision": []}, "height": 240, "layer": [bars, line]}
    return Chart(spec, "Histogram of the chosen layer's weights by the sign of their codes", "layer", variants)


def scale_chart(layers: Sequence[LayerStatistics]) -> Chart:
    """Clusters of the chosen layer by their scale and threshold, to both sides of zero, as they lie among the weights."""
    variants: dict[str, tuple[Datasets, str]] = {}
    for layer in layers:
        found = layer.weights
        kinds = [("scale", found.scales), ("threshold", found.thresholds)]
        rows = [row for name, part in kinds if part is not None for row in _mirrored(bins(part, of=name))]
        ends = [{"low": -found.negative.high, "high": found.negative.high}]
        caption = "" if rows else "8-bit weights have an exponent per output channel: no clusters, no thresholds."
        variants[layer.name] = ({"clusters": rows, "ends": ends}, caption)
    bars = {
        "data": {"name": "clusters"},
        "mark": {"type": "bar", "binSpacing": 0, "opacity": 0.65, "tooltip": True},
        "encoding": {
            "x": {"field": "low", "bin": {"binned": True}, "type": "quantitative", "title": "± scale, ± threshold"},
            "x2": {"field": "high"},
            "y": {**quantitative("count", "clusters"), "stack": None},
            "color": _codes_colour(["scale", "threshold"], "of"),
        },
    }
    # As wide as the weights' own histogram.
    frame = {
        "data": {"name": "ends"},
        "mark": {"type": "rule", "opacity": 0},
        "encoding": {"x": quantitative("low", "± scale, ± threshold"), "x2": {"field": "high"}},
    }
    spec = {"datasets": {"clusters": [], "ends": []}, "height": 130, "layer": [bars, frame]}
    return Chart(spec, "Clusters of the chosen layer by scale and threshold", "layer", variants)


def activation_chart(tensors: Sequence[TensorStatistics]) -> Chart:
    """Histogram of a chosen tensor before it is rounded, with the ends of its codes' range."""
    variants = {}
    for tensor in tensors:
        rows = bins(tensor.histogram)
        for row in rows:
            middle = (row["low"] + row["high"]) / 2
            row["where"] = "within range" if tensor.low <= middle <= tensor.high else "clipped"
        ends = [{"end": tensor.low, "name": "least code"}, {"end": tensor.high, "name": "largest code"}]
        caption = (
            f"{tensor.name}: exponent {tensor.exponent}, codes stand for {tensor.low:g} … {tensor.high:g}; values from "
            f"{tensor.minimum:.4g} to {tensor.maximum:.4g}; {tensor.clipped:.3%} clipped."
        )
        variants[tensor.name] = ({"values": rows, "ends": ends}, caption)
    bars = {
        "data": {"name": "values"},
        "mark": {"type": "bar", "binSpacing": 0, "tooltip": True},
        "encoding": {
            "x": {"field": "low", "bin": {"binned": True}, "type": "quantitative", "title": "value"},
            "x2": {"field": "high"},
            "y": {
                **quantitative("count", "values (log)"),
                "scale": {"type": "symlog"},
                "axis": {"values": [0, *(10**power for power in range(10))], "format": ".0s"},
            },
            "color": _codes_colour(["within range", "clipped"], "where"),
        },
    }
    rules = {
        "data": {"name": "ends"},
        "mark": {"type": "rule", "strokeDash": [5, 3], "strokeWidth": 1.5, "style": "text-line"},
        "encoding": {"x": quantitative("end", "value"), "tooltip": tooltips("name", ("end", "g"))},
    }
    spec = {"datasets": {"values": [], "ends": []}, "height": 240, "layer": [bars, rules]}
    return Chart(spec, "Histogram of the chosen activation tensor with its range", "tensor", variants)


def curve_chart(rows: Rows, title: str, description: str, percent: bool) -> Chart:
    """Curves over epochs: rows of ``epoch``, ``of`` and ``value``."""
    y: Row = {**quantitative("value", title), "scale": {"zero": False}}
    if percent:
        y["axis"] = {"format": ".1%"}
    spec = {
        "data": {"name": "rows"},
        "datasets": {"rows": rows},
        "height": 200,
        "mark": {"type": "line", "point": True},
        "encoding": {
            "x": _epochs(),
            "y": y,
            "color": {"field": "of", "type": "nominal", "title": None},
            "strokeDash": {"field": "of", "type": "nominal", "title": None},
            "tooltip": tooltips("of", "epoch", ("value", ".4g")),
        },
    }
    return Chart(spec, description)


def layers_over_epochs_chart(rows: Rows, title: str, description: str) -> Chart:
    """A thin line for each layer, the chosen one's in colour: rows of ``epoch``, ``layer`` and ``value``."""
    chosen = "datum.layer === chosen"
    shared = {
        "x": _epochs(),
        "y": {**quantitative("value", title), "axis": {"format": ".1%"}},
        "detail": {"field": "layer"},
        "tooltip": tooltips("layer", "epoch", ("value", ".2%")),
    }
    spec = {
        "params": [{"name": "chosen", "value": ""}],
        "data": {"name": "rows"},
        "datasets": {"rows": rows},
        "height": 200,
        "encoding": shared,
        "layer": [
            {"mark": {"type": "line", "style": "background-line"}},
            {"transform": [{"filter": chosen}], "mark": {"type": "line", "point": True, "strokeWidth": 2.5}},
        ],
    }
    return Chart(spec, description, "layer", parameter="chosen")


def sensitivity_chart(sensitivity: Mapping[str, Any]) -> Chart:
    """Each layer quantized alone, what hurts most on top: signal-to-noise of the logits by scheme."""
    found = [row for row in sensitivity["rows"] if row["signal_to_noise"] is not None]
    worst: dict[str, float] = {}
    for row in found:
        worst[row["layer"]] = min(worst.get(row["layer"], row["signal_to_noise"]), row["signal_to_noise"])
    order = sorted(worst, key=lambda name: worst[name])
    keys = ("layer", "scheme", "signal_to_noise", "kl_divergence", "top1_difference", "weight_bits")
    spec = {
        "data": {"name": "rows"},
        "datasets": {"rows": [{key: row[key] for key in keys} for row in found]},
        "height": 20 * len(order) + 90,
        "mark": {"type": "point", "filled": True, "size": 70},
        "encoding": {
            "y": {"field": "layer", "type": "nominal", "sort": order, "title": None, "axis": {"grid": True}},
            "x": {**quantitative("signal_to_noise", "signal-to-noise of the logits, dB"), "scale": {"zero": False}},
            "color": {"field": "scheme", "type": "nominal", "title": None},
            "shape": {"field": "scheme", "type": "nominal", "title": None},
            "tooltip": tooltips(
                *("layer", "scheme", ("signal_to_noise", ".1f"), ("kl_divergence", ".3g")),
                *(("top1_difference", "+.2%"), ("weight_bits", ".2f")),
            ),
        },
    }
    return Chart(
        spec, f"Signal-to-noise by layer and scheme; the most sensitive layer is {order[0] if order else 'none'}"
    )


def confusion_chart(classes: ClassStatistics) -> Chart:
    """Labels against found classes; the diagonal is not coloured, so that confusions are seen."""
    names = classes.names
    rows = [
        {"label": names[label], "found": names[found], "images": number, "right": label == found}
        for label, row in enumerate(classes.confusion)
        for found, number in enumerate(row)
    ]
    fill = {"field": "images", "type": "quantitative", "title": "images", "legend": None}
    spec = {
        "data": {"name": "rows"},
        "datasets": {"rows": rows},
        "height": 24 * len(names) + 90,
        "encoding": {
            "x": {**_classes("found", names), "title": "class of the quantized model", "axis": {"labelAngle": -40}},
            "y": {**_classes("label", names), "title": "label"},
            "tooltip": tooltips("label", "found", "images"),
        },
        "layer": [
            {
                "transform": [{"filter": "!datum.right && datum.images > 0"}],
                "mark": {"type": "rect", "style": "heat"},
                "encoding": {"opacity": {**fill, "scale": {"range": [0.2, 1]}}},
            },
            {
                "transform": [{"filter": "datum.images > 0"}],
                "mark": {"type": "text", "fontSize": 11},
                "encoding": {"text": {"field": "images"}},
            },
        ],
    }
    return Chart(
        spec, f"Confusion matrix of {len(names)} classes on {classes.images:,} images; the table below lists errors"
    )


def bins(part: Histogram, zeros: bool = False, **also: str) -> Rows:
    """A row for each bin that is not empty (or for each): its ends and its count."""
    width = (part.high - part.low) / len(part.counts)
    return [
        {
            "low": _short(part.low + index * width),
            "high": _short(part.low + (index + 1) * width),
            "count": number,
            **also,
        }
        for index, number in enumerate(part.counts)
        if number or zeros
    ]


def quantitative(name: str, title: str | None) -> Row:
    """A field of numbers."""
    return {"field": name, "type": "quantitative", "title": title}


def tooltips(*fields: str | tuple[str, str]) -> Rows:
    """Fields by name, or by name and number format."""
    return [
        {"field": item, "title": item.replace("_", " ")}
        if isinstance(item, str)
        else {"field": item[0], "format": item[1], "title": item[0].replace("_", " ")}
        for item in fields
    ]


def _mirrored(rows: Iterable[Row]) -> Rows:
    return [mirror for row in rows for mirror in (row, {**row, "low": -row["high"], "high": -row["low"]})]


def _weight_caption(layer: LayerStatistics) -> str:
    size = f", clusters of N={layer.cluster_size}" if layer.weights.scales is not None else ""
    line = "; the line: full-precision weights" if layer.weights.full_precision is not None else ""
    return f"{layer.name}: {layer.scheme}{size}; {layer.sparsity:.1%} of the codes are zero{line}."


def _codes_colour(domain: list[str], name: str) -> Row:
    return {"field": name, "type": "nominal", "scale": {"domain": domain}, "title": None}


def _layer_axis(layers: int) -> Row:
    return {"labelAngle": -40, "labelLimit": 130, "labelOverlap": layers > _LABELLED_LAYERS}


def _epochs() -> Row:
    return {"field": "epoch", "type": "quantitative", "title": "epoch", "axis": {"tickMinStep": 1, "format": "d"}}


def _classes(name: str, names: list[str]) -> Row:
    return {"field": name, "type": "nominal", "sort": names, "scale": {"domain": names}}


def _short(value: float) -> float:
    return float(f"{value:.5g}")
