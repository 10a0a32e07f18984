"""Fashion-MNIST: the real files where they are installed, small made-up ones elsewhere, and damaged ones."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from lowprec.data import DataError, create_data, fashion_mnist

COUNTS = {"train": 60, "t10k": 20}
installed = pytest.mark.skipif(
    not fashion_mnist.DEBIAN_FOLDER.is_dir(), reason="needs Debian's package dataset-fashion-mnist"
)


def write_set(folder: Path, packed: bool = True) -> Path:
    """The four files, with 60 and 20 images of noise."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for part, count in COUNTS.items():
        images = struct.pack(">4i", 0x803, count, 28, 28) + generator.bytes(count * 28 * 28)
        labels = struct.pack(">2i", 0x801, count) + bytes(index % 10 for index in range(count))
        for name, content in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def small_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "COUNTS", COUNTS)


@installed
def test_real_files() -> None:
    data = create_data("fashion_mnist", augment=False, validation_share=0.05)
    assert data.sizes == {"train": 57_000, "validation": 3_000, "test": 10_000}
    images = torch.cat([images for images, _ in data.test_dataloader()])
    labels = torch.cat([labels for _, labels in data.test_dataloader()])
    assert images.shape == (10_000, 1, 28, 28)
    assert torch.bincount(labels).tolist() == [1000] * 10
    assert labels[:10].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]  # the order of the file
    shares = torch.bincount(data._arrays["train"].images.flatten(), minlength=256) / (60_000 * 28 * 28)
    greys = torch.arange(256) / 255
    mean = (shares * greys).sum()
    assert round(float(mean), 4) == data.mean[0]
    assert round(float((shares * (greys - mean) ** 2).sum().sqrt()), 4) == data.std[0]
    validation = torch.cat([labels for _, labels in data.val_dataloader()])
    assert torch.bincount(validation).tolist() == [300] * 10


@installed
def test_training_images_are_augmented_test_images_are_not() -> None:
    data = create_data("fashion_mnist", limit_train=1000, limit_test=100)
    loader = data.train_dataloader()
    first = next(iter(loader))[0]
    loader.sampler.set_epoch(1)
    assert not torch.equal(first, next(iter(loader))[0])
    assert torch.equal(next(iter(data.test_dataloader()))[0], next(iter(data.test_dataloader()))[0])


@pytest.mark.usefixtures("small_counts")
@pytest.mark.parametrize("layout", ["packed", "unpacked", "FashionMNIST/raw"])
def test_layouts_of_root(tmp_path: Path, layout: str) -> None:
    folder = tmp_path / layout if "/" in layout else tmp_path
    write_set(folder, packed=layout != "unpacked")
    data = create_data("fashion_mnist", root=tmp_path, validation_share=0.1)
    assert data.sizes == {"train": 54, "validation": 6, "test": 20}


@pytest.mark.usefixtures("small_counts")
def test_debian_folder_then_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "debian")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = write_set(tmp_path / "lowprec" / "FashionMNIST" / "raw")
    assert create_data("fashion_mnist")._folder() == cache
    debian = write_set(tmp_path / "debian")
    assert create_data("fashion_mnist")._folder() == debian


def test_nothing_installed_and_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*arguments: object, **named: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "debian")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(fashion_mnist.datasets, "FashionMNIST", unreachable)
    with pytest.raises(DataError) as caught:
        create_data("fashion_mnist").setup()
    text = str(caught.value)
    assert "train-images-idx3-ubyte.gz" in text
    assert "Name or service not known" in text
    assert "apt-get install dataset-fashion-mnist" in text


def test_incomplete_root_names_the_missing_file(tmp_path: Path) -> None:
    write_set(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"missing t10k-labels-idx1-ubyte\.gz \(") as caught:
        create_data("fashion_mnist", root=tmp_path).setup()
    assert "apt-get install dataset-fashion-mnist" in str(caught.value)


IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"


def repack(path: Path, content: bytes) -> None:
    path.write_bytes(gzip.compress(content))


def truncate_packed(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def corrupt_packed(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.usefixtures("small_counts")
@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        (IMAGES, truncate_packed, "does not unpack"),
        (IMAGES, corrupt_packed, "does not unpack"),
        (IMAGES, lambda path: path.write_bytes(b"<html>404</html>"), "does not unpack"),
        (IMAGES, lambda path: path.write_bytes(b""), "header is empty"),
        (IMAGES, lambda path: repack(path, b"\0\0"), "header is empty"),
        (IMAGES, lambda path: repack(path, struct.pack(">4i", 0x803, 60, 28, 28) + bytes(99)), "115 bytes .* 47056"),
        (IMAGES, lambda path: repack(path, struct.pack(">4i", 0x803, 50, 28, 28) + bytes(39200)), "50×28×28, .*60×28"),
        (LABELS, lambda path: repack(path, struct.pack(">2i", 0x803, 60) + bytes(60)), "magic 0x0803, .*magic 0x0801"),
        (LABELS, lambda path: repack(path, struct.pack(">2i", 0x801, 60) + bytes([77] * 60)), "a label is 77"),
    ],
)  # fmt: skip
def test_damaged_files_are_named_with_the_reason(tmp_path: Path, name: str, damage: object, reason: str) -> None:
    write_set(tmp_path)
    damage(tmp_path / name)  # type: ignore[operator]
    with pytest.raises(DataError, match=rf"{name} is damaged: .*{reason}") as caught:
        create_data("fashion_mnist", root=tmp_path).setup()
    assert "apt-get install --reinstall dataset-fashion-mnist" in str(caught.value)


@installed
def test_truncated_copy_of_a_real_file(tmp_path: Path) -> None:
    for path in fashion_mnist.DEBIAN_FOLDER.glob("*.gz"):
        (tmp_path / path.name).symlink_to(path)
    victim = tmp_path / "t10k-images-idx3-ubyte.gz"
    content = victim.read_bytes()
    victim.unlink()
    victim.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte\.gz is damaged"):
        create_data("fashion_mnist", root=tmp_path).setup()
