"""What no run can have: each check names the key, its value and the valid choices."""

from __future__ import annotations

import difflib
import math
import re

from lowprec.config.schema import (
    ACCELERATORS,
    DATA_SETS,
    DEBUG_MODES,
    FORMATS,
    HEADS,
    INPUTS,
    OPSETS,
    OPTIMIZERS,
    PHOTOGRAPHS,
    PRECISIONS,
    PROCESSORS,
    PROGRESS,
    RUNTIMES,
    TASKS,
    WANDB_MODES,
    ConfigError,
    RunConfig,
)
from lowprec.recipe import RecipeError

# Arguments of models that other keys set.
KEYS_OF_ARGUMENTS = {
    "name": "model.name",
    "model_name": "model.name",
    "pretrained": "model.pretrained",
    "weights": "model.pretrained",
    "num_classes": "data.num_classes",
    "in_channels": "data.in_channels",
    "in_chans": "data.in_channels",
}


def check(config: RunConfig) -> None:
    """Raises ConfigError for the first value that no run can have."""
    _require_choice("task", config.task, TASKS)
    _require_choice("data.name", config.data.name, DATA_SETS)
    _require_choice("model.head", config.model.head, HEADS)
    if config.run_id is not None and (
        not re.fullmatch(r"[\w][\w.,+-]*", config.run_id) or config.run_id in ("baselines", "sweeps", "comparisons")
    ):
        raise ConfigError(f"run_id={config.run_id!r}: give a folder name of letters, digits and . , + _ -")
    _require("seed", config.seed, 0 <= config.seed < 2**32, "a whole number from 0 to 2^32 - 1")
    _check_model(config)
    _check_data(config)
    _check_training(config)
    _check_export(config)
    _check_slurm(config)
    images = config.report.images
    _require("report.images", images, images is None or images > 0, "at least 1, or null for all")
    wanted = 2 if config.task == "compare" else 0
    fits = len(config.run) == len(set(config.run)) == wanted
    _require("run", config.run, fits, "two different runs, run=[a,b]" if wanted else "none: it is for task=compare")
    _require_choice("logger.mode", config.logger.mode, WANDB_MODES)
    try:
        config.recipe  # noqa: B018 - building it is the check
        config.budget.validate()
    except RecipeError as error:
        raise ConfigError(str(error)) from error
    if config.budget.given and config.task == "cost":
        raise ConfigError(
            f"budget.{config.budget.name}={config.budget.value:g}: task=cost reads no data, so it assigns nothing; "
            "recipe_file=PATH takes the recipe.yaml that a run with this budget leaves"
        )


def _check_model(config: RunConfig) -> None:
    for argument, key in KEYS_OF_ARGUMENTS.items():
        if argument in config.model.arguments:
            value = config.model.arguments[argument]
            raise ConfigError(f"model.arguments.{argument}={value!r}: {key} says that, for the whole run")


def _check_data(config: RunConfig) -> None:
    data = config.data
    _require("data.validation_share", data.validation_share, 0 < data.validation_share < 1, "a share in (0, 1)")
    for key, value in (
        ("model.name", config.model.name),
        ("data.batch_size", data.batch_size),
        ("data.eval_batch_size", data.eval_batch_size),
        ("data.in_channels", data.in_channels),
        ("calibration.images", config.calibration.images),
        ("sensitivity.images", config.sensitivity.images),
    ):
        _require(key, value, bool(value) and (isinstance(value, str) or value > 0), "at least 1")
    for key, optional in (
        ("data.num_classes", data.num_classes),
        ("data.image_size", data.image_size),
        ("data.limit_train", data.limit_train),
        ("data.limit_test", data.limit_test),
    ):
        _require(key, optional, optional is None or optional > 0, "at least 1, or null")
    labelled = config.sensitivity.labelled_images
    _require("sensitivity.labelled_images", labelled, labelled >= 0, "0 or more")
    _require("data.padding", data.padding, data.padding is None or data.padding >= 0, "0 or more, or null")
    needs_root = data.name in ("image_folder", "shards") and config.task != "cost"
    _require("data.root", data.root, data.root is not None or not needs_root, "the folder that holds train/ and val/")
    workers = data.num_workers
    _require("data.num_workers", workers, workers is None or workers >= 0, "0 or more, or null for the default")
    _require("data.random_erasing", data.random_erasing, 0 <= data.random_erasing <= 1, "a probability")
    _require("data.max_corrupted", data.max_corrupted, data.max_corrupted >= 0, "0 or more")
    for key in ("auto_augment", "random_erasing"):
        value = getattr(data, key)
        if value and data.name not in PHOTOGRAPHS:
            raise ConfigError(f"data.{key}={value}: this is for photographs ({', '.join(PHOTOGRAPHS)})")
        if value and not data.augment:
            raise ConfigError(f"data.{key}={value}: data.augment=false leaves training images as they are")


def _check_export(config: RunConfig) -> None:
    export, images = config.export, config.verify.images
    _require_choice("export.format", export.format, FORMATS)
    _require_choice("export.runtime", export.runtime, RUNTIMES)
    if export.format != "int8" and export.runtime != "onnxruntime":
        raise ConfigError(f"export.runtime={export.runtime}: export.format={export.format} is for onnxruntime")
    _require_choice("export.processor", export.processor, PROCESSORS)
    if export.format == "qonnx" and export.processor != "any":
        raise ConfigError(f"export.processor={export.processor}: export.format=qonnx is for hardware of your own")
    if export.format == "qonnx" and config.task == "verify":
        raise ConfigError(
            "export.format=qonnx: the qonnx package executes such files; task=verify takes int8 or packed"
        )
    _require_choice("export.input", export.input, INPUTS)
    opset = export.opset
    _require("export.opset", opset, opset is None or opset in OPSETS, f"{OPSETS.start} to {OPSETS.stop - 1}, or null")
    if export.format == "packed" and opset not in (None, OPSETS.stop - 1):
        raise ConfigError(f"export.opset={opset}: export.format=packed needs {OPSETS.stop - 1}, or null")
    for key in ("opset", "batch_size"):
        if export.format == "qonnx" and getattr(export, key) is not None:
            raise ConfigError(f"export.{key}={getattr(export, key)}: export.format=qonnx has its own; give null")
    if export.format == "qonnx" and export.input != "float":
        raise ConfigError(f"export.input={export.input}: export.format=qonnx takes float images")
    batch = export.batch_size
    _require("export.batch_size", batch, batch is None or batch > 0, "at least 1, or null for any")
    _require("verify.images", images, images is None or images > 0, "at least 1, or null for all")


def _check_slurm(config: RunConfig) -> None:
    slurm = config.slurm
    for key, least in (("time_minutes", 1), ("cpus_per_task", 1), ("signal_seconds", 1), ("requeues", 0)):
        _require(f"slurm.{key}", getattr(slurm, key), getattr(slurm, key) >= least, f"at least {least}")
    for key in ("gpus_per_node", "memory_gb"):
        value = getattr(slurm, key)
        _require(f"slurm.{key}", value, value is None or value >= 1, "at least 1, or null")


def _check_training(config: RunConfig) -> None:
    trainer, distillation = config.trainer, config.trainer.distillation
    _require("trainer.max_epochs", trainer.max_epochs, trainer.max_epochs >= 0, "0 or more")
    _require("baseline.max_epochs", config.baseline.max_epochs, config.baseline.max_epochs >= 1, "at least 1")
    for key, smoothing in (("trainer", trainer.label_smoothing), ("baseline", config.baseline.label_smoothing)):
        _require(f"{key}.label_smoothing", smoothing, 0 <= smoothing < 1, "a share in [0, 1)")
    weight, temperature = distillation.weight, distillation.temperature
    _require("trainer.distillation.weight", weight, 0 <= weight <= 1, "a share in [0, 1]; 0 turns it off")
    _require("trainer.distillation.temperature", temperature, temperature > 0, "above 0")
    for key in ("nodes", "devices", "accumulate_grad_batches"):
        _require(f"trainer.{key}", getattr(trainer, key), getattr(trainer, key) >= 1, "at least 1")
    minutes = trainer.checkpoint_minutes
    _require("trainer.checkpoint_minutes", minutes, minutes is None or minutes >= 0, "0 or more, or null")
    if trainer.debug is not None:
        _require_choice("trainer.debug", trainer.debug, DEBUG_MODES)
    if trainer.keep_codes and trainer.compile:
        raise ConfigError("trainer.keep_codes=true: not with trainer.compile=true; choose one of the two")
    if trainer.tensor_cores and trainer.compile:
        raise ConfigError("trainer.tensor_cores=true: not with trainer.compile=true; choose one of the two")
    clip = trainer.gradient_clip
    _require("trainer.gradient_clip", clip, clip is None or clip > 0, "a norm above 0, or null")
    threads = trainer.threads
    _require("trainer.threads", threads, threads is None or threads > 0, "at least 1, or null for all cores")
    _require_choice("trainer.precision", trainer.precision, PRECISIONS)
    _require_choice("trainer.accelerator", trainer.accelerator, ACCELERATORS)
    _require_choice("trainer.progress", trainer.progress, PROGRESS)
    _require("trainer.progress_seconds", trainer.progress_seconds, trainer.progress_seconds >= 0, "0 or more")
    _require("trainer.log_every_steps", trainer.log_every_steps, trainer.log_every_steps >= 1, "at least 1")
    for prefix, optim, epochs in (
        ("optim", config.optim, trainer.max_epochs),
        ("baseline.optim", config.baseline.optim, config.baseline.max_epochs),
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


def _require(key: str, value: object, condition: bool, expected: str) -> None:
    endless = isinstance(value, float) and not math.isfinite(value)
    if not condition or endless:
        raise ConfigError(f"{key}={value}: expected {'a finite number, ' if endless else ''}{expected}")


def _require_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{key}={value}: choose one of {', '.join(choices)}{_did_you_mean(value, choices)}")


def _did_you_mean(value: str, choices: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""
