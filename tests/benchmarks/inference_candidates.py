"""What inference.py times: a model in full precision, as others quantize it, and as lowprec does, in three runtimes.

Each candidate is as fast as its runtime makes it: a fixed batch, channels_last, compiled with frozen weights, threads as
told. PyTorch and OpenVINO run batches in one stream.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

import lowprec
from lowprec.export.onnx import ExportOptions
from lowprec.export.runtime import openvino_core, saturates
from lowprec.integer.fast import FastModel
from lowprec.integer.model import IntegerModel
from lowprec.integer.operators import IntegerAdd
from lowprec.recipe import RESIDUALS, Recipe
from lowprec.verify import ExportedCodes

REFERENCE = "PyTorch FP32"
OPSET = 18


@dataclass(frozen=True)
class Candidate:
    """One line of the table.

    run: one batch of images to logits. bytes: of its file. codes_equal: to the integer executor's; None where there is
    nothing to be equal to. once: too slow to be timed more than once.
    """

    run: Callable[[], Tensor]
    bytes: int
    codes_equal: bool | None = None
    once: bool = False


Builder = Callable[[], Candidate]


@dataclass
class Workload:
    """What all candidates share. model: in eval mode. images [B, 3, H, W]; checked: how many are compared code by code."""

    model: nn.Module
    images: Tensor
    calibration: list[Tensor]
    recipe: Recipe
    checked: int
    threads: int
    folder: Path

    def builders(self, reference: bool) -> Iterator[tuple[str, Builder]]:
        """Candidates by name, not built yet; reference: with the integer executor itself."""
        yield REFERENCE, self._pytorch
        yield "PyTorch FP32, compiled", partial(self._pytorch, compiled=True)
        yield "PyTorch bf16 autocast", partial(self._pytorch, bf16=True)
        yield "PyTorch bf16 autocast, compiled", partial(self._pytorch, bf16=True, compiled=True)
        yield "ONNX Runtime FP32", lambda: self._onnxruntime(self._onnx)
        yield "OpenVINO FP32", partial(self._openvino_float, "f32")
        yield "OpenVINO bf16", partial(self._openvino_float, "bf16")
        yield "ONNX Runtime int8, S8S8", partial(self._onnxruntime_int8, "QInt8")
        yield "ONNX Runtime int8, U8S8", partial(self._onnxruntime_int8, "QUInt8")
        yield "OpenVINO int8 (NNCF)", self._nncf
        for residual in RESIDUALS:
            # One form is as good as the other where nothing is added.
            if residual != RESIDUALS[0] and not self._adds:
                continue
            yield f"lowprec, PyTorch, {residual}", partial(self._fast, residual)
            yield f"lowprec, ONNX Runtime, {residual}", partial(self._exported, residual, "onnxruntime")
            yield f"lowprec, OpenVINO, {residual}", partial(self._exported, residual, "openvino")
        if reference:
            yield "lowprec, integer executor", self._executor

    def _pytorch(self, bf16: bool = False, compiled: bool = False) -> Candidate:
        model: Any = copy.deepcopy(self.model).to(memory_format=torch.channels_last)
        images = self.images.contiguous(memory_format=torch.channels_last)
        path = self.folder / "model.pt"
        torch.save(model.state_dict(), path)
        if compiled:
            model = torch.compile(model, options={"freezing": True})

        def run() -> Tensor:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                return model(images)

        return Candidate(run, path.stat().st_size)

    @cached_property
    def _onnx(self) -> Path:
        path = self.folder / "float.onnx"
        names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
        # The exporter that needs no further package.
        torch.onnx.export(self.model, (self.images,), path, dynamo=False, opset_version=OPSET, **names)
        return path

    def _onnxruntime(self, path: Path) -> Candidate:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self.threads
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        images = self.images.numpy()
        return Candidate(lambda: torch.from_numpy(session.run(None, {"images": images})[0]), path.stat().st_size)

    def _onnxruntime_int8(self, activations: str) -> Candidate:
        """As ONNX Runtime's documentation says: QDQ, weights by channel, after its own shape inference and fusions."""
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        batches = iter([{"images": batch.numpy()} for batch in self.calibration])

        class Reader(CalibrationDataReader):
            def get_next(self) -> dict[str, np.ndarray] | None:
                return next(batches, None)

        prepared, path = self.folder / "prepared.onnx", self.folder / f"peer_{activations}.onnx"
        quant_pre_process(str(self._onnx), str(prepared))
        quantize_static(
            str(prepared),
            str(path),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType[activations],
            weight_type=QuantType.QInt8,
        )
        return self._onnxruntime(path)

    @property
    def _openvino_model(self) -> Any:
        import openvino

        return openvino.convert_model(self._onnx)

    def _openvino(self, model: Any, path: Path, precision: str | None) -> Candidate:
        settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": self.threads, "NUM_STREAMS": 1}
        if precision is not None:
            settings["INFERENCE_PRECISION_HINT"] = precision
        compiled = openvino_core().compile_model(model, "CPU", settings)
        found = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if precision not in (None, found):
            raise RuntimeError(f"OpenVINO computes in {found} on this CPU")
        request, images = compiled.create_infer_request(), self.images.numpy()
        size = sum(part.stat().st_size for part in (path, path.with_suffix(".bin")) if part.exists())
        return Candidate(lambda: torch.from_numpy(next(iter(request.infer({0: images}).values())).copy()), size)

    def _openvino_float(self, precision: str) -> Candidate:
        import openvino

        model, path = self._openvino_model, self.folder / "float.xml"
        openvino.save_model(model, path, compress_to_fp16=False)
        return self._openvino(model, path, precision)

    def _nncf(self) -> Candidate:
        """As NNCF's documentation says; in the precision that OpenVINO takes for what stays float."""
        import nncf
        import openvino

        batches = nncf.Dataset([batch.numpy() for batch in self.calibration])
        model, path = nncf.quantize(self._openvino_model, batches), self.folder / "nncf.xml"
        openvino.save_model(model, path, compress_to_fp16=False)
        return self._openvino(model, path, None)

    @cached_property
    def _integer_models(self) -> dict[str, IntegerModel]:
        return {}

    def _integer(self, residual: str) -> IntegerModel:
        if residual not in self._integer_models:
            recipe = copy.deepcopy(self.recipe)
            recipe.activations.residual = residual
            qmodel = lowprec.prepare(self.model, recipe, self.images[:1])
            lowprec.calibrate(qmodel, self.calibration)
            self._integer_models[residual] = lowprec.convert(qmodel)
        return self._integer_models[residual]

    @property
    def _adds(self) -> bool:
        return any(isinstance(step.operator, IntegerAdd) for step in self._integer(RESIDUALS[0]).steps)

    def _expected(self, residual: str) -> tuple[dict[str, Tensor], Tensor]:
        """Codes of every step, and logits, of the images that are checked."""
        model, images = self._integer(residual), self.images[: self.checked]
        return model.codes(images), model(images)

    def _fast(self, residual: str) -> Candidate:
        model, path = self._integer(residual), self.folder / f"{residual}.safetensors"
        lowprec.save(model, path)
        fast, images = FastModel(model), self.images
        codes, logits = self._expected(residual)
        found = fast.codes(images[: self.checked])
        equal = _all_equal(found, codes) and torch.equal(fast(images)[: self.checked], logits)
        return Candidate(lambda: fast(images), path.stat().st_size, equal)

    def _exported(self, residual: str, runtime: str) -> Candidate:
        model, path = self._integer(residual), self.folder / f"{residual}_{runtime}.onnx"
        # As an engineer would export it for this machine.
        processor = "any" if saturates(runtime) else "vnni"
        lowprec.export_onnx(model, path, ExportOptions(runtime, processor, batch_size=len(self.images)))
        # In OpenVINO with float32 sums, as ExportedModel runs it.
        timed = self._onnxruntime(path) if runtime == "onnxruntime" else self._openvino(path, path, "f32")
        codes, logits = self._expected(residual)
        found = ExportedCodes(path, model).run(self.images[: self.checked])
        equal = _all_equal(found, codes) and torch.equal(timed.run()[: self.checked], logits)
        return Candidate(timed.run, timed.bytes, equal)

    def _executor(self) -> Candidate:
        model, path = self._integer(RESIDUALS[0]), self.folder / f"{RESIDUALS[0]}.safetensors"
        lowprec.save(model, path)
        return Candidate(lambda: model(self.images), path.stat().st_size, once=True)


def _all_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Whether every tensor that was found (all of them, or all that have a grid) holds the codes expected of it."""
    return len(found) > 0 and all(torch.equal(codes.double(), expected[name].double()) for name, codes in found.items())
