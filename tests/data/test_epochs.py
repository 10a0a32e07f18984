"""The data of an epoch depends on (seed, epoch) alone: what a resumed run needs to go on to the same bits."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lowprec.data import create_data
from lowprec.data.epochs import EpochSampler, seed_of

Batches = list[tuple[Tensor, Tensor]]


def epoch_of(loader: DataLoader, epoch: int) -> Batches:
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    return list(loader)


def equal(first: Batches, second: Batches) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, second, strict=True)
    )


def test_epochs_differ_and_repeat() -> None:
    loader = create_data("digits", seed=1).train_dataloader()
    first, second = epoch_of(loader, 0), epoch_of(loader, 1)
    assert not equal(first, second)
    assert equal(first, epoch_of(loader, 0))
    torch.manual_seed(99)  # the global generator has no say
    assert equal(second, epoch_of(create_data("digits", seed=1).train_dataloader(), 1))
    assert not equal(first, epoch_of(create_data("digits", seed=2).train_dataloader(), 0))


def test_loaders_leave_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    data = create_data("digits")
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        list(loader)
    assert torch.equal(before, torch.get_rng_state())


def test_augmentation_does_not_depend_on_the_batch_size() -> None:
    def images_of_epoch(batch_size: int) -> Tensor:
        loader = create_data("digits", batch_size=batch_size, limit_train=96).train_dataloader()
        return torch.cat([images for images, _ in epoch_of(loader, 5)])

    assert torch.equal(images_of_epoch(16), images_of_epoch(48))


def test_workers_see_the_epoch() -> None:
    alone = create_data("digits", limit_train=256).train_dataloader()
    shared = create_data("digits", limit_train=256, num_workers=2).train_dataloader()
    for epoch in (0, 1, 0):  # the workers persist from epoch to epoch
        assert equal(epoch_of(alone, epoch), epoch_of(shared, epoch))


def test_sampler_gives_each_rank_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda *_, rank=rank: rank)
        shares.append([index for _, index in EpochSampler(10, seed=0)])
    assert [len(share) for share in shares] == [4, 4, 4]
    assert set().union(*shares) == set(range(10))


def test_seeds_of_different_purposes_differ() -> None:
    seeds = {seed_of(purpose, seed, epoch) for purpose in "ab" for seed in range(20) for epoch in range(20)}
    assert len(seeds) == 800
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of("order", 0, 1) == 5464234415807774710  # the same on every machine and in every version


class Recorder(LightningModule):
    """Notes a digest of every batch; has one weight, so that there is something to train."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[int, list[str]] = {}

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        images, labels = batch
        digest = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
        self.seen.setdefault(self.current_epoch, []).append(digest)
        return (self.weight * images.mean() - 1) ** 2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path, epochs: int, checkpoint: Path | None = None, **arguments: Any) -> tuple[Recorder, Trainer]:
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=folder, **arguments,
    )  # fmt: skip
    model = Recorder()
    trainer.fit(model, datamodule=create_data("digits", limit_train=256, batch_size=64), ckpt_path=checkpoint)
    return model, trainer


@pytest.mark.filterwarnings("ignore")
def test_resumed_lightning_run_sees_the_data_of_an_undisturbed_one(tmp_path: Path) -> None:
    undisturbed, _ = fit(tmp_path, epochs=3)
    assert len({tuple(digests) for digests in undisturbed.seen.values()}) == 3
    interrupted, trainer = fit(tmp_path, epochs=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    torch.rand(100)
    resumed, _ = fit(tmp_path, epochs=3, checkpoint=tmp_path / "last.ckpt")
    assert interrupted.seen | resumed.seen == undisturbed.seen
    assert list(resumed.seen) == [1, 2]
    assert torch.equal(resumed.weight, undisturbed.weight)


@pytest.mark.filterwarnings("ignore")
def test_overfit_batches_of_lightning(tmp_path: Path) -> None:
    model, _ = fit(tmp_path, epochs=2, overfit_batches=1)
    assert model.seen[0] == model.seen[1]
