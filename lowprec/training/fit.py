"""Trains a model with Lightning: goes on from the last checkpoint of its folder and ends with the best one."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.loggers import Logger
from rich.console import Console

from lowprec.config import TrainerConfig
from lowprec.models import load_checkpoint
from lowprec.training.checkpoints import BEST, LAST, BestAndLast
from lowprec.training.module import Classification
from lowprec.training.precision import choose_accelerator, choose_precision
from lowprec.training.progress import progress_callbacks
from lowprec.training.resume import ResumedData

# Each says what is so on purpose here, and none what a user could act on.
_IRRELEVANT_WARNINGS = (
    ".*does not have many workers.*",
    ".*logging interval.*",
    ".*is not resumable.*",
    ".*lr_scheduler.step\\(\\).*",
    ".*does not have a deterministic implementation.*",
    ".*LeafSpec.*",
)


def fit(
    module: Classification,
    data: Any,
    *,
    folder: Path,
    max_epochs: int,
    settings: TrainerConfig,
    title: str,
    console: Console,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[Logger] = (),
) -> int:
    """Trains ``module.model`` in place for ``max_epochs`` in all, and loads its best weights by validation accuracy.

    Args:
        data: a data module. folder: where ``best.safetensors`` and ``last.ckpt`` are kept and found again.
        settings: precision, accelerator and gradient clipping. title: stands before each line of progress.

    Returns:
        The epoch, from 1, that the best weights come from.

    Raises:
        Interrupted: the user pressed Ctrl-C; ``last.ckpt`` holds the state after the last whole step.
    """
    _quiet_lightning()
    checkpoints = BestAndLast(folder)
    accelerator = choose_accelerator(settings.accelerator)
    progress = progress_callbacks(settings.progress, title, console)
    trainer = lightning.Trainer(
        max_epochs=max_epochs,
        accelerator=accelerator,
        devices=1,
        precision=choose_precision(settings.precision, accelerator),
        gradient_clip_val=settings.gradient_clip,
        # A warning, not an error: a few CUDA kernels have no deterministic form.
        deterministic="warn",
        callbacks=[*callbacks, *progress, checkpoints],
        logger=list(loggers) or False,
        enable_checkpointing=True,
        enable_model_summary=False,
        enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in progress),
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    last = folder / LAST
    module.train()  # Lightning keeps the mode it finds
    with checkpoints.listening(), warnings.catch_warnings():
        for message in _IRRELEVANT_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        if last.is_file():
            trainer.fit(module, ResumedData(data, last), ckpt_path=str(last), weights_only=True)
        else:
            trainer.fit(module, data)
    module.model.to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    load_checkpoint(module.model, folder / BEST)
    return checkpoints.best_epoch + 1


def _quiet_lightning() -> None:
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
