"""Decoding: the same pixels whichever decoder, and damage that is told from other errors."""

import numpy as np
import pytest
import torch
from photograph_files import encoded

from lowprec.data.decoding import DamagedImageError, decoded_photograph, decoded_pixels, opened


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_training_pixels_are_those_of_evaluation(mode: str) -> None:
    content = encoded(0, "JPEG", mode, (123, 77))
    pixels = decoded_pixels(content, opened(content), channels=3, reduction=1)
    expected = np.asarray(decoded_photograph(content, channels=3))
    assert torch.equal(pixels.permute(1, 2, 0), torch.from_numpy(expected.copy()))


@pytest.mark.parametrize(
    ("reduction", "size"), [(1, (77, 123)), (2, (39, 62)), (3, (39, 62)), (4, (20, 31)), (9, (10, 16))]
)
def test_reduction_is_at_most_what_was_asked_for(reduction: int, size: tuple[int, int]) -> None:
    content = encoded(0, "JPEG", size=(123, 77))
    assert decoded_pixels(content, opened(content), channels=3, reduction=reduction).shape == (3, *size)


def test_reduction_is_for_jpeg_alone() -> None:
    content = encoded(0, "PNG", size=(123, 77))
    assert decoded_pixels(content, opened(content), channels=1, reduction=4).shape == (1, 77, 123)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_truncated_files_are_damaged(kind: str, share: float) -> None:
    whole = encoded(0, kind, size=(123, 77))
    content = whole[: int(len(whole) * share)]
    with pytest.raises(DamagedImageError):
        decoded_photograph(content, channels=3)
    with pytest.raises(DamagedImageError):
        decoded_pixels(content, opened(content), channels=3, reduction=1)


def test_other_files_are_damaged_images() -> None:
    for content in (b"", b"<html>", bytes(1000)):
        # Pillow's own message shows an address in memory.
        with pytest.raises(DamagedImageError, match=r"^cannot identify the image format$"):
            opened(content)
