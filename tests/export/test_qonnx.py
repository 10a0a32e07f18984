"""The QONNX file: executed by the qonnx package it gives the integer executor's logits and every tensor's codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from integer_models import every_product, operator_alone, over_last_axis, pointwise
from networks import awkward, images, quantize, random_network, random_recipe
from onnx import numpy_helper
from torch import Tensor, nn

from lowprec.export.qdq import values_name
from lowprec.export.qonnx import DOMAIN, export_qonnx
from lowprec.integer.model import IntegerModel
from lowprec.integer.operators import Grid, IntegerAveragePool, IntegerLayer, IntegerOperator
from lowprec.models.cifar_resnet import CifarResNet
from lowprec.recipe import Recipe, WeightScheme

pytest.importorskip("qonnx", reason="the qonnx package needs Python 3.11 beside an onnx that knows INT2")
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.core.onnx_exec import execute_onnx
from qonnx.util.cleanup import cleanup_model


def assert_same_codes(imodel: IntegerModel, file: Path, batch: Tensor) -> None:
    """Every step's codes and the logits, image by image."""
    model = ModelWrapper(str(file))
    for image in batch.split(1):
        found = execute_onnx(model, {"images": image.numpy()}, return_full_exec_context=True)
        expected = imodel.codes(image)
        for step in imodel.steps:
            grid = step.operator.output
            if grid is not None and step is not imodel.steps[-1]:
                codes = np.ldexp(found[values_name(step.name)].astype(np.float64), -grid.exponent)
                assert np.array_equal(codes, expected[step.name].numpy()), step.name
        assert np.array_equal(found["logits"], imodel(image).numpy())


@pytest.mark.parametrize("seed", range(400, 412))
def test_random_networks_give_the_executors_codes(seed: int, tmp_path: Path) -> None:
    _, imodel = quantize(random_network(seed), random_recipe(seed), images(seed))
    export_qonnx(imodel, tmp_path / "model.onnx")
    assert_same_codes(imodel, tmp_path / "model.onnx", images(seed + 1, 2))


@pytest.mark.parametrize("recipe", ["w2a8_n4", "w4a8_n4", "w8a8"])
def test_resnet(recipe: str, tmp_path: Path) -> None:
    _, imodel = quantize(awkward(CifarResNet(8), seed=0), recipe, images(0, 4, (3, 16, 16)))
    export_qonnx(imodel, tmp_path / "model.onnx")
    assert_same_codes(imodel, tmp_path / "model.onnx", images(1, 2, (3, 16, 16)))


@pytest.mark.parametrize("seed", range(5))
def test_the_clean_up_of_the_qonnx_package_changes_nothing(seed: int, tmp_path: Path) -> None:
    _, imodel = quantize(random_network(seed), random_recipe(seed), images(seed))
    export_qonnx(imodel, tmp_path / "model.onnx")
    clean = cleanup_model(ModelWrapper(str(tmp_path / "model.onnx")))
    x = images(seed + 1, 1)
    (logits,) = execute_onnx(clean, {clean.graph.input[0].name: x.numpy()}).values()
    assert np.array_equal(logits, imodel(x).numpy())


def quantizers(file: Path) -> dict[str, dict[str, Any]]:
    """Of each quantizer by its name: kind, attributes, bits, scale."""
    proto = onnx.load(file)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    found = {}
    for node in proto.graph.node:
        if node.domain == DOMAIN:
            settings = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
            inputs = [constants.get(name) for name in node.input[1:]]
            bits = int(inputs[2]) if len(inputs) == 3 else 1
            found[node.name] = {**settings, "kind": node.op_type, "bits": bits, "scale": inputs[0]}
    return found


@pytest.mark.parametrize("cluster_scales", [True, False])
@pytest.mark.parametrize("layout", ["kernel", "element"])
@pytest.mark.parametrize(("bits", "cluster_size"), [(2, 1), (2, 5), (2, 64), (4, 5)])
def test_quantizers_of_weights(bits: int, cluster_size: int, layout: str, cluster_scales: bool, tmp_path: Path) -> None:
    recipe = Recipe(weights=WeightScheme(bits=bits, cluster_size=cluster_size, layout=layout))
    _, imodel = quantize(random_network(6), recipe, images(6))
    export_qonnx(imodel, tmp_path / "model.onnx", cluster_scales)
    assert_same_codes(imodel, tmp_path / "model.onnx", images(7, 1))
    found = quantizers(tmp_path / "model.onnx")
    for step in imodel.steps:
        layer = step.operator
        if not isinstance(layer, IntegerLayer):
            continue
        quant = found[f"{step.name}.weight.quant"]
        clustered = layer.bits == 2 and cluster_scales
        assert quant["bits"] == (2 if clustered else {2: 8, 4: 7, 8: 8}[layer.bits])
        assert quant["rounding_mode"] == b"ROUND"
        assert quant["signed"] == 1
        assert quant["narrow"] == int(layer.effective.min() > -128)
        assert (quant["scale"] > 0).all()
        channels = 1 if layer.codes.dim() == 2 else 0
        by_channel = quant["scale"].size == quant["scale"].shape[channels] == len(layer.codes)
        if not clustered or (layer.layout.groups == 1 and layer.layout.shares_positions):
            assert by_channel


def test_quantizers_of_activations(tmp_path: Path) -> None:
    _, imodel = quantize(random_network(4), random_recipe(4), images(4))
    export_qonnx(imodel, tmp_path / "model.onnx")
    found = quantizers(tmp_path / "model.onnx")
    for step in imodel.steps:
        quant, grid = found.get(f"{step.name}.quant"), step.operator.output
        if quant is not None:
            assert grid is not None
            assert (quant["bits"], quant["signed"], quant["narrow"]) == (8, int(grid.signed), 0)
            assert quant["scale"] == 2.0**grid.exponent


@pytest.mark.parametrize("cluster_scales", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_every_code_and_mantissa(bits: int, cluster_scales: bool, tmp_path: Path) -> None:
    imodel, each = every_product(bits)
    export_qonnx(imodel, tmp_path / "model.onnx", cluster_scales)
    assert_same_codes(imodel, tmp_path / "model.onnx", each)


@pytest.mark.parametrize("bits", [2, 4])
def test_a_linear_layer_over_the_last_of_four_axes(bits: int, tmp_path: Path) -> None:
    imodel, batch = over_last_axis(bits)
    export_qonnx(imodel, tmp_path / "model.onnx")
    assert_same_codes(imodel, tmp_path / "model.onnx", batch)


def test_weights_without_a_zero_are_bipolar(tmp_path: Path) -> None:
    signs = 1 - 2 * torch.randint(0, 2, (6, 10), generator=torch.Generator().manual_seed(0))
    mantissas = torch.arange(-9, 9).view(6, 3)
    mantissas[mantissas == 0] = 64
    layer = pointwise(signs.to(torch.int8), mantissas.to(torch.int8), 2, 4)
    imodel = operator_alone(layer, layer.input, (10, 1, 1))
    export_qonnx(imodel, tmp_path / "model.onnx")
    quant = quantizers(tmp_path / "model.onnx")["operator.weight.quant"]
    assert quant["kind"] == "BipolarQuant"
    assert quant["scale"].shape == (6, 10, 1, 1)
    assert (quant["scale"] > 0).all()
    assert_same_codes(imodel, tmp_path / "model.onnx", torch.arange(30.0).view(3, 10, 1, 1))
    layer.codes[0, 0] = 0
    layer.effective[0, 0] = 0
    export_qonnx(imodel, tmp_path / "model.onnx")
    assert quantizers(tmp_path / "model.onnx")["operator.weight.quant"]["kind"] == "Quant"


@pytest.mark.parametrize("sides", [(3, 4), (7, 7), (17, 14)])
@pytest.mark.parametrize("shift", [-1, 0, 3])
def test_global_averages_with_ties(sides: tuple[int, int], shift: int, tmp_path: Path) -> None:
    size = sides[0] * sides[1]
    source = Grid(-3, 0, 255)
    pool = IntegerAveragePool(source, Grid(-3 - shift, 0, 255), None, None, (0, 0), False, True, True)
    totals = torch.arange(0, 255 * size + 1, max(1, size // 14))
    base = torch.div(totals, size, rounding_mode="floor").view(-1, 1)
    codes = base + (torch.arange(size) < totals.view(-1, 1) - base * size)
    # Channels hold the sums: the file's batch is 1.
    imodel = operator_alone(pool, source, (len(totals), *sides))
    export_qonnx(imodel, tmp_path / "model.onnx")
    assert_same_codes(imodel, tmp_path / "model.onnx", codes.float().view(1, -1, *sides) * 2.0**source.exponent)


def test_a_bias_that_float32_cannot_hold_is_refused(tmp_path: Path) -> None:
    imodel, _ = every_product(2)
    imodel.steps[-1].operator.bias[0] = (1 << 24) + 1
    with pytest.raises(ValueError, match=r"operator\.bias has more than the 24 bits"):
        export_qonnx(imodel, tmp_path / "model.onnx")


def test_a_grid_that_is_not_of_eight_bits_is_refused(tmp_path: Path) -> None:
    source = Grid(0, 0, 255)
    pool = IntegerAveragePool(source, Grid(0, 0, 100), None, None, (0, 0), False, True, True)
    with pytest.raises(ValueError, match="operator: codes from 0 to 100"):
        export_qonnx(operator_alone(pool, source, (1, 2, 2)), tmp_path / "model.onnx")


class Unknown(IntegerOperator):
    KIND = "unknown"

    def forward(self, codes: Tensor) -> Tensor:
        return codes


def test_an_operator_without_a_form_is_named(tmp_path: Path) -> None:
    source = Grid(0, 0, 255)
    with pytest.raises(TypeError, match="operator: Unknown has no QONNX form"):
        export_qonnx(operator_alone(Unknown(source), source, (1, 2, 2)), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_only_integer_models_are_exported(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"lowprec\.convert\(qmodel\), not Linear"):
        export_qonnx(nn.Linear(2, 2), tmp_path / "model.onnx")  # type: ignore[arg-type]


def test_a_failed_export_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imodel, _ = every_product(2)
    file = tmp_path / "model.onnx"
    file.write_bytes(b"before")

    def full_disk(proto: onnx.ModelProto, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(onnx, "save", full_disk)
    with pytest.raises(OSError, match="no space left"):
        export_qonnx(imodel, file)
    assert file.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [file]
