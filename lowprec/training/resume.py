"""Going on in the middle of an epoch: the batches that are done are not loaded again, and it is the same training."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from torch.utils.data import DataLoader

from lowprec.models import CheckpointError

IDENTITY = "identity"


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
    """``data``, whose first epoch goes on after ``batches_done`` batches.

    The order of an epoch is a function of (seed, epoch) alone, and what is random in an image of (seed, epoch, index), so
    leaving out the first batches is all that it takes, on any number of loader processes.
    """

    def __init__(self, data: lightning.LightningDataModule, batches_done: int) -> None:
        super().__init__()
        self.data = data
        self.batches_done = batches_done

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

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self.data.on_after_batch_transfer(batch, dataloader_idx)


def batches_done(checkpoint: Path, identity: dict[str, Any]) -> int:
    """How many batches of its epoch ``checkpoint`` (a Lightning checkpoint) has seen.

    identity: what the training is (model, recipe, processes …), as its module writes it into checkpoints.

    Raises:
        CheckpointError: the file is damaged, or another training's: the first difference is named.
    """
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        found = content.get(IDENTITY, {})
        done = int(content["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["processed"])
    except Exception as error:
        raise CheckpointError(
            f"the checkpoint {checkpoint} cannot be read ({str(error).strip().splitlines()[0]}): delete it, and the training "
            "starts again, or start the run afresh with fresh=true"
        ) from error
    for key in sorted({*found, *identity}):
        theirs, ours = found.get(key, "nothing"), identity.get(key, "nothing")
        if theirs != ours:
            raise CheckpointError(
                f"the checkpoint {checkpoint} is of another training: its {key} is {theirs}, and this one's is {ours}. Give the "
                "run another run_id=NAME, or start it afresh with fresh=true"
            )
    return done
