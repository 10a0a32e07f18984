"""Data sets that fit into memory: uint8 tensors, of which whole batches are cropped, flipped and normalised at once."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lowprec.data.epochs import generator_of, split_epoch
from lowprec.data.module import DataModule, DataOptions, Source
from lowprec.data.normalization import Normalization

__all__ = ["ImageArrays", "ImageBatches", "InMemoryDataModule", "crop_and_flip"]

UInt8Array = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ImageArrays:
    """Images uint8 [N, C, H, W] and labels int64 [N]."""

    images: Tensor
    labels: Tensor


class InMemoryDataModule(DataModule):
    """A data set that a subclass reads as two ``ImageArrays``.

    Args:
        options: see ``DataOptions``.
        padding: black pixels added at every edge before the random crop; None for the set's default.

    Raises:
        ValueError: ``padding`` is negative.
    """

    default_padding: ClassVar[int]
    flip: ClassVar[bool]

    def __init__(self, options: DataOptions, *, padding: int | None = None) -> None:
        super().__init__(options)
        self.padding = self.default_padding if padding is None else padding
        if self.padding < 0:
            raise ValueError(f"data.padding must be at least 0, not {padding}")
        self._arrays: dict[Source, ImageArrays] = {}

    @abstractmethod
    def _read_arrays(self) -> tuple[ImageArrays, ImageArrays]:
        """The training and the test images."""

    def _read(self) -> dict[Source, Tensor]:
        self._arrays["train"], self._arrays["test"] = self._read_arrays()
        return {source: arrays.labels for source, arrays in self._arrays.items()}

    def _dataset(self, source: Source, indices: Tensor, *, augment: bool, replace_damaged: bool) -> Dataset:
        arrays = self._arrays[source]
        return ImageBatches(
            ImageArrays(arrays.images[indices], arrays.labels[indices]),
            self.normalization,
            augmentation=Augmentation(self.padding, self.flip, self.options.seed) if augment else None,
        )


@dataclass(frozen=True)
class Augmentation:
    """Random crop of an image with ``padding`` black pixels around it, and a random horizontal flip."""

    padding: int
    flip: bool
    seed: int

    def draw(self, images: int, epoch: int) -> IntArray:
        """For each image the row and the column of the crop in the padded image, and 0 or 1 for the flip: [N, 3]."""
        generator = generator_of("augmentation", self.seed, epoch)
        corners = torch.randint(0, 2 * self.padding + 1, (images, 2), generator=generator)
        flips = torch.randint(0, 2 if self.flip else 1, (images, 1), generator=generator)
        return torch.cat([corners, flips], dim=1).numpy()


def crop_and_flip(images_BCHW: UInt8Array, moves_B3: IntArray, padding: int) -> UInt8Array:
    """Crop each image [C, H, W], padded with zeros, at the row and column of its move; flip it where that says so."""
    batch, channels, height, width = images_BCHW.shape
    padded = np.zeros((batch, channels, height + 2 * padding, width + 2 * padding), np.uint8)
    padded[:, :, padding : padding + height, padding : padding + width] = images_BCHW
    row, column, flip = moves_B3.T
    # All windows of all images, as a view; the indexing copies the chosen ones.
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
    cropped = windows[np.arange(batch), :, row, column]
    flipped = flip == 1
    cropped[flipped] = cropped[flipped, :, :, ::-1]
    return cropped


class ImageBatches(Dataset):
    """Batches of (images float32 [B, C, H, W], labels int64 [B]).

    NumPy does the work: for so small pieces it is as fast as torch, and where the training keeps all cores busy many
    times faster, because it starts no threads that have to wait for each other.
    """

    def __init__(self, arrays: ImageArrays, normalization: Normalization, augmentation: Augmentation | None) -> None:
        self.images_NCHW = arrays.images.numpy()
        self.labels = arrays.labels
        # Few pixel values, many pixels: what each becomes is looked up.
        self.table_CP = normalization.table().numpy()
        self.channels_C11 = np.arange(len(self.table_CP)).reshape(-1, 1, 1)
        self.augmentation = augmentation
        self._epoch = -1
        self._moves_N3: IntArray = np.empty((0, 3), np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: list[Any]) -> tuple[Tensor, Tensor]:
        """The batch of ``indices``: each an image, or a pair (epoch, image)."""
        epoch, chosen = split_epoch(indices)
        images_BCHW = self.images_NCHW[chosen]
        if self.augmentation is not None:
            if epoch != self._epoch:  # the moves of all images at once, so that they do not depend on the batches
                self._epoch, self._moves_N3 = epoch, self.augmentation.draw(len(self), epoch)
            images_BCHW = crop_and_flip(images_BCHW, self._moves_N3[chosen], self.augmentation.padding)
        single = len(self.table_CP) == 1
        normalised = self.table_CP[0][images_BCHW] if single else self.table_CP[self.channels_C11, images_BCHW]
        return torch.from_numpy(normalised), self.labels[chosen]
