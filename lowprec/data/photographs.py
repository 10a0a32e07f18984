"""Photographs, decoded and transformed one by one: what folders and shards have in common."""

import hashlib
import os
from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import timm.data
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import Compose

from lowprec.data.augmentation import TrainingTransform
from lowprec.data.damage import DamagedImages
from lowprec.data.decoding import DamagedImageError, decoded_photograph
from lowprec.data.epochs import seed_of, split_epoch
from lowprec.data.image_files import ImageFiles
from lowprec.data.module import DataModule, DataOptions, Source
from lowprec.data.sources import DataError

__all__ = ["PhotographModule", "Photographs", "require_same_classes"]

DEFAULT_DATA_CONFIG: dict[str, Any] = {
    "input_size": (3, 224, 224),
    "mean": timm.data.IMAGENET_DEFAULT_MEAN,
    "std": timm.data.IMAGENET_DEFAULT_STD,
    "interpolation": "bicubic",
    "crop_pct": 0.875,
}
MOST_WORKERS = 16
FINGERPRINT_DIGITS = 10

# The content of a file and a seed -> image [C, H, W]; raises DamagedImageError.
Transform = Callable[[bytes, int], Tensor]


class PhotographModule(DataModule):
    """Photographs in ``root/train`` and ``root/val``, and possibly ``root/test``; a subclass says how they lie there.

    Where there is a ``test`` folder, ``val`` is the validation split; otherwise ``val`` is the test split, and
    validation images are taken from ``train``.

    Training images are cropped and flipped as uint8 pixels by the loading processes, and normalised in whole batches by
    ``on_after_batch_transfer``; all others go through timm's evaluation transforms.

    Args:
        options: see ``DataOptions``; ``root`` must be given.
        data_config: what the model expects (``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct``), as
            ``lowprec.models.pretrained_data_config`` tells; other keys are left alone. The arguments of the same names
            go before it, and ImageNet's usual values come after it.
        color_jitter, auto_augment, random_erasing: see ``TrainingTransform``.
        max_corrupted: so many images of ``train`` that cannot be decoded, those taken for validation included, are
            replaced by the next one of their split that can, with a warning; one more is an error. Each is counted once
            for each rank. Images of ``val`` and ``test`` are never replaced.

    Raises:
        DataError: ``root`` or a folder in it is missing, empty or cannot be read, or the classes of two splits differ.
        ValueError: a value is impossible; the message names the key.
    """

    uses_test_folder: ClassVar[bool] = True
    class_names: tuple[str, ...]

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
        auto_augment: str | None = None,
        random_erasing: float = 0.0,
        max_corrupted: int = 100,
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
        if not 0 <= random_erasing <= 1:
            raise ValueError(f"data.random_erasing must be a probability, not {random_erasing}")
        if max_corrupted < 0:
            raise ValueError(f"data.max_corrupted must be at least 0, not {max_corrupted}")
        self.max_corrupted = max_corrupted
        self._training_transform = TrainingTransform(
            self.input_size,
            self.mean,
            self.interpolation,
            color_jitter=color_jitter,
            auto_augment=auto_augment,
            random_erasing=random_erasing,
        )
        self._files: dict[Source, ImageFiles] = {}
        self._damaged: DamagedImages | None = None
        # The classes are needed at once: the model is built for so many.
        self._folders = self._find_folders()
        self.class_names = self._find_classes()
        self.num_classes = len(self.class_names)

    @staticmethod
    @abstractmethod
    def layout(root: str | Path) -> str:
        """The expected tree of ``root``, for messages."""

    @abstractmethod
    def _find_classes(self) -> tuple[str, ...]:
        """The names of the classes. Raises DataError if they are not the same in all of ``_folders``."""

    @abstractmethod
    def _find_files(self, folder: Path) -> ImageFiles:
        """The photographs of a split. Raises DataError if there are none."""

    def _find_folders(self) -> dict[Source, Path]:
        name = type(self).__name__
        if self.options.root is None:
            raise DataError(f"{name} needs data.root=FOLDER, laid out like this:\n{self.layout('FOLDER')}")
        root = Path(self.options.root)
        try:
            present = {entry.name for entry in os.scandir(root) if entry.is_dir()}
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DataError(
                f"data.root={root} is not a folder; {name} needs one laid out like this:\n{self.layout(root)}"
            ) from error
        except OSError as error:
            raise DataError(f"data.root={root} cannot be read ({error.strerror}): check its permissions") from error
        for required in ("train", "val"):
            if required not in present:
                raise DataError(f"the folder {root / required} is missing; expected is\n{self.layout(root)}")
        if self.uses_test_folder and "test" in present:
            return {"train": root / "train", "validation": root / "val", "test": root / "test"}
        return {"train": root / "train", "test": root / "val"}

    def _read(self) -> dict[Source, Tensor]:
        self._files = {source: self._find_files(folder) for source, folder in self._folders.items()}
        # One for all loaders: training, validation and calibration count an image once.
        self._damaged = DamagedImages(self.max_corrupted, self._files["train"].name)
        return {source: files.labels for source, files in self._files.items()}

    def _default_workers(self) -> int:
        # torchrun says how many processes share this machine; a batch system gives each its own cores.
        cores = _available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return min(MOST_WORKERS, max(1, cores))

    def _dataset(self, source: Source, indices: Tensor, *, augment: bool, replace_damaged: bool) -> Dataset:
        files = self._files[source]
        return Photographs(
            files,
            indices,
            self._training_transform if augment else self._evaluation_transform(),
            seed=self.options.seed,
            damaged=self._damaged if replace_damaged else None,
        )

    @property
    def fingerprint(self) -> str:
        self.setup()
        digest = hashlib.sha256("\0".join(self.class_names).encode("utf-8", "surrogateescape"))
        for source, files in sorted(self._files.items()):
            digest.update(f"\0{source} {len(files.labels)}\0".encode())
            digest.update(files.labels.numpy().tobytes())
            digest.update(b"\0".join(files.identities()))
        return digest.hexdigest()[:FINGERPRINT_DIGITS]

    @property
    def preprocessing(self) -> dict[str, Any]:
        # Of the transform itself, so that it is what is done.
        resize, crop, *_ = self._evaluation_transform().transform.transforms
        size = resize.size if isinstance(resize.size, int) else list(resize.size)
        return {"resize": size, "crop": list(crop.size), "interpolation": self.interpolation}

    def _evaluation_transform(self) -> "EvaluationTransform":
        transform = timm.data.create_transform(
            self.input_size,
            is_training=False,
            mean=self.mean,
            std=self.std,
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
        )
        return EvaluationTransform(transform, self.in_channels)


class EvaluationTransform:
    """timm's evaluation transform of the decoded photograph: float32 [C, H, W], normalised; nothing is random."""

    def __init__(self, transform: Compose, channels: int) -> None:
        self.transform = transform
        self.channels = channels

    def __call__(self, content: bytes, seed: int) -> Tensor:
        return self.transform(decoded_photograph(content, self.channels))


class Photographs(Dataset):
    """The photographs ``indices`` [N] of ``files`` as (image [C, H, W], label).

    What is random in one depends on (seed, epoch, index) alone. ``damaged`` counts those that cannot be decoded: the
    next that can be takes the place of each, in every epoch. Without it, they are errors.
    """

    def __init__(
        self, files: ImageFiles, indices: Tensor, transform: Transform, *, seed: int, damaged: DamagedImages | None
    ) -> None:
        self.files = files
        self.indices = indices
        self.transform = transform
        self.seed = seed
        self.damaged = damaged

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> tuple[Tensor, int]:
        """Raises DataError: the file cannot be opened, or cannot be decoded and must not be replaced."""
        epoch, [chosen] = split_epoch([index])
        seed = seed_of("photograph", self.seed, epoch, chosen)
        for step in range(len(self)):
            file = int(self.indices[(chosen + step) % len(self)])
            content = self.files.read(file)
            try:
                return self.transform(content, seed), int(self.files.labels[file])
            except DamagedImageError as error:
                if self.damaged is None:
                    raise DataError(
                        f"the image {self.files.name(file)} cannot be read ({error}): replace or delete it"
                    ) from error
                self.damaged.add(file, str(error))
        first = self.files.name(int(self.indices[0]))
        raise DataError(f"none of the {len(self)} images of this split can be decoded; the first is {first}")


def require_same_classes(expected: set[Any], found: set[Any], where: Path, reference: Path) -> None:
    """Raises DataError unless the classes ``found`` in the split ``where`` are the ``expected`` ones of ``reference``."""
    lacking, extra = sorted(expected - found), sorted(found - expected)
    if lacking or extra:
        raise DataError(
            f"the classes of {where} differ from those of {reference}: "
            f"{len(lacking)} missing ({_some(lacking)}), {len(extra)} unknown ({_some(extra)})"
        )


def _available_cores() -> int:
    """Cores that this process may use; not every system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _some(names: list[Any]) -> str:
    return ", ".join(map(str, names[:5])) + (", …" if len(names) > 5 else "") if names else "none"
