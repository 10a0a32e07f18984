"""Files that are not what was exported: one error that names the file, whatever is wrong with it."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from networks import images, quantize, random_network
from torch import Tensor, fx, nn

import lowprec
from lowprec.export.exported_file import CHECKSUM, METADATA, ExportedFileError
from lowprec.export.runtime import ExportedModel


@pytest.fixture(scope="module")
def models() -> tuple[fx.GraphModule, lowprec.IntegerModel]:
    return quantize(random_network(3), "w2a8_n4", images(0))


@pytest.fixture(scope="module")
def exported(models: tuple[fx.GraphModule, lowprec.IntegerModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("exported") / "model.onnx"
    lowprec.export_onnx(models[1], file)
    return file


@pytest.fixture
def file(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(exported, tmp_path / "model.onnx"))


def change_text(key: str, text: str | None) -> Callable[[onnx.ModelProto], None]:
    def change(proto: onnx.ModelProto) -> None:
        texts = {entry.key: entry.value for entry in proto.metadata_props if entry.key != key}
        del proto.metadata_props[:]
        onnx.helper.set_model_props(proto, texts if text is None else {**texts, key: text})

    return change


def drop_input(proto: onnx.ModelProto) -> None:
    del proto.graph.input[:]


def rename_graph(proto: onnx.ModelProto) -> None:
    proto.graph.name = "another"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_text(METADATA, None), "was not exported by lowprec, or is damaged"),
        (change_text(CHECKSUM, None), "was written by an earlier lowprec: export it again"),
        (change_text(METADATA, '{"format": '), "its metadata cannot be read"),
        (change_text(METADATA, "[1]"), "its metadata cannot be read"),
        (change_text(METADATA, "{}"), "its input, output or format is missing"),
        (drop_input, "its input, output or format is missing"),
        (rename_graph, "was changed or damaged after it was exported: export it again"),
    ],
)
def test_changed_files_are_refused(file: Path, change: Callable[[onnx.ModelProto], None], message: str) -> None:
    proto = onnx.load(file)
    change(proto)
    onnx.save(proto, file)
    with pytest.raises(ExportedFileError, match=rf"model\.onnx .*{message}"):
        ExportedModel(file)


def test_truncated_and_empty_files_are_refused(file: Path) -> None:
    content = file.read_bytes()
    for length in (0, 1, 7, *range(10, len(content), len(content) // 20), len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(ExportedFileError, match=r"model\.onnx .*export it again"):
            ExportedModel(file)


def test_files_of_others_are_refused(file: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, file)
    with pytest.raises(ExportedFileError, match=r"model\.onnx is truncated, damaged or no ONNX file"):
        ExportedModel(file)
    node = onnx.helper.make_node("Relu", ["images"], ["logits"])
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 2]) for name in ("images", "logits")]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", values[:1], values[1:])), file)
    with pytest.raises(ExportedFileError, match=r"model\.onnx was not exported by lowprec"):
        ExportedModel(file)


def test_no_flipped_bit_gives_another_error(models: tuple[fx.GraphModule, lowprec.IntegerModel], file: Path) -> None:
    """Refused by itself; verify names the file too, or a tensor, or that the file was changed."""
    content, draw = file.read_bytes(), random.Random(0)
    found = 0
    for _ in range(60):
        place = draw.randrange(len(content))
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :])
        with pytest.raises(ExportedFileError, match=r"model\.onnx"):
            ExportedModel(file)
        with pytest.raises((ExportedFileError, lowprec.VerificationError), match=r"model\.onnx") as caught:
            lowprec.verify(*models, [images(1, 2)], onnx=file).raise_if_different()
        found += isinstance(caught.value, lowprec.VerificationError)
    assert found > 0


def test_files_of_another_kind_are_told(models: tuple[fx.GraphModule, lowprec.IntegerModel], tmp_path: Path) -> None:
    qonnx, packed = tmp_path / "model.qonnx.onnx", tmp_path / "packed.onnx"
    lowprec.export_qonnx(models[1], qonnx)
    with pytest.raises(ExportedFileError, match=r"model\.qonnx\.onnx is for the qonnx package"):
        lowprec.verify(*models, [images(1)], onnx=qonnx)
    lowprec.export_packed_onnx(models[1], packed)
    with pytest.raises(ExportedFileError, match=r"packed\.onnx holds packed weights, .*for OpenVINO write"):
        lowprec.verify(*models, [images(1)], onnx=packed, runtime="openvino")
    with pytest.raises(ValueError, match="runtime='tensorrt': choose one of onnxruntime, openvino"):
        lowprec.verify(*models, [images(1)], onnx=packed, runtime="tensorrt")


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_images_that_do_not_fit_are_told(file: Path, runtime: str) -> None:
    model, batch = ExportedModel(file, runtime), images(1, 3)
    for wrong, kind, message in (
        (batch[0], ValueError, r"have the shape \[3, 17, 14\]; the model takes \[B, 3, 17, 14\]"),
        (batch[..., :-1], ValueError, r"have the shape \[3, 3, 17, 13\]"),
        (batch * float("nan"), ValueError, "the images hold NaN"),
        (batch.to(torch.uint8), TypeError, "must be float32, not uint8: pixels"),
        (batch.numpy(), TypeError, "must be a tensor .*, not ndarray"),
    ):
        with pytest.raises(kind, match=message):
            model(wrong)
    assert model(batch[:0]).shape == (0, 5)


class Flattened(nn.Sequential):
    """A model of one size of images."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))


class Viewed(Flattened):
    """Another size gives another batch, unless it is refused."""

    def forward(self, x: Tensor) -> Tensor:
        x = self[0](x).view(x.shape[0], 4, 8).transpose(1, 2)
        return self[3](x.flatten(1))


@pytest.mark.parametrize("network", [Flattened, Viewed])
@pytest.mark.parametrize("fast", [False, True])
def test_integer_models_refuse_images_that_do_not_fit(network: type[nn.Module], fast: bool) -> None:
    torch.manual_seed(0)
    batch = images(0, 4, (1, 4, 4))
    imodel = quantize(network().eval(), "w8a8", batch)[1]
    model = lowprec.FastModel(imodel) if fast else imodel
    for wrong, kind, message in (
        (batch[0], ValueError, r"have the shape \[1, 4, 4\]; the model takes \[B, 1, "),
        (batch.expand(-1, 3, -1, -1), ValueError, r"have the shape \[4, 3, 4, 4\]"),
        (images(0, 4, (1, 8, 8)), ValueError, r"have the shape \[4, 1, 8, 8\]; the model takes \["),
        (batch * float("nan"), ValueError, "the images hold NaN"),
        (batch / 0, ValueError, "the images hold infinite values"),
        (batch.half(), TypeError, r"must be float32, not float16: call \.float"),
        (batch.to(torch.uint8), TypeError, "must be float32, not uint8: pixels; normalise them"),
        (batch.numpy(), TypeError, "must be a tensor .*, not ndarray"),
        ({"images": batch}, TypeError, "not dict"),
    ):
        with pytest.raises(kind, match=message):
            model(wrong)
        with pytest.raises(kind, match=message):
            model.codes(wrong)
    assert model(batch[:0]).shape == (0, 3)
