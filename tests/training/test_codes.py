"""Sparsity and flips of codes, and the alarm when a layer collapses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console
from wandb_files import wandb_records

from lowprec.calibrate import calibrate
from lowprec.config import LoggerConfig, OptimConfig, TrainerConfig
from lowprec.data import create_data
from lowprec.layers import quantized_layers
from lowprec.models import create_model
from lowprec.numerics.effective_codes import planes_of
from lowprec.prepare import prepare
from lowprec.recipe import Recipe, WeightScheme
from lowprec.training.codes import CodeStatistics, CollapseWarning, sparsity
from lowprec.training.fit import fit
from lowprec.training.loggers import close_loggers, create_loggers
from lowprec.training.module import Classification


def test_sparsity_is_the_share_of_zeros() -> None:
    assert sparsity(torch.tensor([[0, 1], [-1, 0]], dtype=torch.int8)) == 0.5


def test_a_weight_of_two_planes_is_zero_where_both_digits_are() -> None:
    torch.manual_seed(0)
    model = create_model("cifar_resnet8", in_channels=1, num_classes=10, width=8).eval()
    qmodel = prepare(model, Recipe(weights=WeightScheme(planes=2)), torch.zeros(2, 1, 8, 8))
    layers = [layer for _, layer in quantized_layers(qmodel) if layer.scheme.planes == 2]
    assert layers
    for layer in layers:
        codes = layer.weight_codes()
        first, second = planes_of(codes)
        assert sparsity(codes) == float(((first == 0) & (second == 0)).float().mean())
        assert 0 < sparsity(codes) < min(sparsity(first), sparsity(second))


def test_every_layer_is_logged_and_a_collapsed_one_is_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = create_data("digits", limit_train=128)
    model = create_model("cifar_resnet8", in_channels=1, num_classes=10, width=8).eval()
    qmodel = prepare(model, Recipe.load("w2a8_n4"), torch.zeros(2, *data.input_size))
    calibrate(qmodel, data.calibration_batches(64))
    layers = dict(quantized_layers(qmodel))
    names = list(layers)
    # All weights but one are zero; frozen, so that they stay so.
    collapsed = max(names, key=lambda name: layers[name].weight.numel())
    weight = layers[collapsed].weight
    with torch.no_grad():
        weight.view(-1)[1:] = 0
    weight.requires_grad_(False)
    layers[collapsed].weight_quantizer.solve(weight, collapsed)
    loggers = create_loggers(LoggerConfig(csv=True, wandb=True, mode="offline"), tmp_path, "run", {})
    with pytest.warns(CollapseWarning, match=f"layer {collapsed} has collapsed.*quant.rules") as warned:
        fit(
            Classification(qmodel, OptimConfig(learning_rate=1e-4)),
            data,
            folder=tmp_path,
            max_epochs=2,
            settings=TrainerConfig(precision="32", accelerator="cpu", progress="none"),
            title="",
            console=Console(quiet=True),
            callbacks=[CodeStatistics()],
            loggers=loggers,
        )
    assert len([warning for warning in warned if warning.category is CollapseWarning]) == 1
    close_loggers(loggers)
    (alert,) = [record.alert for record in wandb_records(tmp_path) if record.HasField("alert")]
    assert alert.title == "a layer has collapsed"
    assert alert.text.startswith(f"layer {collapsed} has collapsed")
    header, first, _ = (tmp_path / "metrics.csv").read_text().splitlines()
    columns = header.split(",")
    assert {f"sparsity/{name}" for name in names} | {f"flips/{name}" for name in names} <= set(columns)
    values = dict(zip(columns, first.split(","), strict=True))
    assert float(values[f"sparsity/{collapsed}"]) > 0.99
    assert 0 <= float(values[f"flips/{names[0]}"]) < 0.5
