"""The stages of a run, in order. Every stage keeps its result, so a run that was cut off goes on after its last one.

full-precision model ─ prepare, calibrate ─ fine-tune ─ convert, save, export ─ verify, measure ─ summary ─ report
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from omegaconf import OmegaConf
from rich.console import Console
from torch import fx, nn

from lowprec.assign import check_reachable
from lowprec.calibrate import calibrate
from lowprec.candidates import scheme_choices
from lowprec.config import ConfigError, RunConfig
from lowprec.cost import cost
from lowprec.export.onnx import export_onnx
from lowprec.export.runtime import RUNTIME_NAMES, ExportedModel
from lowprec.integer.convert import convert
from lowprec.integer.fast import FastModel
from lowprec.integer.model import IntegerModel
from lowprec.integer.packed import save
from lowprec.layers import QuantizedFloatOperator
from lowprec.layers.integer_product import use_integer_kernels
from lowprec.layers.tensor_core_product import use_tensor_cores
from lowprec.models import checkpoint_metadata, load_checkpoint, save_checkpoint
from lowprec.prepare import prepare
from lowprec.reconstruct import reconstruct
from lowprec.report.summary import Summary, build_summary, cost_summary, plural, summary_table
from lowprec.report.terminal import create_console
from lowprec.report.wandb_media import wandb_media
from lowprec.run.allocator import give_back_freed_memory, keep_freed_memory
from lowprec.run.current import Run
from lowprec.run.data import evaluation_images, run_data
from lowprec.run.directory import RunDirectory, write_text
from lowprec.run.export import export_file, export_options
from lowprec.run.full_precision import build_model, full_precision_model, training_identity
from lowprec.run.report import report_on
from lowprec.run.sensitivity import assign_for_budget
from lowprec.run.stage_progress import heading
from lowprec.training import processes
from lowprec.training.checkpoints import BEST
from lowprec.training.codes import CodeStatistics
from lowprec.training.evaluation import top1
from lowprec.training.fit import fit
from lowprec.training.loggers import close_loggers, create_loggers, log_artifacts, log_media, log_summary
from lowprec.training.module import Classification
from lowprec.training.precision import choose_accelerator, choose_device
from lowprec.training.profile import StepProfile
from lowprec.verify import VerificationError, verify


def run(config: RunConfig, callbacks: Sequence[Callback] = ()) -> Summary:
    """Does ``config.task``; returns the run's summary (of ``task=cost``, the costs).

    Raises:
        ConfigError: no such model, data set or run. DataError, CheckpointError: files are missing or wrong.
        VerificationError: the integer model or the ONNX file differs from what was validated.
        Interrupted: the user pressed Ctrl-C in a training; the same configuration goes on from there.
    """
    console = create_console()
    if config.trainer.threads is not None:
        torch.set_num_threads(config.trainer.threads)
    if config.task != "train":
        from lowprec.run.tasks import TASKS

        return TASKS[config.task](config, console)
    return train(config, console, callbacks)


def train(config: RunConfig, console: Console, callbacks: Sequence[Callback] = ()) -> Summary:
    """From the full-precision model to a verified integer one.

    Several processes train together; the integer model is made and proven by the main one alone, and the others return an
    empty summary.
    """
    started = processes.launch()
    processes.check_launch(started, config.trainer.nodes, config.trainer.devices)
    directory = RunDirectory(config)
    directory.writes = started.rank == 0
    console = console if directory.writes else Console(quiet=True)
    loggers: list[Logger] = []
    try:
        with processes.joined(started, choose_accelerator(config.trainer.accelerator) == "gpu"):
            directory.state = processes.on_main(directory.open)
            if processes.on_main(lambda: directory.finished):
                return directory.summary()
            console.print(f"run {directory.path}")
            compute_deterministically()
            device = choose_device(config.trainer.accelerator)
            if device.type == "cpu":
                keep_freed_memory()
            current = Run(config, directory, run_data(config), console, device, callbacks)
            processes.on_main(lambda: check_same_data(current))
            processes.on_main(lambda: check_quantizable(current))
            content = {**_plain(config), "git": directory.state["git"]}
            processes.on_main(
                lambda: loggers.extend(create_loggers(config.logger, directory.path, directory.unique_name, content))
            )
            qmodel = _trained(current, loggers)
        if not directory.writes:
            return {}
        imodel = ship(current, qmodel)
        prove(current, qmodel, imodel)
        summary = summarize(current)
        write_report(current, loggers)
        # Last, where it is seen.
        console.print(summary_table(summary))
        console.print(f"everything is in {directory.path}")
        log_summary(loggers, summary, directory.summary_file)
        if not directory.result("verification"):
            log_artifacts(loggers, [directory.model_file, directory.onnx_file, directory.config_file], summary)
    finally:
        close_loggers(loggers)
        directory.close()
    fault = directory.result("verification")
    if fault:
        raise VerificationError(f"{fault}: do not ship {directory.path}")
    return summary


def compute_deterministically() -> None:
    """Sums of a GPU or of several threads are done in a fixed order, so that the same seed gives the same figures."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Else PyTorch fills new memory with NaN before it is written, another pass over each tensor; nothing is read before. (A
    # documented property of the module, which its types do not have.)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _trained(current: Run, loggers: list[Logger]) -> fx.GraphModule:
    """The fake-quant model, fine-tuned; the same in all processes."""
    full_precision = full_precision_model(current.config, current.data, current.console)
    current.measure("full_precision", full_precision, current.device)
    # By one process; the others read what it found.
    processes.on_main(lambda: assign_for_budget(current, full_precision))
    qmodel = quantize(current, full_precision)
    fine_tune(current, qmodel, full_precision, loggers)
    return qmodel


def check_same_data(current: Run) -> None:
    """Keeps what the data of the run is, and raises ConfigError for other images than those that it began with."""
    fingerprint, known = current.data.fingerprint, current.directory.result("data")
    if known is None:
        current.directory.record("data", fingerprint)
    elif known != fingerprint:
        raise ConfigError(
            f"run_id={current.config.run_id}: the run began with other images than those in data.root="
            f"{current.config.data.root}; put them back, give another run_id, or start anew with fresh=true"
        )


def check_quantizable(current: Run) -> None:
    """Prepares the architecture on the meta device: rules and operators are refused before anything is trained.

    Raises:
        RecipeError: a rule matches no layer, or no assignment meets the budget. UnsupportedModelError, TracingError: the model
            has no integer form.
        ConfigError: the model or the data cannot be exported as configured.
    """
    with torch.device("meta"):
        model = build_model(current.config, num_classes=current.data.num_classes).eval()
        qmodel = prepare(model, current.config.recipe, torch.empty(2, *current.data.input_size))
    if current.config.budget.given:
        check_reachable(scheme_choices(qmodel), current.config.budget)
    options = export_options(current.config, current.data)
    floats = [name for name, module in qmodel.named_modules() if isinstance(module, QuantizedFloatOperator)]
    if floats and options.runtime == "openvino":
        raise ConfigError(
            f"export.runtime=openvino: {floats[0]} computes in float, and OpenVINO's form is proven for models without such "
            "operators; choose export.runtime=onnxruntime"
        )


def quantize(current: Run, full_precision: nn.Module) -> fx.GraphModule:
    """The fake-quant model with solved weights and calibrated activations, as it is before any training."""
    directory = current.directory
    with current.stage("prepare", "prepare: weights to codes and scales"):
        qmodel = prepare(full_precision.cpu(), directory.recipe, current.example_images())
    # By one process, on images drawn from the whole training split; the others read what it found.
    processes.on_main(lambda: _calibrated(current, qmodel))
    load_checkpoint(qmodel, directory.post_training_file)
    current.measure("post_training", qmodel, current.device)
    directory.record("cost", cost_summary(cost(qmodel.cpu(), current.example_images())))
    return qmodel


def _calibrated(current: Run, qmodel: fx.GraphModule) -> None:
    file, count = current.directory.post_training_file, current.config.calibration.images
    if file.is_file():
        return
    images = plural(min(count, current.data.sizes["train"]), "image")
    fitting = current.config.calibration.reconstruct
    with current.stage("calibrate", f"calibrate: exponents and {'weights' if fitting else 'batch norm'} on {images}"):
        batches = current.data.calibration_batches(count)
        qmodel.to(current.device)
        with current.progress.messages("lowprec.calibrate", "calibrate"):
            (reconstruct if fitting else calibrate)(qmodel, [batch.to(current.device) for batch in batches])
    save_checkpoint(qmodel, file, {"recipe": current.directory.recipe.name})


def fine_tune(current: Run, qmodel: fx.GraphModule, teacher: nn.Module, loggers: list[Logger]) -> None:
    """Trains the fake-quant model with straight-through gradients, up to its best weights in validation."""
    config, directory = current.config, current.directory
    if config.trainer.max_epochs == 0:
        if directory.result("validation") is None:
            directory.record("validation", top1(qmodel, current.data.val_dataloader(), current.device))
        return
    if config.trainer.tensor_cores and current.device.type == "cuda":
        use_tensor_cores(qmodel)
    else:
        use_integer_kernels(qmodel, config.trainer.integer_kernels and not config.trainer.compile)
    module = Classification(
        qmodel,
        config.optim,
        label_smoothing=config.trainer.label_smoothing,
        teacher=teacher,
        distillation=config.trainer.distillation,
        channels_last=config.trainer.channels_last,
        compiled=config.trainer.compile,
        keep_codes=config.trainer.keep_codes,
        identity=training_identity(config, directory.recipe),
    )
    profile = [StepProfile(directory.path)] if config.trainer.debug == "profile" else []
    give_back_freed_memory()  # of the calibration, whose tensors leave holes
    with current.stage("fine_tune", f"fine-tune: {plural(config.trainer.max_epochs, 'epoch')}"):
        fit(
            module,
            current.data,
            folder=directory.checkpoints,
            max_epochs=config.trainer.max_epochs,
            settings=config.trainer,
            title="fine-tuning",
            console=current.console,
            callbacks=[CodeStatistics(), *profile, *current.callbacks],
            loggers=loggers,
        )
    # What is verified against the integer model does not come from integer kernels.
    use_integer_kernels(qmodel, False)
    directory.record("validation", float(checkpoint_metadata(directory.checkpoints / BEST)["validation_top1"]))
    current.measure("fine_tuned", qmodel, current.device)
    qmodel.cpu()


def ship(current: Run, qmodel: fx.GraphModule) -> IntegerModel:
    """The integer model, saved packed and exported to ONNX."""
    directory = current.directory
    with current.stage("export", f"export: {directory.model_file.name} (packed), {directory.onnx_file.name}"):
        imodel = convert(qmodel)
        save(imodel, directory.model_file)
        export_onnx(imodel, directory.onnx_file, export_options(current.config, current.data))
        if current.config.export.format != "int8":
            export_file(imodel, directory, current.config, current.data)
    return imodel


def prove(current: Run, qmodel: fx.GraphModule, imodel: IntegerModel) -> None:
    """Compares every code of fake-quant, integer and ONNX model on the whole test split; measures the last two."""
    directory = current.directory
    limit = current.config.verify.images
    where = "the whole test split" if limit is None else plural(limit, "test image")
    runtime = RUNTIME_NAMES[current.config.export.runtime]
    current.console.print(heading(f"verify: fake-quant, integer model and {runtime}, code by code, on {where}"))
    if directory.result("verify") is None:
        images = evaluation_images(current.data, limit)
        count = min(current.data.sizes["test"], limit or current.data.sizes["test"])
        batches = current.progress.batches(images, count, "verify")
        report = verify(qmodel, imodel, batches, onnx=directory.onnx_file)
        if not report.equal:
            current.console.print(str(report))
        try:
            report.raise_if_different()
        except VerificationError as error:
            directory.record("verification", str(error))
        figures = {name: getattr(report, name) for name in ("images", "compared_codes", "mismatched_codes")}
        directory.record("verify", figures)
    current.measure("integer", FastModel(imodel))
    current.measure("onnx", ExportedModel(directory.onnx_file))


def summarize(current: Run) -> Summary:
    """Writes summary.json, which marks the run as finished."""
    config, directory = current.config, current.directory
    names = {
        "experiment": config.experiment,
        "model": config.model.name,
        "data": config.data.name,
        "recipe": directory.recipe.name,
    }
    results, seconds = directory.state["results"], directory.state["seconds"]
    summary = build_summary(names, results, seconds, config.trainer.max_epochs)
    write_text(directory.summary_file, json.dumps(summary, indent=2) + "\n")
    return summary


def write_report(current: Run, loggers: list[Logger]) -> None:
    """Makes report.html, and its like in W&B. What cannot be made is one warning: the run is finished without it."""
    try:
        content = report_on(current.directory, current.console)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        current.console.print(f"warning: there is no report.html ({reason}); task=report tries again", markup=False)
        return
    try:
        log_media(loggers, lambda: wandb_media(content, current.directory.report_file))
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        current.console.print(f"warning: W&B has no report ({reason}); report.html has it all", markup=False)


def _plain(config: RunConfig) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.structured(config))  # type: ignore[return-value]
