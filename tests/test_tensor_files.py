"""Files are the same to the byte for the same content."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from lowprec.tensor_files import write_safetensors

TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor([1, 2, 3], dtype=torch.uint8)}
TEXTS = {"version": "2", "format": "lowprec", "name": 'é "quoted"\n', "checksum": "0f"}


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    # safetensors itself draws one of 24 orders of these texts each time.
    found = set()
    for _ in range(12):
        write_safetensors(tmp_path / "file.safetensors", TENSORS, TEXTS)
        found.add((tmp_path / "file.safetensors").read_bytes())
    assert len(found) == 1
    write_safetensors(tmp_path / "file.safetensors", TENSORS, dict(reversed(TEXTS.items())))
    assert {(tmp_path / "file.safetensors").read_bytes()} == found


@pytest.mark.parametrize("texts", [TEXTS, {}])
def test_what_was_written_is_read_again(tmp_path: Path, texts: dict[str, str]) -> None:
    path = tmp_path / "file.safetensors"
    write_safetensors(path, TENSORS, texts)
    loaded = safetensors.torch.load_file(path)
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())
    with safetensors.safe_open(path, framework="pt") as file:
        assert (file.metadata() or {}) == texts
    # As long as what safetensors writes: the header is whole and aligned.
    assert path.stat().st_size == len(safetensors.torch.save(TENSORS, metadata=texts))
