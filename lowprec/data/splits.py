"""Which image is trained on, validated on, tested on: decided here for every data set, and fixed by the seed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowprec.data.epochs import generator_of
from lowprec.data.sources import DataError

__all__ = ["Splits", "split", "stratified_order"]


@dataclass(frozen=True)
class Splits:
    """Ascending image indices: ``train`` among the training images, ``test`` among the test images, and ``validation``
    among the training images, or among the set's own validation images where it has some."""

    train: Tensor
    validation: Tensor
    test: Tensor


def stratified_order(labels: Tensor, *seed: str | int) -> Tensor:
    """A random permutation of the images, of which every first part holds the classes in their shares (± 1 image).

    Args:
        labels: class of each image, int64 [N].
        seed: what the permutation is drawn from.
    """
    generator = generator_of("stratified", *seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    by_class = shuffled[torch.argsort(labels[shuffled], stable=True)]
    classes = labels[by_class]
    count = torch.bincount(labels)
    first = count.cumsum(0) - count
    # The k-th of a class's n images falls somewhere in the k-th n-th of the order.
    jitter = torch.rand(len(labels), generator=generator, dtype=torch.float64)
    position = (torch.arange(len(labels)) - first[classes] + jitter) / count[classes]
    return by_class[torch.argsort(position, stable=True)]


def split(
    train_labels: Tensor,
    validation_labels: Tensor | None,
    test_labels: Tensor,
    *,
    validation_share: float,
    limit_train: int | None,
    limit_test: int | None,
    seed: int,
) -> Splits:
    """Divide the images.

    Validation images are taken from the training images, the same ones whatever the limits are, unless the set has
    its own (``validation_labels``). ``limit_train`` leaves that many images to train on, and shrinks the validation
    split in proportion; ``limit_test`` leaves that many test images.

    Raises:
        DataError: nothing is left to train on or to validate on.
    """
    order = stratified_order(train_labels, "train", seed)
    if validation_labels is None:
        taken = max(1, round(validation_share * len(order)))
        validation, train = order[:taken], order[taken:]
    else:
        validation, train = stratified_order(validation_labels, "validation", seed), order
    if len(train) == 0 or len(validation) == 0:
        raise DataError(
            f"{len(train_labels)} training images are too few for data.validation_share={validation_share}: give another "
            "share, or more images"
        )
    if limit_train is not None and limit_train < len(train):
        validation = validation[: max(1, round(len(validation) * limit_train / len(train)))]
        train = train[:limit_train]
    test = torch.arange(len(test_labels))
    if limit_test is not None and limit_test < len(test):
        test = stratified_order(test_labels, "test", seed)[:limit_test]
    return Splits(*(indices.sort().values for indices in (train, validation, test)))
