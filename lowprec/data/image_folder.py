"""Photographs in a folder per class, ImageNet among them, with timm's transforms."""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm.data
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder as TorchvisionImageFolder
from torchvision.datasets.folder import default_loader

from lowprec.data.epochs import seed_of, split_epoch
from lowprec.data.module import DataModule, DataOptions, Source
from lowprec.data.sources import DataError

__all__ = ["ImageFolder", "ImageNet"]

DEFAULT_DATA_CONFIG: dict[str, Any] = {
    "input_size": (3, 224, 224),
    "mean": timm.data.IMAGENET_DEFAULT_MEAN,
    "std": timm.data.IMAGENET_DEFAULT_STD,
    "interpolation": "bicubic",
    "crop_pct": 0.875,
}


class ImageFolder(DataModule):
    """Photographs in ``root/train/CLASS/`` and ``root/val/CLASS/``, and possibly ``root/test/CLASS/``.

    Where there is a ``test`` folder, ``val`` is the validation split; otherwise ``val`` is the test split, and
    validation images are taken from ``train``.

    Args:
        options: see ``DataOptions``; ``root`` must be given.
        data_config: what the model expects (``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct``), as
            ``lowprec.models.pretrained_data_config`` tells; other keys are left alone. The arguments of the same names
            go before it, and ImageNet's usual values come after it.
        color_jitter: strength of random changes of brightness, contrast and saturation in training; 0 for none.

    Raises:
        DataError: ``root`` or a folder in it is missing, empty, or the class folders of two splits differ.
        ValueError: ``mean`` or ``std`` does not have a value per channel.
    """

    uses_test_folder = True

    def __init__(
        self,
        options: DataOptions,
        *,
        data_config: Mapping[str, Any] | None = None,
        input_size: tuple[int, int, int] | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        interpolation: str | None = None,
        crop_pct: float | None = None,
        color_jitter: float = 0.0,
    ) -> None:
        super().__init__(options)
        explicit = {
            "input_size": input_size,
            "mean": mean,
            "std": std,
            "interpolation": interpolation,
            "crop_pct": crop_pct,
        }
        chosen = dict(DEFAULT_DATA_CONFIG)
        for given in (data_config or {}, explicit):
            chosen.update({key: given[key] for key in chosen if given.get(key) is not None})
        channels, height, width = chosen["input_size"]
        self.input_size = (channels, height, width)
        if channels == 1:  # a model's published values are for colours: grey images get their average
            for key in ("mean", "std"):
                chosen[key] = [sum(chosen[key]) / len(chosen[key])]
        self.mean, self.std = tuple(chosen["mean"]), tuple(chosen["std"])
        for key, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != channels:
                raise ValueError(f"data.{key} has {len(values)} values for {channels} channel(s)")
        self.interpolation, self.crop_pct = chosen["interpolation"], chosen["crop_pct"]
        self.color_jitter = color_jitter
        self._samples: dict[Source, list[tuple[str, int]]] = {}
        # The class folders are needed at once: the model is built for so many classes.
        self._folders = self._find_folders()
        self.classes = _class_names(self._folders["train"])
        self.num_classes = len(self.classes)
        self.class_names = tuple(self.classes)
        for folder in self._folders.values():
            _require_same_classes(self._folders["train"], self.classes, folder)

    def _find_folders(self) -> dict[Source, Path]:
        name = type(self).__name__
        if self.options.root is None:
            raise DataError(f"{name} needs data.root=FOLDER, laid out like this:\n{_tree('FOLDER')}")
        root = Path(self.options.root)
        if not root.is_dir():
            raise DataError(f"data.root={root} is not a folder; {name} needs one laid out like this:\n{_tree(root)}")
        for required in ("train", "val"):
            if not (root / required).is_dir():
                raise DataError(f"the folder {root / required} is missing; expected is\n{_tree(root)}")
        if self.uses_test_folder and (root / "test").is_dir():
            return {"train": root / "train", "validation": root / "val", "test": root / "test"}
        return {"train": root / "train", "test": root / "val"}

    def _read(self) -> dict[Source, Tensor]:
        self._samples = {source: _find_samples(folder) for source, folder in self._folders.items()}
        return {source: torch.tensor([label for _, label in found]) for source, found in self._samples.items()}

    def _dataset(self, source: Source, indices: Tensor, augment: bool) -> Dataset:
        samples = self._samples[source]
        transform = timm.data.create_transform(
            self.input_size,
            is_training=augment,
            mean=self.mean,
            std=self.std,
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            color_jitter=self.color_jitter,
        )
        chosen = [samples[index] for index in indices.tolist()]
        return Photographs(chosen, transform, self.input_size[0], self.options.seed)


class ImageNet(ImageFolder):
    """ImageNet-1k: ``val`` is the test split (the test images have no labels), 1 % of ``train`` is for validation."""

    default_validation_share = 0.01
    uses_test_folder = False


class Photographs(Dataset):
    """Photographs as (image float32 [C, H, W], label); what is random in one depends on (seed, epoch, index) alone."""

    def __init__(
        self, samples: list[tuple[str, int]], transform: Callable[[Any], Tensor], channels: int, seed: int
    ) -> None:
        self.samples = samples
        self.transform = transform
        self.channels = channels
        self.seed = seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: Any) -> tuple[Tensor, int]:
        epoch, [chosen] = split_epoch([index])
        path, label = self.samples[chosen]
        try:
            photograph = default_loader(path)
        except (OSError, SyntaxError) as error:  # Pillow raises the latter for some damaged PNG files
            raise DataError(f"the image {path} cannot be read ({error}): replace or delete it") from error
        if self.channels == 1:
            photograph = photograph.convert("L")
        with _seeded(seed_of("photograph", self.seed, epoch, chosen)):
            return self.transform(photograph), label


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the two global generators that the transforms draw from; afterwards they are as they were."""
    python_state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)


def _class_names(folder: Path) -> list[str]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not names:
        raise DataError(f"the folder {folder} has no class folders; expected is\n{_tree(folder.parent)}")
    return names


def _find_samples(folder: Path) -> list[tuple[str, int]]:
    """Path and class of each image, in the order of their names."""
    try:
        return TorchvisionImageFolder(str(folder)).samples
    except FileNotFoundError as error:  # torchvision names the class folders without images
        raise DataError(f"{folder}: {error}\nExpected is\n{_tree(folder.parent)}") from error


def _require_same_classes(train_folder: Path, train_classes: list[str], folder: Path) -> None:
    classes = _class_names(folder)
    lacking = sorted(set(train_classes) - set(classes))
    extra = sorted(set(classes) - set(train_classes))
    if lacking or extra:
        raise DataError(
            f"the class folders of {folder} differ from those of {train_folder}: "
            f"{len(lacking)} missing ({_some(lacking)}), {len(extra)} unknown ({_some(extra)}); expected is\n"
            f"{_tree(folder.parent)}"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "") if names else "none"


def _tree(root: str | Path) -> str:
    return (
        f"  {root}/\n"
        "    train/CLASS/*.jpg   a folder per class\n"
        "    val/CLASS/*.jpg     the same class folders\n"
        "    test/CLASS/*.jpg    optional, not for ImageNet"
    )
