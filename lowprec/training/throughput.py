"""How fast a training runs, and how long it waits for its data."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.profilers import Profiler

from lowprec.training import processes
from lowprec.training.loggers import log_metrics

# Above this share of an epoch, and from this many seconds on, waiting for data is worth a warning.
WORTH_A_WARNING = 0.2
SECONDS_WORTH_A_WARNING = 10.0
GIB = 1 << 30


class DataWaitWarning(UserWarning):
    """A training that waits for its data wastes its processor."""


@dataclass(frozen=True)
class Work:
    """What this process did in training: images, seconds, and the seconds of them in which it waited for data."""

    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    def since(self, earlier: Work) -> Work:
        return Work(self.images - earlier.images, self.seconds - earlier.seconds, self.waited - earlier.waited)

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds > 0 else 0.0

    @property
    def wait_share(self) -> float:
        return self.waited / self.seconds if self.seconds > 0 else 0.0


class LoaderClock(Profiler):
    """Adds up the time that is lost to waiting for training batches.

    On a GPU this is the time in which the GPU had nothing to do while a batch was fetched, by CUDA events that are read
    later: a process that waits for a batch while its GPU still computes loses nothing.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self._clock = clock
        self._waited = 0.0
        self._started = 0.0
        self._event: torch.cuda.Event | None = None
        self._unread: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.on_gpu = False

    def start(self, action_name: str) -> None:
        if not action_name.endswith("train_dataloader_next"):
            return
        self._started = self._clock()
        self._event = _recorded_event() if self.on_gpu else None

    def stop(self, action_name: str) -> None:
        if not action_name.endswith("train_dataloader_next"):
            return
        if self._event is None:
            self._waited += self._clock() - self._started
        else:
            self._unread.append((self._event, _recorded_event()))

    @property
    def seconds(self) -> float:
        """Of all waits that are over on the device."""
        while self._unread and self._unread[0][1].query():
            start, end = self._unread.pop(0)
            self._waited += start.elapsed_time(end) / 1000
        return self._waited


class Throughput(Callback):
    """Logs ``perf/images_per_second`` and ``perf/data_wait_share`` every N optimizer steps, and their means per epoch.

    Images are those of all processes, the wait is that of the process that waits longest, for which the others wait in turn.
    On GPUs also ``perf/gpu_memory_gib``, the peak of what tensors took. Validation counts nowhere. Takes the trainer's place
    for a profiler, to learn when batches are fetched.
    """

    def __init__(self, log_every_steps: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.log_every_steps = log_every_steps
        self._clock = clock
        self._loader = LoaderClock(clock)
        self._images = 0
        self._seconds = 0.0
        self._mark = 0.0
        self._logged_step = -1
        self._at_last_log = self._at_epoch_start = Work()
        self._warned = False

    @property
    def work(self) -> Work:
        """Of this process since the training started, up to the last batch."""
        return Work(self._images, self._seconds, self._loader.seconds)

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        trainer.profiler = self._loader  # type: ignore[attr-defined]  # set by its connectors

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._loader.on_gpu = pl_module.device.type == "cuda"
        # A run that goes on in the middle of an epoch does not start that epoch.
        self._mark = self._clock()
        self._logged_step = trainer.global_step

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._mark = self._clock()
        self._at_epoch_start = self._at_last_log = self.work

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._mark = self._clock()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = self._clock()
        self._seconds += now - self._mark
        self._mark = now
        self._images += len(batch[0])
        if trainer.global_step == self._logged_step or trainer.global_step % self.log_every_steps:
            return
        self._logged_step = trainer.global_step
        work = self.work
        metrics = _over_processes(work.since(self._at_last_log))
        if self._loader.on_gpu:
            (peak,) = processes.largest(torch.cuda.max_memory_allocated() / GIB)
            metrics["perf/gpu_memory_gib"] = peak
        self._at_last_log = work
        log_metrics(trainer, metrics)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        epoch = self.work.since(self._at_epoch_start)
        metrics = _over_processes(epoch)
        log_metrics(trainer, {f"{name}_epoch": value for name, value in metrics.items()})
        share = metrics["perf/data_wait_share"]
        if processes.is_main() and not self._warned and share > WORTH_A_WARNING:
            self._warned = epoch.seconds * share >= SECONDS_WORTH_A_WARNING
            if self._warned:
                warnings.warn(
                    f"{share:.0%} of epoch {trainer.current_epoch + 1} were spent waiting for data. Raise data.num_workers up to "
                    "the cores of a process, write photographs into tar shards (data=shards) where single files are slow to "
                    "read, or keep them on a local disk",
                    DataWaitWarning,
                    stacklevel=2,
                )


def _over_processes(work: Work) -> dict[str, float]:
    (images,) = processes.total(work.images)
    seconds, wait_share = processes.largest(work.seconds, work.wait_share)
    return {
        "perf/images_per_second": images / seconds if seconds > 0 else 0.0,
        "perf/data_wait_share": wait_share,
    }


def _recorded_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
