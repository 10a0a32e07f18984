"""The same watch on a GPU, where numbers are read later than they are computed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import TensorDataset
from watched_training import BATCH, STEPS, Recorder, random_images, tiny_module, train

from lowprec.training.checkpoints import LAST, BestAndLast, TrainingDiverged
from lowprec.training.non_finite import NonFiniteGuard
from lowprec.training.profile import TABLE, StepProfile
from lowprec.training.throughput import Throughput

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


class BadGradient(Callback):
    """The gradient of a step (from 1) is infinite, while its loss is finite."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_after_backward(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if trainer.global_step + 1 == self.step:
            pl_module.model.get_parameter("first.weight").grad.fill_(math.inf)


@pytest.mark.parametrize("step", [STEPS - 2, STEPS], ids=["read a step later", "the last before a checkpoint"])
def test_the_step_of_a_bad_gradient_is_named(step: int, tmp_path: Path) -> None:
    callbacks = [BadGradient(step), NonFiniteGuard(tmp_path / LAST, 50), BestAndLast(tmp_path)]
    message = rf"step {step} \(epoch 1\): the gradient norm is inf; non-finite is the gradient of model.first.weight"
    with pytest.raises(TrainingDiverged, match=message):
        train(tiny_module(), tmp_path, callbacks, accelerator="gpu")
    assert list(tmp_path.iterdir()) == []


def test_the_step_and_the_batch_of_a_bad_loss_are_named(tmp_path: Path) -> None:
    images, labels = random_images()
    images[2 * BATCH + 1] = math.nan
    with pytest.raises(
        TrainingDiverged, match=r"step 3 \(epoch 1\): the loss is nan; the batch itself .* 1 of its 4 images"
    ):
        train(
            tiny_module(),
            tmp_path,
            [NonFiniteGuard(tmp_path / LAST, 50)],
            images=TensorDataset(images, labels),
            accelerator="gpu",
        )


def test_throughput_memory_and_profile(tmp_path: Path) -> None:
    recorder = Recorder()
    callbacks = [NonFiniteGuard(tmp_path / LAST, 3), Throughput(3), StepProfile(tmp_path)]
    train(tiny_module(), tmp_path, callbacks, loggers=[recorder], accelerator="gpu")
    assert all(0 <= share <= 1 for share in recorder.column("perf/data_wait_share").values())
    assert len(recorder.column("perf/gpu_memory_gib")) == 4
    assert all(0 < peak < 1 for peak in recorder.column("perf/gpu_memory_gib").values())
    assert all(math.isfinite(norm) and norm > 0 for norm in recorder.column("optim/gradient_norm").values())
    assert "CUDA" in (tmp_path / TABLE).read_text()
