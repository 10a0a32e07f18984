"""The report of a run, from what lies in its folder: a finished run's, or as much of it as an interrupted one has."""

from __future__ import annotations

import copy
import io
import json
from dataclasses import asdict
from itertools import islice
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, fx

from lowprec.config import RunConfig
from lowprec.cost import Costs, cost
from lowprec.data import DataError, DataModule
from lowprec.estimates import estimates
from lowprec.layer_statistics import layer_statistics, output_signal_to_noise, tensor_statistics, weight_codes
from lowprec.models import CheckpointError, load_checkpoint
from lowprec.prepare import full_precision, prepare
from lowprec.report.html.run_page import RunContent, write_run_report
from lowprec.report.measurements import ClassStatistics
from lowprec.report.summary import build_summary
from lowprec.run.data import run_data
from lowprec.run.directory import RunDirectory
from lowprec.run.full_precision import baseline_file, build_model, full_precision_model
from lowprec.run.stage_progress import heading
from lowprec.training.checkpoints import BEST
from lowprec.training.loggers import read_metrics
from lowprec.training.precision import choose_device, float32_evaluation

# Histograms of activations need no more; a few at a time, as each tensor of the network is kept.
ACTIVATION_IMAGES, AT_A_TIME = 128, 32
SHOWN_IMAGES, LARGEST_SIDE = 24, 112


def report_on(directory: RunDirectory, console: Console) -> RunContent:
    """Makes report.html of the run in ``directory``, whose configuration and state have been read; returns what it shows.

    Nothing in the folder but report.html changes, and nothing is trained. What cannot be measured is said in the report.
    """
    console.print(heading("report: layers, activations and classes, from the run's files"))
    content = run_content(directory)
    write_run_report(content, directory.report_file)
    console.print(f"  {directory.report_file}")
    return content


def run_content(directory: RunDirectory) -> RunContent:
    """What the report shows, measured from the run's checkpoints and read from its files."""
    config, results = directory.config, directory.state["results"]
    names = {"experiment": config.experiment, "model": config.model.name, "data": config.data.name}
    recipe = (
        config.recipe.name if config.budget.given and not directory.recipe_file.is_file() else directory.recipe.name
    )
    content = RunContent(
        name=directory.path.name,
        summary=build_summary(
            {**names, "recipe": recipe}, results, directory.state["seconds"], config.trainer.max_epochs
        ),
        finished=directory.finished,
        config=directory.config_file.read_text(),
        commit=directory.state["git"]["commit"],
        fault=results.get("verification") or "",
        metrics=read_metrics(directory.path / "metrics.csv"),
    )
    if not content.metrics:
        content.missing["training"] = "There is no metrics.csv with rows: nothing was trained, or logger.csv was off."
    if directory.sensitivity_file.is_file():
        content.sensitivity = json.loads(directory.sensitivity_file.read_text())
    else:
        content.missing["sensitivity"] = (
            "Not measured: the same command with task=sensitivity does it, then task=report."
        )
    try:
        _measure(content, directory)
    except (DataError, CheckpointError) as error:
        for section in ("layers", "activations", "classes"):
            content.missing.setdefault(section, f"Not measured: {error}")
    return content


def _measure(content: RunContent, directory: RunDirectory) -> None:
    config = directory.config
    if not directory.post_training_file.is_file():
        for section in ("layers", "activations", "classes"):
            content.missing[section] = "Not measured: the run has no calibrated model yet."
        return
    data = run_data(config)
    device = choose_device(config.trainer.accelerator)
    reference, found = _full_precision(config, data)
    example = torch.zeros(2, *data.input_size)
    with float32_evaluation(device):
        if reference is None:
            content.missing["classes"] = "Changed classes and full-precision weights are not shown: " + found
            model = build_model(config, num_classes=data.num_classes).eval()
        qmodel = prepare(model if reference is None else reference, directory.recipe, example).eval()
        reference = None if reference is None else copy.deepcopy(qmodel)
        load_checkpoint(qmodel, directory.post_training_file)
        content.weights_of, codes_before = "Weights as calibrated, before any training", None
        if (best := directory.checkpoints / BEST).is_file():
            codes_before = weight_codes(qmodel)
            load_checkpoint(qmodel, best)
            done = (
                "The fine-tuned weights"
                if content.summary["fine_tuned"]
                else "The best weights of the fine-tuning so far"
            )
            content.weights_of = f"{done}, as they {'were' if content.finished else 'would be'} shipped"
        costs = cost(qmodel, example)
        content.estimates = asdict(estimates(costs))
        _measure_values(content, qmodel.to(device), reference, data, costs, codes_before, device)
        content.classes = class_statistics(qmodel, reference, data, config.report.images, device)


def _full_precision(config: RunConfig, data: DataModule) -> tuple[Any, str]:
    """The model that the run began with, or None and the reason; it is never trained here."""
    if config.model.is_trained_here:
        file = baseline_file(config, data.fingerprint)
        if not file.is_file():
            return None, f"there is no {file}."
    try:
        return full_precision_model(config, data, Console(quiet=True)), ""
    except CheckpointError as error:
        return None, f"{error}."


def _measure_values(
    content: RunContent,
    qmodel: fx.GraphModule,
    reference: fx.GraphModule | None,
    data: DataModule,
    costs: Costs,
    codes_before: dict[str, Tensor] | None,
    device: torch.device,
) -> None:
    images = torch.cat([batch for batch, _ in data.test_batches(ACTIVATION_IMAGES)]).to(device)
    batches = images.split(AT_A_TIME)
    content.activation_images = len(images)
    content.tensors = tensor_statistics(qmodel, batches)
    ratios = None if reference is None else output_signal_to_noise(qmodel, reference.to(device), batches)
    content.layers = layer_statistics(qmodel, costs, reference, codes_before, ratios)


@torch.no_grad()
def class_statistics(
    qmodel: fx.GraphModule, reference: fx.GraphModule | None, data: DataModule, limit: int | None, device: torch.device
) -> ClassStatistics:
    """Classes that the quantized and, where there is one, the full-precision model find in test images, at most ``limit``."""
    names = data.class_names or tuple(map(str, range(data.num_classes)))
    confusion = torch.zeros(len(names), len(names), dtype=torch.int64)
    found = ClassStatistics(0, list(names), [], None if reference is None else 0)
    for images, labels in data.test_batches(limit or data.sizes["test"]):
        after = qmodel(images.to(device)).argmax(1).cpu()
        confusion.view(-1).index_add_(0, labels * len(names) + after, torch.ones_like(labels))
        found.images += len(labels)
        if reference is None:
            continue
        with full_precision(reference):
            before = reference(images.to(device)).argmax(1).cpu()
        changed = (before != after).nonzero().flatten()
        found.agreed = (found.agreed or 0) + len(labels) - len(changed)
        found.gained += int((labels == after)[changed].sum())
        found.lost += int((labels == before)[changed].sum())
        found.changed += torch.stack([labels, before, after], 1)[changed].tolist()
        for index in islice(changed.tolist(), SHOWN_IMAGES - len(found.pictures)):
            found.pictures.append(picture(images[index], data))
    found.confusion = confusion.tolist()
    return found


def picture(image: Tensor, data: DataModule) -> bytes:
    """A normalised image [C, H, W] as a PNG file, at most 112 pixels wide and high; only its first channel unless it has 3."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (data.mean, data.std))
    pixels = ((image * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    drawn = Image.fromarray(pixels.permute(1, 2, 0).numpy() if len(pixels) == 3 else pixels[0].numpy())
    drawn.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    file = io.BytesIO()
    drawn.save(file, "PNG")
    return file.getvalue()
