"""The ONNX file: valid, of integer kernels once ONNX Runtime has optimized it, its weights safe on every processor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from networks import awkward, images, quantize, random_network, random_recipe
from onnx import numpy_helper
from torch import nn

import lowprec
from lowprec.export import assembly
from lowprec.export.runtime import onnx_session
from lowprec.integer.model import IntegerModel, Step
from lowprec.integer.operators import (
    Grid,
    IntegerAdd,
    IntegerAveragePool,
    IntegerConv2d,
    IntegerInput,
    IntegerLayer,
    IntegerMaxPool,
    IntegerOperator,
)
from lowprec.models import create_model
from lowprec.models.cifar_resnet import CifarResNet

INTEGER_KERNELS = {
    *("QLinearConv", "QLinearAdd", "QLinearMul", "QLinearConcat", "QGemm"),
    *("QLinearAveragePool", "QLinearGlobalAveragePool", "NhwcMaxPool"),
}
# These move or compare whatever they are given: codes or floats.
MOVEMENTS = {"MaxPool", "Transpose", "Flatten", "Reshape", "Clip", "Split", "Resize", "Cast", "Gather"}
RELU_FAMILIES = (
    *("resnet18", "resnet50d", "resnext50_32x4d", "wide_resnet50_2", "mobilenetv2_100", "mnasnet_100", "repvgg_a0"),
    *("efficientnet_lite0", "regnetx_008", "vgg11_bn", "densenet121", "inception_v3", "dla34", "hrnet_w18_small"),
    *("torchvision:googlenet", "torchvision:shufflenet_v2_x1_0"),
)
# Their sigmoids and hard-sigmoids are looked up.
GATED_FAMILIES = ("regnety_008", "ghostnet_100")


def optimized(file: Path) -> onnx.ModelProto:
    """What ONNX Runtime makes of the file."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(file.with_suffix(".optimized.onnx"))
    onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return onnx.load(options.optimized_model_filepath)


def assert_integer_kernels(proto: onnx.ModelProto) -> None:
    for node in proto.graph.node:
        if node.op_type == "QuantizeLinear":
            assert node.input[0] == "images"
        elif node.op_type == "DequantizeLinear":
            assert list(node.output) == ["logits"]
        elif node.op_type in MOVEMENTS:
            data = node.input[1] if node.op_type == "Gather" else node.input[0]
            assert data != "images", node.name
        else:
            assert node.op_type in INTEGER_KERNELS, node.name


@pytest.mark.parametrize("recipe", ["w2a8_n4", "w4a8_n4", "w8a8"])
def test_optimized_graph_holds_integer_kernels_alone(recipe: str, tmp_path: Path) -> None:
    model = awkward(CifarResNet(8), seed=0)
    lowprec.export_onnx(quantize(model, recipe, images(0, 4, (3, 16, 16)))[1], tmp_path / "model.onnx")
    assert_integer_kernels(optimized(tmp_path / "model.onnx"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*RELU_FAMILIES, *GATED_FAMILIES])
def test_optimized_graph_of_families_holds_integer_kernels_alone(name: str, tmp_path: Path) -> None:
    arguments = {"aux_logits": False, "init_weights": False} if "googlenet" in name else {}
    model = create_model(name if ":" in name else f"timm:{name}", num_classes=7, **arguments)
    side = {"inception_v3": 75, "vgg11_bn": 224}.get(name, 32)
    _, imodel = quantize(awkward(model.eval(), 0, dead_channels=False), "w2a8_n4", images(0, 2, (3, side, side)))
    lowprec.export_onnx(imodel, tmp_path / "model.onnx")
    assert_integer_kernels(optimized(tmp_path / "model.onnx"))


@pytest.mark.parametrize("seed", range(60, 70))
def test_weights_are_safe_on_processors_without_vnni(seed: int, tmp_path: Path) -> None:
    _, imodel = quantize(random_network(seed), random_recipe(seed), images(seed))
    lowprec.export_onnx(imodel, tmp_path / "model.onnx")
    proto = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(proto, full_check=True)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    for step in imodel.steps:
        if isinstance(step.operator, IntegerLayer):
            weight, zero = constants[f"{step.name}.weight"], constants[f"{step.name}.weight.zero_point"]
            codes = step.operator.effective.numpy()
            if codes.ndim == 2:
                weight = weight.T
            assert np.array_equal(weight.astype(int) - int(zero[0]), codes)
            assert weight.dtype == (np.uint8 if step.operator.bits == 8 else np.int8)
            assert set(zero.tolist()) == {128 if step.operator.bits == 8 else 0}
            if step.operator.bits != 8:
                assert np.abs(weight.astype(int)).max() <= 64
            assert constants[f"{step.name}.bias"].dtype == np.int32


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_batches_of_any_size(batch: int, tmp_path: Path) -> None:
    _, imodel = quantize(random_network(5), random_recipe(5), images(5))
    lowprec.export_onnx(imodel, tmp_path / "model.onnx")
    x = images(6, batch)
    (logits,) = onnx_session(str(tmp_path / "model.onnx")).run(["logits"], {"images": x.numpy()})
    assert torch.equal(torch.from_numpy(logits), imodel(x))
    proto = onnx.load(tmp_path / "model.onnx")
    assert [value.name for value in (*proto.graph.input, *proto.graph.output)] == ["images", "logits"]


def operator_alone(operator: IntegerOperator, source: Grid, shape: tuple[int, int, int]) -> IntegerModel:
    steps = [Step("input", (), IntegerInput(source)), Step("operator", ("input",), operator)]
    return IntegerModel(steps, shape)


def assert_same_codes(imodel: IntegerModel, codes: torch.Tensor, source: Grid, folder: Path) -> None:
    """The operator's codes from ONNX Runtime, for exactly these input codes."""
    lowprec.export_onnx(imodel, folder / "model.onnx")
    x = codes.float() * 2.0**source.exponent
    (logits,) = onnx_session(str(folder / "model.onnx")).run(["logits"], {"images": x.numpy()})
    last = imodel.steps[-1]
    assert torch.equal(imodel.codes(x)["input"], codes)
    expected = imodel.codes(x)[last.name].double() * 2.0**last.operator.output.exponent
    assert torch.equal(torch.from_numpy(logits).double(), expected)


def every_total(low: int, high: int, size: int) -> torch.Tensor:
    """Rows of ``size`` codes whose sums take every value that they can take."""
    totals = torch.arange(low * size, high * size + 1)
    base = torch.div(totals, size, rounding_mode="floor")
    extra = (totals - base * size).view(-1, 1)
    return (base.view(-1, 1) + (torch.arange(size) < extra)).to(torch.int32)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("shift", [-2, -1, 0, 1, 3])
@pytest.mark.parametrize("sides", [(2, 2), (3, 3), (3, 4), (7, 7), (2, 5), (12, 1)])
def test_global_average_pool_of_every_sum(sides: tuple[int, int], shift: int, signed: bool, tmp_path: Path) -> None:
    low, high = (-128, 127) if signed else (0, 255)
    source, output = Grid(-3, low, high), Grid(-3 - shift, low, high)
    pool = IntegerAveragePool(source, output, None, None, (0, 0), False, True, True)
    codes = every_total(low, high, sides[0] * sides[1]).view(-1, 1, *sides)
    assert_same_codes(operator_alone(pool, source, (1, *sides)), codes, source, tmp_path)


@pytest.mark.parametrize("keep_axes", [True, False])
def test_global_average_pool_with_and_without_axes(keep_axes: bool, tmp_path: Path) -> None:
    source = Grid(-3, 0, 255)
    pool = IntegerAveragePool(source, source, None, None, (0, 0), False, True, keep_axes)
    assert_same_codes(operator_alone(pool, source, (4, 3, 3)), random_codes(source, 4, 3, 3), source, tmp_path)


def random_codes(grid: Grid, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(grid.low, grid.high + 1, (20, *shape), generator=generator).to(torch.int32)


WINDOWS = [
    (kernel, stride, padding, ceil_mode)
    for kernel in ((2, 2), (3, 3), (3, 2))
    for stride in ((1, 1), (2, 2), (3, 2))
    for padding in ((0, 0), (1, 1))
    for ceil_mode in (False, True)
]


@pytest.mark.parametrize(("kernel", "stride", "padding", "ceil_mode"), WINDOWS)
def test_local_pools(
    kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], ceil_mode: bool, tmp_path: Path
) -> None:
    for source in (Grid(-3, 0, 255), Grid(-3, -128, 127)):
        codes = random_codes(source, 2, 7, 6)
        for counted in (False, True):
            if counted and ceil_mode and any(padding):
                continue
            for output in (source, Grid(-4, source.low, source.high), Grid(-2, source.low, source.high)):
                pool = IntegerAveragePool(source, output, kernel, stride, padding, ceil_mode, counted, True)
                assert_same_codes(operator_alone(pool, source, (2, 7, 6)), codes, source, tmp_path)
        max_pool = IntegerMaxPool(source, kernel, stride, padding, (1, 1), ceil_mode)
        assert_same_codes(operator_alone(max_pool, source, (2, 7, 6)), codes, source, tmp_path)


def chosen_channel(channel: int, source: Grid, shift: int) -> IntegerConv2d:
    """A convolution that copies the codes of one of two channels to a grid 2^shift times as fine."""
    codes = torch.tensor([[[[1 - channel]], [[channel]]]], dtype=torch.int8)
    exponents, bias = torch.tensor([-shift], dtype=torch.int8), torch.zeros(1, dtype=torch.int32)
    output = Grid(source.exponent - shift, source.low, source.high)
    geometry = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
    return IntegerConv2d(codes, None, exponents, bias, 8, 4, "kernel", source, output, **geometry)


@pytest.mark.parametrize("distance", [0, 1, 7, 15])
@pytest.mark.parametrize("signed", [False, True])
def test_add_of_every_pair_of_codes(distance: int, signed: bool, tmp_path: Path) -> None:
    ends = (-128, 127) if signed else (0, 255)
    left, right = Grid(0, *ends), Grid(-distance, *ends)
    every = torch.arange(ends[0], ends[1] + 1, dtype=torch.int32)
    codes = torch.stack(torch.meshgrid(every, every, indexing="ij")).unsqueeze(0)
    for output in (-distance - 2, -distance, -1, 0, 1, 4, 8):
        if output + distance > 16:
            continue
        steps = [
            Step("input", (), IntegerInput(left)),
            Step("left", ("input",), chosen_channel(0, left, 0)),
            Step("right", ("input",), chosen_channel(1, left, distance)),
            Step("add", ("left", "right"), IntegerAdd(left, right, Grid(output, *ends))),
        ]
        assert_same_codes(IntegerModel(steps, (2, 256, 256)), codes, left, tmp_path)


def test_only_integer_models_are_exported(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"lowprec\.convert\(qmodel\), not Linear"):
        lowprec.export_onnx(nn.Linear(2, 2), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_failed_export_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, imodel = quantize(random_network(5), random_recipe(5), images(5))
    file = tmp_path / "model.onnx"
    file.write_bytes(b"before")

    def full_disk(proto: onnx.ModelProto, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(assembly.onnx, "save", full_disk)
    with pytest.raises(OSError, match="no space left"):
        lowprec.export_onnx(imodel, file)
    assert file.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [file]
