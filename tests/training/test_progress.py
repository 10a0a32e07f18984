"""What is shown of a training, on a clock that the test moves."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from watched_training import STEPS, Clock, TimedImages, TimedSteps, tiny_module, train

from lowprec.config import TrainerConfig
from lowprec.training.checkpoints import LAST
from lowprec.training.non_finite import NonFiniteGuard
from lowprec.training.progress import EpochLines, LiveBar, LiveFigures, StepLines, duration
from lowprec.training.throughput import Throughput
from lowprec.training.watch import watch_callbacks


def lines_of(tmp_path: Path, seconds: float) -> list[str]:
    """What a plain log has of a training whose batches take 1 s each, 0.5 s of which are spent waiting."""
    clock, console = Clock(), Console(file=io.StringIO(), width=200)
    guard, throughput = NonFiniteGuard(tmp_path / LAST, 50), Throughput(50, clock)
    steps = StepLines("fine-tuning", console, seconds, LiveFigures(throughput, guard, clock), clock)
    callbacks = [TimedSteps(clock, 0.5), guard, throughput, EpochLines("fine-tuning", console, clock), steps]
    train(tiny_module(), tmp_path, callbacks, images=TimedImages(clock, 0.125))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_a_line_every_so_often_and_one_per_epoch(tmp_path: Path) -> None:
    first, second, epoch, *_, last = lines_of(tmp_path, 3)
    words = first.split("  ")
    assert words[:4] == ["fine-tuning", "step 3/12 (epoch 1/2)", "4 images/s", "data wait 50%"]
    assert words[4].startswith("loss 0.")
    assert words[5].startswith("learning rate 0.0")
    # Three steps took 3 s, and nine are left.
    assert words[6] == "9 s left"
    assert second.startswith("fine-tuning  step 6/12 (epoch 1/2)  ")
    assert epoch.startswith("fine-tuning  epoch 1/2  loss 0.")
    assert last.startswith("fine-tuning  epoch 2/2  loss 0.")


def test_short_epochs_have_their_own_lines_alone(tmp_path: Path) -> None:
    # The validations, of 1000 s each, are no reason for a line before the next step.
    lines = lines_of(tmp_path, 10_000)
    assert [line.split("  ")[1] for line in lines] == ["epoch 1/2", "epoch 2/2"]


def test_figures_are_of_the_steps_since_one_last_asked(tmp_path: Path) -> None:
    read: list[dict[str, str]] = []
    clock = Clock()
    guard, throughput = NonFiniteGuard(tmp_path / LAST, 50), Throughput(50, clock)
    figures = LiveFigures(throughput, guard, clock)

    class Reader(Callback):
        def on_train_start(self, trainer: object, pl_module: object) -> None:
            figures.start(trainer)  # type: ignore[arg-type]

        def on_train_batch_end(self, trainer: object, *arguments: object) -> None:
            read.append(figures.read(trainer))  # type: ignore[arg-type]

    callbacks = [TimedSteps(clock, 0.001), guard, throughput, Reader()]
    train(tiny_module(), tmp_path, callbacks, images=TimedImages(clock, 0.00025), max_epochs=1)
    assert len(read) == STEPS
    assert {figure["images/s"] for figure in read} == {"2,000"}
    assert {figure["data wait"] for figure in read} == {"50%"}
    assert len({figure["loss"] for figure in read}) == STEPS
    assert read[-1]["left"] == "0 s"


@pytest.mark.parametrize(
    ("progress", "expected"),
    [
        ("none", []),
        ("plain", [EpochLines, StepLines]),
        ("auto", [EpochLines, StepLines]),
        ("rich", [EpochLines, LiveBar]),
    ],
)
def test_what_is_shown_where(progress: str, expected: list[type], tmp_path: Path) -> None:
    settings = TrainerConfig(progress=progress)
    found = watch_callbacks(settings, folder=tmp_path, title="", console=Console(quiet=True))
    assert [type(callback) for callback in found] == [NonFiniteGuard, Throughput, *expected]


def test_the_bar_shows_figures_and_asks_for_them_seldom(tmp_path: Path) -> None:
    clock = Clock()
    guard, throughput = NonFiniteGuard(tmp_path / LAST, 50), Throughput(50, clock)
    bar = LiveBar(LiveFigures(throughput, guard, clock), clock)
    shown: list[dict[str, str]] = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: object, pl_module: object, *arguments: object) -> None:
            shown.append(bar.get_metrics(trainer, pl_module))  # type: ignore[arg-type]

    callbacks = [TimedSteps(clock, 0.9), guard, throughput, bar, Look()]
    train(tiny_module(), tmp_path, callbacks, images=TimedImages(clock, 0), max_epochs=1)
    # The first two seconds are over in the third step.
    assert shown[:2] == [{}, {}]
    assert shown[2]["images/s"] == "4"
    assert shown[2] == shown[3] == shown[4]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (89.4, "89 s"), (90, "2 min"), (3570, "1 h 00 min"), (11_100, "3 h 05 min")],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words
