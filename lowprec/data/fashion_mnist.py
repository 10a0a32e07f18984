"""Fashion-MNIST: 60,000 + 10,000 grey images of 28×28, 10 classes of clothes (Xiao et al., arXiv 1708.07747)."""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets

from lowprec.data.in_memory import ImageArrays, InMemoryDataModule
from lowprec.data.sources import DataError, cache_folder, download

__all__ = ["FashionMnist"]

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
INSTALL = "apt-get install dataset-fashion-mnist"
# The names of the four files; each may also be packed: NAME.gz.
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
COUNTS = {"train": 60_000, "t10k": 10_000}
IMAGES_MAGIC, LABELS_MAGIC = 0x0803, 0x0801  # unsigned bytes, 3 and 1 dimensions
SIDE = 28
CLASSES = 10


class FashionMnist(InMemoryDataModule):
    """The files are looked for in ``root`` (the four of them, or torchvision's layout), or else in the folder of
    Debian's package, or else in the cache, into which torchvision downloads them."""

    num_classes = CLASSES
    class_names = (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    )
    input_size = (1, SIDE, SIDE)
    mean = (0.2860,)
    std = (0.3530,)
    default_padding = 2
    flip = True

    def _read_arrays(self) -> tuple[ImageArrays, ImageArrays]:
        folder = self._folder()
        train, test = (
            ImageArrays(_read_images(folder, part), _read_labels(folder, part)) for part in ("train", "t10k")
        )
        return train, test

    def _folder(self) -> Path:
        if self.options.root is not None:
            return _complete_folder(Path(self.options.root))
        if not _missing(DEBIAN_FOLDER):
            return DEBIAN_FOLDER
        root = cache_folder()
        folder = root / "FashionMNIST" / "raw"
        if _missing(folder):
            download(
                lambda: datasets.FashionMNIST(str(root), download=True),
                what=f"Fashion-MNIST is neither in {DEBIAN_FOLDER} nor in {folder} "
                f"(missing: {', '.join(_missing(DEBIAN_FOLDER))})",
                instead=f"Install it with: {INSTALL}\nor give data.root=FOLDER with its four files.",
            )
        return folder


def _complete_folder(root: Path) -> Path:
    """``root`` or torchvision's folder in it: whichever has the four files."""
    candidates = [root, root / "FashionMNIST" / "raw", root / "raw"]
    for folder in candidates:
        if not _missing(folder):
            return folder
    raise DataError(
        f"Fashion-MNIST is not in data.root={root}: missing {', '.join(_missing(root))} (unpacked will do, and so will "
        f"torchvision's folder FashionMNIST/raw).\nGet the files with: {INSTALL}\n"
        f"which puts them into {DEBIAN_FOLDER}, where they are found without data.root."
    )


def _missing(folder: Path) -> list[str]:
    return [f"{name}.gz" for name in FILES if _existing(folder, name) is None]


def _existing(folder: Path, name: str) -> Path | None:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    return None


def _read_images(folder: Path, part: str) -> Tensor:
    """uint8 [N, 1, 28, 28]."""
    shape = (COUNTS[part], SIDE, SIDE)
    return _read_idx(folder, f"{part}-images-idx3-ubyte", IMAGES_MAGIC, shape).unsqueeze(1)


def _read_labels(folder: Path, part: str) -> Tensor:
    """int64 [N]."""
    name = f"{part}-labels-idx1-ubyte"
    labels = _read_idx(folder, name, LABELS_MAGIC, (COUNTS[part],)).long()
    if int(labels.max()) >= CLASSES:
        raise _damaged(_existing(folder, name), f"a label is {int(labels.max())}, expected 0 to {CLASSES - 1}")
    return labels


def _read_idx(folder: Path, name: str, magic: int, shape: tuple[int, ...]) -> Tensor:
    """The uint8 tensor of an idx file: a header of big-endian int32 (magic, sizes), then the bytes."""
    path = _existing(folder, name)
    assert path is not None  # the folder was seen to be complete
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _damaged(path, f"it does not unpack ({error})") from error
    header = struct.pack(f">{1 + len(shape)}i", magic, *shape)
    if content[: len(header)] != header:
        present = min(len(content), len(header)) // 4
        found = struct.unpack(f">{present}i", content[: 4 * present])
        raise _damaged(path, f"its header is {_header_text(found)}, expected {_header_text((magic, *shape))}")
    expected = len(header) + int(np.prod(shape))
    if len(content) != expected:
        raise _damaged(path, f"it has {len(content)} bytes when unpacked, expected {expected}")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=len(header)).reshape(shape).copy())


def _header_text(values: tuple[int, ...]) -> str:
    if not values:
        return "empty"
    return f"magic {values[0]:#06x}, sizes {'×'.join(str(size) for size in values[1:]) or 'none'}"


def _damaged(path: Path | None, reason: str) -> DataError:
    return DataError(
        f"{path} is damaged: {reason}.\nGet it again with: apt-get install --reinstall dataset-fashion-mnist"
    )
