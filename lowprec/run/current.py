"""The run at hand, as its stages and tasks see it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from torch import Tensor

from lowprec.config import RunConfig
from lowprec.data import DataModule
from lowprec.report.summary import TOP1_ROWS
from lowprec.run.directory import RunDirectory
from lowprec.run.stage_progress import StageProgress, heading
from lowprec.training import processes
from lowprec.training.evaluation import Predictor, top1


@dataclass
class Run:
    """What every stage of a run needs: its configuration, its folder, its data, and where it speaks."""

    config: RunConfig
    directory: RunDirectory
    data: DataModule
    console: Console
    device: torch.device
    callbacks: Sequence[Callback] = ()  # more ones of the fine-tuning

    @property
    def progress(self) -> StageProgress:
        """What its stages show of how far they are."""
        trainer = self.config.trainer
        return StageProgress(self.console, trainer.progress, trainer.progress_seconds)

    @contextmanager
    def stage(self, name: str, says: str) -> Iterator[None]:
        """Says what is being done, seeds it, and adds its seconds to the run's, also those of a stage that is cut
        off.
        """
        self.console.print(heading(says))
        # Every stage starts from the seed alone, whether or not the stages before it ran in the same process.
        seed_everything(self.config.seed, workers=True, verbose=False)
        started = time.monotonic()
        try:
            yield
        finally:
            self.directory.add_seconds(name, time.monotonic() - started)

    def measure(self, name: str, predict: Predictor, device: torch.device | str = "cpu") -> None:
        """Measures top-1 on the whole test split and keeps it, unless it is known already."""
        if self.directory.result(name) is None:
            images = self.data.sizes["test"] // processes.size()
            batches = self.progress.batches(self.data.test_dataloader(), images, dict(TOP1_ROWS)[name])
            self.directory.record(name, top1(predict, batches, device))
        self.console.print(f"  {dict(TOP1_ROWS)[name]}: {self.directory.result(name):.2%} top-1 on the test split")

    def example_images(self) -> Tensor:
        """Two images of the data's shape, [2, C, H, W]: batch norm in train mode takes no single one."""
        # Random, so that checks of the traced graph see every path; drawn from a generator of their own.
        return torch.randn(2, *self.data.input_size, generator=torch.Generator().manual_seed(0))
