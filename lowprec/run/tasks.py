"""What can be done with a run (evaluate, verify, export, report) or two (compare), and what needs none (cost, sensitivity)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table
from torch import fx

from lowprec.assign import assign
from lowprec.config import ConfigError, RunConfig
from lowprec.cost import cost
from lowprec.export.runtime import RUNTIME_NAMES, ExportedModel
from lowprec.integer.fast import FastModel
from lowprec.integer.packed import load
from lowprec.models import load_checkpoint
from lowprec.prepare import prepare
from lowprec.report.summary import Summary, cost_rows, cost_summary
from lowprec.run.compare import compare_runs
from lowprec.run.current import Run
from lowprec.run.data import evaluation_images, published_data_config, run_data
from lowprec.run.directory import RunDirectory
from lowprec.run.export import check_exported, export_file, exported_file
from lowprec.run.full_precision import baseline_file, build_model, full_precision_model
from lowprec.run.report import report_on
from lowprec.run.sensitivity import analyse, show_assignment
from lowprec.run.stage_progress import StageProgress
from lowprec.run.stages import check_quantizable, check_same_data, compute_deterministically
from lowprec.training.checkpoints import BEST
from lowprec.training.evaluation import Predictor, top1
from lowprec.training.precision import choose_device
from lowprec.verify import verify


def finished_run(config: RunConfig) -> RunDirectory:
    """The finished run that ``run_id``, or the experiment and overrides, name; with the configuration it was made with.

    Where it works (data folder, loader processes) is taken from ``config``.

    Raises:
        ConfigError: there is no such run, or it is not finished.
    """
    directory = stored_run(config)
    if not directory.finished:
        raise ConfigError(f"the run {directory.path} is not finished: task=train goes on with it")
    return directory


def stored_run(config: RunConfig) -> RunDirectory:
    """As :func:`finished_run`, of a run that need not be finished."""
    directory = RunDirectory(config)
    stored = directory.stored_config()
    here = config.data
    data = replace(stored.data, num_workers=here.num_workers, eval_batch_size=here.eval_batch_size)
    if here.name == stored.data.name and here.root is not None:
        data = replace(data, root=here.root)
    where = {name: getattr(config, name) for name in ("task", "runs_dir", "run_id", "report")}
    directory.config = replace(stored, **where, data=data)
    return directory


def evaluate_run(config: RunConfig, console: Console) -> Summary:
    """Top-1 of the packed integer model and of the ONNX file on the whole test split, read from the run's files."""
    directory = finished_run(config)
    exported = ExportedModel(check_exported(directory, config))
    data = run_data(directory.config)
    models: dict[str, Predictor] = {"integer": FastModel(load(directory.model_file)), "onnx": exported}
    progress = StageProgress(console, config.trainer.progress, config.trainer.progress_seconds)
    accuracies = {
        name: top1(model, progress.batches(data.test_dataloader(), data.sizes["test"], name))
        for name, model in models.items()
    }
    table = Table("file", "top-1", title=f"{directory.path}, {data.sizes['test']:,} test images", title_justify="left")
    table.add_row(directory.model_file.name, f"{accuracies['integer']:.2%}")
    runtime = RUNTIME_NAMES[exported.runtime]
    table.add_row(f"{exported_file(directory, config).name} in {runtime}", f"{accuracies['onnx']:.2%}")
    console.print(table)
    return {name: {"top1": value} for name, value in accuracies.items()}


def verify_run(config: RunConfig, console: Console) -> Summary:
    """Compares the run's fake-quant checkpoint, its packed file and its ONNX file, code by code.

    Raises:
        VerificationError: any code differs.
    """
    directory = finished_run(config)
    data = run_data(directory.config)
    qmodel = fake_quant_model(directory, data.num_classes, data.input_size)
    file = check_exported(directory, config)
    limit, progress = (
        config.verify.images,
        StageProgress(console, config.trainer.progress, config.trainer.progress_seconds),
    )
    count = min(data.sizes["test"], limit or data.sizes["test"])
    batches = progress.batches(evaluation_images(data, limit), count, "verify")
    report = verify(qmodel, load(directory.model_file), batches, onnx=file)
    console.print(str(report))
    report.raise_if_different()
    return {name: getattr(report, name) for name in ("images", "compared_codes", "mismatched_codes")}


def export_run(config: RunConfig, console: Console) -> Summary:
    """Writes an ONNX file from the packed integer model alone, with the format and options of ``config.export``."""
    directory = finished_run(config)
    path = export_file(load(directory.model_file), directory, config, run_data(directory.config))
    console.print(f"wrote {path} ({path.stat().st_size:,} bytes)")
    if config.export.format != "qonnx":
        console.print("prove it on your images: the same command with task=verify")
    return {}


def report_run(config: RunConfig, console: Console) -> Summary:
    """Writes report.html of a run, finished or not; one file, which needs no network to be read."""
    directory = stored_run(config)
    directory.read_state()
    report_on(directory, console)
    return {}


def cost_of(config: RunConfig, console: Console) -> Summary:
    """What the configured model would cost, from shapes alone: no data, no weights, no run."""
    data = config.data
    if data.num_classes is None:
        raise ConfigError("data.num_classes=null: task=cost reads no data, so give the number of classes")
    if data.image_size is None:
        shape = published_data_config(config)["input_size"]
    else:
        shape = (data.in_channels, data.image_size, data.image_size)
    with torch.device("meta"):
        model = build_model(config, num_classes=data.num_classes).eval()
        images = torch.empty(2, *shape)
        costs = cost(prepare(model, config.recipe, images), images)
    title = f"{config.model.name}, {config.recipe.name}, images of {shape[1]}×{shape[2]}"
    table = Table(title=title, title_justify="left", show_header=False)
    summary = cost_summary(costs)
    for row in cost_rows(summary):
        table.add_row(*row)
    console.print(str(costs))
    console.print(table)
    return summary


def sensitivity_of(config: RunConfig, console: Console) -> Summary:
    """Quantizes each layer alone, and leaves what was found in the run's folder: sensitivity.json and sensitivity.csv.

    The full-precision model is the run's, and is trained first where there is none yet. A run in the folder stays as it is.

    Raises:
        ConfigError: the baseline of a training in several processes is not there, and this is one process.
    """
    directory = RunDirectory(replace(config, task="train", fresh=False))
    directory.state = directory.open()
    try:
        console.print(f"run {directory.path}")
        compute_deterministically()
        device = choose_device(config.trainer.accelerator)
        current = Run(directory.config, directory, run_data(config), console, device)
        check_same_data(current)
        check_quantizable(current)
        _check_one_process(current)
        found = analyse(current, full_precision_model(config, current.data, console), labelled=True)
    finally:
        directory.close()
    console.print(str(found))
    if (budget := config.budget).given:
        show_assignment(current, assign(found, budget.weight_bits, budget.multiplications_replaced))
    console.print(
        f"everything is in {directory.sensitivity_file} and {directory.sensitivity_file.with_suffix('.csv').name}"
    )
    return found.to_dict()


def _check_one_process(current: Run) -> None:
    config, trainer = current.config, current.config.trainer
    if (
        config.model.is_trained_here
        and trainer.nodes * trainer.devices > 1
        and not baseline_file(config, current.data.fingerprint).is_file()
    ):
        raise ConfigError(
            f"trainer.nodes={trainer.nodes} and trainer.devices={trainer.devices}: task=sensitivity is one process, and their "
            "full-precision baseline is not trained yet; task=train trains it, or give trainer.nodes=1 trainer.devices=1"
        )


def fake_quant_model(directory: RunDirectory, num_classes: int, input_size: tuple[int, int, int]) -> fx.GraphModule:
    """The run's fake-quant model as it was shipped: the best of fine-tuning, or the calibrated one."""
    config = directory.config
    model = build_model(config, num_classes=num_classes).eval()
    qmodel = prepare(model, directory.recipe, torch.zeros(2, *input_size))
    fine_tuned = config.trainer.max_epochs > 0
    load_checkpoint(qmodel, directory.checkpoints / BEST if fine_tuned else directory.post_training_file)
    qmodel.eval()
    return qmodel


TASKS: dict[str, Callable[[RunConfig, Console], Summary]] = {
    "evaluate": evaluate_run,
    "verify": verify_run,
    "export": export_run,
    "cost": cost_of,
    "sensitivity": sensitivity_of,
    "report": report_run,
    "compare": compare_runs,
}
