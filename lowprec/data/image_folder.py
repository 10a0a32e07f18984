"""Photographs in a folder per class, ImageNet among them."""

from pathlib import Path

from lowprec.data.image_files import FolderImages, class_folders, find_images
from lowprec.data.photographs import PhotographModule, require_same_classes

__all__ = ["ImageFolder", "ImageNet"]


class ImageFolder(PhotographModule):
    """Photographs in ``root/train/CLASS/`` and ``root/val/CLASS/``, and possibly ``root/test/CLASS/``."""

    @staticmethod
    def layout(root: str | Path) -> str:
        return (
            f"  {root}/\n"
            "    train/CLASS/*.jpg   a folder per class\n"
            "    val/CLASS/*.jpg     the same class folders\n"
            "    test/CLASS/*.jpg    optional, not for ImageNet"
        )

    def _find_classes(self) -> tuple[str, ...]:
        train = self._folders["train"]
        classes = class_folders(train)
        for folder in self._folders.values():
            require_same_classes(set(classes), set(class_folders(folder)), folder, train)
        return tuple(classes)

    def _find_files(self, folder: Path) -> FolderImages:
        return find_images(folder)


class ImageNet(ImageFolder):
    """ImageNet-1k: ``val`` is the test split (the test images have no labels), 1 % of ``train`` is for validation."""

    default_validation_share = 0.01
    uses_test_folder = False
