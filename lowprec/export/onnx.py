"""int8 ONNX: QuantizeLinear/DequantizeLinear around each operator, which runtimes turn into integer kernels.

All activations are uint8 (zero point 128 where a tensor can be negative), so that adds find equal types. Weights of ternary
and 4-bit layers are their effective codes as int8, within ±64: pairs of products fit the saturating int16 sums of
processors without VNNI. Weights of 8-bit layers are uint8 with zero point 128, which takes another kernel; OpenVINO's are
two of 7 bits (:mod:`lowprec.export.openvino`). Scales are powers of two, so runtimes that compute in float32 between
quantize and dequantize are exact as well.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from lowprec.export.image_input import Normalization, write_uint8_input
from lowprec.export.operators import write_step
from lowprec.export.qdq import QdqGraph
from lowprec.integer.model import IntegerModel

RUNTIMES = ("onnxruntime", "openvino")
INPUTS = ("float", "uint8", "uint8_nhwc")
# Older operator sets lack dequantization by channel; newer ones than 25 are not known to the runtimes measured.
OPSETS = range(13, 26)
DEFAULT_OPSET = 18
# Key of a file's metadata under which lowprec's own stands, as JSON.
METADATA = "lowprec"


@dataclass(frozen=True)
class ExportOptions:
    """How an ONNX file is written.

    runtime: ``onnxruntime`` or ``openvino``, whose exact form is written (the second is exact in ONNX Runtime too). opset:
    13 to 25. batch_size: None for any. input: ``float`` (normalised images [B, C, H, W]), ``uint8`` (pixels of the same
    shape) or ``uint8_nhwc`` ([B, H, W, C], as cameras give them), for which ``normalization`` says what the model was
    trained with. class_names: kept in the file's metadata.
    """

    runtime: str = "onnxruntime"
    opset: int = DEFAULT_OPSET
    batch_size: int | None = None
    input: str = "float"
    normalization: Normalization | None = None
    class_names: Sequence[str] | None = None

    def validate(self) -> None:
        """Raises ValueError for an option that cannot be; the message names it and the choices."""
        for name, value, choices in (("runtime", self.runtime, RUNTIMES), ("input", self.input, INPUTS)):
            if value not in choices:
                raise ValueError(f"export.{name}={value!r}: choose one of {', '.join(choices)}")
        if self.opset not in OPSETS:
            raise ValueError(f"export.opset={self.opset}: give one of {OPSETS.start} to {OPSETS.stop - 1}")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"export.batch_size={self.batch_size}: give at least 1, or null for any")
        if self.input != "float" and self.normalization is None:
            raise ValueError(f"export.input={self.input}: give the normalization (mean, std) of the training images")


def export_onnx(model: IntegerModel, path: str | Path, options: ExportOptions | None = None) -> None:
    """Writes the integer model as an ONNX file: input ``images``, output ``logits`` float.

    The file is checked by ONNX's own checker, written to a temporary name and renamed. Its metadata holds lowprec's version,
    the recipe, every tensor's exponent, and the class names.

    Raises:
        TypeError: ``model`` is not an integer model. ValueError: an option that cannot be, or a layer whose sums no runtime
            holds exactly.
    """
    if not isinstance(model, IntegerModel):
        raise TypeError(
            f"export_onnx expects an integer model, from lowprec.convert(qmodel), not {type(model).__name__}"
        )
    options = options or ExportOptions()
    options.validate()
    proto = _model_proto(model, options)
    onnx.checker.check_model(proto, full_check=True)
    write_proto(proto, Path(path))


def write_proto(proto: onnx.ModelProto, path: Path) -> None:
    """Writes a model to a temporary name and renames it, so that a file is whole or absent."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        onnx.save(proto, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def metadata(proto: onnx.ModelProto) -> dict[str, object]:
    """What lowprec wrote into a file beside its graph; empty for files of others."""
    texts = {entry.key: entry.value for entry in proto.metadata_props}
    return dict(json.loads(texts[METADATA])) if METADATA in texts else {}


def _model_proto(model: IntegerModel, options: ExportOptions) -> onnx.ModelProto:
    graph = QdqGraph(model.shapes(), options.runtime)
    result = ""
    for step in model.steps:
        if not step.inputs and options.input != "float":
            assert options.normalization is not None
            write_uint8_input(graph, step, options.normalization, channels_last=options.input == "uint8_nhwc")
        else:
            result = write_step(graph, step)
    for node in graph.nodes:
        node.output[:] = ["logits" if output == result else output for output in node.output]
    batch = options.batch_size or "batch"
    channels, height, width = model.image_shape
    image = (height, width, channels) if options.input == "uint8_nhwc" else model.image_shape
    kind = TensorProto.FLOAT if options.input == "float" else TensorProto.UINT8
    shape = graph.shapes[model.steps[-1].name]
    content = helper.make_graph(
        graph.nodes,
        "lowprec",
        [helper.make_tensor_value_info("images", kind, [batch, *image])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, *shape[1:]])],
        list(graph.constants.values()),
    )
    opset = helper.make_opsetid("", options.opset)
    proto = helper.make_model(
        content, producer_name="lowprec", ir_version=helper.find_min_ir_version_for([opset]), opset_imports=[opset]
    )
    helper.set_model_props(proto, {METADATA: json.dumps(_metadata(model, options))})
    return proto


def _metadata(model: IntegerModel, options: ExportOptions) -> dict[str, object]:
    return {
        **model.metadata,
        "runtime": options.runtime,
        "input": options.input,
        "normalization": None if options.normalization is None else options.normalization._asdict(),
        "class_names": None if options.class_names is None else list(options.class_names),
        "exponents": {
            step.name: step.operator.output.exponent for step in model.steps if step.operator.output is not None
        },
    }
