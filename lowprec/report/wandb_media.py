"""A run's report as W&B's tables, plots and histograms: what ``report.html`` shows, in a form that a sweep can compare.

Keys say what a panel holds and then of what, the same in all runs, so that W&B groups them: ``report/…`` for tables and plots,
``weights/LAYER``, ``scales/LAYER`` and ``activations/TENSOR`` for histograms. Curves over training are metrics already.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lowprec.report.html.run_page import MATRIX_CLASSES, RunContent, confusions
from lowprec.report.measurements import ClassStatistics, Histogram, LayerStatistics, TensorStatistics
from lowprec.report.summary import TOP1_ROWS

Media = dict[str, Any]
LAYER_COLUMNS: list[str | int] = [
    *("layer", "shape", "scheme", "cluster size", "sparsity", "flips", "weights, dB", "outputs, dB"),
    *("least exponent", "largest exponent", "MACs", "multiplications", "bytes", "output"),
]
TENSOR_COLUMNS: list[str | int] = [
    *("tensor", "exponent", "least code's value", "largest code's value", "minimum", "maximum", "clipped"),
    "signal-to-noise, dB",
]
SENSITIVITY_COLUMNS: list[str | int] = [
    *("layer", "scheme", "signal_to_noise", "kl_divergence", "top1_difference", "weight_bits", "macs"),
    "multiplications_replaced",
]
CONFUSION_COLUMNS: list[str | int] = ["label", "found instead", "images", "images of the label"]
CHANGED_COLUMNS: list[str | int] = ["image", "label", "full precision", "quantized"]


def wandb_media(content: RunContent, report_file: Path) -> Media:
    """Tables, plots and histograms by key, for ``wandb.Run.log``; of what was not measured there is none.

    report_file: the page itself, which W&B shows as it is.
    """
    import wandb

    summary = content.summary
    ladder = [[label, summary[key]["top1"]] for key, label in TOP1_ROWS if summary[key] is not None]
    media: Media = {"report/page": wandb.Html(str(report_file), inject=False)}
    if ladder:
        table = wandb.Table(columns=["stage", "top-1"], data=ladder)
        media["report/ladder"] = wandb.plot.bar(table, "stage", "top-1", title="Top-1 by stage")
    if content.layers:
        media["report/layers"] = wandb.Table(columns=LAYER_COLUMNS, data=list(map(_layer_row, content.layers)))
        media["report/depth"] = _depth_plot(content.layers)
        media.update(_weight_histograms(content.layers))
    if content.tensors:
        media["report/activations"] = wandb.Table(columns=TENSOR_COLUMNS, data=list(map(_tensor_row, content.tensors)))
        media.update({f"activations/{tensor.name}": _histogram([tensor.histogram]) for tensor in content.tensors})
    if content.sensitivity is not None:
        rows = [[row[column] for column in SENSITIVITY_COLUMNS] for row in content.sensitivity["rows"]]
        media["report/sensitivity"] = wandb.Table(columns=SENSITIVITY_COLUMNS, data=rows)
    if content.classes is not None:
        media.update(_class_media(content.classes))
    return media


def _layer_row(layer: LayerStatistics) -> list[Any]:
    return [
        *(layer.name, "×".join(map(str, layer.shape)), layer.scheme, layer.cluster_size, layer.sparsity, layer.flips),
        *(layer.weight_signal_to_noise, layer.output_signal_to_noise, *layer.exponents, layer.macs),
        *(layer.multiplications, layer.bytes, layer.tensor),
    ]


def _tensor_row(tensor: TensorStatistics) -> list[Any]:
    return [
        *(tensor.name, tensor.exponent, tensor.low, tensor.high, tensor.minimum, tensor.maximum, tensor.clipped),
        tensor.signal_to_noise,
    ]


def _depth_plot(layers: Sequence[LayerStatistics]) -> Any:
    import wandb

    series = {
        "weights": [layer.weight_signal_to_noise for layer in layers],
        "outputs": [layer.output_signal_to_noise for layer in layers],
    }
    measured = {
        of: [(place, ratio) for place, ratio in enumerate(ratios, start=1) if ratio is not None]
        for of, ratios in series.items()
    }
    measured = {of: points for of, points in measured.items() if points}
    return wandb.plot.line_series(
        xs=[[place for place, _ in points] for points in measured.values()],
        ys=[[ratio for _, ratio in points] for points in measured.values()],
        keys=list(measured),
        title="Signal-to-noise by layer, dB",
        xname="layer",
    )


def _weight_histograms(layers: Iterable[LayerStatistics]) -> Media:
    media = {}
    for layer in layers:
        found = layer.weights
        media[f"weights/{layer.name}"] = _histogram([found.negative, found.zero, found.positive])
        if found.scales is not None:
            media[f"scales/{layer.name}"] = _histogram([found.scales])
    return media


def _histogram(parts: Sequence[Histogram]) -> Any:
    """The parts, of the same bins, as one."""
    import wandb

    first = parts[0]
    counts = [sum(found) for found in zip(*(part.counts for part in parts), strict=True)]
    width = (first.high - first.low) / len(counts)
    edges = [first.low + index * width for index in range(len(counts) + 1)]
    return wandb.Histogram(np_histogram=(np.array(counts), np.array(edges)))


def _class_media(classes: ClassStatistics) -> Media:
    import wandb

    names = classes.names
    media: Media = {
        "report/confusions": wandb.Table(columns=CONFUSION_COLUMNS, data=list(map(list, confusions(classes))))
    }
    if len(names) <= MATRIX_CLASSES:
        cells = [
            [names[label], names[other], number]
            for label, row in enumerate(classes.confusion)
            for other, number in enumerate(row)
        ]
        columns = ["Actual", "Predicted", "nPredictions"]  # the names that W&B's plot knows
        media["report/confusion"] = wandb.plot.plot_table(
            "wandb/confusion_matrix/v1",
            wandb.Table(columns=[*columns], data=cells),
            {column: column for column in columns},
            {"title": "Confusion matrix of the quantized model"},
        )
    if classes.pictures:
        rows = [
            [wandb.Image(_opened(picture)), *(names[index] for index in changed)]
            for picture, changed in zip(classes.pictures, classes.changed, strict=False)
        ]
        media["report/changed_classes"] = wandb.Table(columns=CHANGED_COLUMNS, data=rows)
    return media


def _opened(picture: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(picture))
