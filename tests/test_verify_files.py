"""One number changed in an exported file is found, and the first tensor that it changes is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from networks import awkward, images, quantize
from onnx import numpy_helper
from safetensors import safe_open
from safetensors.torch import save_file
from torch import fx

import lowprec
from lowprec.integer import packed
from lowprec.integer.model import IntegerModel
from lowprec.models.cifar_resnet import CifarResNet
from lowprec.verify import VerificationError

SHAPE = (1, 12, 12)
BATCH = images(1, 4, SHAPE)
Change = Callable[[np.ndarray], None]


@pytest.fixture(scope="module")
def models() -> tuple[fx.GraphModule, IntegerModel]:
    network = awkward(CifarResNet(8, in_channels=1, width=4), seed=3, dead_channels=False)
    return quantize(network, "w2a8_n4", images(0, 8, SHAPE))


def change_initializer(file: Path, name: str, change: Change) -> None:
    proto = onnx.load(file)
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == name)
    array = numpy_helper.to_array(tensor).copy()
    change(array)
    tensor.CopyFrom(numpy_helper.from_array(array, name))
    onnx.save(proto, file)


def flip_code(array: np.ndarray) -> None:
    """One weight: to zero if it is none, else to the cluster's mantissa."""
    place = (1, *[0] * (array.ndim - 1))
    array[place] = np.abs(array).max() if array[place] == 0 else 0


def double(array: np.ndarray) -> None:
    array[(1,) if array.ndim else ()] *= 2


def raise_bias(array: np.ndarray) -> None:
    array[1] += 400


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    ("tensor", "change"),
    [("weight", flip_code), ("weight.scale", double), ("bias", raise_bias), ("scale", double)],
)
def test_one_changed_number_in_an_onnx_file_is_found_and_named(
    models: tuple[fx.GraphModule, IntegerModel], tmp_path: Path, runtime: str, tensor: str, change: Change
) -> None:
    qmodel, imodel = models
    name, file = "stage2.0.conv1", tmp_path / "model.onnx"
    lowprec.export_onnx(imodel, file, lowprec.ExportOptions(runtime=runtime))
    assert lowprec.verify(qmodel, imodel, [BATCH], onnx=file).equal
    change_initializer(file, f"{name}.{tensor}", change)
    report = lowprec.verify(qmodel, imodel, [BATCH], onnx=file)
    kind = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}[runtime]
    first = next(comparison for comparison in report.comparisons if comparison.mismatched)
    assert (first.tensor, first.against) == (name, kind)
    assert first.largest_difference > 0
    message = (
        rf"the first in {name} \({kind} against the integer executor: {first.mismatched} of {first.compared}, by up to"
    )
    assert f"{file} was changed or damaged after it was exported" in str(report)
    with pytest.raises(VerificationError, match=rf"{message}.*model\.onnx was changed or damaged.*export it again"):
        report.raise_if_different()


def test_a_change_that_no_image_shows_is_damage(models: tuple[fx.GraphModule, IntegerModel], tmp_path: Path) -> None:
    qmodel, imodel = models
    file = tmp_path / "model.onnx"
    lowprec.export_onnx(imodel, file)
    proto = onnx.load(file)
    proto.graph.name = "another"
    onnx.save(proto, file)
    report = lowprec.verify(qmodel, imodel, [BATCH], onnx=file)
    assert report.mismatched_codes == 0
    assert not report.equal
    with pytest.raises(VerificationError, match=r"no code differs on these images, but .* was changed or damaged"):
        report.raise_if_different()


@pytest.mark.parametrize(("tensor", "value"), [("codes", 0x40), ("exponents", 1), ("bias", 400), ("mantissas", 2)])
def test_one_changed_number_in_a_packed_file_with_a_right_checksum_is_named(
    models: tuple[fx.GraphModule, IntegerModel], tmp_path: Path, tensor: str, value: int
) -> None:
    qmodel, imodel = models
    name, file = "stage2.0.conv1", tmp_path / "model.safetensors"
    lowprec.save(imodel, file)
    with safe_open(file, "pt") as content:
        metadata = content.metadata()
        tensors = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118 (not a mapping)
    flat = tensors[f"{name}.{tensor}"].view(-1)
    flat[1] = flat[1] ^ value if tensor == "codes" else flat[1] + value
    metadata["checksum"] = packed._checksum(tensors)
    save_file(tensors, file, metadata)
    report = lowprec.verify(qmodel, lowprec.load(file), [BATCH])
    assert next(comparison.tensor for comparison in report.comparisons if comparison.mismatched) == name
    with pytest.raises(VerificationError, match=f"the first in {name} "):
        report.raise_if_different()


def test_classes_are_counted_for_every_implementation(models: tuple[fx.GraphModule, IntegerModel]) -> None:
    report = lowprec.verify(*models, [BATCH])
    assert report.agreed == {"fake-quant": len(BATCH), "fast executor": len(BATCH)}
    assert report.agreement == 1.0
    assert torch.equal(models[1](BATCH).argmax(1), models[0](BATCH).argmax(1))
