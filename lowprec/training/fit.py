"""Trains a model with Lightning: goes on from the last checkpoint of its folder and ends with the best one."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy
from rich.console import Console

from lowprec.config import TrainerConfig
from lowprec.models import load_checkpoint
from lowprec.training import processes
from lowprec.training.batch_norm import synchronize_batch_norms
from lowprec.training.checkpoints import BEST, LAST, BestAndLast, DurableCheckpoints
from lowprec.training.equality import EqualModels
from lowprec.training.module import Classification
from lowprec.training.precision import choose_accelerator, choose_precision
from lowprec.training.resume import ResumedData, ResumeLine, batches_done
from lowprec.training.watch import watch_callbacks

# Each says what is so on purpose here, and none what a user could act on.
_IRRELEVANT_WARNINGS = (
    ".*does not have many workers.*",
    ".*logging interval.*",
    ".*is not resumable.*",
    ".*lr_scheduler.step\\(\\).*",
    ".*does not have a deterministic implementation.*",
    ".*LeafSpec.*",
    ".*sync_dist=True.*",
    ".*`broadcast_buffers` is deprecated.*",
    ".*Grad strides do not match bucket view strides.*",
    ".*`srun` command is available.*",
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

    In all processes of a training, which end with the same weights.

    Args:
        data: a data module. folder: where ``best.safetensors`` and ``last.ckpt`` are kept and found again.
        settings: precision, accelerator, processes, gradient clipping and accumulation. title: stands before each line of
        progress.

    Returns:
        The epoch, from 1, that the best weights come from.

    Raises:
        Interrupted: a signal came; ``last.ckpt`` holds the state after the last whole step. CheckpointError: ``last.ckpt`` is
        damaged or another training's, or the best weights beside it are. CheckpointWriteError: a full disk.
        DesynchronizedError: the processes differ.
    """
    _quiet_lightning()
    last = folder / LAST
    done = processes.on_main(lambda: batches_done(last, module.identity) if last.is_file() else None)
    resume_line = [] if done is None else [ResumeLine(title, console, last)]
    checkpoints = BestAndLast(folder, settings.checkpoint_minutes)
    accelerator = choose_accelerator(settings.accelerator)
    watch = watch_callbacks(settings, folder=folder, title=title, console=console)
    if settings.sync_batchnorm:
        synchronize_batch_norms(module)
    trainer = lightning.Trainer(
        max_epochs=max_epochs,
        **_processes(accelerator),
        precision=choose_precision(settings.precision, accelerator),
        gradient_clip_val=settings.gradient_clip,
        accumulate_grad_batches=settings.accumulate_grad_batches,
        # A warning, not an error: a few CUDA kernels have no deterministic form.
        deterministic="warn",
        callbacks=[*resume_line, *callbacks, *watch, EqualModels(), checkpoints],
        logger=list(loggers) or False,
        log_every_n_steps=settings.log_every_steps,
        enable_checkpointing=True,
        enable_model_summary=False,
        enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in watch),
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    if processes.rank():
        # Each process draws its own dropout masks; the main one's are those of a training on its own.
        seed_everything(torch.initial_seed() + processes.rank(), workers=True, verbose=False)
    module.train()  # Lightning keeps the mode it finds
    with checkpoints.listening(), warnings.catch_warnings():
        for message in _IRRELEVANT_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        if done is None:
            trainer.fit(module, data)
        else:
            trainer.fit(module, ResumedData(data, done), ckpt_path=str(last), weights_only=True)
    module.model.to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    load_checkpoint(module.model, folder / BEST)
    # A caller may delete the folder, which it does in one process.
    processes.meet()
    return checkpoints.best_epoch + 1


def _processes(accelerator: str) -> dict[str, Any]:
    """Lightning's arguments for the processes that were started; it starts none itself."""
    started = processes.launch()
    arguments: dict[str, Any] = {
        "accelerator": accelerator,
        "plugins": [DurableCheckpoints()],
        # The loaders give each process its share already.
        "use_distributed_sampler": False,
    }
    if processes.size() == 1:
        # Named, because Lightning would take a SLURM job's only process for one of several, and requeue its job.
        return {**arguments, "devices": 1, "plugins": [DurableCheckpoints(), LightningEnvironment()]}
    # Each process keeps its own batch statistics, which are averaged before validation; all else is equal by computation.
    strategy = DDPStrategy(cluster_environment=started.environment, broadcast_buffers=False)
    nodes = started.size // started.local_size
    return {**arguments, "devices": started.local_size, "num_nodes": nodes, "strategy": strategy}


def _quiet_lightning() -> None:
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
