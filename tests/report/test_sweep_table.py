"""The table of a sweep: the best first, by validation, with what was tried."""

from __future__ import annotations

import csv
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console

from lowprec.report.sweep import (
    TrialRecord,
    read_record,
    sorted_records,
    trials_table,
    write_record,
    write_trials,
)


def record(number: int, status: str = "finished", **values: Any) -> TrialRecord:
    return TrialRecord(number, f"runs/{number}", {"optim": "sgd", "seed": str(number), "run_id": "x"}, status, **values)


def test_trials_are_sorted_by_validation_and_never_by_test_accuracy_where_there_is_one() -> None:
    records = [
        record(0, validation=0.8, fine_tuned=0.9),
        record(1, validation=0.9, fine_tuned=0.7),
        record(2, "pruned", validation=0.95),
        record(3, "failed"),
        record(4, post_training=0.6),
        record(5, post_training=0.5, fine_tuned=0.65),
        record(6, validation=0.9, fine_tuned=0.7),
    ]
    assert [item.number for item in sorted_records(records)] == [1, 6, 0, 5, 4, 2, 3]


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = record(3, "failed", validation=0.25, bytes=100, error="too little memory, it says:\n0 bytes")
    write_record(written, tmp_path / "trials" / "3.json")
    assert read_record(tmp_path / "trials" / "3.json") == written


def test_the_file_has_a_column_per_override_and_nothing_made_up(tmp_path: Path) -> None:
    write_trials([record(0, validation=0.5), record(1, "failed", error="a, b")], tmp_path / "trials.csv")
    with (tmp_path / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["seed"] for row in rows] == ["0", "1"]
    assert "run_id" not in rows[0]
    assert (rows[0]["validation"], rows[0]["fine_tuned"], rows[1]["error"]) == ("0.5", "", "a, b")
    assert [path.name for path in tmp_path.iterdir()] == ["trials.csv"]


def test_the_screen_shows_what_differs() -> None:
    console = Console(width=120, record=True, file=StringIO())
    console.print(trials_table([record(0, validation=0.5, bytes=1234), record(1, "failed")], "two"))
    text = console.export_text()
    assert "seed" in text
    assert "optim" not in text
    assert "50.00%" in text
    assert "1,234" in text
