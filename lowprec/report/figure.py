"""The figure of a sweep: top-1 against multiplications replaced and against the cluster size N, before and after fine-tuning.

Needs matplotlib (``pip install 'lowprec[sweep]'``); a sweep goes without it, so this is imported when one ends.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from lowprec.files import whole_file
from lowprec.report.sweep import TrialRecord, short_key, tried_keys

# What a line runs along, what dashes tell apart, and what has panels of its own; all else about the recipe is a colour.
_CLUSTER_SIZE, _LAYOUT, _RECONSTRUCT = "quant.weights.cluster_size", "quant.weights.layout", "calibration.reconstruct"
# Okabe and Ito's, which all readers tell apart, colour-blind ones too; but yellow, too pale for a line, and black.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))
_FULL_PRECISION = "full precision"
# The same trials give the same file, with text that can be searched.
_SETTINGS: dict[Any, str] = {"svg.hashsalt": "lowprec", "svg.fonttype": "none"}


def write_figure(records: Sequence[TrialRecord], title: str, path: Path) -> bool:
    """Draws the finished trials to ``path`` with the suffixes ``.png`` and ``.svg``; without such trials it returns False."""
    if (figure := sweep_figure(records, title)) is None:
        return False
    with matplotlib.rc_context(_SETTINGS):
        for kind, metadata in (("png", {}), ("svg", {"Date": None})):
            with whole_file(path.with_suffix(f".{kind}")) as temporary:
                figure.savefig(temporary, format=kind, dpi=150, metadata=metadata)
    return True


def sweep_figure(records: Sequence[TrialRecord], title: str) -> Figure | None:
    """The figure of the finished trials: a line for each recipe, hollow before fine-tuning and filled after it.

    The recipe is what the trials tried of ``quant``; along a line, N changes. There are panels against N where trials say
    theirs, and a row of panels for each value of ``calibration.reconstruct``. None when no trial has finished.
    """
    finished = sorted((record for record in records if _is_drawn(record)), key=lambda record: record.number)
    if not finished:
        return None
    recipe = _differing(_recipe_keys(finished), finished)
    rows = _grouped(finished, [_RECONSTRUCT] if _RECONSTRUCT in recipe else [])
    axes_of_x = 2 if any(_cluster_size(record) for record in finished) else 1
    figure = Figure(figsize=(5 * axes_of_x + 3, 3.6 * len(rows) + 0.6), layout="constrained")
    # matplotlib wraps at spaces alone, and a sweep's name has none.
    figure.suptitle(textwrap.fill(title, int(9 * figure.get_figwidth())))
    panels = figure.subplots(len(rows), axes_of_x, squeeze=False, sharey=True, sharex="col")
    for row, members in zip(panels, rows, strict=True):
        _draw_row(row, members, recipe)
    return figure


def _draw_row(row: Sequence[Axes], records: Sequence[TrialRecord], recipe: Sequence[str]) -> None:
    keys = _differing(recipe, records)
    coloured = [key for key in keys if key != _LAYOUT]
    colours = {_values(members[0], coloured): index for index, members in enumerate(_grouped(records, coloured))}
    layouts = list(dict.fromkeys(record.overrides.get(_LAYOUT) for record in records))
    lines = _grouped(records, keys)
    for members in lines:
        colour = _COLOURS[colours[_values(members[0], coloured)] % len(_COLOURS)]
        dash = _DASHES[layouts.index(members[0].overrides.get(_LAYOUT)) % len(_DASHES)]
        label = _words(members[0], keys) or "all trials"
        _draw_line(row[0], [(record.multiplications_replaced, record) for record in members], label, colour, dash)
        if len(row) == 2:
            _draw_line(row[1], [(_cluster_size(record), record) for record in members], label, colour, dash)
    full_precision = sorted({record.full_precision for record in records if record.full_precision is not None})
    for panel in row:
        panel.grid(alpha=0.3)
        for value in full_precision:
            panel.axhline(value, color="black", linewidth=1, label=_FULL_PRECISION)
    _name_axes(row, records)
    row[0].set_title(_words(records[0], [key for key in recipe if key not in keys]), loc="left", fontsize="medium")
    row[-1].legend(handles=_legend(row[0], len(lines)), loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)


def _draw_line(
    panel: Axes, points: Sequence[tuple[float | None, TrialRecord]], label: str, colour: str, dash: tuple[str, str]
) -> None:
    """Both curves of a line; trials with one and the same x, such as those of seeds, are points that nothing connects."""
    known = sorted(((x, record) for x, record in points if x is not None), key=lambda point: point[0])
    style = dash[0] if len({x for x, _ in known}) == len(known) else "none"
    for name, width, face in (("post_training", 1.0, "white"), ("fine_tuned", 2.0, colour)):
        measured = [(x, top1) for x, record in known if (top1 := getattr(record, name)) is not None]
        panel.plot(
            [x for x, _ in measured],
            [top1 for _, top1 in measured],
            linestyle=style,
            linewidth=width,
            color=colour,
            marker=dash[1],
            markersize=6,
            markerfacecolor=face,
            label=label if name == "fine_tuned" else f"_{label}, before",
        )


def _name_axes(row: Sequence[Axes], records: Sequence[TrialRecord]) -> None:
    row[0].set_ylabel("top-1 on the test split")
    row[0].set_xlabel("multiplications replaced")
    for axis in (row[0].yaxis, row[0].xaxis):
        axis.set_major_formatter(PercentFormatter(1.0))
    for panel in row:
        panel.tick_params(labelbottom=True, labelleft=True)
    if len(row) == 2:
        sizes = sorted({size for record in records if (size := _cluster_size(record))})
        row[1].set_xscale("log", base=2)
        row[1].set_xticks(sizes, [str(size) for size in sizes])
        row[1].minorticks_off()
        row[1].set_xlabel("cluster size N")


def _legend(panel: Axes, lines: int) -> list[Line2D]:
    shown = [line for line in panel.get_lines() if not str(line.get_label()).startswith("_")]
    before, after = (
        Line2D([], [], linestyle="none", marker="o", color="grey", markerfacecolor=face, label=label)
        for face, label in (("white", "hollow: before fine-tuning"), ("grey", "filled: after it"))
    )
    return [*shown[: lines + 1], before, after]


def _is_drawn(record: TrialRecord) -> bool:
    return record.status == "finished" and record.multiplications_replaced is not None


def _recipe_keys(records: Sequence[TrialRecord]) -> list[str]:
    keys = [key for key in tried_keys(records) if key.split(".")[0] == "quant" or key == _RECONSTRUCT]
    return [key for key in keys if key != _CLUSTER_SIZE]


def _differing(keys: Sequence[str], records: Sequence[TrialRecord]) -> list[str]:
    return [key for key in keys if len({record.overrides.get(key) for record in records}) > 1]


def _grouped(records: Sequence[TrialRecord], keys: Sequence[str]) -> list[list[TrialRecord]]:
    groups: dict[tuple[str | None, ...], list[TrialRecord]] = {}
    for record in records:
        groups.setdefault(_values(record, keys), []).append(record)
    return list(groups.values())


def _values(record: TrialRecord, keys: Sequence[str]) -> tuple[str | None, ...]:
    return tuple(record.overrides.get(key) for key in keys)


def _words(record: TrialRecord, keys: Sequence[str]) -> str:
    """``bits 2, layout kernel``; truth values in small letters, as they are written in a configuration."""
    given = {short_key(key, keys): record.overrides[key] for key in keys if key in record.overrides}
    return ", ".join(
        f"{name} {value.lower() if value in ('True', 'False') else value}" for name, value in given.items()
    )


def _cluster_size(record: TrialRecord) -> int | None:
    value = record.overrides.get(_CLUSTER_SIZE, "")
    return int(value) if value.isdigit() else None
