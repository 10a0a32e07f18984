"""The random changes of photographs in training, on uint8 pixels."""

import random
import re
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import timm.data
import torch
from PIL import Image
from timm.data.auto_augment import AugMixAugment, AutoAugment, RandAugment, posterize
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from lowprec.data.decoding import decoded_pixels, opened

__all__ = ["TrainingTransform"]

CROP_AREA = (0.08, 1.0)
CROP_ASPECT = (3 / 4, 4 / 3)
# Tensors are resized by these alone; others (lanczos, …) become the nearest in kind, bicubic.
INTERPOLATIONS = {mode.value: mode for mode in (InterpolationMode.BILINEAR, InterpolationMode.NEAREST)}


class TrainingTransform:
    """Random resized crop, flip, and what else is asked for; what is random depends on the given seed alone.

    Args:
        input_size: (C, H, W) of the result.
        mean: per channel, for pixels in 0..1; fills what a change leaves empty.
        interpolation: timm's name of the filter of resizing.
        color_jitter: strength of random changes of brightness, contrast and saturation; 0 for none.
        auto_augment: a policy by its name in timm (``rand-m9-mstd0.5-inc1``, ``augmix-m3-w3``, ``original``, ``3a``, …);
            as in timm it takes the place of ``color_jitter``, but for ``3a``. None for none.
        random_erasing: probability that a rectangle of the image is filled with ``mean``.

    Raises:
        ValueError: timm knows no such policy, or it is for colour images and these are grey.
    """

    def __init__(
        self,
        input_size: tuple[int, int, int],
        mean: tuple[float, ...],
        interpolation: str,
        *,
        color_jitter: float = 0.0,
        auto_augment: str | None = None,
        random_erasing: float = 0.0,
    ) -> None:
        self.channels, *size = input_size
        self.size = size
        self.interpolation = INTERPOLATIONS.get(interpolation, InterpolationMode.BICUBIC)
        if auto_augment is not None and self.channels != 3:
            raise ValueError(
                f"data.auto_augment={auto_augment} is for colour images, not for {self.channels} channel(s)"
            )
        self.policy = auto_augment is not None
        self.photometric = _photometric(input_size, mean, interpolation, color_jitter, auto_augment)
        self.erasing = None
        if random_erasing > 0:
            self.erasing = v2.RandomErasing(random_erasing, value=[round(255 * level) for level in mean])

    def __call__(self, content: bytes, seed: int) -> Tensor:
        """The file of a photograph -> uint8 [C, H, W]. Raises DamagedImageError."""
        photograph = opened(content)
        with _seeded(seed, numpy=self.policy):
            pixels = self._cropped(content, photograph)
            if random.random() < 0.5:
                pixels = functional.horizontal_flip(pixels)
            if self.photometric is not None:
                pixels = functional.pil_to_tensor(self.photometric(functional.to_pil_image(pixels)))
            return pixels if self.erasing is None else self.erasing(pixels)

    def _cropped(self, content: bytes, photograph: Image.Image) -> Tensor:
        width, height = photograph.size
        top, left, crop_height, crop_width = RandomResizedCropAndInterpolation.get_params(
            photograph, CROP_AREA, CROP_ASPECT
        )
        # The decoder may leave out detail that resizing would take away anyway.
        reduction = max(1, min(crop_height // self.size[0], crop_width // self.size[1]))
        pixels = decoded_pixels(content, photograph, self.channels, reduction)
        vertical, horizontal = pixels.shape[1] / height, pixels.shape[2] / width
        return functional.resized_crop(
            pixels,
            round(top * vertical),
            round(left * horizontal),
            max(1, round(crop_height * vertical)),
            max(1, round(crop_width * horizontal)),
            self.size,
            interpolation=self.interpolation,
            antialias=True,
        )


def _photometric(
    input_size: tuple[int, int, int],
    mean: tuple[float, ...],
    interpolation: str,
    color_jitter: float,
    auto_augment: str | None,
) -> v2.Transform | None:
    """timm's changes between the flip and the normalisation, of a Pillow image; None if there are none."""
    if auto_augment is not None:
        _require_whole_sections(auto_augment)
    try:
        _, changes, _ = timm.data.create_transform(
            input_size,
            is_training=True,
            mean=mean,
            interpolation=interpolation,
            color_jitter=color_jitter or None,  # type: ignore[arg-type]  # None: no such change at all
            auto_augment=auto_augment,
            separate=True,
        )
    except (AssertionError, AttributeError, KeyError, ValueError) as error:  # all that timm says of an unknown policy
        raise ValueError(
            f"data.auto_augment={auto_augment}: timm knows no such policy ({type(error).__name__}: {error}); give one like "
            "rand-m9-mstd0.5-inc1, augmix-m3-w3, original or 3a"
        ) from error
    if auto_augment is not None:
        _keep_a_bit(changes.transforms[0])
    return changes if changes.transforms else None


def _keep_a_bit(policy: RandAugment | AugMixAugment | AutoAugment) -> None:
    """Make timm's strongest posterization leave one bit a pixel: it asks for none, which Pillow refuses since version 13."""
    steps = [step for steps in policy.policy for step in steps] if isinstance(policy, AutoAugment) else policy.ops
    for step in steps:
        if step.name.startswith("Posterize"):
            step.aug_fn = _posterized


def _posterized(image: Image.Image, bits: int, **arguments: object) -> Image.Image:
    return posterize(image, max(1, bits), **arguments)


def _require_whole_sections(policy: str) -> None:
    """Raises ValueError for a section that is no letters and a number (or a set of transforms): timm passes over it."""
    for section in policy.split("-")[1:]:
        if not re.fullmatch(r"t[a-z0-9]+|[a-z]+\d+(\.\d+)?", section):
            raise ValueError(f"data.auto_augment={policy}: {section!r} is not of the form m9 or mstd0.5")


@contextmanager
def _seeded(seed: int, *, numpy: bool) -> Iterator[None]:
    """Seed the global generators that the transforms draw from; afterwards they are as they were.

    NumPy's, which takes the most time, only if asked for: timm's policies alone draw from it.
    """
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    numpy_state = np.random.get_state() if numpy else None  # noqa: NPY002
    random.seed(seed)
    # Not torch.manual_seed: it would seed the accelerators' generators as well, which nothing here draws from.
    torch.default_generator.manual_seed(seed)
    if numpy:
        np.random.seed(seed % 2**32)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python_state)
        torch.set_rng_state(torch_state)
        if numpy_state is not None:
            np.random.set_state(numpy_state)  # noqa: NPY002
