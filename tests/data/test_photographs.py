"""Loaders of photographs: what an epoch depends on, and what becomes of files that cannot be decoded."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from photograph_files import CLASSES, SMALL, encoded, write_folder
from torch import Tensor
from torch.utils.data import DataLoader

from lowprec.data import DataError, DataModule, create_data
from lowprec.data.write_shards import write_shards
from lowprec.training.resume import ResumedData

Batches = list[tuple[Tensor, Tensor]]


def folder_data(root: Path, **arguments: Any) -> DataModule:
    return create_data("image_folder", root=root, **{"data_config": SMALL, "num_workers": 0, **arguments})


def epoch_of(loader: DataLoader, epoch: int) -> Batches:
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    return list(loader)


def equal(first: Batches, second: Batches) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, second, strict=True)
    )


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 training and 6 test images; tests must leave them as they are."""
    return write_folder(tmp_path_factory.mktemp("photographs"), {"train": 10, "val": 2})


STRONG = {"auto_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.5, "batch_size": 6}


def test_workers_change_nothing(photographs: Path) -> None:
    alone = folder_data(photographs, **STRONG).train_dataloader()
    shared = folder_data(photographs, **STRONG, num_workers=2).train_dataloader()
    for epoch in (0, 1, 0):
        assert equal(epoch_of(alone, epoch), epoch_of(shared, epoch))
    assert not equal(epoch_of(alone, 0), epoch_of(alone, 1))


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_in_the_middle_of_an_epoch(photographs: Path, workers: int) -> None:
    undisturbed = epoch_of(folder_data(photographs, **STRONG).train_dataloader(), 3)
    resumed = ResumedData(folder_data(photographs, **STRONG, num_workers=workers), 2).train_dataloader()
    resumed.batch_sampler.sampler.set_epoch(3)  # type: ignore[union-attr]
    assert equal(list(resumed), undisturbed[2:])


def test_batches_are_normalised_after_the_transfer(photographs: Path) -> None:
    data = folder_data(photographs, batch_size=4)
    pixels, labels = next(iter(data.train_dataloader()))
    assert pixels.dtype == torch.uint8
    images, same_labels = data.on_after_batch_transfer([pixels, labels], 0)
    assert images.dtype == torch.float32
    assert images.shape == pixels.shape
    assert torch.equal(data.normalization.pixels(images), pixels)
    assert same_labels is labels
    evaluation = next(iter(data.test_dataloader()))
    assert evaluation[0].dtype == torch.float32
    assert data.on_after_batch_transfer(evaluation, 0) is evaluation


def test_training_images_without_augmentation(photographs: Path) -> None:
    data = folder_data(photographs, batch_size=27, augment=False)
    loader = data.train_dataloader()
    (images, labels), (others, _) = epoch_of(loader, 0)[0], epoch_of(loader, 1)[0]
    assert images.dtype == torch.float32
    assert not torch.equal(images, others)
    assert torch.allclose(images.sum(dim=0), others.sum(dim=0), atol=1e-4)  # the same images in another order
    assert len(labels) == 27


def test_default_workers_are_this_processs_share_of_the_cores(
    photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def workers(cores: int, processes: int) -> int:
        monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cores)), raising=False)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        return folder_data(photographs, num_workers=None).train_dataloader().num_workers

    assert [workers(1, 1), workers(8, 1), workers(8, 2), workers(2, 8), workers(128, 1), workers(128, 8)] == [
        1, 8, 4, 1, 16, 16
    ]  # fmt: skip
    assert create_data("digits").train_dataloader().num_workers == 0


def test_impossible_values_are_named(photographs: Path) -> None:
    for key, value in (("random_erasing", 1.5), ("max_corrupted", -1), ("num_workers", -1), ("auto_augment", "rand-x")):
        with pytest.raises(ValueError, match=rf"data\.{key}"):
            folder_data(photographs, **{key: value})


def write_damaged(root: Path, damaged: int) -> tuple[Path, list[Path]]:
    """6 training images for each class; the first ``damaged`` of them, class by class, are cut off."""
    write_folder(root, {"train": 6, "val": 2})
    paths = [root / "train" / name / f"{index:03d}.jpg" for name in CLASSES for index in range(6)][:damaged]
    for path in paths:
        path.write_bytes(path.read_bytes()[:300])
    return root, paths


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_images_are_replaced(tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture) -> None:
    root, damaged = write_damaged(tmp_path, 3)
    options = {"batch_size": 4, "validation_share": 0.01, "max_corrupted": 3}
    expected = folder_data(root, **options).train_dataloader()
    data = folder_data(root, **options, num_workers=workers)
    loader = data.train_dataloader()
    with caplog.at_level(logging.WARNING):
        for epoch in range(4):
            batches = epoch_of(loader, epoch)
            assert [len(labels) for _, labels in batches] == [4] * 4
            assert equal(batches, epoch_of(expected, epoch))
    # Each is counted once, over all epochs and processes.
    trained_on = {int(index) for index in data.splits.train}
    assert sorted(loader.dataset.damaged.indices) == [index for index in range(3) if index in trained_on]  # type: ignore[attr-defined]
    if workers == 0:
        assert all(caplog.text.count(f"{path} cannot be decoded") <= 2 for path in damaged)  # once a loader
        assert any(f"{path} cannot be decoded" in caplog.text for path in damaged)


# PyTorch takes ten seconds to end the processes of a loader after an error.
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_too_many_damaged_images(tmp_path: Path, workers: int) -> None:
    root, damaged = write_damaged(tmp_path, 12)
    data = folder_data(root, batch_size=17, validation_share=0.01, max_corrupted=5, num_workers=workers)
    with pytest.raises(DataError) as caught:
        list(data.train_dataloader())
    message = str(caught.value).splitlines()
    assert message[0].startswith("more than data.max_corrupted=5 training images cannot be decoded (the last one: ")
    assert len(message) == 7
    assert all(any(str(path) in line for path in damaged) for line in message[1:])


def test_all_images_damaged(tmp_path: Path) -> None:
    root, _ = write_damaged(tmp_path, 18)
    with pytest.raises(DataError, match="none of the 17 images of this split can be decoded; the first is"):
        list(folder_data(root, batch_size=6, validation_share=0.01).train_dataloader())


def test_none_may_be_damaged(tmp_path: Path) -> None:
    root, damaged = write_damaged(tmp_path, 2)
    with pytest.raises(DataError, match=r"more than data\.max_corrupted=0"):
        list(folder_data(root, batch_size=17, validation_share=0.01, max_corrupted=0).train_dataloader())
    assert len(damaged) == 2


def test_calibration_goes_on_and_evaluation_does_not(tmp_path: Path) -> None:
    root, damaged = write_damaged(tmp_path, 4)
    data = folder_data(root, validation_share=0.5)
    assert sum(len(batch) for batch in data.calibration_batches(9)) == 9
    (root / "val" / "cat" / "000.jpg").write_bytes(encoded(0)[:200])
    with pytest.raises(DataError, match=r"val/cat/000\.jpg cannot be read .*: replace or delete it"):
        list(data.test_dataloader())
    assert len(damaged) == 4


def test_validation_images_taken_from_train_are_replaced_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root, damaged = write_damaged(tmp_path, 4)
    options = {"batch_size": 9, "validation_share": 0.5}
    data = folder_data(root, **options)
    with caplog.at_level(logging.WARNING):
        assert sum(len(labels) for _, labels in data.val_dataloader()) == 9
        assert 0 < len(caplog.messages) < 4  # the others are trained on
        for loader in (data.train_dataloader(), data.val_dataloader()):
            list(loader)
        data.calibration_batches(9)
    # Once in all loaders together, and no address in memory is told.
    assert len(caplog.messages) == 4
    assert all(caplog.text.count(f"{path} cannot be decoded (") == 1 for path in damaged)
    assert "4 of at most data.max_corrupted=100" in caplog.messages[-1]
    limited = folder_data(root, **options, max_corrupted=3)
    with pytest.raises(DataError, match=r"more than data\.max_corrupted=3 training images"):
        list(limited.train_dataloader()) + list(limited.val_dataloader())


def test_validation_images_of_their_own_folder_are_not_replaced(tmp_path: Path) -> None:
    root = write_folder(tmp_path, {"train": 4, "val": 2, "test": 2})
    (root / "val" / "cat" / "000.jpg").write_bytes(encoded(0)[:200])
    with pytest.raises(DataError, match=r"val/cat/000\.jpg cannot be read .*: replace or delete it"):
        list(folder_data(root).val_dataloader())


def renamed_class(root: Path) -> None:
    for split in ("train", "val"):
        (root / split / "cat").rename(root / split / "cow")


CHANGES = {
    "class name": renamed_class,
    "one more training image": lambda root: (root / "train" / "cat" / "9.jpg").write_bytes(encoded(9)),
    "one test image less": lambda root: (root / "val" / "cat" / "000.jpg").unlink(),
    "other images": lambda root: (root / "train" / "cat" / "000.jpg").rename(root / "train" / "cat" / "x.jpg"),
    "class of an image": lambda root: (root / "train" / "cat" / "000.jpg").rename(root / "train" / "dog" / "9.jpg"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("name", ["image_folder", "shards"])
def test_the_fingerprint_is_of_the_images_not_of_their_place(
    tmp_path: Path, name: str, change: Callable[[Path], object]
) -> None:
    folder = write_folder(tmp_path / "folder", {"train": 4, "val": 2})

    def fingerprint(version: str) -> str | None:
        if name == "shards":
            write_shards(folder, tmp_path / version)
        else:
            shutil.copytree(folder, tmp_path / version)
        return create_data(name, root=tmp_path / version).fingerprint

    before = fingerprint("first")
    assert before is not None
    assert fingerprint("copy") == before
    (tmp_path / "copy").rename(tmp_path / "moved")
    assert create_data(name, root=tmp_path / "moved").fingerprint == before
    change(folder)
    assert fingerprint("changed") != before


class Recorder(LightningModule):
    """Notes the images of every step; has one weight, so that there is something to train."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained: list[Tensor] = []
        self.validated: list[Tensor] = []

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        self.trained.append(batch[0])
        return self.weight * batch[0].mean()

    def validation_step(self, batch: Any, batch_index: int) -> None:
        self.validated.append(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore")
def test_lightning_trains_on_normalised_images(photographs: Path, tmp_path: Path) -> None:
    data = folder_data(photographs, batch_size=9)
    module = Recorder()
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=tmp_path, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    expected = epoch_of(folder_data(photographs, batch_size=9).train_dataloader(), 0)
    assert len(module.trained) == 3
    for images, (pixels, _) in zip(module.trained, expected, strict=True):
        assert images.dtype == torch.float32
        assert torch.equal(images, data.normalization.normalize(pixels))
    assert torch.equal(torch.cat(module.validated), torch.cat([images for images, _ in data.val_dataloader()]))
