"""Files for OpenVINO: equal there in every code, equal in ONNX Runtime too, and refused where that is not proven."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from networks import TinyTransformer, awkward, images, quantize, random_network, random_recipe

import lowprec
from lowprec.export.runtime import ExportedModel
from lowprec.integer.model import IntegerModel, Step
from lowprec.integer.operators import Grid, IntegerAveragePool, IntegerInput, IntegerReshape
from lowprec.recipe import ActivationScheme, Recipe, WeightScheme

OPENVINO = lowprec.ExportOptions(runtime="openvino")


@pytest.mark.parametrize("seed", range(16))
def test_random_networks_agree_in_openvino_and_onnx_runtime(seed: int, tmp_path: Path) -> None:
    qmodel, imodel = quantize(random_network(seed), random_recipe(seed), images(seed))
    file = tmp_path / "model.onnx"
    lowprec.export_onnx(imodel, file, OPENVINO)
    for runtime in ("openvino", "onnxruntime"):
        report = lowprec.verify(qmodel, imodel, [images(seed + 1, 5)], onnx=file, runtime=runtime)
        assert report.equal, report


@pytest.mark.parametrize("residual", ["requantized", "accumulator"])
def test_both_residual_forms_agree_in_both_runtimes(residual: str, tmp_path: Path) -> None:
    model = awkward(timm.create_model("resnet10t", num_classes=7), seed=5, dead_channels=False)
    recipe = Recipe(weights=WeightScheme(bits=4), activations=ActivationScheme(residual=residual))
    qmodel, imodel = quantize(model, recipe, images(0, 4, (3, 48, 48)))
    adds = sum(step.operator.KIND == "add" for step in imodel.steps)
    shortcuts = sum(getattr(step.operator, "shortcut", None) is not None for step in imodel.steps)
    assert (adds, shortcuts) == ((4, 0) if residual == "requantized" else (0, 4))
    for runtime in ("openvino", "onnxruntime"):
        file = tmp_path / f"{runtime}.onnx"
        lowprec.export_onnx(imodel, file, lowprec.ExportOptions(runtime=runtime))
        report = lowprec.verify(qmodel, imodel, [images(1, 3, (3, 48, 48))], onnx=file)
        assert report.equal, report


def test_the_form_for_onnx_runtime_is_not_exact_in_openvino(tmp_path: Path) -> None:
    """Else a form of its own would be for nothing."""
    model = awkward(timm.create_model("resnet10t", num_classes=7), seed=5, dead_channels=False)
    _, imodel = quantize(model, "w2a8_n4", images(0, 4, (3, 48, 48)))
    lowprec.export_onnx(imodel, tmp_path / "model.onnx")
    batch = images(1, 3, (3, 48, 48))
    assert (ExportedModel(tmp_path / "model.onnx", "openvino")(batch) != imodel(batch)).any()


def test_models_that_compute_in_float_are_refused(tmp_path: Path) -> None:
    _, imodel = quantize(TinyTransformer().eval(), "w2a8_n4", images(0, 2, (3, 8, 8)))
    with pytest.raises(ValueError, match=r"runtime=openvino: norm computes in float"):
        lowprec.export_onnx(imodel, tmp_path / "model.onnx", OPENVINO)
    assert not list(tmp_path.iterdir())


def averages(signed: bool, shape: tuple[int, ...], axes: tuple[int, ...], keep_axes: bool) -> IntegerModel:
    """Codes of [B, 12, 4, 5], as ``shape``, averaged over axes of it."""
    source = Grid(-3, -128 if signed else 0, 127 if signed else 255)
    pool = IntegerAveragePool(
        source, Grid(-4, source.low, source.high), None, None, (0, 0), False, True, keep_axes, axes
    )
    steps = [
        Step("input", (), IntegerInput(source)),
        Step("moved", ("input",), IntegerReshape(source, (-1, *shape))),
        Step("average", ("moved",), pool),
    ]
    return IntegerModel(steps, (12, 4, 5))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("keep_axes", [False, True])
@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((12, 4, 5), (1,)),
        ((12, 4, 5), (2, 3)),
        ((12, 4, 5), (1, 3)),
        ((12, 20), (1,)),
        ((12, 20), (2,)),
        ((240,), (1,)),
        ((6, 2, 4, 5), (2, 3)),
        ((6, 2, 4, 5), (1, 4)),
    ],
)
def test_averages_over_any_axes(
    shape: tuple[int, ...], axes: tuple[int, ...], keep_axes: bool, signed: bool, tmp_path: Path
) -> None:
    imodel = averages(signed, shape, axes, keep_axes)
    lowprec.export_onnx(imodel, tmp_path / "model.onnx", OPENVINO)
    for batch in (1, 2, 5):
        codes = torch.randint(
            -128 if signed else 0, 128, (batch, 12, 4, 5), generator=torch.Generator().manual_seed(batch)
        )
        x = codes * 2.0**-3
        for runtime in ("openvino", "onnxruntime"):
            assert torch.equal(ExportedModel(tmp_path / "model.onnx", runtime)(x), imodel(x))


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("signed", [False, True])
def test_averages_whose_ties_a_rounded_inverse_would_break(signed: bool, windows: bool, tmp_path: Path) -> None:
    """1547 / 238 is 6.5; times the rounded 1 / 238 it is more. All sums that 238 codes can have."""
    low, size = -128 if signed else 0, 7 * 34
    kernel = (7, 34) if windows else None
    totals = torch.arange(low * size, (low + 255) * size + 1)
    base = torch.div(totals, size, rounding_mode="floor").view(-1, 1)
    codes = base + (torch.arange(size) < totals.view(-1, 1) - base * size)
    for exponent in (-4, -3, -2, -1):
        grid, output = Grid(-3, low, low + 255), Grid(exponent, low, low + 255)
        pool = IntegerAveragePool(grid, output, kernel, kernel, (0, 0), False, True, True)
        imodel = IntegerModel([Step("input", (), IntegerInput(grid)), Step("pool", ("input",), pool)], (1, 7, 34))
        lowprec.export_onnx(imodel, tmp_path / "model.onnx", OPENVINO)
        x = codes.view(-1, 1, 7, 34) / 8
        for runtime in ("openvino", "onnxruntime"):
            assert torch.equal(ExportedModel(tmp_path / "model.onnx", runtime)(x), imodel(x))
