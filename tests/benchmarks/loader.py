"""Training images a second and core: torchvision's folder with timm's transforms, and lowprec's loader of folders and shards.

    python tests/benchmarks/loader.py [--images 512] [--batch 64] [--workers 0] [--rounds 7]

Writes JPEG files of 500×375 pixels, quality 90 (crops of scikit-learn's photographs, with noise), and reads them as training
batches of float32 [B, 3, 224, 224], normalised on the CPU: random resized crop (bicubic) and flip, no colour jitter in any.
The candidates take turns, an epoch each in every round, so that what else runs on the machine slows all alike; ratios are
medians of the rounds'. With 0 workers everything is done by one thread of one process. With more, each of these is counted as
one core, and the process that normalises is not.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm.data
import torch
from inference import describe_machine
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from lowprec.data import DataModule, create_data
from lowprec.data.write_shards import write_shards

WIDTH, HEIGHT, QUALITY = 500, 375, 90
CLASSES = 4
REFERENCE = "torchvision ImageFolder, timm transforms"

# Reads one epoch, and returns how many images it had.
Epoch = Callable[[int], int]


def photograph(generator: np.random.Generator, sources: list[np.ndarray]) -> bytes:
    """A JPEG file: a random crop of one of ``sources`` [H, W, 3], scaled to the size of most of ImageNet, with noise."""
    source = sources[generator.integers(len(sources))]
    height = int(generator.integers(source.shape[0] // 2, source.shape[0] + 1))
    width = height * WIDTH // HEIGHT
    top = int(generator.integers(0, source.shape[0] - height + 1))
    left = int(generator.integers(0, source.shape[1] - width + 1))
    crop = Image.fromarray(source[top : top + height, left : left + width]).resize(
        (WIDTH, HEIGHT), Image.Resampling.BICUBIC
    )
    noise = generator.integers(-6, 7, (HEIGHT, WIDTH, 3))
    pixels = np.clip(np.asarray(crop).astype(np.int64) + noise, 0, 255).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", quality=QUALITY)
    return content.getvalue()


def write_folder(root: Path, images: int) -> None:
    """``images`` training photographs in ``CLASSES`` classes, and one of each class in ``val``."""
    generator = np.random.default_rng(0)
    sources = load_sample_images().images
    for split, count in (("train", images), ("val", CLASSES)):
        for number in range(count):
            folder = root / split / f"class{number % CLASSES}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number}.jpg").write_bytes(photograph(generator, sources))


def torchvision_epoch(root: Path, batch: int, workers: int) -> Epoch:
    transform = timm.data.create_transform(
        (3, 224, 224),
        is_training=True,
        interpolation="bicubic",
        color_jitter=None,  # type: ignore[arg-type]
    )
    loader = DataLoader(
        ImageFolder(str(root / "train"), transform),
        batch_size=batch,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    return lambda epoch: sum(len(images) for images, _ in loader)


def our_epoch(data: DataModule) -> Epoch:
    loader = data.train_dataloader()

    def read(epoch: int) -> int:
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        images = 0
        for batch in loader:
            pixels, _ = data.on_after_batch_transfer(batch, 0)
            assert pixels.dtype == torch.float32
            images += len(pixels)
        return images

    return read


def measure(candidates: dict[str, Epoch], rounds: int, cores: int) -> dict[str, list[float]]:
    """Images a second and core of each candidate in each round; before them each reads an epoch that is not timed."""
    for read in candidates.values():
        read(0)
    speeds: dict[str, list[float]] = {name: [] for name in candidates}
    for epoch in range(1, rounds + 1):
        for name, read in candidates.items():
            started = time.perf_counter()
            images = read(epoch)
            speeds[name].append(images / (time.perf_counter() - started) / cores)
    return speeds


def table(speeds: dict[str, list[float]]) -> str:
    """A line for each candidate: median and best of its rounds, and the median of its ratios to the reference."""
    width = max(map(len, speeds))
    lines = [f"{'':{width}} {'images/s/core':>14} {'best':>8} {'ratio':>7}"]
    for name, mine in speeds.items():
        ratio = statistics.median(found / other for found, other in zip(mine, speeds[REFERENCE], strict=True))
        lines.append(f"{name:{width}} {statistics.median(mine):14.1f} {max(mine):8.1f} {ratio:6.2f}x")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--images", type=int, default=512, help="of an epoch; a last batch that is not full is left out"
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args(arguments)

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder, shards = Path(name) / "folder", Path(name) / "shards"
        write_folder(folder, given.images)
        write_shards(folder, shards)
        options = {"batch_size": given.batch, "num_workers": given.workers, "validation_share": 1e-9}
        candidates = {
            REFERENCE: torchvision_epoch(folder, given.batch, given.workers),
            "lowprec, image_folder": our_epoch(create_data("image_folder", root=folder, **options)),
            "lowprec, shards": our_epoch(create_data("shards", root=shards, **options)),
        }
        speeds = measure(candidates, given.rounds, max(1, given.workers))
    print(f"{given.images} JPEG files of {WIDTH}×{HEIGHT}, batches of {given.batch}, {given.workers} workers")
    print(describe_machine(1))
    print(table(speeds), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
