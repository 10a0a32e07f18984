"""Where photographs come from: files that are read whole, one by one, in any order and by any process."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from lowprec.data.sources import DataError

__all__ = ["FolderImages", "ImageFiles", "class_folders", "find_images"]


class ImageFiles(Protocol):
    """Files of photographs by index, with their classes.

    Names are kept in arrays: a million Python strings would be copied into every loading process as they are used.
    """

    @property
    def labels(self) -> Tensor:
        """Class of each image, int64 [N]."""
        ...

    def name(self, index: int) -> str:
        """Where the image lies, for messages."""
        ...

    def identities(self) -> list[bytes]:
        """What tells each image [N] from others without opening it, wherever the folder lies."""
        ...

    def read(self, index: int) -> bytes:
        """The content of the file. Raises DataError if it cannot be opened or read."""
        ...


@dataclass(frozen=True)
class FolderImages:
    """Images in ``folder``: their paths within it as bytes [N], their classes as int64 [N]."""

    folder: Path
    paths: npt.NDArray[Any]
    labels: Tensor

    def path(self, index: int) -> Path:
        return self.folder / os.fsdecode(self.paths[index])

    def name(self, index: int) -> str:
        return str(self.path(index))

    def identities(self) -> list[bytes]:
        # Their names alone: to ask for the sizes of a million files takes minutes on a network's disk.
        paths: list[bytes] = self.paths.tolist()
        return paths

    def read(self, index: int) -> bytes:
        try:
            return self.path(index).read_bytes()
        except OSError as error:
            raise DataError(
                f"the image {self.path(index)} cannot be opened ({error.strerror}): check the file and its permissions"
            ) from error


def class_folders(folder: Path) -> list[str]:
    """The names of the folders in ``folder``, sorted: a class each.

    Raises:
        DataError: there are none, or ``folder`` cannot be read.
    """
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError as error:
        raise _unreadable_folder(error) from error
    if not names:
        raise DataError(f"the folder {folder} has no class folders: each class needs one, with its images")
    return names


def find_images(folder: Path) -> FolderImages:
    """All images in the class folders of ``folder`` and below, in the order of classes and paths (torchvision's).

    Raises:
        DataError: a class folder has no images, or a folder cannot be read.
    """

    def fail(error: OSError) -> None:
        raise _unreadable_folder(error) from error

    paths: list[bytes] = []
    labels: list[int] = []
    empty: list[str] = []
    for label, name in enumerate(class_folders(folder)):
        before = len(paths)
        # Otherwise os.walk leaves out what it may not read, and the run goes on with fewer images.
        for parent, _, files in sorted(os.walk(folder / name, onerror=fail, followlinks=True)):
            within = os.path.relpath(parent, folder)
            paths += [
                os.fsencode(f"{within}/{file}") for file in sorted(files) if file.lower().endswith(IMG_EXTENSIONS)
            ]
        labels += [label] * (len(paths) - before)
        if len(paths) == before:
            empty.append(name)
    if empty:
        raise DataError(
            f"{len(empty)} class folder(s) of {folder} hold no images: {', '.join(empty[:5])}"
            f"{', …' if len(empty) > 5 else ''} (images end in {', '.join(IMG_EXTENSIONS)})"
        )
    return FolderImages(folder, np.array(paths), torch.tensor(labels))


def _unreadable_folder(error: OSError) -> DataError:
    return DataError(f"the folder {error.filename} cannot be read ({error.strerror}): check its permissions")
