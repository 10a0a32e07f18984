"""Reading exported files: whole, lowprec's own and unchanged, or one clear error."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError

# Keys of a file's metadata: what lowprec knows of it, as JSON, and a checksum over all else in the file.
METADATA, CHECKSUM = "lowprec", "lowprec_checksum"
# What a file holds: int8 codes, packed ones, or values for the qonnx package.
FORMATS = ("int8", "packed", "qonnx")


class ExportedFileError(ValueError):
    """A file that is no export of lowprec's, is damaged, or that a runtime cannot take; the message names it and what to do."""


def read_exported(path: str | Path) -> onnx.ModelProto:
    """The ONNX model in a file that lowprec exported; its checksum is not compared.

    Raises:
        FileNotFoundError: there is no such file. ExportedFileError: it is truncated, empty, damaged or another program's.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no ONNX file at {path}: lowprec.export_onnx(imodel, path) writes one")
    try:
        proto = onnx.load_model_from_string(Path(path).read_bytes())
    except (DecodeError, ValueError) as error:
        raise ExportedFileError(f"{path} is truncated, damaged or no ONNX file: export it again") from error
    texts = _texts(proto)
    if METADATA not in texts or CHECKSUM not in texts:
        what = (
            "was written by an earlier lowprec" if METADATA in texts else "was not exported by lowprec, or is damaged"
        )
        raise ExportedFileError(f"{path} {what}: export it again, with lowprec.export_onnx(imodel, path)")
    try:
        known = metadata(proto)
    except (ValueError, TypeError) as error:
        raise ExportedFileError(f"{path} is damaged: its metadata cannot be read. Export it again") from error
    if len(proto.graph.input) != 1 or not proto.graph.output or known.get("format") not in FORMATS:
        raise ExportedFileError(f"{path} is damaged: its input, output or format is missing. Export it again")
    return proto


def metadata(proto: onnx.ModelProto) -> dict[str, Any]:
    """What lowprec wrote into a file beside its graph; empty for files of others."""
    return dict(json.loads(_texts(proto).get(METADATA, "{}")))


def seal(proto: onnx.ModelProto) -> None:
    """Writes the checksum of a finished model into its metadata."""
    onnx.helper.set_model_props(proto, {**_texts(proto), CHECKSUM: _checksum(proto)})


def is_sealed(proto: onnx.ModelProto) -> bool:
    """Whether the model is as it was when it was exported: graph, weights, metadata and operator sets."""
    return _texts(proto).get(CHECKSUM) == _checksum(proto)


def _texts(proto: onnx.ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in proto.metadata_props}


def _checksum(proto: onnx.ModelProto) -> str:
    """CRC-32 over all of the model but its checksum."""
    value = zlib.crc32(proto.graph.SerializeToString(deterministic=True))
    for opset in proto.opset_import:
        value = zlib.crc32(f"{opset.domain} {opset.version}".encode(), value)
    texts = {key: text for key, text in _texts(proto).items() if key != CHECKSUM}
    value = zlib.crc32(json.dumps([proto.ir_version, *sorted(texts.items())]).encode(), value)
    return f"{value:08x}"
