"""Stops a training that promises less than the trials of a search before it."""

from __future__ import annotations

import warnings
from typing import Protocol

import lightning.pytorch as lightning
from lightning.pytorch.callbacks import Callback

from lowprec.report.summary import plural
from lowprec.training.processes import is_main, on_main


class TrialPruned(Exception):
    """The trial was stopped because half of the trials before it were better by then. It did not fail."""


class Trial(Protocol):
    """What is needed of Optuna's trial, which only the main process of a training has."""

    def report(self, value: float, step: int) -> None: ...

    def should_prune(self) -> bool: ...


class PruneHopeless(Callback):
    """Reports the validation top-1 of each epoch to ``trial`` and raises :class:`TrialPruned` before the next one.

    Not at the epoch's end: by the next one's start the checkpoints are written, and a last epoch has none to save.
    """

    def __init__(self, trial: Trial) -> None:
        self.trial = trial

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if not is_main():
            return
        with warnings.catch_warnings():
            # A run that was cut off before its checkpoint does the epoch again, with the same result.
            warnings.filterwarnings("ignore", message=".*already reported.*")
            self.trial.report(float(trainer.callback_metrics["val/top1"]), trainer.current_epoch)

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if on_main(self.trial.should_prune):
            raise TrialPruned(f"worse than half of the trials before it after {plural(trainer.current_epoch, 'epoch')}")
