"""Files for OpenVINO: equal there in every code, equal in ONNX Runtime too, and refused where that is not proven."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
from networks import TinyTransformer, awkward, images, quantize, random_network, random_recipe

import lowprec
from lowprec.export.runtime import ExportedModel
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
    with pytest.raises(ValueError, match=r"export\.runtime=openvino: norm computes in float"):
        lowprec.export_onnx(imodel, tmp_path / "model.onnx", OPENVINO)
    assert not list(tmp_path.iterdir())
