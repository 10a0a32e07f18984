"""Going on in the middle of an epoch: the batches that are done are not loaded again."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from torch.utils.data import DataLoader


class RestOfEpoch:
    """A sampler without the first ``done`` indices of its first epoch; its length stays, which Lightning counts on."""

    def __init__(self, sampler: Any, done: int) -> None:
        self.sampler = sampler
        self.done = done

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        done, self.done = self.done, 0
        return islice(iter(self.sampler), done, None)


class ResumedData(lightning.LightningDataModule):
    """``data``, whose first epoch goes on where ``checkpoint`` (a Lightning checkpoint) was written.

    The order of an epoch is a function of (seed, epoch) alone, so leaving out the first batches is all that it takes.
    """

    def __init__(self, data: lightning.LightningDataModule, checkpoint: Path) -> None:
        super().__init__()
        self.data = data
        content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        self.batches_done = content["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["processed"]

    def prepare_data(self) -> None:
        self.data.prepare_data()

    def setup(self, stage: str) -> None:
        self.data.setup(stage)

    def train_dataloader(self) -> DataLoader[Any]:
        loader: DataLoader[Any] = self.data.train_dataloader()
        # A checkpoint of an epoch's end says that all its batches are done; the next epoch starts from none.
        if self.batches_done < len(loader):
            done = self.batches_done * (loader.batch_size or 1)
            loader.batch_sampler.sampler = RestOfEpoch(loader.sampler, done)  # type: ignore[union-attr]
        return loader

    def val_dataloader(self) -> DataLoader[Any]:
        loader: DataLoader[Any] = self.data.val_dataloader()
        return loader
