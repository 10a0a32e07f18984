"""Checkpoints of a training: the best weights by validation accuracy, the last state, and one that Ctrl-C leaves."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as lightning
from lightning.pytorch.callbacks import Checkpoint

from lowprec.models import save_checkpoint

BEST = "best.safetensors"
LAST = "last.ckpt"


class Interrupted(Exception):
    """Training was stopped by Ctrl-C; its state up to the last whole step is in ``last.ckpt``."""


class TrainingDiverged(RuntimeError):
    """The training loss became infinite or NaN; checkpoints of the epochs before it are kept."""


class BestAndLast(Checkpoint):
    """Keeps ``best.safetensors`` (weights alone) and ``last.ckpt`` (everything, to go on from) in ``folder``.

    Both are written after every epoch, under another name first and renamed. Ctrl-C only sets a flag: the step in
    hand is finished, ``last.ckpt`` is written, and :class:`Interrupted` is raised. A second Ctrl-C stops at once.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.best_top1 = -1.0
        self.best_epoch = -1
        self._stop = False

    def state_dict(self) -> dict[str, Any]:
        return {"best_top1": self.best_top1, "best_epoch": self.best_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_top1, self.best_epoch = state_dict["best_top1"], state_dict["best_epoch"]

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it, Ctrl-C is heard here; outside of the main thread, where signals do not arrive, nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = signal.signal(signal.SIGINT, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # After an epoch's last step its validation follows, and then on_train_epoch_end below.
        if self._stop and not trainer.is_last_batch:
            trainer.save_checkpoint(self.folder / LAST)
            raise Interrupted

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        loss = float(trainer.callback_metrics["train/loss"])
        if not math.isfinite(loss):
            raise TrainingDiverged(
                f"training diverged: the loss of epoch {trainer.current_epoch + 1} is {loss}. Lower optim.learning_rate "
                "(baseline.optim.learning_rate for the full-precision model), or set trainer.gradient_clip"
            )
        top1 = float(trainer.callback_metrics["val/top1"])
        if top1 > self.best_top1:
            self.best_top1, self.best_epoch = top1, trainer.current_epoch
            metadata = {"epoch": str(self.best_epoch + 1), "validation_top1": f"{top1:.6f}"}
            save_checkpoint(pl_module.model, self.folder / BEST, metadata)  # type: ignore[arg-type]
        trainer.save_checkpoint(self.folder / LAST)
        if self._stop:
            raise Interrupted

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._stop:
            raise Interrupted
        self._stop = True
