"""CIFAR is read from torchvision's files; without them and without a network the error says where to put what."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets

from lowprec.data import DataError, create_data


def write_pickle(path: Path, content: dict) -> list[str]:
    """Write it and return torchvision's entry for the file: name and MD5 sum."""
    path.write_bytes(pickle.dumps(content))
    return [path.name, hashlib.md5(path.read_bytes()).hexdigest()]


@pytest.fixture
def cifar10_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-10's layout with 100 + 20 images of noise."""
    folder = tmp_path / datasets.CIFAR10.base_folder
    folder.mkdir()
    generator = np.random.default_rng(0)

    def batch(name: str, images: int) -> list[str]:
        content = {"data": generator.integers(0, 256, (images, 3072), dtype=np.uint8)}
        return write_pickle(folder / name, {**content, "labels": [index % 10 for index in range(images)]})

    monkeypatch.setattr(datasets.CIFAR10, "train_list", [batch("data_batch_1", 50), batch("data_batch_2", 50)])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [batch("test_batch", 20)])
    name, md5 = write_pickle(folder / "batches.meta", {"label_names": [str(index) for index in range(10)]})
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    return tmp_path


def test_reads_torchvisions_files(cifar10_root: Path) -> None:
    data = create_data("cifar10", root=cifar10_root, batch_size=16)
    assert data.sizes == {"train": 90, "validation": 10, "test": 20}
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (16, 3, 32, 32)
    with (cifar10_root / datasets.CIFAR10.base_folder / "test_batch").open("rb") as file:
        content = pickle.load(file)
    images, labels = next(iter(data.test_dataloader()))
    pixels = torch.from_numpy(content["data"]).view(-1, 3, 32, 32) / 255
    expected = (pixels - torch.tensor(data.mean).view(3, 1, 1)) / torch.tensor(data.std).view(3, 1, 1)
    torch.testing.assert_close(images, expected)
    assert labels.tolist() == content["labels"]


@pytest.mark.parametrize(("name", "archive"), [("cifar10", "cifar-10-python"), ("cifar100", "cifar-100-python")])
def test_no_files_and_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, archive: str) -> None:
    def unreachable(*arguments: object, **named: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", unreachable)
    with pytest.raises(DataError) as caught:
        create_data(name, root=tmp_path).setup()
    text = str(caught.value)
    assert f"{archive}.tar.gz" in text
    assert str(tmp_path) in text
    assert "not known" in text


def test_damaged_file_is_noticed(cifar10_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*arguments: object, **named: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", unreachable)
    victim = cifar10_root / datasets.CIFAR10.base_folder / "test_batch"
    victim.write_bytes(victim.read_bytes()[:-10])
    with pytest.raises(DataError, match="CIFAR10 is missing or incomplete in"):
        create_data("cifar10", root=cifar10_root).setup()
