"""The benchmark of training steps, on a network and images that take no time."""

from __future__ import annotations

import pytest
import training_step

SMALL = ["cifar_resnet8", "--batch", "2", "--side", "16", "--rounds", "2", "--threads", "1"]


def test_a_line_for_each_candidate_and_one_for_what_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(start: object) -> None:
        raise ZeroDivisionError("no such\nthing")

    monkeypatch.setitem(training_step.CANDIDATES, "PyTorch FX", fails)
    training_step.main([*SMALL, "--no-memory", "--only", "lowprec w2a8_n4", "PyTorch*", "--precision", "32", "bf16"])
    rows = [row for row in capsys.readouterr().out.splitlines() if row.startswith(("plain", "lowprec", "PyTorch"))]
    assert [row[:16].strip() for row in rows] == ["plain", "lowprec w2a8_n4", "PyTorch FX"] * 2
    assert rows[0].split()[1] == "1.00x"
    assert float(rows[1].split()[2].removesuffix("x")) > 0
    assert rows[2].endswith("failed: ZeroDivisionError: no such thing")


@pytest.mark.slow
def test_memory_is_that_of_a_process_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    training_step.main([*SMALL, "--only", "plain"])
    *_, unit = (row := capsys.readouterr().out.splitlines()[-1]).split()
    assert unit == "MiB"
    assert row.split()[4] == "1.00x"
    assert float(row.split()[5]) > 100


def test_what_is_not_there_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        training_step.main(["--only", "nothing*"])
    assert "--only nothing*: no such candidate; there are plain; lowprec w2a8_n4; " in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="not_a_model"):
        training_step.memory_of("plain", ["not_a_model", "--batch", "2", "--side", "16"])
