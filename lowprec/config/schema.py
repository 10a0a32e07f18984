"""The typed schema of a run: every key, its type, its default and the values it can have.

Hydra fills these dataclasses from ``conf/``; :meth:`RunConfig.validate` refuses what no run can have. This module
imports no torch, so that a mistyped key stops a run at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Optional

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from lowprec.budget import Budget
from lowprec.recipe import Recipe

TASKS = ("train", "evaluate", "verify", "export", "cost", "sensitivity", "report", "compare", "sbatch", "list")
PHOTOGRAPHS = ("imagenet", "image_folder", "shards")
DATA_SETS = ("fashion_mnist", "digits", "cifar10", "cifar100", *PHOTOGRAPHS)
HEADS = ("strict", "new")
RUNTIMES = ("onnxruntime", "openvino")
FORMATS = ("int8", "packed", "qonnx")
INPUTS = ("float", "uint8", "uint8_nhwc")
PROCESSORS = ("any", "vnni")
OPSETS = range(13, 26)
OPTIMIZERS = ("sgd", "adamw")
PRECISIONS = ("auto", "32", "bf16")
ACCELERATORS = ("auto", "cpu", "gpu")
DEBUG_MODES = ("one_batch", "overfit", "profile")
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
    "data.max_corrupted",
    "data.eval_batch_size",
    "trainer.progress",
    "trainer.progress_seconds",
    "trainer.log_every_steps",
    "trainer.checkpoint_minutes",
    "slurm",
    "export",
    "verify",
    "report",
    "run",
    "sensitivity.labelled_images",
)


class ConfigError(ValueError):
    """A configuration that no run can have; the message names the key, its value and the valid choices."""


# Optional[...] rather than "| None" below: OmegaConf reads these annotations as its schema.
@dataclass
class ModelConfig:
    """The full-precision model. ``checkpoint`` (a path) wins over ``pretrained`` (the name's own published weights).

    ``head``: ``strict`` asks weights for the data's number of classes; ``new`` loads all but the classifier, and trains the
    model as a full-precision baseline from there.
    """

    name: str = MISSING
    pretrained: bool = False
    checkpoint: Optional[str] = None  # noqa: UP045
    head: str = "strict"
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def is_trained_here(self) -> bool:
        """Whether quantization starts from a baseline of this project's own training."""
        return self.head == "new" or (self.checkpoint is None and not self.pretrained)


@dataclass
class DataConfig:
    """The data set; what is null is the data set's own default, or the model's.

    ``num_classes``, ``in_channels`` and ``image_size`` (pixels) are stated so that costs are known without the data;
    photographs are scaled to ``image_size``, or else to the size that the model was published with. ``padding``
    (pixels) is that of the random crop of small images. The last three are for photographs: a policy of timm by name
    (``rand-m9-mstd0.5-inc1``), the probability that a rectangle is erased, and how many training images that cannot be
    decoded are replaced by others before that is an error.
    """

    name: str = MISSING
    num_classes: Optional[int] = None  # noqa: UP045
    in_channels: int = 3
    image_size: Optional[int] = None  # noqa: UP045
    root: Optional[str] = None  # noqa: UP045
    batch_size: int = 128
    eval_batch_size: int = 500
    num_workers: Optional[int] = None  # noqa: UP045
    validation_share: float = 0.1
    augment: bool = True
    padding: Optional[int] = None  # noqa: UP045
    limit_train: Optional[int] = None  # noqa: UP045
    limit_test: Optional[int] = None  # noqa: UP045
    auto_augment: Optional[str] = None  # noqa: UP045
    random_erasing: float = 0.0
    max_corrupted: int = 100


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
    """``images``: training images, without augmentation or labels, that set activation exponents.

    ``reconstruct``: they also fit each layer's weights to its full-precision outputs (:func:`lowprec.reconstruct`); else the
    weights stay as solved, and batch norm is corrected (:func:`lowprec.calibrate`).
    """

    images: int = 1024
    reconstruct: bool = True


@dataclass
class SensitivityConfig:
    """Each layer quantized alone. ``images``: of the calibration images, how many the output error is measured on, by
    ``task=sensitivity`` and for a ``budget``. ``labelled_images``: validation images on which ``task=sensitivity`` measures
    top-1; 0 leaves that out.
    """

    images: int = 128
    labelled_images: int = 256


@dataclass
class DistillationConfig:
    """Loss = (1 - weight) · cross-entropy + weight · T² · KL(teacher ‖ student); logits divided by T."""

    weight: float = 0.5
    temperature: float = 4.0


@dataclass
class TrainerConfig:
    """How training runs; ``max_epochs`` counts fine-tuning epochs, and 0 leaves it at post-training quantization.

    ``nodes`` and ``devices`` (processes on each node): every process trains on ``data.batch_size`` images a step, times
    ``accumulate_grad_batches``. ``checkpoint_minutes``: last.ckpt is written that often within an epoch; null leaves it at
    the ends of epochs. ``integer_kernels``: see :func:`lowprec.layers.integer_product.use_integer_kernels`; ``tensor_cores``: see
    :func:`lowprec.layers.tensor_core_product.use_tensor_cores`, of a GPU, not with ``compile``; ``keep_codes``: see
    :func:`lowprec.layers.saved_codes.saved_as_codes`, not with ``compile``. ``debug``: one_batch, overfit or profile instead of a
    training. ``log_every_steps``: optimizer steps between two rows of metrics; ``progress_seconds``: between two lines of
    progress where there is no terminal.
    """

    max_epochs: int = 4
    nodes: int = 1
    devices: int = 1
    sync_batchnorm: bool = False
    accumulate_grad_batches: int = 1
    compile: bool = False
    keep_codes: bool = False
    integer_kernels: bool = True
    tensor_cores: bool = False
    checkpoint_minutes: Optional[float] = 10.0  # noqa: UP045
    debug: Optional[str] = None  # noqa: UP045
    label_smoothing: float = 0.0
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    gradient_clip: Optional[float] = None  # noqa: UP045
    precision: str = "auto"
    accelerator: str = "auto"
    threads: Optional[int] = None  # noqa: UP045
    channels_last: bool = True
    progress: str = "auto"
    progress_seconds: float = 60.0
    log_every_steps: int = 50


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
    are files beside it. ``opset`` null is 18, and 25 for ``packed``. ``batch_size`` null leaves the batch open. ``input``:
    ``float`` (normalised images), ``uint8`` or ``uint8_nhwc`` (pixels, with the data's normalization folded in).
    """

    format: str = "int8"
    runtime: str = "onnxruntime"
    processor: str = "any"
    opset: Optional[int] = None  # noqa: UP045
    batch_size: Optional[int] = None  # noqa: UP045
    input: str = "float"


@dataclass
class VerifyConfig:
    """``images`` of the test split are compared code by code; null compares all."""

    images: Optional[int] = None  # noqa: UP045


@dataclass
class ReportConfig:
    """``images`` of the test split, whose classes report.html compares with full precision's; null compares all."""

    images: Optional[int] = 2000  # noqa: UP045


@dataclass
class SlurmConfig:
    """A SLURM job: what ``task=sbatch`` prints and ``hydra/launcher=slurm`` asks for. What is null is the cluster's default.

    ``signal_seconds``: how long before its end the job is told, so that it writes a checkpoint and is requeued.
    ``requeues``: how often at most. ``setup``: shell commands before the training.
    """

    partition: Optional[str] = None  # noqa: UP045
    account: Optional[str] = None  # noqa: UP045
    constraint: Optional[str] = None  # noqa: UP045
    time_minutes: int = 1440
    gpus_per_node: Optional[int] = None  # noqa: UP045
    cpus_per_task: int = 1
    memory_gb: Optional[int] = None  # noqa: UP045
    signal_seconds: int = 120
    requeues: int = 20
    setup: list[str] = field(default_factory=list)


@dataclass
class RunConfig:
    """Everything that a run depends on. ``quant`` holds a recipe (see :class:`lowprec.Recipe`).

    ``run``: of ``task=compare``, the two runs, by their names in ``runs_dir`` or by their folders.

    ``recipe_file``: a recipe's YAML file that takes the place of ``quant``; once composed, its content is there.
    """

    task: str = "train"
    experiment: str = "custom"
    seed: int = 0
    runs_dir: str = "runs"
    run_id: Optional[str] = None  # noqa: UP045
    run: list[str] = field(default_factory=list)
    fresh: bool = False
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    quant: dict[str, Any] = field(default_factory=dict)
    recipe_file: Optional[str] = None  # noqa: UP045
    budget: Budget = field(default_factory=Budget)
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    sensitivity: SensitivityConfig = field(default_factory=SensitivityConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)

    @property
    def recipe(self) -> Recipe:
        """The recipe of ``quant``; raises RecipeError for one that cannot be."""
        return Recipe.from_dict(self.quant)

    def validate(self) -> None:
        """Raises ConfigError for the first value that no run can have."""
        from lowprec.config.checks import check

        check(self)


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


ConfigStore.instance().store(name="run_schema", node=RunConfig)
