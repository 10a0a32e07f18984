"""A training of two processes: it is that of one with the whole batch, it resumes to the same bits, it counts exactly."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from torch import Tensor, nn
from worker_processes import run_in_processes

from lowprec.calibrate import calibrate
from lowprec.config import OptimConfig, TrainerConfig
from lowprec.data import DataModule, create_data
from lowprec.models import create_model
from lowprec.prepare import prepare
from lowprec.recipe import Recipe
from lowprec.training import fit as fit_module
from lowprec.training import processes
from lowprec.training.checkpoints import LAST, Interrupted
from lowprec.training.equality import fingerprints
from lowprec.training.evaluation import top1
from lowprec.training.module import Classification

IMAGES = 320


def digits(batch_size: int) -> DataModule:
    return create_data("digits", batch_size=batch_size, limit_train=IMAGES)


def network(data: DataModule, quantized: bool) -> nn.Module:
    torch.manual_seed(0)
    model = create_model("cifar_resnet8", in_channels=1, num_classes=10, width=8).eval()
    if not quantized:
        return model
    qmodel = prepare(model, Recipe.load("w2a8_n4"), torch.zeros(2, *data.input_size))
    calibrate(qmodel, data.calibration_batches(64))
    return qmodel


class Recorder(Callback):
    """Figures of each epoch, and the loss of each step; sends this process a signal after a step."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after = stop_after
        self.losses: list[float] = []
        self.validation: list[float] = []
        self.training: list[tuple[float, float]] = []

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(outputs["loss"]))
        if trainer.global_step == self.stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.validation.append(float(trainer.callback_metrics["val/loss"]))

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        metrics = trainer.callback_metrics
        self.training.append((float(metrics["train/loss"]), float(metrics["train/top1"])))


class InFloat64(Classification):
    """Rounds alike though sums differ in their last bits, which in float32 now and then move a value over a rounding edge."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.double())


def train(
    folder: Path,
    batch_size: int,
    *,
    quantized: bool,
    epochs: int = 1,
    recorder: Recorder | None = None,
    **settings: Any,
) -> dict[str, Any]:
    data, recorder = digits(batch_size), recorder or Recorder()
    model = network(data, quantized)
    module = InFloat64(model.double(), OptimConfig(learning_rate=0.02, warmup_epochs=0.5))
    settings = {"precision": "32", "accelerator": "cpu", "progress": "none", **settings}
    fit_module.fit(
        module,
        data,
        folder=folder,
        max_epochs=epochs,
        settings=TrainerConfig(**settings),
        title="",
        console=Console(quiet=True),
        callbacks=[recorder],
    )
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "losses": recorder.losses,
        "validation": recorder.validation,
        "training": recorder.training,
        "top1": top1(lambda images: model(images.double()), data.test_dataloader()),
    }


def trained_by_two(folder: Path, quantized: bool) -> dict[str, Any]:
    return train(folder, 32, quantized=quantized, sync_batchnorm=True)


def assert_close(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    for name, tensor in first.items():
        torch.testing.assert_close(tensor.double(), second[name].double(), rtol=1e-5, atol=1e-6, msg=name)


def test_two_processes_with_half_the_batch_are_one_with_the_whole(tmp_path: Path) -> None:
    for quantized in (False, True):
        folder = tmp_path / f"quantized_{quantized}"
        folder.mkdir()
        first, second = run_in_processes(trained_by_two, folder / "two", quantized, folder=folder)
        assert isinstance(first, dict), first
        one = train(folder / "one", 64, quantized=quantized)
        assert one["losses"]
        # Each process's losses are of its own half of the batch.
        halves = [(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)]
        torch.testing.assert_close(torch.tensor(halves), torch.tensor(one["losses"]), rtol=1e-5, atol=1e-6)
        assert_close(first["state"], one["state"])
        for figures in ("validation", "training"):
            torch.testing.assert_close(torch.tensor(first[figures]), torch.tensor(one[figures]), rtol=1e-5, atol=1e-6)
            assert first[figures] == second[figures]
        assert first["top1"] == second["top1"]
        assert first["top1"] == one["top1"]
        for name, tensor in first["state"].items():
            assert torch.equal(tensor, second["state"][name]), name


def test_gradients_of_two_batches_are_those_of_one_of_twice_the_size(tmp_path: Path) -> None:
    """Without batch norm, whose statistics are of each batch."""

    def losses(folder: str, batch_size: int, batches: int) -> Tensor:
        data = digits(batch_size)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        settings = TrainerConfig(
            precision="32", accelerator="cpu", progress="none", accumulate_grad_batches=batches, channels_last=False
        )
        module = Classification(model, OptimConfig(learning_rate=0.1), channels_last=False)
        fit_module.fit(
            module,
            data,
            folder=tmp_path / folder,
            max_epochs=2,
            settings=settings,
            title="",
            console=Console(quiet=True),
        )
        return model[1].weight.detach().clone()  # type: ignore[union-attr,operator]

    torch.testing.assert_close(losses("accumulated", 16, 2), losses("whole", 32, 1), rtol=1e-5, atol=1e-6)


def undisturbed_and_stopped(folder: Path) -> dict[str, Any]:
    """Without synchronized batch norm: within an epoch each process has running statistics of its own."""
    settings: dict[str, Any] = {"quantized": True, "epochs": 2, "accumulate_grad_batches": 2}
    quiet = train(folder / "quiet", 16, **settings)
    # A signal reaches the second process alone.
    recorder = Recorder(stop_after=2 if processes.rank() else None)
    stopped_by = 0
    try:
        train(folder / "stopped", 16, recorder=recorder, **settings)
    except Interrupted as stop:
        stopped_by = stop.number
    resumed = train(folder / "stopped", 16, **settings)
    last = [torch.load(folder / name / LAST, weights_only=True) for name in ("quiet", "stopped")]
    return {
        "stopped by": stopped_by,
        "steps before": len(recorder.losses),
        "steps": (len(quiet["losses"]), len(recorder.losses) + len(resumed["losses"])),
        "training": (quiet["training"], resumed["training"]),
        "best": [fingerprints_of(state) for state in (quiet["state"], resumed["state"])],
        "last": [fingerprints_of(content["state_dict"]) for content in last],
        "optimizer": [
            [step["momentum_buffer"] for step in content["optimizer_states"][0]["state"].values()] for content in last
        ],
    }


def fingerprints_of(state: dict[str, Tensor]) -> dict[str, str]:
    holder = nn.Module()
    for name, tensor in state.items():
        holder.register_buffer(name.replace(".", "/"), tensor)
    return fingerprints(holder)


def test_two_processes_that_were_stopped_within_an_epoch_end_with_the_same_bits(tmp_path: Path) -> None:
    for result in run_in_processes(undisturbed_and_stopped, tmp_path, folder=tmp_path):
        assert isinstance(result, dict), result
        assert result["stopped by"] == signal.SIGTERM
        # Four batches, two steps of the optimizer: both processes stopped after the same one, within the first epoch.
        assert result["steps before"] == 4
        assert result["steps"][0] == result["steps"][1]
        # The first epoch's figures too, of which each process did a part before it was stopped.
        assert len(result["training"][0]) == 2
        assert result["training"][0] == result["training"][1]
        assert result["best"][0] == result["best"][1]
        assert result["last"][0] == result["last"][1]
        assert all(map(torch.equal, *result["optimizer"]))


def delete_once_trained(folder: Path) -> str:
    """As a baseline's training does; the second process is late in reading the best weights."""
    if processes.rank():
        read = fit_module.load_checkpoint

        def late(*arguments: Any, **keywords: Any) -> None:
            time.sleep(3)
            read(*arguments, **keywords)

        fit_module.load_checkpoint = late
    module = Classification(network(digits(32), False), OptimConfig(learning_rate=0.02))
    settings = TrainerConfig(precision="32", accelerator="cpu", progress="none")
    quiet = Console(quiet=True)
    fit_module.fit(module, digits(32), folder=folder / "one", max_epochs=1, settings=settings, title="", console=quiet)
    processes.on_main(lambda: shutil.rmtree(folder / "one"))
    return "trained"


def test_no_process_deletes_what_another_reads(tmp_path: Path) -> None:
    assert run_in_processes(delete_once_trained, tmp_path, folder=tmp_path) == ["trained", "trained"]
