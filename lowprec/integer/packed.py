"""Packed files: an integer model as safetensors, with 2-, 4- and 8-bit codes, its graph, a format version and a checksum.

Everything is data: loading runs no code of the original model and needs none.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowprec.integer.model import IntegerModel, Step, expect_integer_model
from lowprec.integer.operators import OPERATORS, Grid, IntegerLayer, IntegerOperator
from lowprec.numerics.effective_codes import plane_count
from lowprec.numerics.packing import pack_codes, packed_layout, stored_bits, unpack_codes
from lowprec.targets import writable_path
from lowprec.tensor_files import write_safetensors

FORMAT = "lowprec"
VERSION = 2
# Of files that hold weights of two planes, which readers of version 2 alone would misread.
TWO_PLANES_VERSION = 3
VERSIONS = (VERSION, TWO_PLANES_VERSION)
GRAPH = "graph"
# The keys that make a mapping in the graph a Grid.
GRID_KEYS = {"exponent", "low", "high"}


class PackedFileError(ValueError):
    """A file that is no packed model, is damaged, or was written by another version; the message names it."""


def save(model: IntegerModel, path: str | Path) -> None:
    """Writes an integer model as one packed safetensors file: to a temporary name, synced, then renamed.

    Raises:
        TypeError: ``model`` is not an integer model. OSError: ``path`` is a folder, lies in none, or cannot be written.
    """
    expect_integer_model(model, "save")
    path = writable_path(path)
    tensors: dict[str, Tensor] = {}
    graph: list[dict[str, Any]] = []
    for step in model.steps:
        entry = {"name": step.name, "kind": step.operator.KIND, "inputs": step.inputs, **step.operator.attributes()}
        if isinstance(step.operator, IntegerLayer):
            entry["shape"] = list(step.operator.codes.shape)
            stored = _packed_tensors(step.operator)
        else:
            stored = step.operator.tensors()
        for name, tensor in stored.items():
            tensors[f"{step.name}.{name}"] = tensor.cpu().contiguous()
        graph.append(entry)
    text = json.dumps(
        {"image_shape": model.image_shape, "metadata": model.metadata, "steps": graph}, separators=(",", ":")
    )
    tensors[GRAPH] = torch.frombuffer(bytearray(zlib.compress(text.encode(), 9)), dtype=torch.uint8)
    version = max((_version(step.operator) for step in model.steps), default=VERSION)
    metadata = {"format": FORMAT, "version": str(version), "checksum": _checksum(tensors)}
    write_safetensors(path, tensors, metadata)


def load(path: str | Path) -> IntegerModel:
    """The integer model in a packed file; it gives the same codes as the one that was saved.

    Raises:
        FileNotFoundError: there is no such file.
        PackedFileError: the file is truncated, damaged, of another format, or of another version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no packed model at {path}: lowprec.save(imodel, path) writes one")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise PackedFileError(
            f"{path} is truncated or no safetensors file ({error}): copy or export it again"
        ) from error
    if metadata.get("format") != FORMAT or GRAPH not in tensors:
        raise PackedFileError(f"{path} is a safetensors file, but no packed model of lowprec.save")
    if metadata.get("version") not in {str(known) for known in VERSIONS}:
        version = metadata.get("version", "")
        later = version.isdecimal() and int(version) > max(VERSIONS)
        advice = "update lowprec" if later else "export it again"
        known = " and ".join(map(str, VERSIONS))
        raise PackedFileError(f"{path} has format version {version}, this lowprec reads versions {known}: {advice}")
    if metadata.get("checksum") != _checksum(tensors):
        raise PackedFileError(f"{path} is damaged: its checksum does not match its content. Copy or export it again")
    content = json.loads(zlib.decompress(tensors[GRAPH].numpy().tobytes()))
    unknown = sorted({entry["kind"] for entry in content["steps"]} - set(OPERATORS))
    if unknown:
        raise PackedFileError(
            f"{path} holds operators that this lowprec does not know ({', '.join(unknown)}): update it"
        )
    steps = [_step(entry, tensors) for entry in content["steps"]]
    return IntegerModel(steps, tuple(content["image_shape"]), content["metadata"]).eval()


def _version(operator: IntegerOperator) -> int:
    return TWO_PLANES_VERSION if isinstance(operator, IntegerLayer) and operator.planes == 2 else VERSION


def _packed_tensors(layer: IntegerLayer) -> dict[str, Tensor]:
    bits = stored_bits(layer.bits, layer.planes)
    tensors = {"codes": pack_codes(layer.codes, bits), "exponents": layer.exponents, "bias": layer.bias}
    if layer.mantissas is not None:
        tensors["mantissas"] = layer.mantissas
    expected = packed_layout(layer.bits, layer.layout, layer.planes)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == expected
    return tensors


def _step(entry: dict[str, Any], tensors: dict[str, Tensor]) -> Step:
    name, kind, inputs = (entry.pop(key) for key in ("name", "kind", "inputs"))
    arguments = {key: _decoded(value) for key, value in entry.items()}
    prefix = f"{name}."
    stored: dict[str, Any] = {
        key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.rpartition(".")[0] == name
    }
    if issubclass(OPERATORS[kind], IntegerLayer):
        shape = arguments.pop("shape")
        stored.setdefault("mantissas", None)
        bits = stored_bits(arguments["bits"], plane_count(stored["mantissas"]))
        stored["codes"] = unpack_codes(stored["codes"], bits, shape)
    return Step(name, tuple(inputs), OPERATORS[kind](**stored, **arguments))


def _decoded(value: Any) -> Any:
    """What JSON made lists and mappings of: tuples and grids again."""
    if isinstance(value, list):
        return tuple(map(_decoded, value))
    return Grid(**value) if isinstance(value, dict) and value.keys() == GRID_KEYS else value


def _checksum(tensors: dict[str, Tensor]) -> str:
    """CRC-32 over names, shapes and bytes of all tensors, in the order of their names."""
    value = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        value = zlib.crc32(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().tobytes(), value)
    return f"{value:08x}"
