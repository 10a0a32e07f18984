"""The report of two runs side by side: configurations first, then figures, curves and layers."""

from __future__ import annotations

from pathlib import Path

from lowprec.report.comparison import ComparedRun, compared_figures, layer_figures, setting_differences
from lowprec.report.html.charts import Chart, curve_chart, ladder_comparison_chart
from lowprec.report.html.page import write_page
from lowprec.report.html.run_page import over_epochs
from lowprec.report.summary import TOP1_ROWS


def write_comparison(first: ComparedRun, second: ComparedRun, path: Path) -> None:
    """Writes the page to ``path``, whole or not at all."""
    write_page(
        path,
        "compare.html.j2",
        comparison_charts(first, second),
        title=f"{first.name} and {second.name}",
        runs=(first, second),
        settings=setting_differences(first, second),
        figures_of_both=compared_figures(first, second),
        layers=layer_figures(first, second),
    )


def comparison_charts(first: ComparedRun, second: ComparedRun) -> dict[str, Chart]:
    """Accuracies by stage and curves over epochs of both runs, as far as there are any."""
    charts = {}
    rows = [
        {"run": run.name, "stage": label, "top1": run.summary[key]["top1"]}
        for run in (first, second)
        for key, label in TOP1_ROWS
        if run.summary[key] is not None
    ]
    if rows:
        charts["ladder"] = ladder_comparison_chart(rows, [label for _, label in TOP1_ROWS])
    for key, title, percent in (("val/loss", "validation loss", False), ("val/top1", "validation top-1", True)):
        curves = [row for run in (first, second) for row in over_epochs(list(run.metrics), {key: run.name}, "of")]
        if curves:
            charts[key.replace("/", "-")] = curve_chart(curves, title, f"{title} of both runs over epochs", percent)
    return charts
