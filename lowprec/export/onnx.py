"""int8 ONNX: QuantizeLinear/DequantizeLinear around each operator, which ONNX Runtime turns into integer kernels.

All activations are uint8 (zero point 128 where a tensor can be negative), so that adds find equal types. Weights of ternary
and 4-bit layers are their effective codes as int8, within ±64: pairs of products fit the saturating int16 sums of
processors without VNNI. Weights of 8-bit layers are uint8 with zero point 128, which takes another kernel. Scales are
powers of two, so runtimes that compute in float32 between quantize and dequantize are exact as well.
"""

from __future__ import annotations

import os
from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper

from lowprec.export.operators import write_step
from lowprec.export.qdq import QdqGraph
from lowprec.integer.model import IntegerModel

OPSET = 18
IR_VERSION = 10


def export_onnx(model: IntegerModel, path: str | Path) -> None:
    """Writes the integer model as an ONNX file: input ``images`` [batch, C, H, W] float, output ``logits``.

    The file is checked by ONNX's own checker, written to a temporary name and renamed.

    Raises:
        TypeError: ``model`` is not an integer model.
    """
    if not isinstance(model, IntegerModel):
        raise TypeError(
            f"export_onnx expects an integer model, from lowprec.convert(qmodel), not {type(model).__name__}"
        )
    proto = _model_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        onnx.save(proto, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _model_proto(model: IntegerModel) -> onnx.ModelProto:
    images = torch.zeros(1, *model.image_shape)
    graph = QdqGraph({name: tuple(codes.shape) for name, codes in model.codes(images).items()})
    result = ""
    for step in model.steps:
        result = write_step(graph, step)
    for node in graph.nodes:
        node.output[:] = ["logits" if output == result else output for output in node.output]
    shape = graph.shapes[model.steps[-1].name]
    content = helper.make_graph(
        graph.nodes,
        "lowprec",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", *model.image_shape])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", *shape[1:]])],
        list(graph.constants.values()),
    )
    return helper.make_model(
        content, producer_name="lowprec", ir_version=IR_VERSION, opset_imports=[helper.make_opsetid("", OPSET)]
    )
