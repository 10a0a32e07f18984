"""From an integer model and an empty graph to a whole ONNX file: steps written in order, input, output, metadata."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from lowprec.export.exported_file import METADATA, seal
from lowprec.export.image_input import write_uint8_input
from lowprec.export.options import ExportOptions
from lowprec.export.qdq import QdqGraph
from lowprec.files import whole_file
from lowprec.integer.model import IntegerModel, Step
from lowprec.integer.operators import IntegerInput, IntegerLayer


def assemble(
    model: IntegerModel,
    graph: QdqGraph,
    write: Callable[[QdqGraph, Step], str],
    opsets: Sequence[onnx.OperatorSetIdProto],
    options: ExportOptions,
    kind: str,
) -> onnx.ModelProto:
    """An ONNX model: ``images``, as the options say, to ``logits`` float.

    write: adds a step's nodes to the graph and returns the tensor that it ends in, as :func:`write_step` does. kind: the
    file's format, one of ``FORMATS``.
    """
    result = ""
    for step in model.steps:
        if isinstance(step.operator, IntegerInput) and options.input != "float":
            assert options.normalization is not None
            write_uint8_input(graph, step, options.normalization, channels_last=options.input == "uint8_nhwc")
        else:
            result = write(graph, step)
    for node in graph.nodes:
        node.output[:] = ["logits" if output == result else output for output in node.output]
    nodes = _needed(graph.nodes)
    read = {name for node in nodes for name in node.input}
    batch = options.batch_size or "batch"
    channels, height, width = model.image_shape
    image = (height, width, channels) if options.input == "uint8_nhwc" else model.image_shape
    pixel = TensorProto.FLOAT if options.input == "float" else TensorProto.UINT8
    shape = graph.shapes[model.steps[-1].name]
    content = helper.make_graph(
        nodes,
        "lowprec",
        [helper.make_tensor_value_info("images", pixel, [batch, *image])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, *shape[1:]])],
        [constant for name, constant in graph.constants.items() if name in read],
    )
    standard = [opset for opset in opsets if not opset.domain]
    proto = helper.make_model(
        content,
        producer_name="lowprec",
        ir_version=helper.find_min_ir_version_for(standard),
        opset_imports=opsets,
    )
    helper.set_model_props(proto, {METADATA: json.dumps(_metadata(model, options, kind))})
    return proto


def _needed(nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The nodes that the logits depend on: runtimes would compute the values of codes that nothing reads."""
    read, kept = {"logits"}, []
    for node in reversed(nodes):
        if read.intersection(node.output):
            read.update(node.input)
            kept.append(node)
    return kept[::-1]


def check_and_write(proto: onnx.ModelProto, path: Path) -> None:
    """Checks a model with ONNX's own checker, writes it to a temporary name and renames it: a file is whole or absent."""
    onnx.checker.check_model(proto, full_check=True)
    write_proto(proto, path)


def write_proto(proto: onnx.ModelProto, path: Path) -> None:
    """Writes a model, with its checksum, to a temporary name and renames it."""
    seal(proto)
    with whole_file(path) as temporary:
        onnx.save(proto, temporary)


def layers_by_weight(model: IntegerModel) -> dict[str, IntegerLayer]:
    """The model's layers by the name that their weight tensor has in a graph."""
    return {f"{step.name}.weight": step.operator for step in model.steps if isinstance(step.operator, IntegerLayer)}


def _metadata(model: IntegerModel, options: ExportOptions, kind: str) -> dict[str, object]:
    return {
        **model.metadata,
        "format": kind,
        "runtime": options.runtime,
        "processor": options.processor,
        "input": options.input,
        "normalization": None if options.normalization is None else options.normalization._asdict(),
        "class_names": None if options.class_names is None else list(options.class_names),
        "preprocessing": None if options.preprocessing is None else dict(options.preprocessing),
        "exponents": {
            step.name: step.operator.output.exponent for step in model.steps if step.operator.output is not None
        },
    }
