"""From 8-bit pixels to the floats that models are trained on: the same floats in training and in an exported model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["PIXEL_VALUES", "Normalization"]

PIXEL_VALUES = 256


class Normalization(NamedTuple):
    """(pixel / peak − mean) / std for each channel, in float32, operation by operation as torchvision computes it.

    peak: the pixel that stands for 1.0.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    peak: int = 255

    def normalize(self, pixels: Tensor) -> Tensor:
        """uint8 [B, C, H, W] -> float32 of the same shape, on the same device."""
        mean, std = self._per_channel(pixels.device)
        images = torch.empty(pixels.shape, dtype=torch.float32, device=pixels.device)
        # A processor's cache holds one image, not a batch; an accelerator takes the batch at once.
        parts = (
            zip(images.split(1), pixels.split(1), strict=True) if pixels.device.type == "cpu" else [(images, pixels)]
        )
        for image, pixel in parts:
            torch.div(pixel, self.peak, out=image).sub_(mean).div_(std)
        return images

    def table(self) -> Tensor:
        """What each pixel value becomes, float32 [C, 256]."""
        pixels = torch.arange(PIXEL_VALUES, dtype=torch.uint8).view(1, 1, -1, 1)
        return self.normalize(pixels.repeat(1, len(self.mean), 1, 1))[0, :, :, 0]

    def pixels(self, images: Tensor) -> Tensor:
        """The inverse: the uint8 pixels that normalised float images were made of, of the same shape.

        Raises:
            ValueError: the images hold values that no pixels have, or were normalised otherwise.
        """
        mean, std = self._per_channel(images.device)
        pixels = ((images * std + mean) * self.peak).round().clamp(0, PIXEL_VALUES - 1).to(torch.uint8)
        if not torch.equal(self.normalize(pixels), images):
            raise ValueError(
                "the images are no 8-bit pixels that were normalised with this mean and std; images that were resized "
                "after they became floats cannot be given to a model that takes pixels"
            )
        return pixels

    def _per_channel(self, device: torch.device) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return mean, std
