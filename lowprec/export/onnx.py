"""int8 ONNX: QuantizeLinear/DequantizeLinear around each operator, which runtimes turn into integer kernels.

All activations are uint8 (zero point 128 where a tensor can be negative), so that adds find equal types. Weights of ternary
and 4-bit layers are their effective codes as int8, within ±64: pairs of products fit the saturating int16 sums of processors
without VNNI. Weights of 8-bit layers are uint8 with zero point 128, which takes another kernel; OpenVINO's are two of 7 bits
(:mod:`lowprec.export.openvino`); for processors with VNNI they are int8 in both. Scales are powers of two, so runtimes that
compute in float32 between quantize and dequantize are exact as well.
"""

from __future__ import annotations

from pathlib import Path

from onnx import helper

from lowprec.export import openvino
from lowprec.export.assembly import assemble, check_and_write
from lowprec.export.operators import write_step
from lowprec.export.options import DEFAULT_OPSET, ExportOptions, checked_options
from lowprec.export.qdq import QdqGraph
from lowprec.integer.model import IntegerModel, expect_integer_model
from lowprec.integer.operators import FloatLayerNorm
from lowprec.targets import writable_path

# The first operator set with LayerNormalization.
LAYER_NORM_OPSET = 17

__all__ = ["ExportOptions", "export_onnx"]


def export_onnx(model: IntegerModel, path: str | Path, options: ExportOptions | None = None) -> None:
    """Writes the integer model as an ONNX file: input ``images``, output ``logits`` float.

    The file is checked by ONNX's own checker, written to a temporary name and renamed. Its metadata holds lowprec's version,
    the recipe, every tensor's exponent, and the class names.

    Raises:
        TypeError: ``model`` is not an integer model. ValueError: an option that cannot be, a layer whose sums no runtime
            holds exactly, or runtime openvino for a model that computes partly in float. OSError: ``path`` is a folder or
            lies in none.
    """
    expect_integer_model(model, "export_onnx")
    path, shapes = writable_path(path), model.shapes()
    options = checked_options(options, shapes[model.steps[-1].name])
    opset = DEFAULT_OPSET if options.opset is None else options.opset
    if options.runtime == openvino.NAME and model.inexact_steps:
        first = next(step.name for step in model.steps if step.name in model.inexact_steps)
        raise ValueError(
            f"runtime=openvino: {first} computes in float, and OpenVINO fuses such models in ways that change codes "
            "(measured with 2026.4); choose runtime=onnxruntime"
        )
    norm = next((step.name for step in model.steps if isinstance(step.operator, FloatLayerNorm)), None)
    if norm is not None and opset < LAYER_NORM_OPSET:
        raise ValueError(f"opset={opset}: {norm} is a layer norm; give at least {LAYER_NORM_OPSET}")
    graph = QdqGraph(shapes, options.runtime, saturates=options.processor == "any")
    proto = assemble(model, graph, write_step, [helper.make_opsetid("", opset)], options, "int8")
    check_and_write(proto, path)
