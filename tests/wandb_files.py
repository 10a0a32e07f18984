"""Reads back what an offline W&B run wrote."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def wandb_records(folder: Path) -> list[Any]:
    """The records (``wandb_internal_pb2.Record``) of the one offline run below ``folder``/wandb."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    records = []
    for content in _contents(file.read_bytes()):
        records.append(wandb_internal_pb2.Record())
        records[-1].ParseFromString(content)
    return records


def wandb_artifacts(records: list[Any]) -> list[Any]:
    """The artifacts (``ArtifactRecord``) among the records."""
    return [
        record.request.log_artifact.artifact if record.HasField("request") else record.artifact
        for record in records
        if record.HasField("artifact") or record.request.HasField("log_artifact")
    ]


def _contents(file: bytes) -> Iterator[bytes]:
    """A .wandb file has LevelDB's log format: blocks of 32 KiB, records split over them."""
    place, record = 7, b""
    while place + 7 <= len(file):
        left = 32_768 - place % 32_768
        if left < 7:  # too little for a header: the block is padded
            place += left
            continue
        length, kind = struct.unpack("<HB", file[place + 4 : place + 7])
        record += file[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""
