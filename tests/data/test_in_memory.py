"""Cropping, flipping and normalising whole batches equals doing it image by image; options do what they say."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lowprec.data import DataModule, create_data, list_data
from lowprec.data.in_memory import Augmentation, crop_and_flip


def digits(**arguments: Any) -> DataModule:
    return create_data("digits", **arguments)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("padding", [0, 1, 3])
def test_crop_and_flip_equals_one_image_at_a_time(channels: int, padding: int) -> None:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (40, channels, 6, 8), dtype=np.uint8)
    moves = Augmentation(padding, flip=True, seed=0).draw(40, epoch=1)
    for image, (row, column, flip), result in zip(images, moves, crop_and_flip(images, moves, padding), strict=True):
        padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
        expected = padded[:, row : row + 6, column : column + 8]
        assert np.array_equal(result, expected[:, :, ::-1] if flip else expected)


def test_moves_cover_their_range() -> None:
    moves = Augmentation(padding=2, flip=True, seed=0).draw(2000, epoch=0)
    assert [sorted(set(column)) for column in moves.T.tolist()] == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1]]
    assert set(Augmentation(padding=2, flip=False, seed=0).draw(2000, epoch=0)[:, 2]) == {0}


def test_digits_interface() -> None:
    data = digits(batch_size=32)
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (32, *data.input_size) == (32, 1, 8, 8)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert (data.in_channels, data.num_classes) == (1, 10)
    assert data.sizes == {"train": 1294, "validation": 144, "test": 359}
    assert int(labels.max()) < data.num_classes


def all_images(data: DataModule) -> Tensor:
    parts = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    return torch.cat([images for loader in parts for images, _ in loader])


def test_digits_normalisation() -> None:
    data = digits(augment=False, batch_size=1)
    images = torch.cat([images for images, _ in data.train_dataloader()])
    assert abs(float(images.mean())) < 0.01
    assert abs(float(images.std()) - 1) < 0.01


def test_every_digit_is_in_exactly_one_split() -> None:
    images = all_images(digits(augment=False, batch_size=1))
    assert images.shape == (1797, 1, 8, 8)
    assert len(images.unique(dim=0)) == 1797


def evaluation_images(data: DataModule, part: Callable[[DataModule], Any]) -> Tensor:
    return torch.cat([images for images, _ in part(data)])


def test_test_split_does_not_depend_on_options() -> None:
    reference = evaluation_images(digits(), DataModule.test_dataloader)
    other = digits(seed=7, validation_share=0.5, eval_batch_size=50, limit_train=20, augment=False)
    assert torch.equal(reference, evaluation_images(other, DataModule.test_dataloader))
    assert torch.equal(reference, evaluation_images(other, DataModule.test_dataloader))


def test_validation_split_depends_on_the_seed() -> None:
    reference = evaluation_images(digits(seed=1), DataModule.val_dataloader)
    assert torch.equal(reference, evaluation_images(digits(seed=1, augment=False), DataModule.val_dataloader))
    assert not torch.equal(reference, evaluation_images(digits(seed=2), DataModule.val_dataloader))


def test_calibration_images_are_fixed_training_images() -> None:
    data = digits(eval_batch_size=60)
    batches = data.calibration_batches(100)
    assert [len(batch) for batch in batches] == [60, 40]
    again = digits(eval_batch_size=60).calibration_batches(100)
    assert all(torch.equal(one, other) for one, other in zip(batches, again, strict=True))
    assert not torch.equal(batches[0], digits(seed=1, eval_batch_size=60).calibration_batches(100)[0])
    plain = digits(augment=False, batch_size=1)
    training = {images.numpy().tobytes() for images, _ in plain.train_dataloader()}
    assert {image.numpy().tobytes() for batch in batches for image in batch} <= training


def test_calibration_takes_at_most_all_training_images() -> None:
    assert sum(len(batch) for batch in digits(limit_train=30).calibration_batches(100)) == 30
    with pytest.raises(ValueError, match="at least 1"):
        digits().calibration_batches(0)


def test_some_validation_images_are_the_same_each_time_and_of_all_classes() -> None:
    data = digits(eval_batch_size=30)
    batches = data.validation_batches(50)
    assert [len(images) for images, _ in batches] == [len(labels) for _, labels in batches] == [30, 20]
    again = digits(eval_batch_size=30).validation_batches(50)
    assert all(torch.equal(one[0], other[0]) for one, other in zip(batches, again, strict=True))
    labels = torch.cat([labels for _, labels in batches])
    assert torch.bincount(labels).amin() >= 3
    of_images = {
        images.numpy().tobytes(): int(label)
        for batch in data.val_dataloader()
        for images, label in zip(*batch, strict=True)
    }
    for images, found in batches:
        assert [of_images[image.numpy().tobytes()] for image in images] == found.tolist()
    assert sum(len(labels) for _, labels in data.validation_batches(10_000)) == data.sizes["validation"]


def test_small_training_split_is_one_batch() -> None:
    assert [len(labels) for _, labels in digits(limit_train=20, batch_size=64).train_dataloader()] == [20]


def test_incomplete_last_training_batch_is_dropped() -> None:
    assert [len(labels) for _, labels in digits(limit_train=70, batch_size=32).train_dataloader()] == [32, 32]


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"batch_size": 0}, "data.batch_size"),
        ({"eval_batch_size": -1}, "data.eval_batch_size"),
        ({"num_workers": -1}, "data.num_workers"),
        ({"limit_train": 0}, "data.limit_train"),
        ({"limit_test": 0}, "data.limit_test"),
        ({"validation_share": 0.0}, "data.validation_share"),
        ({"validation_share": 1.0}, "data.validation_share"),
        ({"padding": -1}, "data.padding"),
    ],
)
def test_impossible_values_name_the_key(arguments: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=key):
        digits(**arguments)


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="did you mean fashion_mnist"):
        create_data("fashion-mnist")
    with pytest.raises(ValueError, match=r"digits takes no argument bach_size; it takes root, batch_size, .*padding"):
        digits(bach_size=3)
    assert list_data() == ["fashion_mnist", "digits", "cifar10", "cifar100", "imagenet", "image_folder", "shards"]


def test_batches_of_test_images_hold_the_classes_in_their_shares() -> None:
    data = digits(eval_batch_size=30)
    batches = list(data.test_batches(50))
    assert [len(labels) for _, labels in batches] == [30, 20]
    labels = torch.cat([labels for _, labels in batches])
    # 35 to 37 of the 359 test images are of each class.
    assert set(torch.bincount(labels, minlength=10).tolist()) <= {4, 5, 6}
    again = list(digits(eval_batch_size=30).test_batches(50))
    assert all(torch.equal(one[0], other[0]) for one, other in zip(batches, again, strict=True))
    whole = torch.cat([images for images, _ in data.test_batches(10_000)])
    split = torch.cat([images for images, _ in data.test_dataloader()])
    assert torch.equal(whole.flatten(1).sort(0).values, split.flatten(1).sort(0).values)
