"""Photographs for tests: JPEG files in folders and in tar files, each with a colour of its own."""

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("bird", "cat", "dog")
SMALL = {"input_size": (3, 16, 16), "crop_pct": 1.0}


def encoded(number: int, kind: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (40, 32)) -> bytes:
    """The file of an image (width, height) whose pixels are drawn from ``number``."""
    generator = np.random.default_rng(number)
    coarse = Image.fromarray(generator.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    content = io.BytesIO()
    coarse.resize(size, Image.Resampling.BICUBIC).convert(mode).save(content, kind)
    return content.getvalue()


def write_folder(root: Path, splits: Mapping[str, int]) -> Path:
    """So many JPEG files for each class of each split; no two are alike."""
    number = 0
    for split, images in splits.items():
        for name in CLASSES:
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(images):
                (folder / f"{index:03d}.jpg").write_bytes(encoded(number))
                number += 1
    return root


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def samples(labels: list[int], first: int = 0) -> dict[str, bytes]:
    """Members KEY.jpg and KEY.cls for each label."""
    members = {}
    for number, label in enumerate(labels, start=first):
        members[f"{number:04d}.jpg"] = encoded(number)
        members[f"{number:04d}.cls"] = str(label).encode()
    return members
