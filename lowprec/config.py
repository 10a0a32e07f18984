"""The typed schema of a run: every key, its type, its default and the values it can have.

Hydra fills these dataclasses from ``conf/``; :meth:`RunConfig.validate` refuses what no run can have. This module
imports no torch, so that a mistyped key stops a run at once.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Optional

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from lowprec.recipe import Recipe, RecipeError

TASKS = ("train", "evaluate", "verify", "export", "cost")
DATA_SETS = ("fashion_mnist", "digits", "cifar10", "cifar100", "imagenet", "image_folder")
RUNTIMES = ("onnxruntime", "openvino")
FORMATS = ("int8", "packed", "qonnx")
INPUTS = ("float", "uint8", "uint8_nhwc")
PROCESSORS = ("any", "vnni")
OPSETS = range(13, 26)
OPTIMIZERS = ("sgd", "adamw")
PRECISIONS = ("auto", "32", "bf16")
ACCELERATORS = ("auto", "cpu", "gpu")
PROGRESS = ("auto", "rich", "plain", "none")
WANDB_MODES = ("auto", "offline", "online")

# These say where and how a run works, not what comes out of it: they may differ when a run is started again.
INCIDENTAL_KEYS = (
    "task",
    "run_id",
    "runs_dir",
    "fresh",
    "logger",
    "data.root",
    "data.num_workers",
    "data.eval_batch_size",
    "trainer.progress",
    "export",
    "verify",
)


class ConfigError(ValueError):
    """A configuration that no run can have; the message names the key, its value and the valid choices."""


# Optional[...] rather than "| None" below: OmegaConf reads these annotations as its schema.
@dataclass
class ModelConfig:
    """The full-precision model. ``checkpoint`` (a path) wins over ``pretrained`` (the name's own published weights)."""

    name: str = MISSING
    pretrained: bool = False
    checkpoint: Optional[str] = None  # noqa: UP045
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass
class DataConfig:
    """The data set; what is null is the data set's own default, or the model's.

    ``num_classes``, ``in_channels`` and ``image_size`` (pixels) are stated so that costs are known without the data;
    photographs are scaled to ``image_size``, or else to the size that the model was published with. ``padding``
    (pixels) is that of the random crop of small images.
    """

    name: str = MISSING
    num_classes: Optional[int] = None  # noqa: UP045
    in_channels: int = 3
    image_size: Optional[int] = None  # noqa: UP045
    root: Optional[str] = None  # noqa: UP045
    batch_size: int = 128
    eval_batch_size: int = 500
    num_workers: int = 0
    validation_share: float = 0.1
    augment: bool = True
    padding: Optional[int] = None  # noqa: UP045
    limit_train: Optional[int] = None  # noqa: UP045
    limit_test: Optional[int] = None  # noqa: UP045


@dataclass
class OptimConfig:
    """The optimizer and its schedule: linear warm-up, then cosine to zero, both stepped once per batch.

    ``momentum`` and ``nesterov`` are SGD's, ``betas`` AdamW's. ``warmup_epochs`` may be a fraction of an epoch.
    """

    name: str = "sgd"
    learning_rate: float = 0.01
    weight_decay: float = 0.0
    momentum: float = 0.9
    nesterov: bool = True
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    warmup_epochs: float = 0.0


@dataclass
class BaselineConfig:
    """How the full-precision model is trained where there is no checkpoint of it."""

    max_epochs: int = 8
    label_smoothing: float = 0.0
    optim: OptimConfig = field(default_factory=OptimConfig)


@dataclass
class CalibrationConfig:
    """``images``: training images, without augmentation, that set activation exponents and correct batch norm."""

    images: int = 1024


@dataclass
class DistillationConfig:
    """Loss = (1 - weight) · cross-entropy + weight · T² · KL(teacher ‖ student); logits divided by T."""

    weight: float = 0.5
    temperature: float = 4.0


@dataclass
class TrainerConfig:
    """How training runs; ``max_epochs`` counts fine-tuning epochs, and 0 leaves it at post-training quantization."""

    max_epochs: int = 4
    label_smoothing: float = 0.0
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    gradient_clip: Optional[float] = None  # noqa: UP045
    precision: str = "auto"
    accelerator: str = "auto"
    threads: Optional[int] = None  # noqa: UP045
    channels_last: bool = True
    progress: str = "auto"


@dataclass
class LoggerConfig:
    """Where metrics go besides the terminal. ``mode`` is W&B's: ``auto`` is online with a key and offline without."""

    csv: bool = True
    wandb: bool = False
    project: str = "lowprec"
    entity: Optional[str] = None  # noqa: UP045
    tags: list[str] = field(default_factory=list)
    mode: str = "auto"


@dataclass
class ExportConfig:
    """How the ONNX file is written: see :class:`lowprec.export.options.ExportOptions`.

    ``format``: ``int8`` is model.onnx, which every run has; ``packed`` (2- and 4-bit weights) and ``qonnx`` (FINN, hls4ml)
    are files beside it. ``batch_size`` null leaves the batch open. ``input``: ``float`` (normalised images), ``uint8`` or
    ``uint8_nhwc`` (pixels, with the data's normalization folded in).
    """

    format: str = "int8"
    runtime: str = "onnxruntime"
    processor: str = "any"
    opset: int = 18
    batch_size: Optional[int] = None  # noqa: UP045
    input: str = "float"


@dataclass
class VerifyConfig:
    """``images`` of the test split are compared code by code; null compares all."""

    images: Optional[int] = None  # noqa: UP045


@dataclass
class RunConfig:
    """Everything that a run depends on. ``quant`` holds a recipe (see :class:`lowprec.Recipe`)."""

    task: str = "train"
    experiment: str = "custom"
    seed: int = 0
    runs_dir: str = "runs"
    run_id: Optional[str] = None  # noqa: UP045
    fresh: bool = False
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    quant: dict[str, Any] = field(default_factory=dict)
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)

    @property
    def recipe(self) -> Recipe:
        """The recipe of ``quant``; raises RecipeError for one that cannot be."""
        return Recipe.from_dict(self.quant)

    def validate(self) -> None:
        """Raises ConfigError for the first value that no run can have."""
        _require_choice("task", self.task, TASKS)
        _require_choice("data.name", self.data.name, DATA_SETS)
        if self.run_id is not None and (not re.fullmatch(r"[\w][\w.,+-]*", self.run_id) or self.run_id == "baselines"):
            raise ConfigError(f"run_id={self.run_id!r}: give a folder name of letters, digits and . , + _ -")
        _require("seed", self.seed, 0 <= self.seed < 2**32, "a whole number from 0 to 2^32 - 1")
        self._validate_data()
        self._validate_training()
        self._validate_export()
        _require_choice("logger.mode", self.logger.mode, WANDB_MODES)
        try:
            self.recipe  # noqa: B018 - building it is the check
        except RecipeError as error:
            raise ConfigError(str(error)) from error

    def _validate_data(self) -> None:
        data = self.data
        _require("data.validation_share", data.validation_share, 0 < data.validation_share < 1, "a share in (0, 1)")
        for key, value in (
            ("model.name", self.model.name),
            ("data.batch_size", data.batch_size),
            ("data.eval_batch_size", data.eval_batch_size),
            ("data.in_channels", data.in_channels),
            ("calibration.images", self.calibration.images),
        ):
            _require(key, value, bool(value) and (isinstance(value, str) or value > 0), "at least 1")
        for key, optional in (
            ("data.num_classes", data.num_classes),
            ("data.image_size", data.image_size),
            ("data.limit_train", data.limit_train),
            ("data.limit_test", data.limit_test),
        ):
            _require(key, optional, optional is None or optional > 0, "at least 1, or null")
        _require("data.padding", data.padding, data.padding is None or data.padding >= 0, "0 or more, or null")
        needs_root = data.name == "image_folder" and self.task != "cost"
        _require(
            "data.root", data.root, data.root is not None or not needs_root, "the folder that holds train/ and val/"
        )
        _require("data.num_workers", data.num_workers, data.num_workers >= 0, "0 or more")

    def _validate_export(self) -> None:
        export, images = self.export, self.verify.images
        _require_choice("export.format", export.format, FORMATS)
        _require_choice("export.runtime", export.runtime, RUNTIMES)
        if export.format != "int8" and export.runtime != "onnxruntime":
            raise ConfigError(f"export.runtime={export.runtime}: export.format={export.format} is for onnxruntime")
        _require_choice("export.processor", export.processor, PROCESSORS)
        if export.format == "qonnx" and export.processor != "any":
            raise ConfigError(f"export.processor={export.processor}: export.format=qonnx is for hardware of your own")
        if export.format == "qonnx" and self.task == "verify":
            raise ConfigError(
                "export.format=qonnx: the qonnx package executes such files; task=verify takes int8 or packed"
            )
        _require_choice("export.input", export.input, INPUTS)
        _require("export.opset", export.opset, export.opset in OPSETS, f"{OPSETS.start} to {OPSETS.stop - 1}")
        batch = export.batch_size
        _require("export.batch_size", batch, batch is None or batch > 0, "at least 1, or null for any")
        _require("verify.images", images, images is None or images > 0, "at least 1, or null for all")

    def _validate_training(self) -> None:
        trainer, distillation = self.trainer, self.trainer.distillation
        _require("trainer.max_epochs", trainer.max_epochs, trainer.max_epochs >= 0, "0 or more")
        _require("baseline.max_epochs", self.baseline.max_epochs, self.baseline.max_epochs >= 1, "at least 1")
        for key, smoothing in (("trainer", trainer.label_smoothing), ("baseline", self.baseline.label_smoothing)):
            _require(f"{key}.label_smoothing", smoothing, 0 <= smoothing < 1, "a share in [0, 1)")
        weight, temperature = distillation.weight, distillation.temperature
        _require("trainer.distillation.weight", weight, 0 <= weight <= 1, "a share in [0, 1]; 0 turns it off")
        _require("trainer.distillation.temperature", temperature, temperature > 0, "above 0")
        clip = trainer.gradient_clip
        _require("trainer.gradient_clip", clip, clip is None or clip > 0, "a norm above 0, or null")
        threads = trainer.threads
        _require("trainer.threads", threads, threads is None or threads > 0, "at least 1, or null for all cores")
        _require_choice("trainer.precision", trainer.precision, PRECISIONS)
        _require_choice("trainer.accelerator", trainer.accelerator, ACCELERATORS)
        _require_choice("trainer.progress", trainer.progress, PROGRESS)
        for prefix, optim, epochs in (
            ("optim", self.optim, trainer.max_epochs),
            ("baseline.optim", self.baseline.optim, self.baseline.max_epochs),
        ):
            _require_choice(f"{prefix}.name", optim.name, OPTIMIZERS)
            _require(f"{prefix}.learning_rate", optim.learning_rate, optim.learning_rate > 0, "above 0")
            _require(f"{prefix}.weight_decay", optim.weight_decay, optim.weight_decay >= 0, "0 or more")
            _require(f"{prefix}.momentum", optim.momentum, 0 <= optim.momentum < 1, "in [0, 1)")
            in_range = len(optim.betas) == 2 and all(0 <= beta < 1 for beta in optim.betas)
            _require(f"{prefix}.betas", optim.betas, in_range, "two numbers in [0, 1)")
            # Without fine-tuning the optimizer is idle, so any warm-up length will do.
            warmup_fits = optim.warmup_epochs >= 0 and (epochs == 0 or optim.warmup_epochs < epochs)
            _require(f"{prefix}.warmup_epochs", optim.warmup_epochs, warmup_fits, f"in [0, {epochs}), its epochs")


def schema_keys() -> list[str]:
    """All full keys of a run, recipe keys under ``quant`` included: ``trainer.max_epochs``, ``quant.weights.bits``,
    …
    """
    keys = [key for key in _keys_of(RunConfig) if key != "quant"]
    return [*keys, "quant", *(f"quant.{key}" for key in _keys_of(Recipe))]


def _keys_of(kind: type, prefix: str = "") -> Iterator[str]:
    defaults = kind()
    for item in fields(kind):
        yield prefix + item.name
        value = getattr(defaults, item.name)
        if is_dataclass(value):
            yield from _keys_of(type(value), f"{prefix}{item.name}.")


def _require(key: str, value: object, condition: bool, expected: str) -> None:
    endless = isinstance(value, float) and not math.isfinite(value)
    if not condition or endless:
        raise ConfigError(f"{key}={value}: expected {expected}")


def _require_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{key}={value}: choose one of {', '.join(choices)}{_did_you_mean(value, choices)}")


def _did_you_mean(value: str, choices: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


ConfigStore.instance().store(name="run_schema", node=RunConfig)
