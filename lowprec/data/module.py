"""The interface of every data set."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lowprec.data.epochs import EpochSampler, ShareSampler, generator_of
from lowprec.data.normalization import Normalization
from lowprec.data.splits import Splits, split, stratified_order

__all__ = ["DataModule", "DataOptions", "Source"]

# The folders of images that the splits draw from.
Source = Literal["train", "validation", "test"]


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What every data set can be told.

    Attributes:
        root: folder of the data; None for the set's usual places.
        batch_size: training images per step and process.
        eval_batch_size: images per step in validation, test and calibration.
        num_workers: processes that load images; 0 loads in the training process; None for the set's default: 0 for sets
            in memory, this process's share of the cores, at most 16, for photographs.
        seed: fixes the splits, the order of the images and the augmentation.
        validation_share: share of the training images that is held out for validation; None for the set's default.
        augment: crop and flip training images at random.
        limit_train: train on this many images only (and validate on proportionally fewer).
        limit_test: test on this many images only.

    Raises:
        ValueError: a value is impossible; the message names the key.
    """

    root: str | Path | None = None
    batch_size: int = 128
    eval_batch_size: int = 500
    num_workers: int | None = None
    seed: int = 0
    validation_share: float | None = None
    augment: bool = True
    limit_train: int | None = None
    limit_test: int | None = None

    def __post_init__(self) -> None:
        for key in ("batch_size", "eval_batch_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"data.{key} must be at least 1, not {getattr(self, key)}")
        if self.num_workers is not None and self.num_workers < 0:
            raise ValueError(f"data.num_workers must be at least 0, or null for the default, not {self.num_workers}")
        for key in ("limit_train", "limit_test"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"data.{key} must be at least 1, or null for all images, not {value}")
        if self.validation_share is not None and not 0 < self.validation_share < 1:
            raise ValueError(f"data.validation_share must lie between 0 and 1, not {self.validation_share}")


class DataModule(LightningDataModule, ABC):
    """Loaders of (images [B, C, H, W]; labels int64 [B]) for training, validation and test.

    Images are float32, normalised, on the CPU, but for one case: the training loader of photographs gives uint8 pixels,
    which ``on_after_batch_transfer`` normalises on the device. Lightning calls it; other loops must do so.

    The images are found and read at the first use, so a module costs nothing until then; ``DataError`` is raised there.

    Attributes:
        options: what the set was told.
        num_classes: number of classes.
        in_channels: channels of the images.
        input_size: (C, H, W) of the images.
        mean, std: normalisation, a float per channel, for pixels in 0..1.
        peak: the pixel value that stands for 1.0.
        class_names: of the classes in order, None if they have none.
    """

    default_validation_share: ClassVar[float] = 0.1

    num_classes: int
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    peak: ClassVar[int] = 255
    class_names: tuple[str, ...] | None = None

    def __init__(self, options: DataOptions) -> None:
        super().__init__()
        self.options = options
        self._splits: Splits | None = None
        self._labels: dict[Source, Tensor] = {}

    @abstractmethod
    def _read(self) -> dict[Source, Tensor]:
        """Find the images, and return the labels, int64 [N], of the training, the test and, where the set has some of
        its own, the validation images."""

    @abstractmethod
    def _dataset(self, source: Source, indices: Tensor, *, augment: bool, replace_damaged: bool) -> Dataset:
        """The images ``indices`` [N] of ``source``. If it has ``__getitems__``, that returns a collated batch.

        ``replace_damaged`` says that another image may stand in for a file that cannot be decoded.
        """

    @property
    def fingerprint(self) -> str | None:
        """A short hash of the classes and images, wherever they lie; None for a set that is known by its name alone.

        Raises:
            DataError: as ``setup``.
        """
        return None

    def _default_workers(self) -> int:
        """Processes that load images where ``num_workers`` does not say."""
        return 0

    @property
    def in_channels(self) -> int:
        return self.input_size[0]

    @property
    def normalization(self) -> Normalization:
        """How pixels become the floats of a batch."""
        return Normalization(self.mean, self.std, self.peak)

    @property
    def preprocessing(self) -> dict[str, Any] | None:
        """How a picture of any size becomes pixels of the model's, in evaluation; None where all have that size.

        ``resize``: the shorter edge in pixels (a pair: both are covered, the ratio kept), ``crop``: [H, W] of the centre, and
        ``interpolation``: its name, as PIL's; antialiased.
        """
        return None

    @property
    def splits(self) -> Splits:
        """The image indices of the three splits."""
        self.setup()
        assert self._splits is not None
        return self._splits

    @property
    def sizes(self) -> dict[str, int]:
        """Number of images in each split."""
        splits = self.splits
        return {"train": len(splits.train), "validation": len(splits.validation), "test": len(splits.test)}

    def prepare_data(self) -> None:
        """Download what is missing: Lightning calls this in one process, before ``setup`` in all."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Find the images and divide them; does nothing the second time.

        Raises:
            DataError: missing, damaged or wrongly laid out files.
            DataError: too few images for the options.
        """
        if self._splits is not None:
            return
        options = self.options
        share = options.validation_share
        self._labels = self._read()
        self._splits = split(
            self._labels["train"],
            self._labels.get("validation"),
            self._labels["test"],
            validation_share=self.default_validation_share if share is None else share,
            limit_train=options.limit_train,
            limit_test=options.limit_test,
            seed=options.seed,
        )

    def train_dataloader(self) -> DataLoader:
        """Training images, shuffled and augmented as (seed, epoch) says; an incomplete last batch is dropped."""
        options, indices = self.options, self.splits.train
        sampler = EpochSampler(len(indices), options.seed)
        # A batch of few images would disturb batch norm.
        drop_last = len(sampler) >= options.batch_size
        dataset = self._dataset("train", indices, augment=options.augment, replace_damaged=True)
        return self._loader(dataset, batch_size=options.batch_size, sampler=sampler, drop_last=drop_last)

    def val_dataloader(self) -> DataLoader:
        """Every validation image once over all ranks, in a fixed order, not augmented."""
        indices = self.splits.validation
        if "validation" in self._labels:
            return self._evaluation_loader("validation", indices, replace_damaged=False)
        # These are training images: a damaged one must not end a run after its first epoch.
        return self._evaluation_loader("train", indices, replace_damaged=True)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """A batch on its device, its images normalised if they are uint8 pixels."""
        images, *others = batch
        return (self.normalization.normalize(images), *others) if images.dtype == torch.uint8 else batch

    def test_dataloader(self) -> DataLoader:
        """Every test image once over all ranks, in a fixed order, not augmented."""
        return self._evaluation_loader("test", self.splits.test, replace_damaged=False)

    def calibration_batches(self, images: int) -> list[Tensor]:
        """Training images without labels or augmentation, the same for the same seed and on every rank, classes in
        their shares.

        Args:
            images: how many; at most all training images are returned.

        Returns:
            float32 batches [≤ eval_batch_size, C, H, W], normalised, on the CPU.

        Raises:
            ValueError: ``images`` is less than 1.
        """
        if images < 1:
            raise ValueError(f"calibration needs at least 1 image, not {images}")
        train = self.splits.train
        order = stratified_order(self._labels["train"][train], "calibration", self.options.seed)
        dataset = self._dataset("train", train[order[:images]], augment=False, replace_damaged=True)
        return [batch for batch, _ in self._loader(dataset, batch_size=self.options.eval_batch_size)]

    def validation_batches(self, images: int) -> list[tuple[Tensor, Tensor]]:
        """Validation images with labels, the same for the same seed and on every rank, classes in their shares.

        Args:
            images: how many; at most all validation images are returned.

        Returns:
            batches as of :meth:`calibration_batches`, and int64 labels.
        """
        source: Source = "validation" if "validation" in self._labels else "train"
        validation = self.splits.validation
        order = stratified_order(self._labels[source][validation], "sensitivity", self.options.seed)
        dataset = self._dataset(source, validation[order[:images]], augment=False, replace_damaged=source == "train")
        return list(self._loader(dataset, batch_size=self.options.eval_batch_size))

    def test_batches(self, images: int) -> DataLoader:
        """Test images with labels, the same for the same seed and on every rank, classes in their shares, also among the
        first ones.

        Args:
            images: how many; at most all test images are returned.

        Returns:
            A loader of batches as of :meth:`calibration_batches`, and int64 labels.
        """
        test = self.splits.test
        order = stratified_order(self._labels["test"][test], "report", self.options.seed)
        dataset = self._dataset("test", test[order[:images]], augment=False, replace_damaged=False)
        return self._loader(dataset, batch_size=self.options.eval_batch_size)

    def _evaluation_loader(self, source: Source, indices: Tensor, *, replace_damaged: bool) -> DataLoader:
        dataset = self._dataset(source, indices, augment=False, replace_damaged=replace_damaged)
        return self._loader(dataset, batch_size=self.options.eval_batch_size, sampler=ShareSampler(len(indices)))

    def _loader(self, dataset: Dataset, **arguments: Any) -> DataLoader:
        options = self.options
        workers = self._default_workers() if options.num_workers is None else options.num_workers
        return DataLoader(
            dataset,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=_collated if hasattr(dataset, "__getitems__") else None,
            # An own generator: the loader would otherwise draw from the global one at the start of every epoch.
            generator=generator_of("workers", self.options.seed),
            **arguments,
        )


def _collated(batch: Any) -> Any:
    return batch
