"""Pixels become the floats that torchvision makes of them, and can be found again."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms.functional import normalize, to_tensor

from lowprec.data import create_data
from lowprec.data.normalization import Normalization

IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_floats_are_those_of_torchvision() -> None:
    pixels = torch.randint(0, 256, (4, 3, 9, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = [normalize(to_tensor(image.permute(1, 2, 0).numpy()), IMAGENET.mean, IMAGENET.std) for image in pixels]
    assert torch.equal(IMAGENET.normalize(pixels), torch.stack(expected))


def test_every_pixel_value_is_found_again() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    assert torch.equal(IMAGENET.pixels(IMAGENET.normalize(pixels)), pixels)
    assert torch.equal(IMAGENET.table(), IMAGENET.normalize(pixels)[0].flatten(1))


def test_floats_between_pixels_are_refused() -> None:
    images = IMAGENET.normalize(torch.full((1, 3, 2, 2), 100, dtype=torch.uint8))
    with pytest.raises(ValueError, match="resized after they became floats"):
        IMAGENET.pixels(images + 1e-3)


def test_sets_in_memory_give_just_these_floats() -> None:
    data = create_data("digits", batch_size=50, augment=False)
    images, _ = next(iter(data.test_dataloader()))
    pixels = data.normalization.pixels(images)
    assert int(pixels.max()) == data.normalization.peak == 16
    assert torch.equal(data.normalization.normalize(pixels), images)
