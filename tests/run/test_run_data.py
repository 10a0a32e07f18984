"""The data of a run: what its configuration says reaches the data set, and what it cannot be is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import compose
from PIL import Image

from lowprec.config import ConfigError
from lowprec.data.photographs import PhotographModule
from lowprec.data.write_shards import write_shards
from lowprec.run.data import evaluation_images, run_data


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of photographs in ``folder``, the same as shards in ``shards``."""
    root = tmp_path_factory.mktemp("data")
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (root / "folder" / split / name).mkdir(parents=True)
            for number in range(5):
                pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / "folder" / split / name / f"{number}.png")
    write_shards(root / "folder", root / "shards")
    return root


SMALL = ("experiment=custom", "model=resnet18", "data.image_size=16")


@pytest.mark.parametrize(("name", "place"), [("image_folder", "folder"), ("shards", "shards")])
def test_photographs(root: Path, name: str, place: str) -> None:
    config = compose(
        *SMALL, f"data={name}", f"data.root={root / place}", "data.auto_augment=rand-m9", "data.random_erasing=0.25",
        "data.max_corrupted=3", "data.num_workers=0",
    )  # fmt: skip
    config.validate()
    data = run_data(config)
    assert isinstance(data, PhotographModule)
    assert (data.num_classes, data.input_size, data.max_corrupted) == (2, (3, 16, 16), 3)
    images, _ = next(iter(data.train_dataloader()))
    assert images.dtype == torch.uint8
    assert data.class_names == ("cat", "dog")
    assert sum(len(batch) for batch in evaluation_images(data)) == 10
    assert sum(len(batch) for batch in evaluation_images(data, 7)) == 7


def test_another_number_of_classes_is_refused(root: Path) -> None:
    config = compose(*SMALL, "data=shards", f"data.root={root / 'shards'}", "data.num_classes=1000")
    with pytest.raises(ConfigError, match=rf"data\.num_classes=1000: the data set shards in {root}.* has 2"):
        run_data(config)


def test_unknown_policy_is_refused(root: Path) -> None:
    config = compose(*SMALL, "data=shards", f"data.root={root / 'shards'}", "data.auto_augment=magic")
    with pytest.raises(ConfigError, match=r"data\.auto_augment=magic: timm knows no such policy"):
        run_data(config)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("data=shards",), r"data\.root=None: expected the folder that holds train/ and val/"),
        (("data=digits", "data.auto_augment=rand-m9"), r"data\.auto_augment=rand-m9: this is for photographs"),
        (("data=digits", "data.random_erasing=0.5"), r"data\.random_erasing=0\.5: this is for photographs"),
        (("data=imagenet", "data.augment=false", "data.auto_augment=rand-m9"), r"data\.augment=false leaves"),
        (("data=imagenet", "data.random_erasing=2"), r"data\.random_erasing=2\.0: expected a probability"),
        (("data=imagenet", "data.max_corrupted=-1"), r"data\.max_corrupted=-1: expected 0 or more"),
        (("data=imagenet", "data.num_workers=-1"), r"data\.num_workers=-1: expected 0 or more, or null"),
        (("data=imagenet", "model.head=newer"), r"model\.head=newer: choose one of strict, new; did you mean new\?"),
    ],
)
def test_impossible_values_are_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose("experiment=custom", "model=resnet18", *overrides).validate()


def test_workers_by_default() -> None:
    assert compose("experiment=custom", "data=imagenet", "model=resnet18").data.num_workers is None
    digits = run_data(compose("experiment=digits_smoke"))
    assert digits.train_dataloader().num_workers == 0
