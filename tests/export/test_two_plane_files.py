"""Exported files of two ternary planes: both planes in 2 bits, and the integer executor's codes."""

from __future__ import annotations

from collections import Counter
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from integer_models import operator_alone, pointwise
from networks import images, quantize, random_network
from onnx import TensorProto
from torch import Tensor

import lowprec
from lowprec.export.packed_onnx import export_packed_onnx
from lowprec.export.qdq import values_name
from lowprec.export.qonnx import export_qonnx
from lowprec.export.runtime import onnx_session
from lowprec.integer.model import IntegerModel
from lowprec.integer.operators import IntegerLayer
from lowprec.recipe import Recipe, Rule, WeightScheme

# Grouped, depthwise-like and pointwise layers, a multiply-add and two linear ones.
NETWORK = 6


def recipe(cluster_size: int, layout: str) -> Recipe:
    return Recipe(weights=WeightScheme(2, cluster_size, layout, planes=2), rules=[Rule("@classifier", planes=1)])


def every_pair() -> tuple[IntegerModel, Tensor]:
    """Weights of every code for mantissas of both signs, |a1| + |a2| up to 64, and images that take each out alone."""
    pairs = [
        (a1, a2) for a1 in range(-64, 65, 3) for a2 in {0, 1, 64 - abs(a1), abs(a1) - 64} if abs(a1) + abs(a2) <= 64
    ]
    codes = torch.arange(-4, 5).expand(len(pairs), -1).to(torch.int8).contiguous()
    layer = pointwise(codes, torch.tensor(pairs).T.to(torch.int8)[..., None], 2, 9)
    return operator_alone(layer, layer.input, (9, 1, 1)), torch.eye(9).view(9, 9, 1, 1)


def kernels(file: Path) -> Counter[str]:
    """How many operators of each kind ONNX Runtime runs for a file."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(file.with_suffix(".optimized.onnx"))
    onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


@pytest.mark.parametrize(("cluster_size", "layout"), [(1, "kernel"), (3, "element"), (4, "kernel"), (64, "element")])
def test_packed_onnx(cluster_size: int, layout: str, tmp_path: Path) -> None:
    qmodel, imodel = quantize(random_network(NETWORK), recipe(cluster_size, layout), images(NETWORK))
    file = tmp_path / "packed.onnx"
    export_packed_onnx(imodel, file)
    lowprec.verify(qmodel, imodel, [images(7)], onnx=file).raise_if_different()
    lowprec.export_onnx(imodel, tmp_path / "int8.onnx")
    assert kernels(file) == kernels(tmp_path / "int8.onnx")
    constants = {tensor.name: tensor for tensor in onnx.load(file).graph.initializer}
    found = 0
    for step in imodel.steps:
        if isinstance(step.operator, IntegerLayer) and step.operator.planes == 2:
            found += 1
            assert f"{step.name}.weight" not in constants
            for plane in ("first", "residual"):
                codes = constants[f"{step.name}.weight.{plane}"]
                assert codes.data_type == TensorProto.INT2
                assert len(codes.raw_data) == ceil(step.operator.codes.numel() / 4)
                mantissas = constants[f"{step.name}.weight.{plane}.mantissas"]
                assert mantissas.data_type == TensorProto.INT8
                assert len(mantissas.raw_data) == step.operator.layout.clusters
    assert found >= 2


def test_every_code_in_onnx_runtime(tmp_path: Path) -> None:
    imodel, each = every_pair()
    for export, name in ((export_packed_onnx, "packed"), (lowprec.export_onnx, "int8")):
        export(imodel, tmp_path / f"{name}.onnx")
        (logits,) = onnx_session(tmp_path / f"{name}.onnx").run(["logits"], {"images": each.numpy()})
        assert torch.equal(torch.from_numpy(logits), imodel(each))


@pytest.mark.parametrize(("cluster_size", "layout"), [(3, "kernel"), (4, "element")])
def test_openvino(cluster_size: int, layout: str, tmp_path: Path) -> None:
    qmodel, imodel = quantize(random_network(NETWORK), recipe(cluster_size, layout), images(NETWORK))
    file = tmp_path / "model.onnx"
    lowprec.export_onnx(imodel, file, lowprec.ExportOptions(runtime="openvino"))
    for runtime in ("openvino", "onnxruntime"):
        lowprec.verify(qmodel, imodel, [images(7)], onnx=file, runtime=runtime).raise_if_different()


def executed(file: Path, image: Tensor) -> dict[str, Any]:
    pytest.importorskip("qonnx", reason="the qonnx package needs Python 3.11 beside an onnx that knows INT2")
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx

    found: dict[str, Any] = execute_onnx(
        ModelWrapper(str(file)), {"images": image.numpy()}, return_full_exec_context=True
    )
    return found


@pytest.mark.parametrize("cluster_scales", [True, False])
@pytest.mark.parametrize(("cluster_size", "layout"), [(3, "kernel"), (4, "element")])
def test_qonnx(cluster_size: int, layout: str, cluster_scales: bool, tmp_path: Path) -> None:
    _, imodel = quantize(random_network(NETWORK), recipe(cluster_size, layout), images(NETWORK))
    file = tmp_path / "model.onnx"
    export_qonnx(imodel, file, cluster_scales)
    image = images(7, 1)
    found, expected = executed(file, image), imodel.codes(image)
    for step in imodel.steps[:-1]:
        assert step.operator.output is not None
        codes = np.ldexp(found[values_name(step.name)].astype(np.float64), -step.operator.output.exponent)
        assert np.array_equal(codes, expected[step.name].numpy()), step.name
    assert np.array_equal(found["logits"], imodel(image).numpy())
    nodes = {node.name for node in onnx.load(file).graph.node}
    for step in imodel.steps:
        if isinstance(step.operator, IntegerLayer) and step.operator.planes == 2:
            parts = {f"{step.name}.weight.{part}" for part in ("first.quant", "residual.quant", "sum")}
            assert parts <= nodes if cluster_scales else f"{step.name}.weight.quant" in nodes


@pytest.mark.parametrize("cluster_scales", [True, False])
def test_every_code_in_qonnx(cluster_scales: bool, tmp_path: Path) -> None:
    imodel, each = every_pair()
    export_qonnx(imodel, tmp_path / "model.onnx", cluster_scales)
    for image in each.split(1):
        assert np.array_equal(executed(tmp_path / "model.onnx", image)["logits"], imodel(image).numpy())
