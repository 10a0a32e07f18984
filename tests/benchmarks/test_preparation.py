"""The benchmark of what comes before and after training, on a network that takes no time."""

from __future__ import annotations

import preparation
import pytest


def test_a_line_for_each_model(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--batch", "2", "--batches", "2", "--side", "16", "--threads", "1"]
    preparation.main(["cifar_resnet8", "cifar_resnet20", *small])
    titles, *rows = capsys.readouterr().out.splitlines()[-3:]
    assert titles.split() == ["seconds", "forward", "solve", "prepare", "calibrate", "convert", "save", "load"]
    assert [row.split()[0] for row in rows] == ["cifar_resnet8", "cifar_resnet20"]
    assert all(float(cell) >= 0 for row in rows for cell in row.split()[1:])
    assert all(float(row.split()[4]) > 0 for row in rows)
