"""The proof that what was validated is what is shipped: the codes of every tensor, in four implementations.

Fake-quant model in eval mode, integer executor, its fast backend and the exported file in its runtime run on the same
images; each tensor's codes are compared with ``==``, the logits as 32-bit sums.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from lowprec.export.exported_file import ExportedFileError
from lowprec.export.qdq import codes_name, zero_point
from lowprec.export.runtime import RUNTIME_NAMES, ExportedModel
from lowprec.graph.nodes import step_names
from lowprec.images import check_images, image_batches
from lowprec.integer.fast import FastModel
from lowprec.integer.model import IntegerModel, Step, expect_integer_model
from lowprec.integer.operators import IntegerConstant, IntegerLayer, logits_of, sum_exponents_like
from lowprec.numerics.fixed_point import scale_by_power_of_two
from lowprec.prepare import expect_prepared
from lowprec.report.verification import TensorComparison, VerificationError, VerificationReport

# float32 holds every integer up to here, so float32 sums of codes are exact below it.
FLOAT32_EXACT = 1 << 24
__all__ = ["FAKE_QUANT", "FAST", "ONNX", "VerificationError", "VerificationReport", "verify"]

FAKE_QUANT, FAST, ONNX = "fake-quant", "fast executor", RUNTIME_NAMES["onnxruntime"]


@torch.no_grad()
def verify(
    qmodel: fx.GraphModule,
    imodel: IntegerModel,
    batches: Iterable[Any],
    onnx: str | Path | None = None,
    runtime: str | None = None,
) -> VerificationReport:
    """Compares the codes of every tensor on the images of ``batches``; of (images, labels) pairs the images are taken.

    The fake-quant side runs in eval mode, in float32 where no sum can leave float32's exact integers, else in float64.
    onnx: path of the file that :func:`lowprec.export_onnx` wrote; None leaves it out. One that was changed since is compared
    all the same, so that the report names where, and never called equal. runtime: ``onnxruntime`` or
    ``openvino``; None is the one that the file was written for. The report's ``raise_if_different()`` is the gate. Behind
    operators that stay in float (softmax, layer norm) codes may differ: there the classes are compared, and the report never
    calls the models equal.

    Raises:
        TypeError: a model of another kind, or batches that hold no float32 images.
        ValueError: images of another shape than the model's, or that hold NaN or infinite values; the message names the batch.
        FileNotFoundError: there is no such ONNX file.
        ExportedFileError: the ONNX file is damaged, not for this runtime, or lacks tensors of the integer model.
    """
    expect_prepared(qmodel, "verify")
    expect_integer_model(imodel, "verify")
    dtype = torch.float32 if imodel.sum_bound < FLOAT32_EXACT else torch.float64
    fast = FastModel(imodel)
    reference = _FakeQuantCodes(copy.deepcopy(qmodel).cpu().eval().to(dtype))
    exported = None if onnx is None else ExportedCodes(onnx, imodel, runtime)
    report = VerificationReport(fake_quant_dtype=str(dtype).removeprefix("torch."))
    report.inexact = imodel.inexact_steps
    counts: dict[tuple[str, str], TensorComparison] = {}
    last = imodel.steps[-1]
    if exported is not None and not exported.unchanged:
        report.changed_file = str(onnx)
    for name, given in image_batches(batches, "verify"):
        images = given.cpu()
        check_images(images, imodel.image_shape, name, any_size=imodel.any_size and onnx is None)
        expected = imodel.codes(images)
        found = {FAKE_QUANT: reference.run(images.to(dtype), imodel), FAST: fast.codes(images)}
        if exported is not None:
            found[exported.name] = exported.run(images)
        report.images += len(images)
        best = logits_of(expected[last.name], last.operator).argmax(1)
        for against, codes in found.items():
            agreed = (_values(last, codes[last.name]).argmax(1) == best).sum() if last.name in codes else 0
            report.agreed[against] = report.agreed.get(against, 0) + int(agreed)
        for step in imodel.steps:
            for against, codes in found.items():
                if step.name not in codes:
                    continue
                comparison = counts.setdefault((step.name, against), TensorComparison(step.name, against))
                comparison.add(codes[step.name], expected[step.name])
    report.comparisons = list(counts.values())
    return report


class _FakeQuantCodes(fx.Interpreter):
    """Runs a fake-quant model and keeps every node's result."""

    def __init__(self, qmodel: fx.GraphModule) -> None:
        super().__init__(qmodel)
        self.names = step_names(self.graph)
        self.results: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.results[self.names[n]] = result
        return result

    def run(self, images: Tensor, imodel: IntegerModel) -> dict[str, Tensor]:  # type: ignore[override]
        """Codes by step name, float64: value / 2^exponent, a whole number only if the value lies on its grid."""
        super().run(images)
        return {
            step.name: _codes(step, self.results[step.name].double())
            for step in imodel.steps
            # One call may become several steps; the last of them bears its name.
            if step.name in self.results
        }


def _values(step: Step, codes: Tensor) -> Tensor:
    return scale_by_power_of_two(codes, _exponent(step, codes))


def _codes(step: Step, values: Tensor) -> Tensor:
    return scale_by_power_of_two(values, -_exponent(step, values))


class ExportedCodes:
    """The codes of every step of an exported file.

    Outputs beside the logits change what OpenVINO fuses; so the logits come from the file as it is, the codes from a second
    copy of it.

    Raises:
        FileNotFoundError: there is no such file.
        ExportedFileError: the file is damaged, or lacks tensors of the model.
    """

    def __init__(self, path: str | Path, imodel: IntegerModel, runtime: str | None = None) -> None:
        self.steps = [step for step in imodel.steps if step.operator.output is not None]
        self.last = imodel.steps[-1]
        self.exported = ExportedModel(path, runtime, changed=True)
        self.unchanged = self.exported.unchanged
        names = [codes_name(step.name) for step in self.steps]
        missing = [step.name for step, name in zip(self.steps, names, strict=True) if name not in self.exported.tensors]
        if missing:
            raise ExportedFileError(
                f"{path} is not the export of this model: it has no codes of {', '.join(missing[:5])}"
            )
        self.opened = ExportedModel(path, runtime, outputs=names, changed=True)

    @property
    def name(self) -> str:
        """The runtime as reports name it."""
        return RUNTIME_NAMES[self.exported.runtime]

    def run(self, images: Tensor) -> dict[str, Tensor]:
        """Codes by step name, float64, zero points taken off; the last step's 32-bit sums if it has no grid."""
        codes = self.opened.run([codes_name(step.name) for step in self.steps], images)
        # A constant is the same in every part of the images that a fixed batch makes.
        codes = [
            array[: len(step.operator.codes)] if isinstance(step.operator, IntegerConstant) else array
            for step, array in zip(self.steps, codes, strict=True)
        ]
        results = {
            step.name: torch.from_numpy(array.astype(np.float64)) - zero_point(step.operator.output)  # type: ignore[arg-type]
            for step, array in zip(self.steps, codes, strict=True)
        }
        # The logits as a user gets them; where they have a grid, they are its codes once more.
        values = self.exported(images).double()
        results[self.last.name] = _codes(self.last, values)
        return results


def _exponent(step: Step, values: Tensor) -> Tensor:
    """Exponents of a step's values, in a shape that broadcasts against them."""
    if step.operator.output is not None:
        return torch.tensor(step.operator.output.exponent, dtype=torch.int32)
    assert isinstance(step.operator, IntegerLayer)
    return sum_exponents_like(values, step.operator)
