"""From the bytes of a photograph to pixels.

Pillow decodes photographs for evaluation, whose transforms take its images. For training, simplejpeg decodes JPEG files, to
the same pixels in less time; what it does not take, and what may become much smaller, Pillow decodes.
"""

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

__all__ = ["DamagedImageError", "decoded_photograph", "decoded_pixels", "opened"]

JPEG_FORMATS = ("JPEG", "MPO")
# What Pillow's decoders raise for damaged files.
DECODER_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


class DamagedImageError(Exception):
    """These bytes are no image that can be decoded."""


def opened(content: bytes) -> Image.Image:
    """The photograph, of which only the header was read. Raises DamagedImageError."""
    with _damage_named():
        return Image.open(io.BytesIO(content))


def decoded_photograph(content: bytes, channels: int) -> Image.Image:
    """The whole photograph, in colour (3 channels) or grey (1), as torchvision's data sets load it.

    Raises:
        DamagedImageError: it cannot be decoded.
    """
    with _damage_named():
        photograph = opened(content).convert("RGB")
        return photograph if channels == 3 else photograph.convert("L")


def decoded_pixels(content: bytes, photograph: Image.Image, channels: int, reduction: int) -> Tensor:
    """The pixels of a photograph for training.

    Args:
        content: the file. photograph: the same, as ``opened`` gives it.
        channels: 3 for colour, 1 for grey.
        reduction: up to so many times smaller it may become; a JPEG file is then decoded at a half, a quarter or an
            eighth of its size, which takes less time.

    Returns:
        uint8 [channels, height, width].

    Raises:
        DamagedImageError: it cannot be decoded.
    """
    mode = "RGB" if channels == 3 else "L"
    # Of files in four colours (CMYK) the two decoders make different pixels.
    if photograph.format in JPEG_FORMATS and photograph.mode in ("RGB", "L") and reduction < 2:
        with suppress(ValueError):  # a damaged file, or a kind of JPEG that Pillow alone knows
            pixels = simplejpeg.decode_jpeg(content, colorspace="RGB" if channels == 3 else "GRAY")
            return torch.from_numpy(pixels).permute(2, 0, 1)
    with _damage_named():
        photograph.draft(mode, (photograph.width // reduction, photograph.height // reduction))
        return pil_to_tensor(photograph.convert(mode))


@contextmanager
def _damage_named() -> Iterator[None]:
    try:
        yield
    except UnidentifiedImageError as error:  # its message shows the object in memory that was read from
        raise DamagedImageError("cannot identify the image format") from error
    except DECODER_ERRORS as error:
        raise DamagedImageError(str(error) or type(error).__name__) from error
