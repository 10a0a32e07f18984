"""Data sets by name."""

import dataclasses
import difflib
import inspect
from typing import Any

from lowprec.data.cifar import Cifar10, Cifar100
from lowprec.data.digits import Digits
from lowprec.data.fashion_mnist import FashionMnist
from lowprec.data.image_folder import ImageFolder, ImageNet
from lowprec.data.module import DataModule, DataOptions
from lowprec.data.shards import Shards

__all__ = ["create_data", "list_data"]

DATA_SETS: dict[str, type[DataModule]] = {
    "fashion_mnist": FashionMnist,
    "digits": Digits,
    "cifar10": Cifar10,
    "cifar100": Cifar100,
    "imagenet": ImageNet,
    "image_folder": ImageFolder,
    "shards": Shards,
}


def create_data(name: str, **arguments: Any) -> DataModule:
    """A data set by name.

    Args:
        name: one of ``list_data()``.
        arguments: the fields of ``DataOptions`` (``root``, ``batch_size``, ``seed``, ``limit_train``, …); ``padding``
            for the sets in memory; ``data_config``, ``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct``,
            ``color_jitter``, ``auto_augment``, ``random_erasing`` and ``max_corrupted`` for photographs (``imagenet``,
            ``image_folder``, ``shards``).

    Raises:
        ValueError: unknown name, unknown argument, impossible value; the message shows the valid ones.
        DataError: for photographs, if they are missing or laid out wrongly. The other sets look for their
            files at the first use.
    """
    if name not in DATA_SETS:
        closest = difflib.get_close_matches(name, DATA_SETS, n=1)
        suggestion = f"did you mean {closest[0]}? " if closest else ""
        raise ValueError(f"unknown data set {name!r}: {suggestion}There are {', '.join(DATA_SETS)}")
    common = [field.name for field in dataclasses.fields(DataOptions)]
    own = [key for key in inspect.signature(DATA_SETS[name].__init__).parameters if key not in ("self", "options")]
    unknown = [key for key in arguments if key not in common and key not in own]
    if unknown:
        raise ValueError(f"{name} takes no argument {', '.join(unknown)}; it takes {', '.join(common + own)}")
    options = DataOptions(**{key: value for key, value in arguments.items() if key in common})
    specific = {key: value for key, value in arguments.items() if key in own}
    return DATA_SETS[name](options, **specific)


def list_data() -> list[str]:
    """The names that ``create_data`` takes."""
    return list(DATA_SETS)
