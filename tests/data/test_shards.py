"""Shards: splits, classes, and the same epochs as from folders."""

from pathlib import Path
from typing import Any

import pytest
import torch
from photograph_files import SMALL, samples, write_folder, write_tar

from lowprec.data import DataError, DataModule, create_data
from lowprec.data.write_shards import write_shards


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def shard_data(root: Path, **arguments: Any) -> DataModule:
    return create_data("shards", root=root, data_config=SMALL, num_workers=0, **arguments)


def write_splits(root: Path, **labels: list[int]) -> Path:
    for split, found in labels.items():
        write_tar(root / split / "0.tar", samples(found))
    return root


def test_splits_and_classes(tmp_path: Path) -> None:
    root = write_splits(tmp_path, train=[0, 1, 2] * 10, val=[2, 1, 0] * 2)
    data = shard_data(root)
    assert data.sizes == {"train": 27, "validation": 3, "test": 6}
    assert (data.num_classes, data.class_names) == (3, ("0", "1", "2"))
    images, labels = next(iter(data.test_dataloader()))
    assert (images.shape, images.dtype) == ((6, 3, 16, 16), torch.float32)
    assert labels.tolist() == [2, 1, 0] * 2
    (root / "classes.txt").write_text("bird\ncat\ndog\n")
    write_splits(root, test=[0, 1, 2])
    named = shard_data(root)
    assert named.class_names == ("bird", "cat", "dog")
    assert named.sizes == {"train": 30, "validation": 6, "test": 3}


def test_same_images_as_from_the_folder_they_were_written_from(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", {"train": 6, "val": 4})
    write_shards(folder, tmp_path / "shards", images_per_shard=5)
    shards = shard_data(tmp_path / "shards")
    photographs = create_data("image_folder", root=folder, data_config=SMALL, num_workers=0)
    assert shards.class_names == photographs.class_names

    def pairs(data: DataModule) -> list[tuple[bytes, int]]:
        return sorted(
            (image.numpy().tobytes(), int(label))
            for images, labels in data.test_dataloader()
            for image, label in zip(images, labels, strict=True)
        )

    assert pairs(shards) == pairs(photographs)
    assert len(set(pairs(shards))) == 12


def test_every_image_once_an_epoch_in_an_order_of_its_own(tmp_path: Path) -> None:
    data = shard_data(write_splits(tmp_path, train=[0, 1, 2] * 8, val=[0, 1, 2]), batch_size=7)
    loader = data.train_dataloader()
    orders = []
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        orders.append([index for _, index in loader.sampler])
        assert sorted(orders[-1]) == list(range(22))
    assert orders[0] != orders[1]


def test_missing_split_shows_the_tree(tmp_path: Path) -> None:
    write_splits(tmp_path, train=[0, 1])
    with pytest.raises(DataError, match=rf"the folder {tmp_path}/val is missing(.|\n)*val/\*\.tar"):
        shard_data(tmp_path)
    (tmp_path / "val").mkdir()
    with pytest.raises(DataError, match=r"val has no tar files"):
        shard_data(tmp_path)


def test_labels_with_a_gap(tmp_path: Path) -> None:
    root = write_splits(tmp_path, train=[0, 2, 10**9], val=[0])
    with pytest.raises(DataError, match=r"train go up to 1000000000, but no image has label 1"):
        shard_data(root)


def test_classes_that_differ_between_splits(tmp_path: Path) -> None:
    root = write_splits(tmp_path, train=[0, 1, 2], val=[0, 1])
    with pytest.raises(DataError, match=r"the classes of .*val differ from those of .*train: 1 missing \(2\)"):
        shard_data(root)
    write_splits(tmp_path, train=[0, 1], val=[0, 1, 5])
    with pytest.raises(DataError, match=r"0 missing \(none\), 1 unknown \(5\)"):
        shard_data(root)


def test_class_names_must_fit_the_labels(tmp_path: Path) -> None:
    root = write_splits(tmp_path, train=[0, 1, 2], val=[0, 1, 2])
    (root / "classes.txt").write_text("bird\ncat\n")
    with pytest.raises(
        DataError, match=r"train differ from those of .*classes\.txt: 0 missing \(none\), 1 unknown \(2\)"
    ):
        shard_data(root)
    for text in ("", "bird\nbird\ndog\n", "bird\n\ndog\n"):
        (root / "classes.txt").write_text(text)
        with pytest.raises(DataError, match=r"classes\.txt must hold one class name a line"):
            shard_data(root)
