"""Photographs in tar files, laid out as WebDataset does it: far fewer files than images."""

from pathlib import Path

from lowprec.data.photographs import PhotographModule, require_same_classes
from lowprec.data.sources import DataError
from lowprec.data.tar_index import ShardImages, index_shards

__all__ = ["CLASSES_FILE", "Shards"]

CLASSES_FILE = "classes.txt"


class Shards(PhotographModule):
    """Photographs in ``root/train/*.tar`` and ``root/val/*.tar``, and possibly ``root/test/*.tar``.

    Members are ``KEY.jpg`` (or jpeg, png, webp) and ``KEY.cls`` (the class index as text) or ``KEY.json`` with an integer
    field ``label``. ``root/classes.txt`` may name the classes, one a line. Every image is found by its place in its tar
    file, so order, splits and shares of ranks are exact, as with a folder of images.
    """

    @staticmethod
    def layout(root: str | Path) -> str:
        return (
            f"  {root}/\n"
            "    train/*.tar   members KEY.jpg with KEY.cls, the class index as text\n"
            "    val/*.tar\n"
            "    test/*.tar    optional\n"
            "    classes.txt   optional, a class name a line"
        )

    def _find_classes(self) -> tuple[str, ...]:
        # The labels are in the tar files, so the images are found here already.
        self._files = {source: index_shards(folder) for source, folder in self._folders.items()}
        train = self._folders["train"]
        found = {source: set(files.labels.unique().tolist()) for source, files in self._files.items()}
        names = _read_class_names(train.parent / CLASSES_FILE)
        largest = max(found["train"])
        if names is None and len(found["train"]) <= largest:
            lacking = next(label for label in range(largest) if label not in found["train"])
            raise DataError(
                f"the labels of {train} go up to {largest}, but no image has label {lacking}: classes are numbered from 0, "
                f"without gaps; or name the classes in {train.parent / CLASSES_FILE}"
            )
        names = names or tuple(str(label) for label in range(largest + 1))
        require_same_classes(set(range(len(names))), found["train"], train, train.parent / CLASSES_FILE)
        for source, folder in self._folders.items():
            require_same_classes(found["train"], found[source], folder, train)
        return names

    def _find_files(self, folder: Path) -> ShardImages:
        return index_shards(folder)


def _read_class_names(path: Path) -> tuple[str, ...] | None:
    """The lines of ``classes.txt``; None if there is none."""
    try:
        names = tuple(path.read_text(encoding="utf-8").splitlines())
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}): it should hold a class name a line") from error
    if not names or len(set(names)) < len(names) or not all(name.strip() for name in names):
        raise DataError(f"{path} must hold one class name a line, all of them different")
    return names
