"""verify counts what differs and names where; it cannot pass by comparing nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import TinyTransformer, awkward, images, quantize
from torch import Tensor, fx, nn

import lowprec
from lowprec.integer.model import IntegerModel, Step
from lowprec.integer.operators import FloatOperator, IntegerConv2d, IntegerLayer
from lowprec.models.cifar_resnet import CifarResNet
from lowprec.verify import FAKE_QUANT, FAST, ONNX, VerificationError

SHAPE = (1, 12, 12)


@pytest.fixture(scope="module")
def qmodel() -> fx.GraphModule:
    network = awkward(CifarResNet(8, in_channels=1, width=4), seed=3, dead_channels=False)
    return quantize(network, "w2a8_n4", images(0, 8, SHAPE))[0]


@pytest.fixture
def imodel(qmodel: fx.GraphModule) -> IntegerModel:
    return lowprec.convert(qmodel)


@pytest.fixture
def file(imodel: IntegerModel, tmp_path: Path) -> Path:
    lowprec.export_onnx(imodel, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def mutated(imodel: IntegerModel, name: str, tensor: str, index: tuple[int, ...], value: int) -> IntegerModel:
    """The model with one number of one convolution changed by ``value``."""
    steps = []
    for step in imodel.steps:
        operator = step.operator
        if step.name == name:
            assert isinstance(operator, IntegerConv2d)
            tensors = {key: getattr(operator, key).clone() for key in ("codes", "mantissas", "exponents", "bias")}
            tensors[tensor][index] += value
            operator = IntegerConv2d(
                *tensors.values(),
                operator.bits,
                operator.layout.cluster_size,
                operator.layout.kind,
                operator.input,
                operator.output,
                operator.six,
                stride=operator.stride,
                padding=operator.padding,
                dilation=operator.dilation,
                groups=operator.groups,
            )
        steps.append(Step(step.name, step.inputs, operator))
    return IntegerModel(steps, imodel.image_shape)


def conv_name(imodel: IntegerModel) -> str:
    """The third convolution: ternary, in the middle of the network."""
    return [step.name for step in imodel.steps if isinstance(step.operator, IntegerConv2d)][2]


def test_an_unchanged_model_agrees(qmodel: fx.GraphModule, imodel: IntegerModel, file: Path) -> None:
    report = lowprec.verify(qmodel, imodel, [images(1, 3, SHAPE), (images(2, 2, SHAPE), torch.zeros(2))], onnx=file)
    assert report.mismatched_codes == 0
    assert report.images == 5
    assert report.compared_codes == 3 * sum(codes.numel() for codes in imodel.codes(images(1, 5, SHAPE)).values())
    report.raise_if_different()
    lines = str(report).splitlines()
    assert len(lines) == 4  # one for each implementation, and all
    assert lines[0].startswith(f"{FAKE_QUANT}: {len(imodel.steps)} tensors, ")
    assert len(report.details().splitlines()) == 1 + 3 * len(imodel.steps) + 4
    assert (
        report.details().splitlines()[-1]
        == lines[-1]
        == f"5 images, {report.compared_codes:,} codes compared, 0 differ"
    )


def test_without_a_file_onnx_runtime_is_left_out(qmodel: fx.GraphModule, imodel: IntegerModel) -> None:
    report = lowprec.verify(qmodel, imodel, [images(1, 2, SHAPE)])
    assert {comparison.against for comparison in report.comparisons} == {FAKE_QUANT, FAST}
    assert report.compared_codes == 2 * sum(codes.numel() for codes in imodel.codes(images(1, 2, SHAPE)).values())


@pytest.mark.parametrize(
    ("tensor", "index", "value"),
    [("codes", (1, 2, 1, 1), 1), ("mantissas", (2, 0, 0, 0), 1), ("exponents", (0,), 1), ("bias", (3,), 40)],
)
def test_one_changed_number_is_found_and_named(
    qmodel: fx.GraphModule, imodel: IntegerModel, file: Path, tensor: str, index: tuple[int, ...], value: int
) -> None:
    name = conv_name(imodel)
    if tensor == "codes":
        value = -1 if int(imodel.get_submodule("operators")[_index(imodel, name)].codes[index]) == 1 else 1
    wrong = mutated(imodel, name, tensor, index, value)
    report = lowprec.verify(qmodel, wrong, [images(1, 4, SHAPE)], onnx=file)
    for against in (FAKE_QUANT, ONNX):
        differing = {c.tensor: c.mismatched for c in report.comparisons if c.against == against and c.mismatched}
        assert next(iter(differing)) == name
        expected = imodel.codes(images(1, 4, SHAPE))[name] != wrong.codes(images(1, 4, SHAPE))[name]
        assert differing[name] == int(expected.sum())
        # Only that output channel of the tensor.
        assert set(expected.nonzero()[:, 1].tolist()) == {index[0]}
    with pytest.raises(VerificationError, match=rf"{report.mismatched_codes} of .* the first in {name} \(fake-quant"):
        report.raise_if_different()


def _index(imodel: IntegerModel, name: str) -> int:
    return [step.name for step in imodel.steps].index(name)


def test_a_mutated_onnx_file_is_found_alone(qmodel: fx.GraphModule, imodel: IntegerModel, tmp_path: Path) -> None:
    name = conv_name(imodel)
    lowprec.export_onnx(mutated(imodel, name, "bias", (1,), 200), tmp_path / "model.onnx")
    report = lowprec.verify(qmodel, imodel, [images(1, 4, SHAPE)], onnx=tmp_path / "model.onnx")
    differing = [(c.tensor, c.against) for c in report.comparisons if c.mismatched]
    assert differing[0] == (name, ONNX)
    assert {against for _, against in differing} == {ONNX}


def test_a_changed_fake_quant_model_is_found(qmodel: fx.GraphModule, imodel: IntegerModel) -> None:
    changed = copy.deepcopy(qmodel)
    with torch.no_grad():
        changed.get_submodule(conv_name(imodel)).norm.bias[1] += 0.5
    report = lowprec.verify(changed, imodel, [images(1, 4, SHAPE)])
    assert next(c.tensor for c in report.comparisons if c.mismatched) == conv_name(imodel)


def test_changed_logits_are_found(qmodel: fx.GraphModule, imodel: IntegerModel) -> None:
    last = imodel.steps[-1].operator
    assert isinstance(last, IntegerLayer)
    last.bias[0] += 1
    report = lowprec.verify(qmodel, imodel, [images(1, 4, SHAPE)])
    assert [(c.tensor, c.mismatched) for c in report.comparisons if c.mismatched] == [(imodel.steps[-1].name, 4)]


def test_the_file_of_another_model_with_the_same_names(
    qmodel: fx.GraphModule, imodel: IntegerModel, tmp_path: Path
) -> None:
    other = awkward(CifarResNet(8, in_channels=1, width=4), seed=4, dead_channels=False)
    lowprec.export_onnx(quantize(other, "w2a8_n4", images(0, 8, SHAPE))[1], tmp_path / "model.onnx")
    report = lowprec.verify(qmodel, imodel, [images(1, 4, SHAPE)], onnx=tmp_path / "model.onnx")
    assert {c.against for c in report.comparisons if c.mismatched} == {ONNX}
    with pytest.raises(VerificationError, match="ONNX Runtime against"):
        report.raise_if_different()


def test_the_file_of_a_narrower_model_differs_wherever_shapes_do(
    qmodel: fx.GraphModule, imodel: IntegerModel, tmp_path: Path
) -> None:
    other = awkward(CifarResNet(8, in_channels=1, width=1), seed=4, dead_channels=False)
    lowprec.export_onnx(quantize(other, "w2a8_n4", images(0, 8, SHAPE))[1], tmp_path / "model.onnx")
    report = lowprec.verify(qmodel, imodel, [images(1, 4, SHAPE)], onnx=tmp_path / "model.onnx")
    first = next(c for c in report.comparisons if c.against == ONNX and c.mismatched)
    assert (first.tensor, first.mismatched) == ("conv1", first.compared)


def test_the_file_of_a_network_with_other_layers_is_refused(
    qmodel: fx.GraphModule, imodel: IntegerModel, tmp_path: Path
) -> None:
    other = awkward(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(200, 10)), seed=4)
    lowprec.export_onnx(quantize(other, "w2a8_n4", images(0, 8, SHAPE))[1], tmp_path / "model.onnx")
    with pytest.raises(ValueError, match=r"model\.onnx is not the export of this model: it has no codes of conv1"):
        lowprec.verify(qmodel, imodel, [images(1, 4, SHAPE)], onnx=tmp_path / "model.onnx")


def test_a_missing_file_says_how_to_write_one(qmodel: fx.GraphModule, imodel: IntegerModel, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.onnx: lowprec\.export_onnx"):
        lowprec.verify(qmodel, imodel, [images(1, 1, SHAPE)], onnx=tmp_path / "nowhere.onnx")


@pytest.mark.parametrize("batches", [[], [torch.zeros(0, *SHAPE)]])
def test_comparing_nothing_is_no_proof(qmodel: fx.GraphModule, imodel: IntegerModel, batches: list[Tensor]) -> None:
    report = lowprec.verify(qmodel, imodel, batches)
    with pytest.raises(VerificationError, match="nothing was compared"):
        report.raise_if_different()


def test_a_printed_report_lists_what_differs(qmodel: fx.GraphModule, imodel: IntegerModel) -> None:
    name = conv_name(imodel)
    report = lowprec.verify(qmodel, mutated(imodel, name, "bias", (1,), 200), [images(1, 1, SHAPE)])
    differing = [c.tensor for c in report.comparisons if c.mismatched]
    lines = str(report).splitlines()
    assert lines[0].startswith("tensor ")
    assert [line.split()[0] for line in lines[1 : 1 + len(differing)]] == differing
    assert lines[1].startswith(f"{name} ")
    assert lines[-1].startswith("1 image, ")
    assert len(lines) == 1 + len(differing) + 3
    assert len(lines) < len(report.details().splitlines())


@pytest.mark.parametrize(
    ("batches", "kind", "message"),
    [
        (lambda x: [x, x * float("nan")], ValueError, "the images of batch 1 hold NaN"),
        (lambda x: [x / 0], ValueError, "the images of batch 0 hold"),
        (lambda x: x, TypeError, r"verify expects an iterable of batches .*give \[images\]"),
        (lambda x: [{"image": x}], TypeError, "the images of batch 0 are dict: verify expects tensors"),
        (lambda x: [x.numpy()], TypeError, "the images of batch 0 are ndarray"),
        (lambda x: [x.half()], TypeError, r"batch 0 must be float32, not float16: call \.float\(\)"),
        (lambda x: [(x, x), (x.to(torch.uint8), x)], TypeError, "batch 1 must be float32, not uint8: pixels"),
        (lambda x: [x[0]], ValueError, r"batch 0 have the shape \[1, 12, 12\]; the model takes \[B, 1, H, W\]"),
        (lambda x: [x.expand(-1, 3, -1, -1)], ValueError, r"have the shape \[2, 3, 12, 12\]"),
    ],
)
def test_images_that_cannot_be_compared_name_their_batch(
    qmodel: fx.GraphModule,
    imodel: IntegerModel,
    batches: Callable[[Tensor], Any],
    kind: type[Exception],
    message: str,
) -> None:
    with pytest.raises(kind, match=message):
        lowprec.verify(qmodel, imodel, batches(images(1, 2, SHAPE)))


def test_models_in_the_wrong_place_are_told(qmodel: fx.GraphModule, imodel: IntegerModel) -> None:
    with pytest.raises(TypeError, match=r"fake-quant model, from lowprec\.prepare\(.*\), not IntegerModel"):
        lowprec.verify(imodel, qmodel, [])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"verify expects an integer model, from lowprec\.convert\(qmodel\), not "):
        lowprec.verify(qmodel, qmodel, [])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"verify expects a fake-quant model, .* not CifarResNet"):
        lowprec.verify(CifarResNet(8), imodel, [])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"calibrate expects a fake-quant model, .* not CifarResNet"):
        lowprec.calibrate(CifarResNet(8), [])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"cost expects a fake-quant model, .* not IntegerModel"):
        lowprec.cost(imodel, images(1, 2, SHAPE))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"convert expects a fake-quant model, .* not IntegerModel"):
        lowprec.convert(imodel)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"FastModel expects an integer model, .* not "):
        lowprec.FastModel(qmodel)  # type: ignore[arg-type]


def test_verify_leaves_both_models_as_they_are(qmodel: fx.GraphModule, imodel: IntegerModel) -> None:
    qmodel.train()
    before = {name: tensor.clone() for name, tensor in qmodel.state_dict().items()}
    lowprec.verify(qmodel, imodel, [images(1, 2, SHAPE)])
    assert qmodel.training
    assert all(torch.equal(before[name], tensor) for name, tensor in qmodel.state_dict().items())
    qmodel.eval()


@pytest.fixture(scope="module")
def transformer() -> tuple[fx.GraphModule, IntegerModel]:
    torch.manual_seed(0)
    return quantize(TinyTransformer().eval(), "w4a8_n4", images(0, 32, (3, 8, 8)))


def test_operators_in_float_are_never_called_equal(
    transformer: tuple[fx.GraphModule, IntegerModel], tmp_path: Path
) -> None:
    qmodel, imodel = transformer
    lowprec.export_onnx(imodel, tmp_path / "model.onnx")
    report = lowprec.verify(qmodel, imodel, [images(1, 100, (3, 8, 8))], onnx=tmp_path / "model.onnx")
    assert not report.equal
    assert report.agreement >= 0.99
    assert "not equal" in str(report)
    exact = [comparison for comparison in report.comparisons if comparison.tensor not in report.inexact]
    assert {"patches", "concatenation", "add"} <= {comparison.tensor for comparison in exact}
    assert sum(comparison.mismatched for comparison in exact) == 0
    assert "norm" in report.inexact
    assert "classifier" in report.inexact
    report.raise_if_different()
    # Layers and products of tensors are integer, layer norms and the softmax are not.
    assert {step.name for step in imodel.steps if isinstance(step.operator, FloatOperator)} == {
        "norm",
        "softmax",
        "last",
    }


def test_a_code_before_the_first_float_operator_must_not_differ(
    transformer: tuple[fx.GraphModule, IntegerModel],
) -> None:
    qmodel = copy.deepcopy(transformer[0])
    with torch.no_grad():
        qmodel.get_submodule("patches").bias[0] += 1.0
    with pytest.raises(VerificationError, match="the first in patches"):
        lowprec.verify(qmodel, transformer[1], [images(1, 4, (3, 8, 8))]).raise_if_different()


def test_other_classes_behind_float_operators_are_found(transformer: tuple[fx.GraphModule, IntegerModel]) -> None:
    qmodel = copy.deepcopy(transformer[0])
    with torch.no_grad():
        qmodel.get_submodule("classifier").bias[0] += 100.0
    report = lowprec.verify(qmodel, transformer[1], [images(1, 20, (3, 8, 8))])
    with pytest.raises(VerificationError, match=r"fake-quant finds the integer executor's class in \d"):
        report.raise_if_different()
