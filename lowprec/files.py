"""Files that appear whole or not at all, and of tensors with the same bytes each time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
from torch import Tensor

# The header of a safetensors file: its length, then JSON, filled up with spaces so that the tensors are aligned.
LENGTH_BYTES = 8
HEADER_ALIGNMENT = 8
METADATA = "__metadata__"


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to; at the end it is synced to the disk and renamed to ``path``.

    If anything fails on the way (a full disk, a kill), what lay at ``path`` before is untouched.

    Raises:
        OSError: the file cannot be written; the temporary one is removed.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        # The new name is in the folder, which is synced by itself.
        _sync(path.parent)
    except OSError as error:
        # A full disk is reported without the file's name.
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_safetensors(path: str | Path, tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write contiguous ``tensors`` and ``metadata`` (texts) to a safetensors file, whole or not at all; the same content
    gives the same bytes.

    Raises:
        OSError: the file cannot be written.
    """
    content = safetensors.torch.save(tensors, metadata=dict(metadata))
    start = LENGTH_BYTES + int.from_bytes(content[:LENGTH_BYTES], "little")
    header = json.loads(content[LENGTH_BYTES:start])
    if metadata:
        # safetensors writes these in the random order of a hash table, all else in a fixed one.
        header[METADATA] = dict(sorted(metadata.items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    with whole_file(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        file.write(memoryview(content)[start:])


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
