"""Two runs side by side: how their configurations differ, and what came of each; as figures and as tables of the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from lowprec.report.summary import TOP1_ROWS, Summary

ABSENT = "not there"
_COSTS = (
    ("multiplications_replaced", "multiplications replaced", True),
    ("weight_bits", "bits per weight", False),
    ("packed_bytes", "bytes, packed", False),
    ("macs", "MACs an image", False),
    ("integer_mac_share", "integer MACs", True),
)


@dataclass(frozen=True)
class ComparedRun:
    """One of the two: ``settings`` are its flat configuration keys, ``metrics`` the rows of its metrics.csv."""

    name: str
    summary: Summary
    settings: Mapping[str, Any]
    metrics: Sequence[dict[str, float]]
    finished: bool


@dataclass(frozen=True)
class Figure:
    """A figure of both runs; None where it was not measured. share: shown in percent, its difference in points.

    gain: 1 where more is better, -1 where less is, 0 where neither is.
    """

    label: str
    values: tuple[float | None, float | None]
    share: bool
    gain: int = 0

    @property
    def difference(self) -> float | None:
        """The second's minus the first's."""
        first, second = self.values
        return None if first is None or second is None else second - first

    def texts(self) -> tuple[str, str, str]:
        """Both values and the difference, as they are shown."""
        change = self.difference
        written = "" if change is None else f"{100 * change:+.2f} points" if self.share else _number(change, "+")
        return self._text(self.values[0]), self._text(self.values[1]), written

    def _text(self, value: float | None) -> str:
        if value is None:
            return "not measured"
        return f"{value:.2%}" if self.share else _number(value)


def setting_differences(first: ComparedRun, second: ComparedRun) -> list[tuple[str, str, str]]:
    """Key and both values of each setting that differs, as they are written on a command line; sorted."""
    keys = sorted({*first.settings, *second.settings})
    return [
        (key, _written(first.settings, key), _written(second.settings, key))
        for key in keys
        if first.settings.get(key) != second.settings.get(key)
    ]


def compared_figures(first: ComparedRun, second: ComparedRun) -> list[Figure]:
    """Accuracies, differing codes, costs and seconds of both."""
    summaries = (first.summary, second.summary)

    def pair(group: str, key: str) -> tuple[float | None, float | None]:
        one, other = ((summary[group] or {}).get(key) for summary in summaries)
        return one, other

    figures = [Figure(label, pair(key, "top1"), True, 1) for key, label in TOP1_ROWS]
    figures.append(Figure("differing codes", pair("verify", "mismatched_codes"), False, -1))
    gains = {"multiplications_replaced": 1, "weight_bits": -1, "packed_bytes": -1}
    figures += [Figure(label, pair("cost", key), share, gains.get(key, 0)) for key, label, share in _COSTS]
    names = dict.fromkeys([*first.summary["seconds"], *second.summary["seconds"]])
    figures += [Figure(f"seconds, {name.replace('_', '-')}", pair("seconds", name), False, -1) for name in names]
    return figures


def layer_figures(first: ComparedRun, second: ComparedRun) -> list[tuple[str, Figure, Figure]]:
    """Layer, its share of zero codes and the share of codes that the last epoch changed, as metrics.csv has them."""
    last: tuple[dict[str, float], dict[str, float]] = ({}, {})
    for run, found in zip((first, second), last, strict=True):
        for row in run.metrics:
            found.update(row)
    names = [name.partition("/")[2] for name in {**last[0], **last[1]} if name.startswith("sparsity/")]

    def figure(kind: str, name: str) -> Figure:
        key = f"{kind}/{name}"
        return Figure(kind, (last[0].get(key), last[1].get(key)), True)

    return [(name, figure("sparsity", name), figure("flips", name)) for name in names]


def setting_table(first: ComparedRun, second: ComparedRun) -> Table:
    """How the configurations differ."""
    table = Table("setting", first.name, second.name, title="configurations", title_justify="left")
    for row in setting_differences(first, second):
        table.add_row(*row)
    return table


def figure_table(first: ComparedRun, second: ComparedRun) -> Table:
    """Both runs' figures."""
    table = Table(title="results", title_justify="left")
    table.add_column()
    for name in (first.name, second.name, "difference"):
        table.add_column(name, justify="right", overflow="fold")
    for figure in compared_figures(first, second):
        table.add_row(figure.label, *figure.texts())
    return table


def _number(value: float, sign: str = "") -> str:
    return format(value, f"{sign},.0f") if float(value).is_integer() else format(value, f"{sign},.2f")


def _written(settings: Mapping[str, Any], key: str) -> str:
    if key not in settings:
        return ABSENT
    value = settings[key]
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
