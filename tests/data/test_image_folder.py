"""Photographs in folders: layouts, transforms from the model's config, errors that show the expected tree."""

import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import CenterCrop, Compose, InterpolationMode, Resize

from lowprec.data import DataError, DataModule, create_data

SMALL = {"input_size": (3, 16, 16), "crop_pct": 1.0}


def write_images(root: Path, splits: dict[str, int], classes: tuple[str, ...] = ("bird", "cat", "dog")) -> Path:
    """So many images of noise, 20×24 pixels, for each class of each split."""
    generator = np.random.default_rng(0)
    for split, images in splits.items():
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(images):
                pixels = generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def folder_data(root: Path, name: str = "image_folder", **arguments: Any) -> DataModule:
    return create_data(name, root=root, data_config=SMALL, **arguments)


def test_val_is_the_test_split_without_a_test_folder(tmp_path: Path) -> None:
    data = folder_data(write_images(tmp_path, {"train": 10, "val": 4}), batch_size=8)
    assert data.sizes == {"train": 27, "validation": 3, "test": 12}
    assert (data.num_classes, data.in_channels, data.input_size) == (3, 3, (3, 16, 16))
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (8, 3, 16, 16)
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
    test_labels = torch.cat([labels for _, labels in data.test_dataloader()])
    assert test_labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_test_folder_makes_val_the_validation_split(tmp_path: Path) -> None:
    write_images(tmp_path, {"train": 10, "val": 4, "test": 5})
    data = folder_data(tmp_path)
    assert data.sizes == {"train": 30, "validation": 12, "test": 15}
    assert len(next(iter(data.val_dataloader()))[0]) == 12
    assert folder_data(tmp_path, "imagenet").sizes == {"train": 29, "validation": 1, "test": 12}


def test_transforms_follow_the_models_config(tmp_path: Path) -> None:
    root = write_images(tmp_path, {"train": 4, "val": 2})
    config = {**SMALL, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.5, 1.0), "interpolation": "bilinear", "crop_mode": "x"}
    data = create_data("image_folder", root=root, data_config=config)
    assert (data.mean, data.std) == ((0.5, 0.5, 0.5), (0.25, 0.5, 1.0))
    for channel, std in enumerate(data.std):
        images = torch.cat([images for images, _ in data.test_dataloader()])
        pixels = images[:, channel] * std + 0.5
        assert float(pixels.min()) >= -1e-6
        assert float(pixels.max()) <= 1 + 1e-6
    explicit = create_data("image_folder", root=root, data_config=config, input_size=(3, 8, 8), std=(1, 1, 1))
    assert next(iter(explicit.test_dataloader()))[0].shape[1:] == (3, 8, 8)
    assert explicit.mean == (0.5, 0.5, 0.5)
    assert explicit.std == (1, 1, 1)


def test_grey_images(tmp_path: Path) -> None:
    root = write_images(tmp_path, {"train": 4, "val": 2})
    data = create_data("image_folder", root=root, input_size=(1, 16, 16), mean=(0.4, 0.5, 0.6))
    assert data.in_channels == 1
    assert data.mean == pytest.approx((0.5,))
    assert len(data.std) == 1
    assert next(iter(data.test_dataloader()))[0].shape[1:] == (1, 16, 16)


def test_normalisation_must_fit_the_channels(tmp_path: Path) -> None:
    root = write_images(tmp_path, {"train": 4, "val": 2})
    with pytest.raises(ValueError, match=r"data\.mean has 2 values for 3 channel"):
        create_data("image_folder", root=root, mean=(0.5, 0.5))


def test_randomness_depends_on_seed_and_epoch_alone(tmp_path: Path) -> None:
    root = write_images(tmp_path, {"train": 4, "val": 2})

    def epoch(number: int, **arguments: Any) -> torch.Tensor:
        loader = folder_data(root, color_jitter=0.4, **arguments).train_dataloader()
        loader.sampler.set_epoch(number)  # type: ignore[attr-defined]
        return torch.cat([images for images, _ in loader])

    random.seed(0)
    torch.manual_seed(0)
    states = random.getstate(), torch.get_rng_state()
    first = epoch(0)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    random.seed(1)
    torch.manual_seed(1)
    assert torch.equal(first, epoch(0))
    assert not torch.equal(first, epoch(1))
    assert not torch.equal(first, epoch(0, seed=1))


def test_workers_see_the_same_images(tmp_path: Path) -> None:
    root = write_images(tmp_path, {"train": 8, "val": 2})
    alone = folder_data(root, batch_size=4).train_dataloader()
    shared = folder_data(root, batch_size=4, num_workers=2).train_dataloader()
    for number in (0, 1):
        alone.sampler.set_epoch(number)  # type: ignore[attr-defined]
        shared.sampler.set_epoch(number)  # type: ignore[attr-defined]
        for one, other in zip(alone, shared, strict=True):
            assert torch.equal(one[0], other[0])
            assert torch.equal(one[1], other[1])


def test_evaluation_and_calibration_are_not_augmented(tmp_path: Path) -> None:
    data = folder_data(write_images(tmp_path, {"train": 8, "val": 2}))
    assert torch.equal(next(iter(data.test_dataloader()))[0], next(iter(data.test_dataloader()))[0])
    first, again = data.calibration_batches(10), data.calibration_batches(10)
    assert len(first[0]) == 10
    assert torch.equal(first[0], again[0])


def test_root_is_needed() -> None:
    with pytest.raises(DataError, match=r"data\.root=FOLDER(.|\n)*train/CLASS"):
        create_data("imagenet")


def test_missing_folders_show_the_tree(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.root=.*nowhere is not a folder(.|\n)*train/CLASS"):
        folder_data(tmp_path / "nowhere")
    with pytest.raises(DataError, match=rf"the folder {tmp_path}/train is missing(.|\n)*train/CLASS"):
        folder_data(tmp_path)
    write_images(tmp_path, {"train": 1})
    with pytest.raises(DataError, match=rf"the folder {tmp_path}/val is missing(.|\n)*val/CLASS"):
        folder_data(tmp_path)


def test_no_classes(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
    with pytest.raises(DataError, match="train has no class folders"):
        folder_data(tmp_path)


def test_images_in_folders_below_a_class(tmp_path: Path) -> None:
    write_images(tmp_path, {"train": 2, "val": 2})
    below = tmp_path / "val" / "cat" / "more" / "of these"
    below.mkdir(parents=True)
    shutil.move(tmp_path / "val" / "cat" / "1.png", below / "é.PNG")
    (below / "notes.txt").write_text("no image")
    data = folder_data(tmp_path)
    assert data.sizes["test"] == 6
    assert sum(len(images) for images, _ in data.test_dataloader()) == 6


@pytest.mark.skipif(os.geteuid() == 0, reason="everything is readable for root")
def test_folder_without_permission_is_named(tmp_path: Path) -> None:
    write_images(tmp_path, {"train": 2, "val": 2})
    (tmp_path / "val" / "cat").chmod(0)
    try:
        with pytest.raises(DataError, match=r"the folder .*val/cat cannot be read \(Permission denied\)"):
            folder_data(tmp_path).setup()
    finally:
        (tmp_path / "val" / "cat").chmod(0o755)


def test_image_that_cannot_be_opened_is_named_and_not_replaced(tmp_path: Path) -> None:
    write_images(tmp_path, {"train": 8, "val": 2})
    data = folder_data(tmp_path, num_workers=0)
    data.setup()
    victim = tmp_path / "train" / "cat" / "0.png"
    victim.unlink()
    with pytest.raises(DataError, match=rf"the image {victim} cannot be opened \(No such file"):
        list(data.train_dataloader())


def test_class_without_images(tmp_path: Path) -> None:
    write_images(tmp_path, {"train": 2, "val": 0})
    with pytest.raises(DataError, match=r"3 class folder\(s\) of .*val hold no images: bird, cat, dog"):
        folder_data(tmp_path).setup()


def test_differing_classes(tmp_path: Path) -> None:
    write_images(tmp_path, {"train": 2, "val": 2})
    shutil.move(tmp_path / "val" / "cat", tmp_path / "val" / "kat")
    with pytest.raises(DataError, match=r"1 missing \(cat\), 1 unknown \(kat\)"):
        folder_data(tmp_path)


def test_unreadable_image_is_named(tmp_path: Path) -> None:
    write_images(tmp_path, {"train": 2, "val": 2})
    victim = tmp_path / "val" / "cat" / "0.png"
    victim.write_bytes(victim.read_bytes()[:200])
    with pytest.raises(DataError, match=rf"the image {victim} cannot be read"):
        list(folder_data(tmp_path).test_dataloader())


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("size", "crop_pct"), [((3, 16, 16), 0.875), ((3, 12, 12), 1.0), ((3, 12, 16), 0.9)])
def test_preprocessing_says_what_is_done(
    tmp_path: Path, size: tuple[int, int, int], crop_pct: float, interpolation: str
) -> None:
    root = write_images(tmp_path, {"train": 4, "val": 3})
    config = {"input_size": size, "crop_pct": crop_pct, "interpolation": interpolation}
    data = create_data("image_folder", root=root, data_config=config, batch_size=16)
    said = data.preprocessing
    assert said is not None
    resize = said["resize"]
    if isinstance(resize, list):  # both edges are covered
        ratio = max(resize[0] / 20, resize[1] / 24)
        resize = [round(20 * ratio), round(24 * ratio)]
    made = Compose([Resize(resize, InterpolationMode(said["interpolation"])), CenterCrop(said["crop"])])
    files = sorted((root / "val").glob("*/*.png"))
    pixels = torch.stack([torch.from_numpy(np.array(made(Image.open(file)))).permute(2, 0, 1) for file in files])
    ((images, _),) = data.test_dataloader()
    torch.testing.assert_close(data.normalization.normalize(pixels), images, rtol=0, atol=1e-6)


def test_images_that_have_their_size_need_no_preprocessing() -> None:
    assert create_data("digits").preprocessing is None
