"""Options of an export: operator set, fixed batch, pixels as input, metadata."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from networks import TinyTransformer, images, quantize, random_network
from torch import Tensor, fx

import lowprec
from lowprec.data.normalization import Normalization
from lowprec.export.exported_file import metadata
from lowprec.export.options import OPSETS, ExportOptions
from lowprec.export.runtime import ExportedModel
from lowprec.integer.model import IntegerModel

NORMALIZATION = Normalization((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


@pytest.fixture(scope="module")
def models() -> tuple[fx.GraphModule, IntegerModel]:
    return quantize(random_network(3), "w2a8_n4", NORMALIZATION.normalize(pixels(8)))


def pixels(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, 17, 14), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("opset", OPSETS)
def test_every_operator_set_gives_the_same_logits(
    models: tuple[fx.GraphModule, IntegerModel], opset: int, tmp_path: Path
) -> None:
    lowprec.export_onnx(models[1], tmp_path / "model.onnx", ExportOptions(opset=opset))
    assert onnx.load(tmp_path / "model.onnx").opset_import[0].version == opset
    batch = images(1, 3)
    assert torch.equal(ExportedModel(tmp_path / "model.onnx")(batch), models[1](batch))


@pytest.mark.parametrize("opset", [13, 16])
def test_layer_norms_need_a_later_operator_set(opset: int, tmp_path: Path) -> None:
    _, imodel = quantize(TinyTransformer().eval(), "w2a8_n4", images(0, 2, (3, 8, 8)))
    with pytest.raises(ValueError, match=rf"opset={opset}: .*17"):
        lowprec.export_onnx(imodel, tmp_path / "model.onnx", ExportOptions(opset=opset))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("count", [1, 4, 7])
def test_a_fixed_batch_takes_any_number_of_images(
    models: tuple[fx.GraphModule, IntegerModel], count: int, tmp_path: Path
) -> None:
    lowprec.export_onnx(models[1], tmp_path / "model.onnx", ExportOptions(batch_size=4))
    shape = onnx.load(tmp_path / "model.onnx").graph.input[0].type.tensor_type.shape
    assert [dimension.dim_value for dimension in shape.dim] == [4, 3, 17, 14]
    batch = images(1, count)
    assert torch.equal(ExportedModel(tmp_path / "model.onnx")(batch), models[1](batch))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("layout", ["uint8", "uint8_nhwc"])
def test_pixels_go_in_as_they_are(
    models: tuple[fx.GraphModule, IntegerModel], layout: str, runtime: str, tmp_path: Path
) -> None:
    file = tmp_path / "model.onnx"
    options = ExportOptions(runtime=runtime, input=layout, normalization=NORMALIZATION)
    lowprec.export_onnx(models[1], file, options)
    frames = pixels(5)
    array = (frames.permute(0, 2, 3, 1).contiguous() if layout == "uint8_nhwc" else frames).numpy()
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"images": array})
    assert torch.equal(torch.from_numpy(logits), models[1](NORMALIZATION.normalize(frames)))
    # No float tensor before the first codes.
    first = next(index for index, node in enumerate(onnx.load(file).graph.node) if node.op_type == "Gather")
    kinds = [node.op_type for node in onnx.load(file).graph.node[:first]]
    assert kinds == [*(["Transpose"] if layout == "uint8_nhwc" else []), "Cast", "Add"]
    report = lowprec.verify(*models, [NORMALIZATION.normalize(frames)], onnx=file)
    assert report.equal, report


def test_images_that_are_no_pixels_are_refused(models: tuple[fx.GraphModule, IntegerModel], tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    lowprec.export_onnx(models[1], file, ExportOptions(input="uint8", normalization=NORMALIZATION))
    with pytest.raises(ValueError, match="no 8-bit pixels"):
        ExportedModel(file)(NORMALIZATION.normalize(pixels(2)) + 0.001)


def test_metadata_tells_what_the_file_is(models: tuple[fx.GraphModule, IntegerModel], tmp_path: Path) -> None:
    names = ("cat", "dog", "eel", "fox", "gnu")
    lowprec.export_onnx(models[1], tmp_path / "model.onnx", ExportOptions(class_names=names))
    found: Any = metadata(onnx.load(tmp_path / "model.onnx"))
    assert found["lowprec"] == lowprec.__version__
    assert found["recipe"] == lowprec.Recipe.load("w2a8_n4").to_dict()
    assert found["class_names"] == list(names)
    assert found["exponents"] == {
        step.name: step.operator.output.exponent for step in models[1].steps if step.operator.output is not None
    }
    lowprec.save(models[1], tmp_path / "model.safetensors")
    assert lowprec.load(tmp_path / "model.safetensors").metadata == models[1].metadata


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runtime": "tensorrt"}, r"runtime='tensorrt': choose one of onnxruntime, openvino"),
        ({"processor": "riscv"}, r"processor='riscv': choose one of any, vnni"),
        ({"opset": 12}, r"opset=12: give one of 13 to 25"),
        ({"batch_size": 0}, r"batch_size=0"),
        ({"input": "bgr"}, r"input='bgr'"),
        ({"input": "uint8"}, r"input=uint8: give the normalization"),
        ({"input": "uint8", "normalization": Normalization((0.5,), (0.5,))}, "the images have 3 channels"),
        ({"batch_size": "4"}, "batch_size='4': give a whole number, not str"),
        ({"batch_size": 2.5}, r"batch_size=2\.5: give a whole number, not float"),
        ({"batch_size": True}, "batch_size=True: give a whole number, not bool"),
        ({"opset": "18"}, "opset='18': give a whole number"),
        ({"opset": 18.0}, r"opset=18\.0: give a whole number"),
        ({"normalization": ((0.5,) * 3, (0.5,) * 3)}, r"must be lowprec\.Normalization\(mean, std\), not tuple"),
        ({"normalization": {"mean": 0.5}}, "not dict"),
        ({"normalization": Normalization(torch.zeros(3), (0.5,) * 3)}, r"normalization\.mean=tensor.*: give a tuple"),
        ({"normalization": Normalization((0.5,) * 3, (0.5, 0.0, 0.5))}, r"normalization\.std=.*: give numbers above 0"),
        ({"normalization": Normalization((0.5,) * 3, (0.5,) * 3, peak=0)}, r"normalization\.peak=0"),
        ({"class_names": "cat"}, "class_names='cat': give a list of strings"),
        ({"class_names": [1, 2]}, r"class_names=\[1, 2\]: give a list of strings"),
        ({"class_names": ["cat", "dog"]}, "class_names holds 2 names; the model has 5 classes"),
    ],
)
@pytest.mark.parametrize("export", [lowprec.export_onnx, lowprec.export_packed_onnx])
def test_options_that_cannot_be_are_named(
    models: tuple[fx.GraphModule, IntegerModel],
    export: Callable[..., None],
    change: dict[str, Any],
    message: str,
    tmp_path: Path,
) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        export(models[1], tmp_path / "model.onnx", dataclasses.replace(ExportOptions(), **change))
    assert not list(tmp_path.iterdir())


def test_packed_weights_have_an_operator_set_of_their_own(
    models: tuple[fx.GraphModule, IntegerModel], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="opset=18: packed weights need 25"):
        lowprec.export_packed_onnx(models[1], tmp_path / "model.onnx", ExportOptions(opset=18))
    lowprec.export_packed_onnx(models[1], tmp_path / "model.onnx", ExportOptions(opset=25))
    assert onnx.load(tmp_path / "model.onnx").opset_import[0].version == 25


EXPORTS = (lowprec.export_onnx, lowprec.export_packed_onnx, lowprec.export_qonnx)


@pytest.mark.parametrize("export", EXPORTS)
def test_what_is_no_option_is_refused(
    models: tuple[fx.GraphModule, IntegerModel], export: Callable[..., None], tmp_path: Path
) -> None:
    with pytest.raises(TypeError, match="not dict"):
        export(models[1], tmp_path / "model.onnx", {"opset": 18})
    with pytest.raises(TypeError, match=rf"{export.__name__} expects an integer model, from lowprec\.convert"):
        export(models[0], tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("export", EXPORTS)
def test_a_place_that_no_file_can_have_is_named(
    models: tuple[fx.GraphModule, IntegerModel], export: Callable[..., None], tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(IsADirectoryError, match=r"a folder; give the name of a file in it: .*folder"):
        export(models[1], folder)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere to write to.*nowhere/model\.onnx"):
        export(models[1], tmp_path / "nowhere" / "model.onnx")
    assert list(tmp_path.iterdir()) == [folder]
