"""Digits: the 1,797 grey images of 8×8 that come with scikit-learn. For tests and runs of a few seconds."""

import torch
from sklearn.datasets import load_digits

from lowprec.data.in_memory import ImageArrays, InMemoryDataModule
from lowprec.data.splits import stratified_order

__all__ = ["Digits"]

TEST_SHARE = 0.2


class Digits(InMemoryDataModule):
    """A fifth of the images is the test split, the same one for every seed."""

    num_classes = 10
    class_names = tuple("0123456789")
    input_size = (1, 8, 8)
    mean = (0.3053,)
    std = (0.3760,)
    default_padding = 1
    flip = False
    peak = 16

    def _read_arrays(self) -> tuple[ImageArrays, ImageArrays]:
        content = load_digits()
        images = torch.from_numpy(content.images).to(torch.uint8).unsqueeze(1)
        labels = torch.from_numpy(content.target).long()
        order = stratified_order(labels, "digits test")
        test = round(TEST_SHARE * len(order))
        return (
            ImageArrays(images[order[test:]], labels[order[test:]]),
            ImageArrays(images[order[:test]], labels[order[:test]]),
        )
