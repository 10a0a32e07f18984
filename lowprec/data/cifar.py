"""CIFAR-10 and CIFAR-100: 50,000 + 10,000 colour images of 32×32 (Krizhevsky, 2009), read by torchvision."""

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torchvision import datasets

from lowprec.data.in_memory import ImageArrays, InMemoryDataModule
from lowprec.data.sources import cache_folder, download

__all__ = ["Cifar10", "Cifar100"]


class Cifar10(InMemoryDataModule):
    """In ``root`` or the cache folder; torchvision downloads what is missing, and checks the files' MD5 sums."""

    num_classes = 10
    class_names: tuple[str, ...] | None = (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    )
    input_size = (3, 32, 32)
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)
    default_padding = 4
    flip = True
    reader: ClassVar[type[datasets.CIFAR10]] = datasets.CIFAR10

    def _read_arrays(self) -> tuple[ImageArrays, ImageArrays]:
        root = Path(self.options.root) if self.options.root is not None else cache_folder()
        archive, folder = self.reader.filename, self.reader.base_folder
        train, test = download(
            lambda: (self.reader(str(root), train=True, download=True), self.reader(str(root), train=False)),
            what=f"{self.reader.__name__} is missing or incomplete in {root}",
            instead=f"Put the archive {archive} (python version) or its unpacked folder {folder} into {root}, "
            "or say where it is with data.root=FOLDER.",
        )
        return (
            ImageArrays(_channels_first(train), torch.tensor(train.targets)),
            ImageArrays(_channels_first(test), torch.tensor(test.targets)),
        )


class Cifar100(Cifar10):
    """As ``Cifar10``, with 100 classes."""

    num_classes = 100
    class_names = None
    mean = (0.5071, 0.4865, 0.4409)
    std = (0.2673, 0.2564, 0.2762)
    reader = datasets.CIFAR100


def _channels_first(content: datasets.CIFAR10) -> Tensor:
    """uint8 [N, 3, 32, 32]."""
    return torch.from_numpy(content.data).permute(0, 3, 1, 2).contiguous()
