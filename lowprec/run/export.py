"""The files that a run exports: which options they get, and where they lie."""

from __future__ import annotations

from pathlib import Path

from lowprec.config import ConfigError, ExportConfig, RunConfig
from lowprec.data import DataModule
from lowprec.data.normalization import PIXEL_VALUES
from lowprec.export.onnx import export_onnx
from lowprec.export.options import ExportOptions
from lowprec.export.packed_onnx import export_packed_onnx
from lowprec.export.qonnx import export_qonnx
from lowprec.export.runtime import ExportedModel
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
        preprocessing=data.preprocessing,
    )


def exported_file(directory: RunDirectory, config: RunConfig) -> Path:
    """Where a file of the configured format lies: model.onnx, model.packed.onnx or model.qonnx.onnx."""
    kind = config.export.format
    return directory.onnx_file if kind == "int8" else directory.onnx_file.with_suffix(f".{kind}.onnx")


def check_exported(directory: RunDirectory, config: RunConfig) -> Path:
    """The file of the configured format, once it is known to be there and to be what the command asks for.

    Raises:
        ConfigError: there is no such file, or an option of the command, other than a default, says what it is not.
    """
    path = exported_file(directory, config)
    again = f"the same command with task=export writes {'it' if path.is_file() else 'one'}"
    if not path.is_file():
        raise ConfigError(f"there is no {path}: {again}")
    # A changed file is for verify to say what is changed in it.
    exported = ExportedModel(path, changed=True)
    for name, default in vars(ExportConfig()).items():
        asked, found = getattr(config.export, name), exported.options.get(name)
        if name != "format" and asked != default and asked != found:
            raise ConfigError(f"export.{name}={asked}: {path} has {found}; {again} anew")
    return path


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
