"""The report of a sweep: accuracy against multiplications replaced, the table of trials, parallel coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lowprec.report.html.charts import Chart, Row, quantitative, tooltips
from lowprec.report.html.page import write_page
from lowprec.report.sweep import TrialRecord, pareto_front, short_key, tried_keys

# Of an axis' height, between two of its values that are written.
_TICK_DISTANCE = 0.06


def write_sweep_report(records: Sequence[TrialRecord], title: str, path: Path) -> None:
    """Writes the report of the trials to ``path``, whole or not at all; failed and running ones are in its table."""
    keys = differing_keys(records)
    front = pareto_front(records)
    write_page(
        path,
        "sweep.html.j2",
        sweep_charts(records),
        title=title,
        records=records,
        best=next((record for record in records if record.status == "finished"), None),
        finished=sum(record.status == "finished" for record in records),
        keys={key: short_key(key, keys) for key in keys},
        front={record.number for record in front},
    )


def differing_keys(records: Sequence[TrialRecord]) -> list[str]:
    """What was tried with more than one value."""
    return [key for key in tried_keys(records) if len({record.overrides.get(key) for record in records}) > 1]


def sweep_charts(records: Sequence[TrialRecord]) -> dict[str, Chart]:
    """The plots of the finished trials, by name; none where no trial has finished."""
    drawn = [item for item in records if item.status == "finished" and item.top1 is not None]
    charts = {}
    if any(record.multiplications_replaced is not None for record in drawn):
        charts["pareto"] = _pareto_chart(records, drawn)
    if differing_keys(drawn):
        charts["parallel"] = _parallel_chart(drawn)
    return charts


def _pareto_chart(records: Sequence[TrialRecord], drawn: Sequence[TrialRecord]) -> Chart:
    keys = differing_keys(records)
    rows = [
        {
            "trial": record.number,
            "stage": stage,
            "replaced": record.multiplications_replaced,
            "top1": value,
            "tried": _tried(record, keys),
        }
        for record in drawn
        for stage, value in (("before fine-tuning", record.post_training), ("after fine-tuning", record.fine_tuned))
        if value is not None and record.multiplications_replaced is not None
    ]
    front = pareto_front(records)
    x = {**quantitative("replaced", "multiplications replaced"), "axis": {"format": ".1%"}, "scale": {"zero": False}}
    y = {**quantitative("top1", "top-1 on the test split"), "axis": {"format": ".1%"}, "scale": {"zero": False}}
    shown = tooltips("trial", "stage", "tried", ("replaced", ".2%"), ("top1", ".2%"))
    spec = {
        "datasets": {
            "trials": rows,
            "front": [{"replaced": item.multiplications_replaced, "top1": item.top1} for item in front],
        },
        "height": 380,
        "layer": [
            {
                "data": {"name": "front"},
                "mark": {"type": "line", "interpolate": "step-before", "style": "text-line", "strokeWidth": 1.5},
                "encoding": {"x": x, "y": y},
            },
            {
                "data": {"name": "trials"},
                "mark": {"type": "point", "size": 70, "filled": True},
                "encoding": {
                    "x": x,
                    "y": y,
                    "color": {"field": "stage", "type": "nominal", "title": None},
                    "shape": {"field": "stage", "type": "nominal", "title": None},
                    "tooltip": shown,
                },
            },
        ],
    }
    names = ", ".join(str(record.number) for record in front)
    return Chart(spec, f"Top-1 against multiplications replaced; on the Pareto front are the trials {names}")


def _parallel_chart(drawn: Sequence[TrialRecord]) -> Chart:
    """A line for each trial, an axis for each key that was tried and for what came of it."""
    keys = differing_keys(drawn)
    axes: list[tuple[str, list[float | str | None], str]] = [
        (short_key(key, keys), [record.overrides.get(key) for record in drawn], ".4g") for key in keys
    ]
    axes.append(("multiplications replaced", [record.multiplications_replaced for record in drawn], ".1%"))
    axes.append(("top-1", [record.top1 for record in drawn], ".2%"))
    rows: list[Row] = []
    ticks: list[Row] = []
    for name, values, form in axes:
        heights = _heights(values)
        ticks += [{"axis": name, "height": height, "value": text} for height, text in _ticks(values, heights, form)]
        rows += [
            {"trial": record.number, "axis": name, "height": height, "top1": record.top1, "tried": _tried(record, keys)}
            for record, height in zip(drawn, heights, strict=True)
        ]
    order = [name for name, *_ in axes]
    x = {"field": "axis", "type": "nominal", "sort": order, "title": None, "axis": {"labelAngle": -25, "grid": True}}
    # Wider than what is drawn, so that no end's text lies on the frame.
    y = {"field": "height", "type": "quantitative", "axis": None, "scale": {"domain": [-0.05, 1.05]}}
    spec = {
        "datasets": {"rows": rows, "ticks": ticks},
        "height": 380,
        "layer": [
            {
                "data": {"name": "rows"},
                "mark": {"type": "line", "strokeWidth": 1.8, "opacity": 0.8, "tooltip": True},
                "encoding": {
                    "x": x,
                    "y": y,
                    "detail": {"field": "trial"},
                    "color": {
                        **quantitative("top1", "top-1"),
                        "legend": {"format": ".1%", "gradientLength": 200, "tickCount": 3},
                        "scale": {"zero": False},
                    },
                    "tooltip": tooltips("trial", "tried", ("top1", ".2%")),
                },
            },
            {
                "data": {"name": "ticks"},
                "mark": {"type": "text", "align": "left", "dx": 6, "fontSize": 11},
                "encoding": {"x": x, "y": y, "text": {"field": "value"}},
            },
        ],
    }
    return Chart(spec, "Parallel coordinates of the finished trials; the table has the same figures")


def _number_of(value: float | str | None) -> float | None:
    try:
        return None if value is None else float(value)
    except ValueError:
        return None


def _heights(values: Sequence[float | str | None]) -> list[float]:
    """Where values lie on their axis, 0 to 1: numbers by size, others in the order in which they came."""
    numbers = [value for value in map(_number_of, values) if value is not None]
    order = list(dict.fromkeys(values))
    places = numbers if len(numbers) == len(values) else [float(order.index(value)) for value in values]
    low, high = min(places), max(places)
    return [0.5 if high == low else (place - low) / (high - low) for place in places]


def _ticks(values: Sequence[float | str | None], heights: Sequence[float], form: str) -> list[tuple[float, str]]:
    """Heights and texts of an axis, from both ends to the middle, without those that would lie on one already there."""
    ticks: list[tuple[float, str]] = []
    for height, value in sorted(zip(heights, map(str, values), strict=True), key=lambda item: -abs(item[0] - 0.5)):
        if all(abs(height - other) >= _TICK_DISTANCE for other, _ in ticks):
            ticks.append((height, _written(value, form)))
    return ticks


def _written(value: str, form: str) -> str:
    try:
        return format(float(value), form)
    except ValueError:
        return "not given" if value == "None" else value


def _tried(record: TrialRecord, keys: Sequence[str]) -> str:
    return ", ".join(f"{short_key(key, keys)} {record.overrides[key]}" for key in keys if key in record.overrides)
