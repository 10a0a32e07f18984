"""Checkpoints of a training: the best weights by validation accuracy, the last state, and one that a signal leaves."""

from __future__ import annotations

import os
import signal
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from lowprec.files import whole_file
from lowprec.models import save_checkpoint
from lowprec.training import processes

BEST = "best.safetensors"
LAST = "last.ckpt"
# Ctrl-C; the end of a job or its preemption; a lost terminal; SLURM's and submitit's warnings before a job's time is over.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Interrupted(Exception):
    """Training was stopped by a signal; its state up to the last whole step is in ``last.ckpt``."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class TrainingDiverged(RuntimeError):
    """The training loss became infinite or NaN; checkpoints of the epochs before it are kept."""


class CheckpointWriteError(RuntimeError):
    """A checkpoint cannot be written; the one before it is as it was."""


class DurableCheckpoints(TorchCheckpointIO):
    """Writes Lightning's checkpoints to a temporary file, syncs it and renames it: one that is there is whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as temporary:
                torch.save(checkpoint, temporary)
        # torch.save reports a full disk as a RuntimeError of its own.
        except (OSError, RuntimeError) as error:
            kept = (
                f"the one before it ({written_at(Path(path))}) is kept"
                if Path(path).is_file()
                else "there is none before it"
            )
            reason = str(error).strip().splitlines()[0]
            raise CheckpointWriteError(
                f"the checkpoint {path} cannot be written ({reason}): {kept}. Make room or permit writing, and start the same "
                "command again: it goes on from there"
            ) from error


class BestAndLast(Checkpoint):
    """Keeps ``best.safetensors`` (weights alone) and ``last.ckpt`` (everything, to go on from) in ``folder``.

    Both are written after every epoch, ``last.ckpt`` also every ``minutes`` (None: not) within one. A signal only sets a
    flag: the step in hand is finished, ``last.ckpt`` is written, and :class:`Interrupted` is raised, in all processes after
    the same step. A second Ctrl-C stops at once.
    """

    def __init__(self, folder: Path, minutes: float | None = None) -> None:
        self.folder = folder
        self.minutes = minutes
        self.best_top1 = -1.0
        self.best_epoch = -1
        self._signal = 0
        self._heard: tuple[signal.Signals, ...] = ()
        self._step = -1
        self._written = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        return {"best_top1": self.best_top1, "best_epoch": self.best_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_top1, self.best_epoch = state_dict["best_top1"], state_dict["best_epoch"]

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it, signals are heard here; outside of the main thread, where they do not arrive, nothing changes.

        A handler that was there before for SIGUSR2 (submitit's, which requeues its job) is called once the checkpoint is written.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # What nohup has made deaf to the loss of its terminal stays so.
        deaf = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        self._heard = tuple(number for number in SIGNALS if number != signal.SIGHUP or not deaf)
        previous = {number: signal.signal(number, self._on_signal) for number in self._heard}
        try:
            yield
        except Interrupted as stop:
            handler = previous[signal.Signals(stop.number)]
            if stop.number == signal.SIGUSR2 and callable(handler):
                handler(stop.number, None)
            raise
        finally:
            self._heard = ()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        # Lightning has put a handler of its own there, which stops at once, or waits for processes that do not wait for it.
        for number in self._heard:
            signal.signal(number, self._on_signal)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Between two steps of the optimizer there are gradients that no checkpoint holds. After an epoch's last step its
        # validation follows, and then on_train_epoch_end below.
        if trainer.global_step == self._step or trainer.is_last_batch:
            return
        self._step = trainer.global_step
        minutes = (time.monotonic() - self._written) / 60
        due = self.minutes is not None and minutes >= self.minutes
        # All processes stop and write after the same step, though signals and clocks reach them at different ones.
        stop, write = processes.largest(self._signal, processes.is_main() and due)
        if stop or write:
            self._write_last(trainer)
        if stop:
            raise Interrupted(int(stop))

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        top1 = float(trainer.callback_metrics["val/top1"])
        if top1 > self.best_top1:
            self.best_top1, self.best_epoch = top1, trainer.current_epoch
            if processes.is_main():
                metadata = {"epoch": str(self.best_epoch + 1), "validation_top1": f"{top1:.6f}"}
                save_checkpoint(pl_module.model, self.folder / BEST, metadata)  # type: ignore[arg-type]
        self._write_last(trainer)
        (stop,) = processes.largest(self._signal)
        if stop:
            raise Interrupted(int(stop))

    def _write_last(self, trainer: lightning.Trainer) -> None:
        trainer.save_checkpoint(self.folder / LAST)
        self._written = time.monotonic()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal and number == signal.SIGINT:
            raise Interrupted(number)
        if number == signal.SIGHUP:
            _leave_lost_terminal()
        self._signal = self._signal or number


def _leave_lost_terminal() -> None:
    """Output to a terminal that is gone would fail, and end the training before its checkpoint is written."""
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


def written_at(path: Path) -> str:
    """When a file was written, in local time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(path.stat().st_mtime))
