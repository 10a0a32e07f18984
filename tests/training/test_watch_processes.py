"""Several processes are watched together: they stop at the same step, and the main one alone speaks, for all of them."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from rich.console import Console
from torch.utils.data import TensorDataset
from watched_training import BATCH, Clock, Recorder, TimedImages, TimedSteps, random_images, tiny_module, train
from worker_processes import run_in_processes

from lowprec.training import processes
from lowprec.training.checkpoints import LAST, BestAndLast, TrainingDiverged
from lowprec.training.non_finite import NonFiniteGuard
from lowprec.training.progress import LiveFigures, StepLines
from lowprec.training.throughput import Throughput


def ddp() -> dict[str, Any]:
    strategy = DDPStrategy(cluster_environment=processes.launch().environment)
    return {"devices": processes.size(), "strategy": strategy, "use_distributed_sampler": False}


def diverge(folder: Path) -> str:
    images, labels = random_images()
    if processes.rank() == 1:
        images[2 * BATCH + 1] = math.nan
    callbacks = [NonFiniteGuard(folder / LAST, 2), BestAndLast(folder)]
    try:
        train(tiny_module(), folder, callbacks, images=TensorDataset(images, labels), **ddp())
    except TrainingDiverged as error:
        return str(error)
    return "trained to the end"


def watch(folder: Path) -> tuple[dict[str, dict[int, float]], str, float]:
    clock, console, recorder = Clock(), Console(file=io.StringIO(), width=200), Recorder()
    # The second process loads more slowly, and computes faster.
    image_seconds, step_seconds = ((0.05, 0.8), (0.15, 0.4))[processes.rank()]
    guard, throughput = NonFiniteGuard(folder / LAST, 3), Throughput(3, clock)
    lines = StepLines("training", console, 2.5, LiveFigures(throughput, guard, clock), clock)
    callbacks = [TimedSteps(clock, step_seconds), guard, throughput, lines]
    images = TimedImages(clock, image_seconds)
    train(tiny_module(), folder, callbacks, loggers=[recorder], images=images, max_epochs=1, **ddp())
    assert isinstance(console.file, io.StringIO)
    names = ("perf/images_per_second", "perf/data_wait_share", "train/step_loss")
    return {name: recorder.column(name) for name in names}, console.file.getvalue(), guard.loss_total


def watch_and_diverge(folder: Path) -> tuple[Any, str]:
    return watch(folder), diverge(folder)


def test_processes_are_watched_and_stopped_together(tmp_path: Path) -> None:
    results = run_in_processes(watch_and_diverge, tmp_path, folder=tmp_path)
    assert not [result for result in results if isinstance(result, str)], results
    ((found, printed, loss), ended), ((others, silence, other_loss), other_ended) = results
    assert found == others
    # Both need 1 s for a batch; the longer wait of the two is 0.6 s of it.
    assert {round(value, 6) for value in found["perf/images_per_second"].values()} == {2 * BATCH}
    assert {round(value, 6) for value in found["perf/data_wait_share"].values()} == {0.6}
    assert list(found["perf/images_per_second"]) == list(found["train/step_loss"]) == [2, 5]
    assert loss == other_loss
    assert silence == ""
    assert [line.split("  ")[:3] for line in printed.splitlines()] == [
        ["training", "step 3/6 (epoch 1/1)", "8 images/s"],
        ["training", "step 6/6 (epoch 1/1)", "8 images/s"],
    ]
    # The batch of the second process alone is bad.
    assert ended == other_ended
    assert ended.startswith(
        "training diverged at step 3 (epoch 1): the loss is nan; the batch itself is not finite: 1 of its 4"
    )
