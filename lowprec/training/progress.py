"""What a training shows: a line per epoch; on a terminal a bar with live figures, elsewhere a line a minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as lightning
from lightning.pytorch.callbacks import Callback, RichProgressBar
from rich import get_console
from rich.console import Console
from rich.progress import BarColumn

from lowprec.training import processes
from lowprec.training.non_finite import NonFiniteGuard
from lowprec.training.throughput import Throughput, Work

Clock = Callable[[], float]
# How often the bar's figures change, in seconds; it moves with every batch.
BAR_SECONDS = 2.0
# Columns of the bar itself: with its figures it fits a line of a hundred; a narrower terminal has half of it, and fewer figures.
BAR_WIDTH, WIDE = 20, 100
_SHORT = {"data wait": "wait", "learning rate": "lr"}
_NARROW = ("images/s", "loss", "left")


class EpochLines(Callback):
    """Prints a line per epoch: loss, training and validation top-1, seconds. Unlike a bar, it stays."""

    def __init__(self, title: str, console: Console, clock: Clock = time.monotonic) -> None:
        self.title = title
        self.console = console
        self._clock = clock
        self._started = 0.0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        # A run that goes on in the middle of an epoch does not start that epoch.
        self._started = self._clock()

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._started = self._clock()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if not processes.is_main():
            return
        metrics = trainer.callback_metrics
        self.console.print(
            f"{self.title}  epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
            f"  loss {float(metrics['train/loss']):.4f}"
            f"  training top-1 {float(metrics['train/top1']):.2%}"
            f"  validation top-1 {float(metrics['val/top1']):.2%}"
            f"  {self._clock() - self._started:.1f} s",
            highlight=False,
        )


class LiveFigures:
    """How a training does since one last asked: throughput, data wait, loss, learning rate, time left.

    They come from this process's host alone: no collective operation, and no wait for the device. Images per second are this
    process's times the number of processes; the loss is the mean over these steps.
    """

    def __init__(self, throughput: Throughput, guard: NonFiniteGuard, clock: Clock = time.monotonic) -> None:
        self._throughput = throughput
        self._guard = guard
        self._clock = clock
        self._work = Work()
        self._losses = (0.0, 0)
        self._started = 0.0
        self._first_step = 0
        self.total_steps = 0

    def start(self, trainer: lightning.Trainer) -> None:
        """The training starts now; the time left is reckoned from what it has done since, validation included.

        In all processes, which may have to agree on the number of steps.
        """
        self._started = self._clock()
        self._first_step = trainer.global_step
        self.total_steps = int(trainer.estimated_stepping_batches)
        self._work = self._throughput.work
        self._losses = (self._guard.loss_total, self._guard.steps)

    def read(self, trainer: lightning.Trainer) -> dict[str, str]:
        """The figures as words, by name."""
        work = self._throughput.work
        recent, self._work = work.since(self._work), work
        total, steps = self._losses
        self._losses = (self._guard.loss_total, self._guard.steps)
        figures = {
            "images/s": f"{recent.images_per_second * processes.size():,.0f}",
            "data wait": f"{recent.wait_share:.0%}",
        }
        if self._guard.steps > steps:
            figures["loss"] = f"{(self._guard.loss_total - total) / (self._guard.steps - steps):.4f}"
            figures["learning rate"] = f"{self._guard.learning_rate:.3g}"
        done = trainer.global_step - self._first_step
        if done:
            left = self.total_steps - trainer.global_step
            figures["left"] = duration((self._clock() - self._started) / done * left)
        return figures


class StepLines(Callback):
    """Prints a line every so many seconds within epochs, for logs that nobody watches live."""

    def __init__(
        self, title: str, console: Console, seconds: float, figures: LiveFigures, clock: Clock = time.monotonic
    ) -> None:
        self.title = title
        self.console = console
        self.seconds = seconds
        self._figures = figures
        self._clock = clock
        self._printed = 0.0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._printed = self._clock()
        self._figures.start(trainer)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._clock() - self._printed < self.seconds or not processes.is_main():
            return
        self._printed = self._clock()
        figures = self._figures.read(trainer)
        words = [
            f"{figures['images/s']} images/s",
            f"data wait {figures['data wait']}",
            *(f"{name} {figures[name]}" for name in ("loss", "learning rate") if name in figures),
            *([f"{figures['left']} left"] if "left" in figures else []),
        ]
        self.console.print(
            f"{self.title}  step {trainer.global_step}/{self._figures.total_steps} (epoch "
            f"{trainer.current_epoch + 1}/{trainer.max_epochs})  {'  '.join(words)}",
            highlight=False,
        )


class LiveBar(RichProgressBar):
    """Lightning's bar with live figures, which are read without waiting for the device after every batch.

    What is printed while it is there has to go to ``rich.get_console()``: it would be written over otherwise.
    """

    def __init__(self, figures: LiveFigures, clock: Clock = time.monotonic) -> None:
        # The bar goes away with its epoch; the line of EpochLines stays.
        super().__init__(leave=False)
        self._figures = figures
        self._clock = clock
        self._read = 0.0
        self._shown: dict[str, str] = {}

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._read = self._clock()
        self._figures.start(trainer)

    def get_metrics(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> dict[str, Any]:
        if self._clock() - self._read >= BAR_SECONDS:
            self._read = self._clock()
            figures = self._figures.read(trainer)
            wide = get_console().width >= WIDE
            self._shown = {
                _SHORT.get(name, name): figure for name, figure in figures.items() if wide or name in _NARROW
            }
        return dict(self._shown)

    def configure_columns(self, trainer: lightning.Trainer) -> list[Any]:
        # Without the epoch's times and batches per second, which the line of the epoch and the figures say better.
        description, _, batches, *_ = super().configure_columns(trainer)
        return [description, BarColumn(BAR_WIDTH if get_console().width >= WIDE else BAR_WIDTH // 2), batches]

    def _get_train_description(self, current_epoch: int) -> str:
        return f"epoch {current_epoch + 1}/{self.trainer.max_epochs}"  # counted as in the lines


def shows_bar(setting: str) -> bool:
    """Whether ``trainer.progress`` means a bar: always for rich, on a terminal for auto."""
    return setting == "rich" or (setting == "auto" and sys.stdout.isatty())


def duration(seconds: float) -> str:
    """In words: ``45 s``, ``12 min``, ``3 h 05 min``."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
