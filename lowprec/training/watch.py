"""All callbacks that watch a training, made to fit together."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.callbacks import Callback
from rich import get_console
from rich.console import Console

from lowprec.config import TrainerConfig
from lowprec.training.checkpoints import LAST
from lowprec.training.non_finite import NonFiniteGuard
from lowprec.training.progress import EpochLines, LiveBar, LiveFigures, StepLines, shows_bar
from lowprec.training.throughput import Throughput


def watch_callbacks(settings: TrainerConfig, *, folder: Path, title: str, console: Console) -> list[Callback]:
    """The guard against divergence, the throughput, and what is shown of both.

    What is shown is for ``settings.progress``: auto (a bar on a terminal, lines elsewhere), rich, plain or none.

    Args:
        folder: where the training's checkpoints are. title: stands before each line of progress.
    """
    guard = NonFiniteGuard(folder / LAST, settings.log_every_steps)
    throughput = Throughput(settings.log_every_steps)
    # The guard comes first: nothing is logged of a step that it stops at.
    callbacks: list[Callback] = [guard, throughput]
    if settings.progress == "none":
        return callbacks
    figures = LiveFigures(throughput, guard)
    if shows_bar(settings.progress):
        return [*callbacks, EpochLines(title, get_console()), LiveBar(figures)]
    return [*callbacks, EpochLines(title, console), StepLines(title, console, settings.progress_seconds, figures)]
