"""Exported files in the runtimes that they are for, on the CPU: ONNX Runtime and OpenVINO."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from lowprec.data.normalization import PIXEL_VALUES, Normalization
from lowprec.export.exported_file import ExportedFileError, is_sealed, metadata, read_exported
from lowprec.export.options import DEFAULT_OPSET
from lowprec.export.qdq import QdqGraph, values_name
from lowprec.images import check_images
from lowprec.integer.operators import Grid

# (names of outputs, input array) -> the outputs.
Compiled = Callable[[Sequence[str], np.ndarray], list[np.ndarray]]

RUNTIME_NAMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


class RuntimeMissingError(ImportError):
    """The runtime's package is not installed; the message says how to."""


class ExportedModel:
    """A file of :func:`lowprec.export_onnx` in one runtime: float images in, arrays out.

    Takes normalised float images whatever the file's input is, and any batch. runtime: None is the one that the file was
    written for. outputs: names of tensors that become outputs beside the logits (which may change what a runtime fuses).
    changed: whether a file may be run that is not as it was exported; ``unchanged`` says whether it is.

    Raises:
        FileNotFoundError: there is no such file. ExportedFileError: it is damaged, or not for this runtime. ValueError: an
            unknown runtime, or a file for processors with VNNI on one without. RuntimeMissingError: it is not installed.
    """

    def __init__(
        self, path: str | Path, runtime: str | None = None, outputs: Sequence[str] = (), changed: bool = False
    ) -> None:
        self.path = path
        proto = read_exported(path)
        known = metadata(proto)
        self.unchanged = is_sealed(proto)
        if not self.unchanged and not changed:
            raise ExportedFileError(f"{path} was changed or damaged after it was exported: export it again")
        self.runtime = str(runtime or known["runtime"])
        if self.runtime not in RUNTIME_NAMES:
            raise ValueError(f"runtime={self.runtime!r}: choose one of {', '.join(RUNTIME_NAMES)}")
        if known["format"] == "qonnx":
            raise ExportedFileError(
                f"{path} is for the qonnx package, FINN and hls4ml: {RUNTIME_NAMES[self.runtime]} takes files of "
                "lowprec.export_onnx"
            )
        if known["format"] == "packed" and self.runtime != "onnxruntime":
            raise ExportedFileError(
                f"{path} holds packed weights, which ONNX Runtime alone takes: for {RUNTIME_NAMES[self.runtime]} write a file "
                f"with lowprec.export_onnx(imodel, path, lowprec.ExportOptions(runtime={self.runtime!r}))"
            )
        self.tensors = {name for node in proto.graph.node for name in node.output}
        present = {output.name for output in proto.graph.output}
        for name in outputs:
            if name not in present:
                value = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, None)
                proto.graph.output.append(value)
        self.input = str(known.get("input", "float"))
        normalization: Any = known.get("normalization")
        self.normalization = Normalization(**normalization) if normalization else None
        if known.get("processor") == "vnni" and saturates(self.runtime):
            raise ValueError(
                f"{path} is for processors with VNNI (processor=vnni), and {RUNTIME_NAMES[self.runtime]} saturates on this "
                "one: export with processor=any"
            )
        sizes = [dimension.dim_value for dimension in proto.graph.input[0].type.tensor_type.shape.dim]
        if len(sizes) != 4:
            raise ExportedFileError(f"{path} is damaged: its input is no batch of images. Export it again")
        self.batch_size = sizes[0] or None
        image = (sizes[3], *sizes[1:3]) if self.input == "uint8_nhwc" else sizes[1:]
        self.image_shape: tuple[int, int, int] = tuple(image)
        # What it was exported with, by the names in ExportOptions.
        self.options: dict[str, object] = {
            **{name: known.get(name) for name in ("runtime", "processor", "input")},
            "batch_size": self.batch_size,
            "opset": max(opset.version for opset in proto.opset_import if not opset.domain),
        }
        with self._failures("load"):
            self._run = compile_model(proto.SerializeToString(), self.runtime)

    def run(self, names: Sequence[str], images: Tensor) -> list[np.ndarray]:
        """The outputs of these names for images [B, C, H, W]; a fixed batch is filled up with zeros, which are cut off.

        Raises:
            TypeError: not float32 images. ValueError: another shape, NaN or infinite values, or no pixels where the file takes
                pixels. ExportedFileError: the runtime cannot compute the file.
        """
        check_images(images, self.image_shape)
        inputs = self._inputs(images)
        # Kernels take no empty batch: it is filled up with one image.
        size = self.batch_size or max(len(inputs), 1)
        parts = []
        for start in range(0, max(len(inputs), 1), size):
            part = inputs[start : start + size]
            padding = [(0, size - len(part)), *[(0, 0)] * (part.ndim - 1)]
            filled = part if len(part) == size else np.pad(part, padding)
            with self._failures("run"):
                arrays = self._run(names, filled)
            # Their share of the first axis, which may count windows of images.
            parts.append(
                arrays if filled is part else [array[: -(-len(array) * len(part) // size)] for array in arrays]
            )
        return parts[0] if len(parts) == 1 else [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]

    def __call__(self, images: Tensor) -> Tensor:
        """Logits [B, classes] float32."""
        return torch.from_numpy(self.run(["logits"], images)[0])

    @contextmanager
    def _failures(self, action: str) -> Iterator[None]:
        """Within it, what a runtime raises, in types of its own, is an ExportedFileError."""
        try:
            yield
        except (RuntimeMissingError, MemoryError):
            raise
        except Exception as error:
            name = RUNTIME_NAMES[self.runtime]
            advice = (
                f"update {name}, or export for an older opset" if self.unchanged else "it is damaged: export it again"
            )
            first = str(error).strip().partition("\n")[0]
            raise ExportedFileError(f"{name} cannot {action} {self.path}; {advice} ({first})") from error

    def _inputs(self, images: Tensor) -> np.ndarray:
        if self.normalization is None or self.input == "float":
            return images.numpy()
        pixels = self.normalization.pixels(images)
        return (pixels.permute(0, 2, 3, 1) if self.input == "uint8_nhwc" else pixels).contiguous().numpy()


def compile_model(model: bytes, runtime: str) -> Compiled:
    """A serialized model, compiled with the runtime's default optimizations.

    Raises:
        ValueError: an unknown runtime. RuntimeMissingError: it is not installed.
    """
    if runtime == "onnxruntime":
        session = onnx_session(model)
        return lambda names, array: session.run(list(names), {"images": array})
    if runtime == "openvino":
        return _openvino(model)
    raise ValueError(f"runtime={runtime!r}: choose one of {', '.join(RUNTIME_NAMES)}")


@functools.cache
def saturates(runtime: str) -> bool:
    """Whether this processor's kernels of a runtime add pairs of products in int16, found out by a sum that does not fit."""
    channels = 64
    graph = QdqGraph({})
    graph.quantize("input", "images", Grid(0, 0, PIXEL_VALUES - 1))
    codes = np.full((channels, channels, 1, 1), 127, np.int8)
    weight = graph.dequantize_constant("weight", codes, np.full(channels, -14), 0, 0)
    graph.node("Conv", [values_name("input"), weight], "sums")
    graph.quantize("output", "sums", Grid(0, 0, PIXEL_VALUES - 1))
    shape = [1, channels, 8, 8]
    content = onnx.helper.make_graph(
        graph.nodes,
        "saturation",
        [onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, shape)],
        [onnx.helper.make_tensor_value_info(values_name("output"), onnx.TensorProto.FLOAT, shape)],
        list(graph.constants.values()),
    )
    opset = onnx.helper.make_opsetid("", DEFAULT_OPSET)
    proto = onnx.helper.make_model(
        content, opset_imports=[opset], ir_version=onnx.helper.find_min_ir_version_for([opset])
    )
    run = compile_model(proto.SerializeToString(), runtime)
    (output,) = run([values_name("output")], np.full(shape, PIXEL_VALUES - 1, np.float32))
    return bool((output != round(channels * (PIXEL_VALUES - 1) * 127 / 2**14)).any())


def onnx_session(model: str | Path | bytes) -> onnxruntime.InferenceSession:
    """A session for a path or a serialized model, with ONNX Runtime's default optimizations."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: it warns of unused initializers
    model = str(model) if isinstance(model, Path) else model
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@functools.cache
def openvino_core() -> Any:
    """The process's one Core, never freed.

    OpenVINO's CPU plugin gives the calling thread an alternate signal stack and, when it is freed, unmaps that without
    taking it back (2026.4): the next signal, a Ctrl-C for one, is then a segmentation fault.
    """
    try:
        import openvino
    except ImportError as error:
        raise RuntimeMissingError(
            'OpenVINO is not installed: pip install "lowprec[openvino]", or verify with runtime=onnxruntime'
        ) from error
    return openvino.Core()


def _openvino(model: bytes) -> Compiled:
    core = openvino_core()
    # The default may round 32-bit sums to bfloat16; integer kernels are the same with both.
    compiled = core.compile_model(core.read_model(model, b""), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(names: Sequence[str], array: np.ndarray) -> list[np.ndarray]:
        results = compiled({"images": array})
        return [results[name] for name in names]

    return run
