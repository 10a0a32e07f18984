"""Data sets behind one interface. Nothing here knows of models or quantization.

- ``registry``: ``create_data`` by name and ``list_data``
- ``module``: the interface, ``DataModule``, and the options that every set takes, ``DataOptions``
- ``splits``: the one place that decides which image is trained on, validated on, tested on
- ``normalization``: from pixels to floats, and back
- ``epochs``: the order and the randomness of an epoch, functions of (seed, epoch) alone
- ``in_memory``: sets small enough for memory: whole batches are cropped, flipped and normalised at once
- ``fashion_mnist``, ``digits``, ``cifar``: the sets in memory
- ``photographs``: decoded and transformed one by one, with ``decoding``, ``augmentation`` and ``damage``
- ``image_folder``: photographs in folders, ImageNet; ``image_files``: how they are found and read
- ``shards``: photographs in tar files; ``tar_index``: where each lies; ``write_shards``: makes them from folders
- ``sources``: the errors of missing and damaged files, and downloads
"""

from lowprec.data.module import DataModule, DataOptions
from lowprec.data.normalization import Normalization
from lowprec.data.registry import create_data, list_data
from lowprec.data.sources import DataError

__all__ = ["DataError", "DataModule", "DataOptions", "Normalization", "create_data", "list_data"]
