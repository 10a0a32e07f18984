"""What functions and models ask of batches of images: one clear error for each mistake, instead of numbers that mean nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def image_batches(batches: Iterable[Any], function: str) -> Iterator[tuple[str, Tensor]]:
    """The images of each batch, of (images, labels) pairs the first, with the batch's name for errors; empty ones left out.

    Raises:
        TypeError: ``batches`` is one tensor, or a batch holds no tensor of images.
    """
    if isinstance(batches, Tensor):
        raise TypeError(f"{function} expects an iterable of batches [B, C, H, W]: give [images] for a single one")
    if isinstance(batches, dict | str) or not isinstance(batches, Iterable):
        raise TypeError(f"{function} expects an iterable of batches [B, C, H, W], not {type(batches).__name__}")
    for index, batch in enumerate(batches):
        images = batch[0] if isinstance(batch, list | tuple) and batch else batch
        name = f"the images of batch {index}"
        if not isinstance(images, Tensor):
            raise TypeError(
                f"{name} are {type(images).__name__}: {function} expects tensors, or (images, labels) pairs"
            )
        if len(images):
            yield name, images


def check_images(images: object, shape: tuple[int, int, int], name: str = "the images", any_size: bool = False) -> None:
    """That ``images`` are normalised float32 images [B, C, H, W] of ``shape`` (channels, height, width), and finite.

    name: of the images, for errors. any_size: height and width may be others.

    Raises:
        TypeError: not a tensor of float32. ValueError: another shape, or NaN or infinite values.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"{name} must be a tensor [B, C, H, W], not {type(images).__name__}")
    if images.dtype != torch.float32:
        kind = str(images.dtype).removeprefix("torch.")
        advice = "call .float()" if images.is_floating_point() else "pixels; normalise them as for training"
        raise TypeError(f"{name} must be float32, not {kind}: {advice}")
    expected = ["B", str(shape[0]), *(["H", "W"] if any_size else map(str, shape[1:]))]
    found = list(images.shape)
    if len(found) != 1 + len(shape) or found[1] != shape[0] or (not any_size and tuple(found[1:]) != shape):
        raise ValueError(f"{name} have the shape {found}; the model takes [{', '.join(expected)}]")
    if images.is_meta or bool(torch.isfinite(images).all()):
        return
    raise ValueError(f"{name} hold {'NaN' if bool(images.isnan().any()) else 'infinite values'}")


@contextmanager
def other_sizes_refused(images: Tensor, shape: tuple[int, int, int]) -> Iterator[None]:
    """Within it, a tensor operation that fails on images of another size than ``shape``'s is a ValueError that says so."""
    try:
        yield
    except RuntimeError as error:
        if tuple(images.shape[1:]) == shape:
            raise
        raise ValueError(
            f"the images have the shape {list(images.shape)}; the model takes {list(shape)} alone: one of its layers does not "
            "fit another size"
        ) from error
