"""lowprec: low-precision fine-tuning for PyTorch, from a full-precision model to an integer one that is equal to it.

recipe = lowprec.Recipe.load("w2a8_n4")
qmodel = lowprec.prepare(model, recipe, example_inputs)
lowprec.reconstruct(qmodel, batches)
imodel = lowprec.convert(qmodel)
lowprec.export_onnx(imodel, "model.onnx")
lowprec.verify(qmodel, imodel, batches, onnx="model.onnx").raise_if_different()
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowprec.assign import assign
    from lowprec.calibrate import calibrate
    from lowprec.cost import cost
    from lowprec.data.normalization import Normalization
    from lowprec.export.exported_file import ExportedFileError
    from lowprec.export.onnx import ExportOptions, export_onnx
    from lowprec.export.packed_onnx import export_packed_onnx
    from lowprec.export.qonnx import export_qonnx
    from lowprec.export.runtime import ExportedModel, RuntimeMissingError
    from lowprec.graph.planning import UnsupportedModelError
    from lowprec.graph.tracing import TracingError
    from lowprec.integer.convert import ConversionError, convert
    from lowprec.integer.fast import FastModel
    from lowprec.integer.model import IntegerModel
    from lowprec.integer.packed import PackedFileError, load, save
    from lowprec.numerics.solve import solve
    from lowprec.prepare import prepare
    from lowprec.recipe import Recipe, RecipeError
    from lowprec.reconstruct import reconstruct
    from lowprec.report.verification import VerificationError
    from lowprec.sensitivity import Sensitivity, sensitivity
    from lowprec.verify import verify

__all__ = [
    "ConversionError",
    "ExportOptions",
    "ExportedFileError",
    "ExportedModel",
    "FastModel",
    "IntegerModel",
    "Normalization",
    "PackedFileError",
    "Recipe",
    "RecipeError",
    "RuntimeMissingError",
    "Sensitivity",
    "TracingError",
    "UnsupportedModelError",
    "VerificationError",
    "assign",
    "calibrate",
    "convert",
    "cost",
    "export_onnx",
    "export_packed_onnx",
    "export_qonnx",
    "load",
    "prepare",
    "reconstruct",
    "save",
    "sensitivity",
    "solve",
    "verify",
]

__version__ = importlib.metadata.version("lowprec")

# Where each public name lives. Found when first used, so that `import lowprec` and a mistyped command do not wait for torch.
_HOMES = {
    "ConversionError": "lowprec.integer.convert",
    "ExportOptions": "lowprec.export.options",
    "ExportedFileError": "lowprec.export.exported_file",
    "ExportedModel": "lowprec.export.runtime",
    "FastModel": "lowprec.integer.fast",
    "IntegerModel": "lowprec.integer.model",
    "Normalization": "lowprec.data.normalization",
    "PackedFileError": "lowprec.integer.packed",
    "Recipe": "lowprec.recipe",
    "RecipeError": "lowprec.recipe",
    "RuntimeMissingError": "lowprec.export.runtime",
    "Sensitivity": "lowprec.sensitivity",
    "TracingError": "lowprec.graph.tracing",
    "UnsupportedModelError": "lowprec.graph.planning",
    "VerificationError": "lowprec.report.verification",
    "assign": "lowprec.assign",
    "calibrate": "lowprec.calibrate",
    "convert": "lowprec.integer.convert",
    "cost": "lowprec.cost",
    "export_onnx": "lowprec.export.onnx",
    "export_packed_onnx": "lowprec.export.packed_onnx",
    "export_qonnx": "lowprec.export.qonnx",
    "load": "lowprec.integer.packed",
    "prepare": "lowprec.prepare",
    "reconstruct": "lowprec.reconstruct",
    "save": "lowprec.integer.packed",
    "sensitivity": "lowprec.sensitivity",
    "solve": "lowprec.numerics.solve",
    "verify": "lowprec.verify",
}


class _Package(ModuleType):
    """The package as a module whose public functions win over the submodules of the same names.

    Importing ``lowprec.prepare`` anywhere binds the submodule as an attribute of the package; here the function of that
    name is bound instead, whatever was imported first.
    """

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'lowprec' has no attribute {name!r}; its public names: {', '.join(__all__)}")
        return getattr(importlib.import_module(_HOMES[name]), name)

    def __setattr__(self, name: str, value: Any) -> None:
        own_submodule = isinstance(value, ModuleType) and _HOMES.get(name) == value.__name__
        super().__setattr__(name, getattr(value, name) if own_submodule else value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
