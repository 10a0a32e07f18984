"""Where each image lies in the tar files of a folder: read from their headers once, and kept."""

import hashlib
import json
import logging
import os
import re
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lowprec.data.sources import DataError, cache_folder
from lowprec.files import whole_file

__all__ = ["IMAGE_EXTENSIONS", "ShardImages", "index_shards"]

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
INDEX_FILE = ".lowprec_index.npz"
# To be raised when what is kept, or how it is read from the tar files, changes.
INDEX_VERSION = 1
BLOCK = 512
READERS = 16

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardImages:
    """Images in the tar files ``shards`` [S] of ``folder``.

    For each image its tar file as int32 [N], the place of its first byte and its size in bytes as int64 [N], the name of
    the member as bytes [N], and its class as int64 [N].
    """

    folder: Path
    shards: npt.NDArray[Any]
    shard: npt.NDArray[np.int32]
    offset: npt.NDArray[np.int64]
    size: npt.NDArray[np.int64]
    member: npt.NDArray[Any]
    classes: npt.NDArray[np.int64]

    @property
    def labels(self) -> Tensor:
        return torch.from_numpy(self.classes)

    def name(self, index: int) -> str:
        return f"{self._path(index)}: {os.fsdecode(self.member[index])}"

    def identities(self) -> list[bytes]:
        # Members are often named by a running number alone.
        return [
            b"%s %d" % (member, size) for member, size in zip(self.member.tolist(), self.size.tolist(), strict=True)
        ]

    def read(self, index: int) -> bytes:
        size = int(self.size[index])
        try:
            # Opened for each image: a set has more tar files than a process may hold open.
            descriptor = os.open(self._path(index), os.O_RDONLY)
            try:
                content = os.pread(descriptor, size, int(self.offset[index]))
            finally:
                os.close(descriptor)
        except OSError as error:
            raise DataError(f"{self._path(index)} cannot be read ({error.strerror}): check its permissions") from error
        if len(content) != size:
            raise DataError(f"{self._path(index)} has become shorter since it was indexed: copy it again")
        return content

    def _path(self, index: int) -> Path:
        return self.folder / os.fsdecode(self.shards[self.shard[index]])


def index_shards(folder: Path) -> ShardImages:
    """The images of ``folder/*.tar``, in the order of the files' names and of the members.

    The index is kept in the folder or, where that cannot be written to, in the cache folder. A tar file is read again
    when its size or time of modification has changed.

    Raises:
        DataError: there are no tar files; one is truncated, cannot be read, or is not laid out as WebDataset does it.
    """
    try:
        found = sorted(entry.name for entry in os.scandir(folder) if entry.name.endswith(".tar") and entry.is_file())
        states = {name: (folder / name).stat() for name in found}
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read ({error.strerror}): check its permissions") from error
    if not found:
        raise DataError(f"the folder {folder} has no tar files: shards are named NAME.tar, and are not compressed")
    keys = {name: f"{name}\0{state.st_size}\0{state.st_mtime_ns}" for name, state in states.items()}
    kept = _kept_entries(folder)
    changed = [name for name in found if keys[name] not in kept]
    if changed:
        logger.info("reading the headers of %d tar files in %s, once", len(changed), folder)
        # Threads wait for the disk together; the headers of an image and of its label take some 50 µs.
        with ThreadPoolExecutor(READERS) as pool:
            read = dict(zip(changed, pool.map(_read_entries, [folder / name for name in changed]), strict=True))
        kept = {keys[name]: read[name] if name in read else kept[keys[name]] for name in found}
        _keep(folder, kept)
    entries = [kept[keys[name]] for name in found]
    return ShardImages(
        folder,
        shards=np.array([os.fsencode(name) for name in found]),
        shard=np.repeat(np.arange(len(found), dtype=np.int32), [len(entry.size) for entry in entries]),
        offset=np.concatenate([entry.offset for entry in entries]),
        size=np.concatenate([entry.size for entry in entries]),
        member=np.concatenate([entry.member for entry in entries]),
        classes=np.concatenate([entry.label for entry in entries]),
    )


@dataclass(frozen=True)
class _Entries:
    """The images of one tar file, [N] each."""

    offset: npt.NDArray[np.int64]
    size: npt.NDArray[np.int64]
    label: npt.NDArray[np.int64]
    member: npt.NDArray[Any]


def _read_entries(path: Path) -> _Entries:
    images: dict[str, tuple[int, int, str]] = {}
    labels: dict[str, int] = {}
    end = 0
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                parts = re.fullmatch(r"((?:.*/)?[^/.]+)\.([^/]+)", member.name)
                if not member.isfile() or parts is None:
                    continue
                key, extension = parts[1], parts[2].lower()
                if extension in IMAGE_EXTENSIONS:
                    if key in images:
                        raise DataError(f"{path}: the key {key} has two images, {images[key][2]} and {member.name}")
                    images[key] = (member.offset_data, member.size, member.name)
                elif extension == "cls" or (extension == "json" and key not in labels):
                    content = archive.extractfile(member)
                    assert content is not None  # it is a plain file
                    label = _label(content.read(), extension, f"{path}: {member.name}")
                    if label is not None:
                        labels[key] = label
        with path.open("rb") as file:  # tarfile takes a file that ends between two members for a whole one
            file.seek(end)
            whole = file.read(BLOCK) == bytes(BLOCK)
    except tarfile.TarError as error:
        raise DataError(f"{path} is truncated, compressed or no tar file ({error}): write or copy it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}): check its permissions") from error
    if not whole:
        raise DataError(f"{path} is truncated or damaged: it does not end as tar files do: write or copy it again")
    unlabelled = [name for key, (_, _, name) in images.items() if key not in labels]
    if unlabelled:
        raise DataError(
            f"{path}: {len(unlabelled)} of {len(images)} images have no label, the first is {unlabelled[0]}: each KEY.jpg "
            "needs a KEY.cls (the class index as text) or a KEY.json with an integer field label"
        )
    lone = [key for key in labels if key not in images]
    if lone:
        raise DataError(
            f"{path}: {len(lone)} labels have no image ({', '.join(IMAGE_EXTENSIONS)}), the first is {lone[0]}"
        )
    if not images:
        raise DataError(f"{path} holds no images: expected are members KEY.jpg and KEY.cls")
    offsets, sizes, members = zip(*images.values(), strict=True)
    return _Entries(
        np.array(offsets),
        np.array(sizes),
        np.array([labels[key] for key in images]),
        np.array(list(map(os.fsencode, members))),
    )


def _label(content: bytes, extension: str, where: str) -> int | None:
    """The class index; None for a JSON file that has none."""
    try:
        value = json.loads(content) if extension == "json" else int(content)
    except ValueError as error:
        raise DataError(
            f"{where} is no {'JSON' if extension == 'json' else 'class index'}: {content[:40]!r}"
        ) from error
    if extension == "json":
        value = value.get("label") if isinstance(value, dict) else None
        if value is None:
            return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise DataError(f"{where}: the label is {value!r}, expected a class index from 0")
    return value


def _index_paths(folder: Path) -> tuple[Path, Path]:
    """Where the index of ``folder`` is kept: beside the tar files, or else in the cache."""
    digest = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    return folder / INDEX_FILE, cache_folder() / "shards" / f"{digest}.npz"


def _kept_entries(folder: Path) -> dict[str, _Entries]:
    """By name, size and time of the tar file; empty where there is no index, or a damaged one."""
    for path in _index_paths(folder):
        try:
            with np.load(path, allow_pickle=False) as content:
                if int(content["version"]) != INDEX_VERSION:
                    continue
                ends = np.cumsum(content["images"])[:-1]
                parts = [np.split(content[name], ends) for name in ("offset", "size", "label", "member")]
                return {str(key): _Entries(*part) for key, *part in zip(content["key"], *parts, strict=True)}
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
            continue
    return {}


def _keep(folder: Path, entries: dict[str, _Entries]) -> None:
    arrays = {
        "version": np.array(INDEX_VERSION),
        "key": np.array(list(entries)),
        "images": np.array([len(entry.size) for entry in entries.values()]),
    }
    for name in ("offset", "size", "label", "member"):
        arrays[name] = np.concatenate([getattr(entry, name) for entry in entries.values()])
    beside, cached = _index_paths(folder)
    try:
        _write(beside, arrays)
    except OSError:
        try:
            _write(cached, arrays)
        except OSError as error:
            logger.warning("the index of %s cannot be kept (%s): its tar files are read each time", folder, error)


def _write(path: Path, arrays: dict[str, npt.NDArray[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # none is named allow_pickle
