"""The page of a sweep: the Pareto front, what was tried, and trials that failed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lowprec.report.html.sweep_page import sweep_charts, write_sweep_report
from lowprec.report.sweep import TrialRecord, pareto_front


def trial(
    number: int, replaced: float | None, top1: float | None, status: str = "finished", **tried: str
) -> TrialRecord:
    values: dict[str, Any] = {"post_training": None if top1 is None else top1 - 0.1, "fine_tuned": top1}
    return TrialRecord(number, f"runs/{number}", tried, status, multiplications_replaced=replaced, **values)


def test_no_trial_of_the_front_is_beaten_and_all_others_are() -> None:
    records = [
        trial(0, 0.9, 0.8),
        trial(1, 0.95, 0.8),  # as good as 0, with more replaced
        trial(2, 0.95, 0.8),  # the same again
        trial(3, 0.5, 0.9),
        trial(4, 0.99, 0.6),
        trial(5, 0.98, 0.5),  # beaten by 4 in both
        trial(6, 0.999, 0.95, status="failed"),
        trial(7, None, 0.99),
        trial(8, 0.7, None),
    ]
    assert [record.number for record in pareto_front(records)] == [3, 1, 4]


def test_a_trial_that_was_not_fine_tuned_counts_with_what_it_has() -> None:
    record = trial(0, 0.9, None)
    record.post_training = 0.7
    assert pareto_front([record, trial(1, 0.9, 0.6)]) == [record]


def test_every_trial_is_in_the_table_and_the_front_is_marked(tmp_path: Path) -> None:
    records = [trial(0, 0.9, 0.8, bits="2"), trial(1, 0.5, 0.7, bits="4"), trial(2, None, None, "failed", bits="<8>")]
    records[2].error = "</script><script>alert(1)</script>"
    write_sweep_report(records, "a & b", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    rows = re.findall(r"<tr><th scope=\"row\".*?</tr>", page, re.DOTALL)
    assert [re.search(r'data-value="(\d)"', row).group(1) for row in rows] == ["0", "1", "2"]  # type: ignore[union-attr]
    assert ["*" in row for row in rows] == [True, False, False]
    assert "&lt;8&gt;" in rows[2]
    assert "<script>alert" not in page
    assert "<title>a &amp; b</title>" in page


def test_the_plots_hold_the_records_own_numbers() -> None:
    records = [trial(0, 0.9, 0.8, n="4"), trial(1, 0.5, 0.7, n="64"), trial(2, None, None, "failed", n="1")]
    charts = sweep_charts(records)
    points = charts["pareto"].spec["datasets"]["trials"]
    assert [
        (point["trial"], point["replaced"], point["top1"]) for point in points if point["stage"].startswith("after")
    ] == [
        (0, 0.9, 0.8),
        (1, 0.5, 0.7),
    ]
    lines = charts["parallel"].spec["datasets"]["rows"]
    assert {(row["trial"], row["axis"], row["height"]) for row in lines} == {
        *((0, "n", 0.0), (0, "multiplications replaced", 1.0), (0, "top-1", 1.0)),
        *((1, "n", 1.0), (1, "multiplications replaced", 0.0), (1, "top-1", 0.0)),
    }
    json.dumps(charts["parallel"].content())


@pytest.mark.parametrize("records", [[], [trial(0, None, None, "failed", n="1")]])
def test_without_a_finished_trial_there_is_a_page_that_says_so(records: list[TrialRecord], tmp_path: Path) -> None:
    write_sweep_report(records, "nothing yet", tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text().count("yet") >= 2
