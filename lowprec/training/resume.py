"""Going on in the middle of an epoch: the batches that are done are not loaded again, and it is the same training."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from torch.utils.data import DataLoader

from lowprec.models import CheckpointError, checkpoint_metadata
from lowprec.training import processes
from lowprec.training.checkpoints import BEST, BestAndLast, written_at
from lowprec.training.differences import differences

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


class ResumeLine(Callback):
    """Prints where the training goes on, and from which checkpoint; nothing where no epoch is left to do."""

    def __init__(self, title: str, console: Console, checkpoint: Path) -> None:
        self.title = title
        self.console = console
        self.checkpoint = checkpoint

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        total_steps = int(trainer.estimated_stepping_batches)  # all processes may have to agree on it
        if not processes.is_main():
            return
        self.console.print(
            f"{self.title}  going on at epoch {trainer.current_epoch + 1}/{trainer.max_epochs}, step "
            f"{trainer.global_step + 1}/{total_steps}, from {self.checkpoint.parent.name}/{self.checkpoint.name} of "
            f"{written_at(self.checkpoint)}",
            highlight=False,
        )


def batches_done(checkpoint: Path, identity: dict[str, Any]) -> int:
    """How many batches of its epoch ``checkpoint`` (a Lightning checkpoint) has seen.

    identity: what the training is (model, recipe, processes …), as its module writes it into checkpoints.

    Raises:
        CheckpointError: the file is damaged, or another training's: what differs is named; or the best weights that were
            written beside it are missing or damaged.
    """
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        found = content.get(IDENTITY, {})
        best_epoch = content.get("callbacks", {}).get(BestAndLast.__qualname__, {}).get("best_epoch", -1)
        done = int(content["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["processed"])
    except Exception as error:
        raise CheckpointError(
            f"the checkpoint {checkpoint} cannot be read ({str(error).strip().splitlines()[0]}): delete it, and the training "
            "starts again, or start the run afresh with fresh=true"
        ) from error
    different = differences(_by_keys(found), _by_keys(identity))
    if different:
        raise CheckpointError(
            f"the checkpoint {checkpoint} is of another training ({different}): give the run another run_id=NAME, or start it "
            "afresh with fresh=true"
        )
    if best_epoch >= 0:
        _check_best(checkpoint, best_epoch + 1)
    return done


def _check_best(checkpoint: Path, epoch: int) -> None:
    """Now, and not when the epochs that are left have been trained and the best weights are to be loaded."""
    best = checkpoint.parent / BEST
    try:
        checkpoint_metadata(best)
    except (CheckpointError, OSError) as error:
        what = f"cannot be read ({error.__cause__ or error})" if best.exists() else "is missing"
        raise CheckpointError(
            f"{best} {what}: {checkpoint.name} beside it counts on these weights, the best by validation so far (epoch "
            f"{epoch}). Put the file back, or start the training anew: with fresh=true, or by deleting {checkpoint.name}"
        ) from error


def _by_keys(identity: dict[str, Any]) -> dict[str, Any]:
    """``identity`` with its recipe, which is written as JSON, under the recipe's keys in the configuration."""
    try:
        return {**identity, "recipe": None, "quant": json.loads(identity["recipe"])}
    except (KeyError, ValueError):
        return identity
