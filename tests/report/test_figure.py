"""The figure of a sweep: what is drawn are the records' own numbers, each on the line of its recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib.image
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lowprec.report.figure import sweep_figure, write_figure
from lowprec.report.sweep import TrialRecord

BITS, SIZE, LAYOUT, SOLVER = (f"quant.weights.{name}" for name in ("bits", "cluster_size", "layout", "solver"))
RECONSTRUCT = "calibration.reconstruct"


def record(number: int, overrides: dict[str, str], status: str = "finished", **values: Any) -> TrialRecord:
    measured = {
        "full_precision": 0.92,
        "post_training": 0.5 + number / 70,
        "fine_tuned": 0.6 + number / 70,
        "multiplications_replaced": 0.9 - number / 130,
    }
    return TrialRecord(number, f"runs/{number}", overrides, status, **{**measured, **values})


def study() -> list[TrialRecord]:
    """Both bit widths, then two solvers without reconstruction; all in both layouts and with two cluster sizes."""
    recipes = [("2", "exact", "True"), ("4", "exact", "True"), ("2", "exact", "False"), ("2", "twn", "False")]
    tried = [
        {BITS: bits, SOLVER: solver, RECONSTRUCT: reconstruct, SIZE: size, LAYOUT: layout}
        for bits, solver, reconstruct in recipes
        for size in ("4", "64")
        for layout in ("kernel", "element")
    ]
    return [record(number, overrides) for number, overrides in enumerate(tried)]


def drawn(records: Sequence[TrialRecord], title: str = "x") -> Figure:
    figure = sweep_figure(records, title)
    assert figure is not None
    return figure


def curves(panel: Axes) -> dict[str, list[tuple[float, float]]]:
    """The points of all curves by label, read from what is drawn."""
    lines = [line for line in panel.get_lines() if line.get_label() != "full precision"]
    points = {str(line.get_label()): list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in lines}
    assert len(points) == len(lines)
    return points


def expected(records: Sequence[TrialRecord], x: str) -> dict[str, list[tuple[float, float]]]:
    """What the curves through these records have to be; ``x``: size or replaced."""
    ordered = sorted((size_or_share(item, x), item) for item in records)
    return {
        "before": [(at, item.post_training) for at, item in ordered if item.post_training is not None],
        "after": [(at, item.fine_tuned) for at, item in ordered if item.fine_tuned is not None],
    }


def size_or_share(item: TrialRecord, x: str) -> float:
    assert item.multiplications_replaced is not None
    return int(item.overrides[SIZE]) if x == "size" else item.multiplications_replaced


def test_every_point_is_a_record_s_own_number() -> None:
    records = study()
    figure = drawn(records, "fashion_mnist")
    assert figure.get_suptitle() == "fashion_mnist"
    fitted, replaced_alone = figure.axes[:2], figure.axes[2:]
    assert len(replaced_alone) == 2
    for panels, reconstruct, label in ((fitted, "True", "bits {b}"), (replaced_alone, "False", "solver {s}")):
        row = [item for item in records if item.overrides[RECONSTRUCT] == reconstruct]
        for panel, x in zip(panels, ("replaced", "size"), strict=True):
            found = curves(panel)
            assert len(found) == 8  # four lines, before and after
            for item in row:
                tried = item.overrides
                name = f"{label.format(b=tried[BITS], s=tried[SOLVER])}, layout {tried[LAYOUT]}"
                line = [o for o in row if all(o.overrides[key] == tried[key] for key in (BITS, SOLVER, LAYOUT))]
                assert found[name] == expected(line, x)["after"]
                assert found[f"_{name}, before"] == expected(line, x)["before"]
    assert fitted[0].get_title(loc="left") == "solver exact, reconstruct true"
    assert replaced_alone[0].get_title(loc="left") == "bits 2, reconstruct false"


def test_full_precision_is_a_line_across_and_hollow_is_before() -> None:
    records = study()
    records[3].full_precision = 0.93
    for panel in drawn(records).axes[:2]:
        across = [line.get_ydata() for line in panel.get_lines() if line.get_label() == "full precision"]
        assert [list(ends) for ends in across] == [[0.92, 0.92], [0.93, 0.93]]
        for line in panel.get_lines():
            if line.get_label() != "full precision":
                hollow = line.get_markerfacecolor() == "white"
                assert hollow == str(line.get_label()).endswith(", before")


def test_the_legend_names_each_line_once_and_what_is_hollow() -> None:
    legend = drawn(study()).axes[1].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [
        *("bits 2, layout kernel", "bits 2, layout element", "bits 4, layout kernel", "bits 4, layout element"),
        *("full precision", "hollow: before fine-tuning", "filled: after it"),
    ]


def test_cluster_sizes_are_the_ticks() -> None:
    assert list(drawn(study()).axes[1].get_xticks()) == [4, 64]


def test_a_long_title_is_inside_the_figure() -> None:
    title = (
        "digits_smoke-baseline.max_epochs_3-calibration.images_16-data.limit_test_100-data.limit_train_400-qu-be9425c8"
    )
    figure = drawn([record(0, {})], title)
    assert figure.get_suptitle().replace("\n", "") == title
    FigureCanvasAgg(figure).draw()
    (text,) = figure.texts
    box = text.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width


def test_only_finished_trials_are_drawn() -> None:
    tried = [{SIZE: size, "quant": "w2a8_n4"} for size in ("1", "4", "16", "64")]
    good = [record(0, tried[0]), record(1, tried[1])]
    bad = [record(2, tried[2], "failed"), record(3, tried[3], "pruned", multiplications_replaced=None)]
    for panel, x in zip(drawn([*bad, *good]).axes, ("replaced", "size"), strict=True):
        found = curves(panel)
        assert found["all trials"] == expected(good, x)["after"]
        assert found["_all trials, before"] == expected(good, x)["before"]
    assert sweep_figure(bad, "x") is None


def test_a_search_of_other_things_is_points_in_one_panel_and_what_was_not_measured_is_missing() -> None:
    records = [
        record(number, {"optim.learning_rate": str(number)}, multiplications_replaced=0.9, fine_tuned=fine_tuned)
        for number, fine_tuned in enumerate((0.7, None, 0.8))
    ]
    (panel,) = drawn(records).axes
    assert curves(panel)["all trials"] == [(0.9, 0.7), (0.9, 0.8)]
    assert len(curves(panel)["_all trials, before"]) == 3
    assert {line.get_linestyle() for line in panel.get_lines() if line.get_label() != "full precision"} == {"None"}


def test_files_are_whole_and_the_same_each_time(tmp_path: Path) -> None:
    assert write_figure(study(), "fashion_mnist", tmp_path / "trials.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trials.png", "trials.svg"]
    assert matplotlib.image.imread(tmp_path / "trials.png").shape[0] > 500
    text = (tmp_path / "trials.svg").read_text()
    assert ElementTree.fromstring(text).tag.endswith("svg")
    assert "bits 4, layout element" in text
    assert write_figure(study(), "fashion_mnist", tmp_path / "trials.png")
    assert (tmp_path / "trials.svg").read_text() == text


def test_a_drawing_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Figure, path: Path, **settings: Any) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    (tmp_path / "trials.png").write_text("old")
    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match="No space left"):
        write_figure(study(), "x", tmp_path / "trials.png")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("trials.png", "old")]


def test_without_finished_trials_there_is_no_file(tmp_path: Path) -> None:
    assert not write_figure([record(0, {}, "failed")], "x", tmp_path / "trials.png")
    assert list(tmp_path.iterdir()) == []
