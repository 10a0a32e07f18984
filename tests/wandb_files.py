"""Reads back what an offline W&B run wrote."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# W&B's service may write the end of a file after the run has said that it is finished.
PATIENCE_SECONDS = 30.0


def wandb_records(folder: Path) -> list[Any]:
    """The records (``wandb_internal_pb2.Record``) of the one offline run below ``folder``/wandb, which has ended."""
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        records = _parsed(file)
        if any(record.HasField("exit") for record in records):
            return records
        assert time.monotonic() < deadline, f"{file} has no end"
        time.sleep(0.1)


def _parsed(file: Path) -> list[Any]:
    from wandb.proto import wandb_internal_pb2

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
        if place + 7 + length > len(file):
            return  # still being written
        record += file[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""
