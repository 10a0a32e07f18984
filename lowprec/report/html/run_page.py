"""The report of one run: accuracies and the verdict, costs, layers, activations, training, sensitivity, classes."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowprec.report.html.charts import (
    Chart,
    Rows,
    activation_chart,
    confusion_chart,
    curve_chart,
    depth_chart,
    ladder_chart,
    layers_over_epochs_chart,
    scale_chart,
    sensitivity_chart,
    weight_chart,
)
from lowprec.report.html.page import write_page
from lowprec.report.measurements import ClassStatistics, LayerStatistics, TensorStatistics
from lowprec.report.summary import TOP1_ROWS, Summary, cost_rows

# More classes than these make no matrix that can be read; the list of confusions is shown of any number.
MATRIX_CLASSES = 30
LISTED_CONFUSIONS = 20


@dataclass
class RunContent:
    """What a run's report says. What is not there is None or empty, and ``missing`` says why, by section.

    sections: layers, activations, training, sensitivity, classes. summary: as of summary.json. weights_of: which weights
    layers and activations are of. fault: what verification complained of. estimates: ``speed_up``, ``float32_energy`` and
    ``energy`` (picojoules an image). metrics: rows of metrics.csv. activation_images: on how many tensors were measured.
    """

    name: str
    summary: Summary
    finished: bool
    config: str
    commit: str | None = None
    fault: str = ""
    weights_of: str = ""
    estimates: Mapping[str, float] | None = None
    layers: list[LayerStatistics] = field(default_factory=list)
    tensors: list[TensorStatistics] = field(default_factory=list)
    activation_images: int = 0
    metrics: list[dict[str, float]] = field(default_factory=list)
    sensitivity: Mapping[str, Any] | None = None
    classes: ClassStatistics | None = None
    missing: dict[str, str] = field(default_factory=dict)


def write_run_report(content: RunContent, path: Path) -> None:
    """Writes the report to ``path``, whole or not at all."""
    stages = [(key, label, content.summary[key]) for key, label in TOP1_ROWS]
    cost = content.summary["cost"]
    write_page(
        path,
        "run.html.j2",
        run_charts(content),
        title=content.name,
        run=content,
        stages=stages,
        first=content.summary["full_precision"],
        verdict=verdict(content),
        cost_rows=[] if cost is None else cost_rows(cost),
        layers=content.layers,
        # The first that has clusters.
        chosen_layer=next((layer.name for layer in content.layers if layer.weights.scales is not None), ""),
        tensors={tensor.name: tensor for tensor in content.tensors},
        confusions=confusions(content.classes),
        pictures=_pictures(content.classes),
    )


def run_charts(content: RunContent) -> dict[str, Chart]:
    """The plots for which there are figures, by name."""
    charts = {}
    summary = content.summary
    ladder = [(label, summary[key]["top1"]) for key, label in TOP1_ROWS if summary[key] is not None]
    if ladder:
        charts["ladder"] = ladder_chart(ladder)
    if content.layers:
        charts["depth"] = depth_chart(content.layers)
        charts["weights"] = weight_chart(content.layers)
        charts["scales"] = scale_chart(content.layers)
    if content.tensors:
        charts["activations"] = activation_chart(content.tensors)
    charts.update(training_charts(content.metrics))
    if content.sensitivity is not None and content.sensitivity["rows"]:
        charts["sensitivity"] = sensitivity_chart(content.sensitivity)
    if content.classes is not None and len(content.classes.names) <= MATRIX_CLASSES:
        charts["confusion"] = confusion_chart(content.classes)
    return charts


def training_charts(metrics: list[dict[str, float]]) -> dict[str, Chart]:
    """Loss, accuracy, flips and sparsity over epochs, as far as the rows of metrics.csv have them."""
    charts = {}
    for key, title, percent in (("loss", "loss", False), ("top1", "top-1", True)):
        names = {f"train/{key}": "training", f"val/{key}": "validation"}
        if rows := over_epochs(metrics, names, "of"):
            charts[key] = curve_chart(rows, title, f"{title} of training and validation over epochs", percent)
    for key, title in (("flips", "codes changed in the epoch"), ("sparsity", "codes that are zero")):
        prefix = f"{key}/"
        columns = dict.fromkeys(name for row in metrics for name in row if name.startswith(prefix))
        if rows := over_epochs(metrics, {name: name.removeprefix(prefix) for name in columns}, "layer"):
            charts[key] = layers_over_epochs_chart(rows, title, f"{title}, by layer, over epochs")
    return charts


def over_epochs(metrics: list[dict[str, float]], names: Mapping[str, str], key: str) -> Rows:
    """Rows of ``epoch`` (from 1), ``value`` and, under ``key``, what ``names`` calls the metric."""
    return [
        {"epoch": int(row["epoch"]) + 1, key: label, "value": row[name]}
        for row in metrics
        if "epoch" in row
        for name, label in names.items()
        if name in row
    ]


def verdict(content: RunContent) -> tuple[str, str]:
    """Whether the models are equal: ``good``, ``bad`` or ``unknown``, and the sentence that says so."""
    found = content.summary["verify"]
    if found is None:
        return "unknown", "Not verified yet: no codes have been compared."
    compared = f"{found['compared_codes']:,} codes compared on {found['images']:,} test images"
    if content.fault:
        return "bad", f"Not equal, do not ship this run: {content.fault}."
    if found["mismatched_codes"]:
        return "unknown", (
            f"{found['mismatched_codes']:,} of {compared} differ, all behind operators that compute in float."
        )
    return "good", f"Equal: fake-quant model, integer executor and exported file differ in 0 of {compared}."


def confusions(classes: ClassStatistics | None) -> list[tuple[str, str, int, int]]:
    """Label, class found instead, images and images of the label; the commonest first."""
    if classes is None:
        return []
    found = [
        (classes.names[label], classes.names[other], number, sum(row))
        for label, row in enumerate(classes.confusion)
        for other, number in enumerate(row)
        if number and label != other
    ]
    return sorted(found, key=lambda item: -item[2])[:LISTED_CONFUSIONS]


def _pictures(classes: ClassStatistics | None) -> list[dict[str, str]]:
    if classes is None:
        return []
    return [
        {
            "url": "data:image/png;base64," + base64.b64encode(picture).decode("ascii"),
            "label": classes.names[label],
            "before": classes.names[before],
            "after": classes.names[after],
            "kind": "gained" if after == label else "lost" if before == label else "wrong both times",
        }
        for picture, (label, before, after) in zip(classes.pictures, classes.changed, strict=False)
    ]
