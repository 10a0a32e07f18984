"""The packed ONNX file: the integer executor's codes, weights of 2 and 4 bits, and the int8 file's integer kernels."""

from __future__ import annotations

from collections import Counter
from math import ceil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from integer_models import every_product, operator_alone, over_last_axis
from networks import awkward, images, quantize, random_network, random_recipe
from onnx import TensorProto, helper
from torch import nn

import lowprec
from lowprec.export.packed_onnx import export_packed_onnx
from lowprec.export.runtime import onnx_session
from lowprec.integer.operators import Grid, IntegerLayer, IntegerOperator
from lowprec.models.cifar_resnet import CifarResNet
from lowprec.recipe import Recipe, WeightScheme

BITS = {2: TensorProto.INT2, 4: TensorProto.INT4}


def kernels(file: Path) -> Counter[str]:
    """How many operators of each kind ONNX Runtime runs for a file."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(file.with_suffix(".optimized.onnx"))
    onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


def scheme(bits: int, cluster_size: int, layout: str) -> Recipe:
    return Recipe(weights=WeightScheme(bits=bits, cluster_size=cluster_size, layout=layout))


@pytest.mark.parametrize("seed", range(300, 316))
def test_random_networks_give_the_executors_codes_from_the_same_kernels(seed: int, tmp_path: Path) -> None:
    qmodel, imodel = quantize(random_network(seed), random_recipe(seed), images(seed))
    export_packed_onnx(imodel, tmp_path / "packed.onnx")
    report = lowprec.verify(qmodel, imodel, [images(seed + 1)], onnx=tmp_path / "packed.onnx")
    report.raise_if_different()
    lowprec.export_onnx(imodel, tmp_path / "int8.onnx")
    assert kernels(tmp_path / "packed.onnx") == kernels(tmp_path / "int8.onnx")


@pytest.mark.parametrize("layout", ["kernel", "element"])
@pytest.mark.parametrize("cluster_size", [1, 3, 4, 64])
@pytest.mark.parametrize("bits", [2, 4])
def test_weights_are_packed_in_blocks_of_a_cluster(bits: int, cluster_size: int, layout: str, tmp_path: Path) -> None:
    seed = 6  # grouped, depthwise-like and pointwise layers, a multiply-add and two linear ones
    qmodel, imodel = quantize(random_network(seed), scheme(bits, cluster_size, layout), images(seed))
    export_packed_onnx(imodel, tmp_path / "model.onnx")
    lowprec.verify(qmodel, imodel, [images(7)], onnx=tmp_path / "model.onnx").raise_if_different()
    proto = onnx.load(tmp_path / "model.onnx")
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    blocks = {node.output[0]: node for node in proto.graph.node if node.op_type == "DequantizeLinear"}
    packed = 0
    for step in imodel.steps:
        layer = step.operator
        if not isinstance(layer, IntegerLayer):
            continue
        weight = constants[f"{step.name}.weight"]
        if layer.bits == 8:
            assert weight.data_type == TensorProto.UINT8
            continue
        packed += 1
        assert weight.data_type == BITS[layer.bits]
        assert len(weight.raw_data) == ceil(layer.codes.numel() * layer.bits / 8)
        mantissas = constants[f"{step.name}.weight.mantissas"]
        assert mantissas.data_type == TensorProto.INT8
        assert len(mantissas.raw_data) == layer.layout.clusters
        block = {entry.name: entry.i for entry in blocks[f"{step.name}.weight.unrounded"].attribute}
        assert block["block_size"] == layer.layout.weights_per_cluster
        assert constants[f"{step.name}.weight.scale"].data_type == TensorProto.FLOAT8E8M0
    assert packed > 3


@pytest.mark.parametrize("bits", [2, 4])
def test_every_code_and_mantissa(bits: int, tmp_path: Path) -> None:
    imodel, each = every_product(bits)
    export_packed_onnx(imodel, tmp_path / "model.onnx")
    (logits,) = onnx_session(tmp_path / "model.onnx").run(["logits"], {"images": each.numpy()})
    assert torch.equal(torch.from_numpy(logits), imodel(each))
    assert len(np.unique(imodel.steps[-1].operator.effective)) > 2


@pytest.mark.parametrize("bits", [2, 4])
def test_a_linear_layer_over_the_last_of_four_axes(bits: int, tmp_path: Path) -> None:
    imodel, batch = over_last_axis(bits)
    for export, name in ((export_packed_onnx, "packed"), (lowprec.export_onnx, "int8")):
        export(imodel, tmp_path / f"{name}.onnx")
        (logits,) = onnx_session(tmp_path / f"{name}.onnx").run(["logits"], {"images": batch.numpy()})
        assert torch.equal(torch.from_numpy(logits), imodel(batch))
    assert kernels(tmp_path / "packed.onnx") == kernels(tmp_path / "int8.onnx")


def test_without_optimizations_the_codes_are_the_same(tmp_path: Path) -> None:
    _, imodel = quantize(random_network(6), scheme(4, 3, "element"), images(6))
    export_packed_onnx(imodel, tmp_path / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    x = images(7)
    assert torch.equal(torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0]), imodel(x))


def test_exponents_that_one_byte_cannot_hold_are_floats(tmp_path: Path) -> None:
    imodel, _ = every_product(2)
    layer = imodel.steps[-1].operator
    assert isinstance(layer, IntegerLayer)
    layer.exponents.fill_(-128)
    export_packed_onnx(imodel, tmp_path / "model.onnx")
    proto = onnx.load(tmp_path / "model.onnx")
    types = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    assert types["operator.weight.scale"] == TensorProto.FLOAT


@pytest.mark.parametrize(("recipe", "share"), [("w2a8_n4", 0.45), ("w4a8_n4", 0.7)])
def test_a_small_network_shrinks_too(recipe: str, share: float, tmp_path: Path) -> None:
    _, imodel = quantize(awkward(CifarResNet(20), seed=0), recipe, images(0, 4, (3, 16, 16)))
    export_packed_onnx(imodel, tmp_path / "packed.onnx")
    lowprec.export_onnx(imodel, tmp_path / "int8.onnx")
    sizes = [(tmp_path / f"{name}.onnx").stat().st_size for name in ("packed", "int8")]
    assert sizes[0] < share * sizes[1]


@pytest.mark.slow
def test_resnet18_is_within_two_percent_of_the_packed_safetensors(tmp_path: Path) -> None:
    model = awkward(timm.create_model("resnet18"), seed=0, dead_channels=False)
    qmodel, imodel = quantize(model, "w2a8_n4", images(0, 2, (3, 64, 64)))
    export_packed_onnx(imodel, tmp_path / "packed.onnx")
    lowprec.save(imodel, tmp_path / "model.safetensors")
    lowprec.export_onnx(imodel, tmp_path / "int8.onnx")
    packed = (tmp_path / "packed.onnx").stat().st_size
    assert packed < 1.02 * (tmp_path / "model.safetensors").stat().st_size
    assert packed < 0.3 * (tmp_path / "int8.onnx").stat().st_size
    lowprec.verify(qmodel, imodel, [images(1, 2, (3, 64, 64))], onnx=tmp_path / "packed.onnx").raise_if_different()


def test_the_file_is_of_the_operator_set_that_has_two_bits(tmp_path: Path) -> None:
    imodel, _ = every_product(2)
    export_packed_onnx(imodel, tmp_path / "model.onnx")
    proto = onnx.load(tmp_path / "model.onnx")
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 25)]
    assert proto.ir_version == helper.find_min_ir_version_for(list(proto.opset_import))
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


class Unknown(IntegerOperator):
    KIND = "unknown"

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        return codes


def test_an_operator_without_a_form_is_named(tmp_path: Path) -> None:
    source = Grid(0, 0, 255)
    with pytest.raises(TypeError, match="operator: Unknown has no ONNX form"):
        export_packed_onnx(operator_alone(Unknown(source), source, (1, 2, 2)), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_only_integer_models_are_exported(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"lowprec\.convert\(qmodel\), not Linear"):
        export_packed_onnx(nn.Linear(2, 2), tmp_path / "model.onnx")  # type: ignore[arg-type]


def test_a_failed_export_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imodel, _ = every_product(2)
    file = tmp_path / "model.onnx"
    file.write_bytes(b"before")

    def full_disk(proto: onnx.ModelProto, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(onnx, "save", full_disk)
    with pytest.raises(OSError, match="no space left"):
        export_packed_onnx(imodel, file)
    assert file.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [file]
