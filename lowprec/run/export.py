"""The files that a run exports: which options they get, and where they lie."""

from __future__ import annotations

from pathlib import Path

from lowprec.config import ConfigError, RunConfig
from lowprec.data import DataModule
from lowprec.data.normalization import PIXEL_VALUES
from lowprec.export.onnx import export_onnx
from lowprec.export.options import ExportOptions
from lowprec.export.packed_onnx import export_packed_onnx
from lowprec.export.qonnx import export_qonnx
from lowprec.integer.model import IntegerModel
from lowprec.run.directory import RunDirectory


def export_options(config: RunConfig, data: DataModule) -> ExportOptions:
    """How the configured run writes its ONNX file, with the data's normalization and class names.

    Raises:
        ConfigError: pixels as input, of a data set whose pixels are not 8-bit.
    """
    export = config.export
    if export.input != "float" and data.normalization.peak != PIXEL_VALUES - 1:
        raise ConfigError(
            f"export.input={export.input}: the pixels of {config.data.name} go to {data.normalization.peak}, not to "
            f"{PIXEL_VALUES - 1}; choose export.input=float"
        )
    return ExportOptions(
        runtime=export.runtime,
        processor=export.processor,
        opset=export.opset,
        batch_size=export.batch_size,
        input=export.input,
        normalization=data.normalization,
        class_names=data.class_names,
    )


def exported_file(directory: RunDirectory, config: RunConfig) -> Path:
    """Where a file of the configured format lies: model.onnx, model.packed.onnx or model.qonnx.onnx."""
    kind = config.export.format
    return directory.onnx_file if kind == "int8" else directory.onnx_file.with_suffix(f".{kind}.onnx")


def export_file(model: IntegerModel, directory: RunDirectory, config: RunConfig, data: DataModule) -> Path:
    """Writes the file of the configured format; returns its path."""
    path, options = exported_file(directory, config), export_options(config, data)
    if config.export.format == "packed":
        export_packed_onnx(model, path, options)
    elif config.export.format == "qonnx":
        export_qonnx(model, path)
    else:
        export_onnx(model, path, options)
    return path
