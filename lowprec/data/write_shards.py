"""Write a folder of images as tar files: ``python -m lowprec.data.write_shards FOLDER OUTPUT``.

FOLDER is laid out as for ``data=image_folder``: ``train/CLASS/*.jpg``, ``val/CLASS/*.jpg``, possibly ``test``. OUTPUT is
then a ``data.root`` for ``data=shards``. Images are copied as they are, in an order drawn from the seed.
"""

import argparse
import io
import sys
import tarfile
from pathlib import Path

import torch

from lowprec.data.epochs import generator_of
from lowprec.data.image_files import FolderImages, find_images
from lowprec.data.image_folder import ImageFolder
from lowprec.data.module import DataOptions
from lowprec.data.shards import CLASSES_FILE
from lowprec.data.sources import DataError
from lowprec.data.tar_index import IMAGE_EXTENSIONS
from lowprec.files import whole_file

__all__ = ["write_shards"]


def write_shards(folder: Path, output: Path, *, images_per_shard: int = 1000, seed: int = 0) -> dict[str, int]:
    """Write the splits of ``folder`` to ``output/SPLIT/*.tar``, and the names of the classes to ``output/classes.txt``.

    Each tar file appears whole or not at all. The same images and seed give the same bytes.

    Returns:
        The number of images by split (``train``, ``val`` and possibly ``test``).

    Raises:
        DataError: ``folder`` is laid out wrongly, an image is of a kind that shards do not hold, or ``output`` holds
            tar files already.
        ValueError: ``images_per_shard`` is less than 1.
    """
    if images_per_shard < 1:
        raise ValueError(f"images per shard must be at least 1, not {images_per_shard}")
    classes = ImageFolder(DataOptions(root=folder)).class_names
    splits = [name for name in ("train", "val", "test") if (folder / name).is_dir()]
    # All that can go wrong is looked at before the first file is written.
    found = {split: find_images(folder / split) for split in splits}
    for split, files in found.items():
        _require_supported(files)
        if any((output / split).glob("*.tar")):
            raise DataError(f"{output / split} holds tar files already: give another folder, or remove them")
    for split, files in found.items():
        (output / split).mkdir(parents=True, exist_ok=True)
        order = torch.randperm(len(files.labels), generator=generator_of("shards", seed, split)).split(images_per_shard)
        for number, indices in enumerate(order):
            first = number * images_per_shard
            with whole_file(output / split / f"{number:06d}.tar") as temporary:
                _write_shard(temporary, files, indices.tolist(), first)
    with whole_file(output / CLASSES_FILE) as temporary:
        temporary.write_text("".join(f"{name}\n" for name in classes or ()), encoding="utf-8")
    return {split: len(files.labels) for split, files in found.items()}


def _write_shard(path: Path, files: FolderImages, indices: list[int], first: int) -> None:
    with tarfile.open(path, "w") as archive:
        for number, index in enumerate(indices, start=first):
            members = {_extension(files.path(index)): files.read(index), "cls": str(int(files.labels[index])).encode()}
            for extension, content in members.items():
                member = tarfile.TarInfo(f"{number:08d}.{extension}")
                member.size, member.mode = len(content), 0o644
                archive.addfile(member, io.BytesIO(content))


def _require_supported(files: FolderImages) -> None:
    for index in range(len(files.labels)):
        if _extension(files.path(index)) not in IMAGE_EXTENSIONS:
            raise DataError(
                f"the image {files.name(index)} is of a kind that shards do not hold: convert it to one of "
                f"{', '.join(IMAGE_EXTENSIONS)}"
            )


def _extension(path: Path) -> str:
    return path.suffix[1:].lower()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the images: train/CLASS/*.jpg, val/CLASS/*.jpg")
    parser.add_argument("output", type=Path, help="where train/*.tar, val/*.tar and classes.txt are written")
    parser.add_argument("--images-per-shard", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="fixes the order of the images")
    arguments = parser.parse_args()
    try:
        counts = write_shards(
            arguments.folder, arguments.output, images_per_shard=arguments.images_per_shard, seed=arguments.seed
        )
    except (DataError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    written = ", ".join(f"{count:,} images in {split}" for split, count in counts.items())
    print(f"{arguments.output}: {written}\nuse them with: data=shards data.root={arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
