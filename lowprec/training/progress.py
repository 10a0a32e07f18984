"""What a training shows: one line per epoch, and on a terminal a bar for the epoch in hand."""

from __future__ import annotations

import sys
import time

import lightning.pytorch as lightning
from lightning.pytorch.callbacks import Callback, RichProgressBar
from rich.console import Console


class EpochLines(Callback):
    """Prints a line per epoch: loss, training and validation top-1, seconds. Unlike a bar, it stays."""

    def __init__(self, title: str, console: Console) -> None:
        self.title = title
        self.console = console
        self._started = 0.0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        # A run that goes on in the middle of an epoch does not start that epoch.
        self._started = time.monotonic()

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._started = time.monotonic()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        metrics = trainer.callback_metrics
        self.console.print(
            f"{self.title}  epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
            f"  loss {float(metrics['train/loss']):.4f}"
            f"  training top-1 {float(metrics['train/top1']):.2%}"
            f"  validation top-1 {float(metrics['val/top1']):.2%}"
            f"  {time.monotonic() - self._started:.1f} s",
            highlight=False,
        )


def progress_callbacks(setting: str, title: str, console: Console) -> list[Callback]:
    """Callbacks for ``trainer.progress``: auto (a bar on a terminal, lines elsewhere), rich, plain or none."""
    if setting == "none":
        return []
    lines: list[Callback] = [EpochLines(title, console)]
    if setting == "rich" or (setting == "auto" and sys.stdout.isatty()):
        # The bar goes away with its epoch; the line of EpochLines stays.
        lines.append(RichProgressBar(leave=False))
    return lines
