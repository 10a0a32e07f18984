"""What stages show of how far they are."""

from __future__ import annotations

import io
import logging

import pytest
import torch
from rich.console import Console

import lowprec
from lowprec.run.stage_progress import StageProgress, heading

BATCHES = [torch.zeros(size, 3) for size in (8, 8, 8, 4)]


class Clock:
    """Ten seconds later each time that it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 10
        return self.now


def speaking(setting: str, seconds: float = 20, terminal: bool = False) -> tuple[StageProgress, io.StringIO]:
    said = io.StringIO()
    console = Console(file=said, width=100, force_terminal=terminal)
    return StageProgress(console, setting, seconds, Clock()), said


def test_without_a_terminal_there_is_a_line_now_and_then() -> None:
    progress, said = speaking("plain")
    assert list(progress.batches(BATCHES, 28, "verify")) == BATCHES
    assert said.getvalue().splitlines() == [
        "verify  image 16/28  1 images/s  15 s left",
        "verify  image 28/28  1 images/s  0 s left",
    ]


def test_pairs_are_counted_by_their_images() -> None:
    progress, said = speaking("plain", seconds=0)
    pairs = [(batch, torch.zeros(len(batch))) for batch in BATCHES]
    assert list(progress.batches(pairs, 28, "integer")) == pairs
    assert [line.split()[2] for line in said.getvalue().splitlines()] == ["8/28", "16/28", "24/28", "28/28"]


def test_a_terminal_has_a_bar_that_goes_away() -> None:
    progress, said = speaking("rich", terminal=True)
    assert list(progress.batches(BATCHES, 28, "verify")) == BATCHES
    assert "28/28" in said.getvalue()
    assert "images/s" in said.getvalue()
    assert said.getvalue().endswith("\x1b[2K")  # the line is erased


def test_no_progress_is_no_progress() -> None:
    progress, said = speaking("none", seconds=0)
    assert list(progress.batches(BATCHES, 28, "verify")) == BATCHES
    with progress.messages("lowprec.calibrate", "calibrate"):
        logging.getLogger("lowprec.calibrate").info("layer")
    assert said.getvalue() == ""


@pytest.mark.parametrize(("setting", "terminal"), [("plain", False), ("rich", True)])
def test_calibration_tells_its_layers(setting: str, terminal: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 2))
    qmodel = lowprec.prepare(model.eval(), "w2a8_n4", torch.randn(2, 3, 8, 8))
    logger = logging.getLogger("lowprec.calibrate")
    before = logger.level, logger.propagate, list(logger.handlers)
    progress, said = speaking(setting, seconds=0, terminal=terminal)
    with progress.messages("lowprec.calibrate", "calibrate"):
        lowprec.calibrate(qmodel, [torch.randn(4, 3, 8, 8)])
        logger.warning("a warning")
    if not terminal:  # a terminal is drawn now and then alone
        assert any(line.startswith("calibrate  0: exponent -") for line in said.getvalue().splitlines())
    assert (logger.level, logger.propagate, logger.handlers) == before
    assert [record.message for record in caplog.records] == ["a warning"]


def test_the_logger_is_as_it_was_after_an_error() -> None:
    logger = logging.getLogger("lowprec.calibrate")
    before = logger.level, logger.propagate, list(logger.handlers)
    progress, _ = speaking("plain")
    with pytest.raises(ZeroDivisionError), progress.messages("lowprec.calibrate", "calibrate"):
        raise ZeroDivisionError
    assert (logger.level, logger.propagate, logger.handlers) == before


def test_a_heading_is_plain_text_where_there_is_no_terminal() -> None:
    for terminal, expected in ((False, "prepare: weights [1:]\n"), (True, "\x1b[1mprepare\x1b[0m: weights [1:]\n")):
        said = io.StringIO()
        Console(file=said, force_terminal=terminal, highlight=False).print(heading("prepare: weights [1:]"))
        assert said.getvalue() == expected
