"""Safetensors files that have the same bytes each time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor

from lowprec.files import whole_file

# The header of a safetensors file: its length, then JSON, filled up with spaces so that the tensors are aligned.
LENGTH_BYTES = 8
HEADER_ALIGNMENT = 8
METADATA = "__metadata__"


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
