"""The full-precision model of a run: from a checkpoint, from published weights, or trained here first and kept."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from lightning.pytorch import seed_everything
from rich.console import Console
from torch import nn

from lowprec.config import ConfigError, RunConfig
from lowprec.models import CheckpointError, create_model, load_checkpoint, save_checkpoint
from lowprec.models.checkpoint import check_published_head
from lowprec.recipe import Recipe
from lowprec.training import processes
from lowprec.training.fit import fit
from lowprec.training.module import Classification


def build_model(config: RunConfig, *, num_classes: int | None, pretrained: bool = False) -> nn.Module:
    """The full-precision architecture of ``config.model``, with published weights if so asked.

    Raises:
        ConfigError: no such model, or it takes no such argument. CheckpointError: the published weights cannot be had.
    """
    try:
        return create_model(
            config.model.name,
            num_classes=num_classes,
            in_channels=config.data.in_channels,
            pretrained=pretrained,
            **config.model.arguments,
        )
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error


def full_precision_model(config: RunConfig, data: Any, console: Console) -> nn.Module:
    """The model that quantization starts from, on the CPU and in eval mode.

    ``model.checkpoint`` wins over ``model.pretrained``; without either, and where their classifier is left out, the baseline is
    trained, once for all runs whose settings of it agree.
    """
    seed_everything(config.seed, workers=True, verbose=False)
    if not config.model.is_trained_here:
        return _given_model(config, data).eval()
    path = _baseline(config, data, console)
    # Built anew, so that a run goes on from the same tensors whether the baseline was trained just now or found.
    model = build_model(config, num_classes=data.num_classes)
    load_checkpoint(model, path)
    _check_finite(model, config)
    return model.eval()


def _given_model(config: RunConfig, data: Any) -> nn.Module:
    """The model with the weights that it is given, random ones where there are none."""
    pretrained = config.model.pretrained and config.model.checkpoint is None
    model = build_model(config, num_classes=data.num_classes, pretrained=pretrained)
    if config.model.checkpoint is not None:
        load_checkpoint(model, config.model.checkpoint, head=config.model.head)
    elif pretrained:
        check_published_head(model, data.num_classes, head=config.model.head)
    _check_finite(model, config)
    return model


def _check_finite(model: nn.Module, config: RunConfig) -> None:
    """Raises CheckpointError, before anything is measured or trained, for weights that are infinite or NaN."""
    for name, tensor in model.state_dict().items():
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise CheckpointError(
                f"{config.model.checkpoint or config.model.name}: {bad} of {tensor.numel()} values of {name} are infinite "
                "or NaN; the checkpoint is damaged, or its training diverged"
            )


def baseline_file(config: RunConfig, fingerprint: str | None) -> Path:
    """Where the baseline of these settings is kept; the name's hash covers all that its weights depend on.

    fingerprint: of the data set.
    """
    data = asdict(config.data)
    for incidental in ("root", "num_workers", "eval_batch_size", "limit_test", "max_corrupted"):
        del data[incidental]
    # Left out while they are off, as in baselines that were trained before there was a choice.
    for option in ("auto_augment", "random_erasing"):
        if not data[option]:
            del data[option]
    # Sets without one are known by their name, and their baselines by what they were before there was one.
    if fingerprint is not None:
        data["fingerprint"] = fingerprint
    trainer = {key: getattr(config.trainer, key) for key in ("precision", "accelerator", "channels_last")}
    # Left out while they are as they were when there was one process alone: baselines of then are still found.
    for key, default in (("nodes", 1), ("devices", 1), ("sync_batchnorm", False), ("accumulate_grad_batches", 1)):
        if getattr(config.trainer, key) != default:
            trainer[key] = getattr(config.trainer, key)
    if config.trainer.debug is not None:
        trainer["debug"] = config.trainer.debug
    settings = {
        "model": {"name": config.model.name, "arguments": config.model.arguments},
        "data": data,
        "baseline": asdict(config.baseline),
        "trainer": trainer,
        "seed": config.seed,
    }
    # Left out without given weights, as in baselines that were trained before these could be begun from.
    if config.model.checkpoint is not None:
        settings["checkpoint"] = _digest(Path(config.model.checkpoint))
    elif config.model.pretrained:
        settings["pretrained"] = True
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
    name = re.sub(r"[^\w.-]+", "_", f"{config.data.name}-{config.model.name}-{digest}")
    return Path(config.runs_dir) / "baselines" / f"{name}.safetensors"


def _digest(file: Path) -> str:
    """Of a file's content; nothing of one that is not there, which loading it will say."""
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def training_identity(config: RunConfig, recipe: Recipe | None = None) -> dict[str, Any]:
    """What a training's checkpoints belong to; recipe: of a fake-quant model."""
    trainer = config.trainer
    return {
        "model": f"{config.model.name} {config.model.arguments}",
        "data": config.data.name,
        "recipe": "none" if recipe is None else json.dumps(recipe.to_dict(), sort_keys=True),
        "seed": config.seed,
        "processes": trainer.nodes * trainer.devices,
        "batch size": config.data.batch_size * trainer.accumulate_grad_batches,
    }


def _baseline(config: RunConfig, data: Any, console: Console) -> Path:
    path = baseline_file(config, data.fingerprint)
    lock = FileLock(path.with_suffix(".lock"))

    def found() -> bool:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Runs that start at the same time train it once: the others wait here, and then find it.
        lock.acquire()
        return path.is_file()

    try:
        if processes.on_main(found):
            console.print(f"full-precision baseline: {path}")
        else:
            given = config.model.checkpoint or ("published weights" if config.model.pretrained else None)
            start = f" from {given} with a new classifier" if given else ""
            console.print(
                f"full-precision baseline: none yet, training one{start} ({config.baseline.max_epochs} epochs)"
            )
            _train_baseline(config, data, console, path)
    finally:
        lock.release()
    return path


def _train_baseline(config: RunConfig, data: Any, console: Console, path: Path) -> None:
    # Its checkpoints lie beside it while it trains, so that whichever run comes next goes on with it.
    folder = path.with_suffix("")
    processes.on_main(lambda: folder.mkdir(exist_ok=True))
    model = _given_model(config, data)
    module = Classification(
        model,
        config.baseline.optim,
        label_smoothing=config.baseline.label_smoothing,
        channels_last=config.trainer.channels_last,
        compiled=config.trainer.compile,
        identity=training_identity(config),
    )
    best_epoch = fit(
        module,
        data,
        folder=folder,
        max_epochs=config.baseline.max_epochs,
        settings=config.trainer,
        title="full precision",
        console=console,
    )

    def keep() -> None:
        save_checkpoint(model, path, {"epoch": str(best_epoch), "seed": str(config.seed)})
        shutil.rmtree(folder)

    processes.on_main(keep)
