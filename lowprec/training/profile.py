"""Where the time of a training step goes: a trace and a table of the operators that take most of it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
from lightning.pytorch.callbacks import Callback
from torch.profiler import ProfilerActivity, profile, schedule

from lowprec.files import whole_file
from lowprec.training import processes

# Batches before the profiler, in which kernels are chosen and memory is taken; with the profiler, not kept; and kept.
SKIPPED, WARM_UP, PROFILED = 4, 2, 5
ROWS = 30
TRACE = "profile.trace.json.gz"
TABLE = "profile.txt"


class StepProfile(Callback):
    """Profiles five batches of a training with torch.profiler, in the main process.

    Leaves in ``folder`` ``profile.trace.json.gz``, for https://ui.perfetto.dev or chrome://tracing, and ``profile.txt``, the
    30 operators that took most time on the device. Only the first of several processes is profiled.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._profiler: profile | None = None
        self._batches = 0
        self._written = False

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if not processes.is_main():
            return
        activities = [ProfilerActivity.CPU]
        if pl_module.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(
            activities=activities,
            schedule=schedule(skip_first=SKIPPED, wait=0, warmup=WARM_UP, active=PROFILED, repeat=1),
            on_trace_ready=self._write,
        )
        self._profiler.start()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._profiler is None:
            return
        self._batches += 1
        if self._written:
            self._stop()
        else:
            self._profiler.step()

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self._profiler is None:
            return
        self._stop()
        if not self._written:
            least = SKIPPED + WARM_UP + 1
            warnings.warn(
                f"nothing was profiled: the training was over before batch {least}; give it more batches "
                "(a smaller data.batch_size, or more of trainer.max_epochs)",
                stacklevel=2,
            )

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._profiler is not None:
            profiler, self._profiler = self._profiler, None
            profiler.stop()

    def _write(self, profiler: profile) -> None:
        # A training that ends just when recording starts has nothing to show.
        if self._batches <= SKIPPED + WARM_UP:
            return
        device = "cuda" if ProfilerActivity.CUDA in profiler.activities else "cpu"
        table = profiler.key_averages().table(
            sort_by=f"self_{'device' if device == 'cuda' else 'cpu'}_time_total", row_limit=ROWS
        )
        with whole_file(self.folder / TABLE) as temporary:
            temporary.write_text(table)
        with whole_file(self.folder / TRACE) as temporary:
            # torch compresses by the name's ending.
            plain = temporary.with_suffix(".json.gz")
            profiler.export_chrome_trace(str(plain))
            plain.replace(temporary)
        self._written = True
