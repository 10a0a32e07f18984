"""The trials of a sweep: one small file each, written by whichever process ran it, and one table of them all."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from rich.table import Table

from lowprec.files import whole_file

# On the screen; the file has them all.
_ACCURACIES = ("validation", "post_training", "fine_tuned", "integer")
# Where and how trials ran, not what they tried.
_NOT_TRIED = ("run_id", "runs_dir", "hparams_search")


@dataclass
class TrialRecord:
    """What came of one trial. ``status``: running, finished, failed, pruned or interrupted.

    Accuracies are top-1, as shares: ``validation`` the best of the validation split, by which trials are compared, the
    others of the test split. ``bytes`` are the packed model's; ``seconds`` those of preparing, calibrating, fine-tuning and
    exporting. What was not measured is None.
    """

    number: int
    run: str
    overrides: dict[str, str]
    status: str
    validation: float | None = None
    full_precision: float | None = None
    post_training: float | None = None
    fine_tuned: float | None = None
    integer: float | None = None
    bytes: int | None = None
    multiplications_replaced: float | None = None
    seconds: float | None = None
    error: str = ""

    @property
    def top1(self) -> float | None:
        """On the test split, of what was measured last: after fine-tuning, or before it."""
        return self.fine_tuned if self.fine_tuned is not None else self.post_training

    @property
    def rank(self) -> tuple[bool, float, float]:
        """Larger is better: finished trials first, by validation, or by what was measured last where there is none."""
        return self.status == "finished", self.validation or 0.0, self.top1 or 0.0


def write_record(record: TrialRecord, path: Path) -> None:
    """Writes a trial's file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(asdict(record), indent=2) + "\n")


def read_record(path: Path) -> TrialRecord:
    """The trial that :func:`write_record` wrote."""
    return TrialRecord(**json.loads(path.read_text()))


def sorted_records(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The best first; equal ones in the order in which they were tried."""
    return sorted(sorted(records, key=lambda record: record.number), key=lambda record: record.rank, reverse=True)


def pareto_front(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The finished trials that no other one beats: in top-1 (of what was measured last) at as many multiplications replaced.

    In the order of ``multiplications_replaced``; of equal trials the first.
    """
    finished = [
        record
        for record in records
        if record.status == "finished" and record.multiplications_replaced is not None and record.top1 is not None
    ]
    front: list[TrialRecord] = []
    for record in sorted(
        finished, key=lambda item: (-(item.multiplications_replaced or 0), -(item.top1 or 0), item.number)
    ):
        if not front or (record.top1 or 0) > (front[-1].top1 or 0):
            front.append(record)
    return front[::-1]


def write_trials(records: Sequence[TrialRecord], path: Path) -> None:
    """Writes the table as CSV: a row per trial, its overrides as columns behind the trial's number."""
    keys = tried_keys(records)
    measured = [item.name for item in fields(TrialRecord) if item.name not in ("number", "run", "overrides", "error")]
    with whole_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["number", *keys, *measured, "run", "error"])
        for record in records:
            values = ["" if (value := getattr(record, name)) is None else value for name in measured]
            tried = [record.overrides.get(key, "") for key in keys]
            writer.writerow([record.number, *tried, *values, record.run, record.error])


def trials_table(records: Sequence[TrialRecord], title: str) -> Table:
    """One row per trial, with those overrides that are not the same in all of them."""
    keys = [key for key in tried_keys(records) if len({record.overrides.get(key) for record in records}) > 1]
    table = Table(title=title, title_justify="left")
    table.add_column("#", justify="right")
    for key in keys:
        name = short_key(key, keys)
        table.add_column(name, overflow="fold", min_width=min(len(name), 16))
    table.add_column("status")
    for name in (*_ACCURACIES, "bytes", "replaced", "seconds"):
        table.add_column(name.replace("_", " "), justify="right")
    for record in records:
        tried = [_rounded(record.overrides.get(key, "")) for key in keys]
        figures = [_share(getattr(record, name)) for name in _ACCURACIES]
        size = "" if record.bytes is None else f"{record.bytes:,}"
        seconds = "" if record.seconds is None else f"{record.seconds:.0f}"
        cells = [str(record.number), *tried, record.status, *figures, size]
        style = "red" if record.status == "failed" else None
        table.add_row(*cells, _share(record.multiplications_replaced), seconds, style=style)
    return table


def tried_keys(records: Sequence[TrialRecord]) -> list[str]:
    """What the trials tried, by override key, in the order of their command lines."""
    keys = dict.fromkeys(key for record in records for key in record.overrides)
    return [key for key in keys if key not in _NOT_TRIED]


def short_key(key: str, keys: Sequence[str]) -> str:
    """The last part of a key, where no other of ``keys`` ends in the same."""
    leaf = key.rpartition(".")[2]
    return leaf if [other.rpartition(".")[2] for other in keys].count(leaf) == 1 else key


def _rounded(value: str) -> str:
    try:
        return f"{float(value):.4g}" if not value.isdigit() else value
    except ValueError:
        return value


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"
