"""Training transforms: uint8 pixels that depend on the file and the seed alone."""

import io
import random

import numpy as np
import pytest
import torch
from photograph_files import encoded
from PIL import Image

from lowprec.data.augmentation import TrainingTransform
from lowprec.data.decoding import DamagedImageError

MEAN = (0.25, 0.5, 0.75)


def transform(
    side: int = 16, channels: int = 3, interpolation: str = "bicubic", **arguments: object
) -> TrainingTransform:
    return TrainingTransform((channels, side, side), MEAN[:channels], interpolation, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", [None, "rand-m9-mstd0.5-inc1", "augmix-m3-w3", "original", "3a"])
def test_seed_alone_decides(policy: str | None) -> None:
    change = transform(auto_augment=policy, random_erasing=0.5, color_jitter=0.4)
    results = [change(encoded(0), seed) for seed in range(8)]
    assert all(result.shape == (3, 16, 16) and result.dtype == torch.uint8 for result in results)
    assert len({result.numpy().tobytes() for result in results}) == 8
    random.seed(1)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    assert all(torch.equal(result, change(encoded(0), seed)) for seed, result in enumerate(results))


@pytest.mark.parametrize("policy", [None, "rand-m9-mstd0.5-inc1", "augmix-m3-w3"])
def test_global_generators_are_left_as_they_were(policy: str | None) -> None:
    def states() -> tuple[object, ...]:
        return random.getstate(), torch.get_rng_state().tolist(), str(np.random.get_state())  # noqa: NPY002

    before = states()
    transform(auto_augment=policy, random_erasing=1.0, color_jitter=0.4)(encoded(0), 3)
    assert states() == before
    with pytest.raises(DamagedImageError):
        transform(auto_augment=policy)(encoded(0)[:-100], 3)
    assert states() == before


def test_a_policy_changes_the_pixels() -> None:
    plain, augmented = transform(), transform(auto_augment="rand-m9-mstd0.5-inc1")
    differing = sum(not torch.equal(plain(encoded(0), seed), augmented(encoded(0), seed)) for seed in range(10))
    assert differing > 5


@pytest.mark.parametrize("policy", ["rand-m15-mmax15-inc1-p1.0-n4", "augmix-m10-w5", "originalr", "v0r"])
def test_strongest_changes(policy: str) -> None:
    change = transform(auto_augment=policy)
    for seed in range(60):  # among them, posterization to less than one bit a pixel
        assert change(encoded(0), seed).shape == (3, 16, 16)


def test_half_of_the_images_are_flipped() -> None:
    # Wide enough that each crop shows on which side it is darker.
    content = encoded_ramp()
    flipped = 0
    for seed in range(200):
        pixels = transform()(content, seed).float()
        flipped += bool(pixels[..., :8].mean() > pixels[..., 8:].mean())
    assert 70 < flipped < 130


def encoded_ramp() -> bytes:
    ramp = np.broadcast_to(np.linspace(0, 255, 40).astype(np.uint8)[None, :, None], (32, 40, 3))
    content = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(ramp)).save(content, "PNG")
    return content.getvalue()


def test_erased_rectangle_has_the_mean_colour() -> None:
    plain, erasing = transform(32), transform(32, random_erasing=1.0)
    mean = torch.tensor([64, 128, 191], dtype=torch.uint8)
    areas = []
    for seed in range(20):
        # The same seed draws the same crop; what is erased is drawn after it.
        before, after = plain(encoded(1), seed), erasing(encoded(1), seed)
        changed = (before != after).any(dim=0)
        assert (after[:, changed] == mean[:, None]).all()
        areas.append(float(changed.float().mean()))
    assert min(areas) > 0
    assert max(areas) < 0.4


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("channels", [1, 3])
def test_kinds_of_files(kind: str, mode: str, channels: int) -> None:
    pixels = transform(channels=channels)(encoded(0, kind, mode), 0)
    assert pixels.shape == (channels, 16, 16)
    if mode == "L" and channels == 3 and kind != "WEBP":  # whose grey is made of colours that are rounded
        assert torch.equal(pixels[0], pixels[1])


@pytest.mark.parametrize(("kind", "mode"), [("JPEG", "CMYK"), ("PNG", "RGBA"), ("PNG", "P"), ("TIFF", "RGB")])
def test_unusual_files(kind: str, mode: str) -> None:
    assert transform()(encoded(0, kind, mode), 0).shape == (3, 16, 16)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest", "lanczos"])
def test_interpolations(interpolation: str) -> None:
    assert transform(interpolation=interpolation)(encoded(0), 0).shape == (3, 16, 16)


def test_large_photographs_look_as_if_decoded_whole() -> None:
    # A PNG file of the same pixels is always decoded whole.
    large, exact = (encoded(0, kind, size=(640, 512)) for kind in ("JPEG", "PNG"))
    for seed in range(10):
        difference = (transform()(large, seed).float() - transform()(exact, seed).float()).abs()
        assert float(difference.mean()) < 3


def test_impossible_policies_are_named() -> None:
    for policy in ("nonsense", "rand-x9", "randm9"):
        with pytest.raises(ValueError, match=rf"data\.auto_augment={policy}: timm knows no such policy"):
            transform(auto_augment=policy)
    for policy in ("rand-x", "rand-m9-mstd", "rand--m9", "augmix-m3-w3-", "rand-m9 -n2"):
        with pytest.raises(ValueError, match=rf"data\.auto_augment={policy}: .* is not of the form m9 or mstd0\.5"):
            transform(auto_augment=policy)
    assert transform(auto_augment="rand-m9-mstd0.5-inc1-n3-p0.7-mmax12-tweights").policy
    with pytest.raises(ValueError, match="is for colour images, not for 1 channel"):
        transform(channels=1, auto_augment="rand-m9")
