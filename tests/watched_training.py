"""A training small enough to watch: two convolutions on random images, with a real trainer, on the CPU unless told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lowprec.config import OptimConfig
from lowprec.training.module import Classification

IMAGES, BATCH = 24, 4
STEPS = IMAGES // BATCH  # of an epoch


class TinyNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 3, 3)
        self.second = nn.Conv2d(3, 3, 3)
        self.classifier = nn.Linear(3, 2)

    def forward(self, images: Tensor) -> Tensor:
        features = self.second(self.first(images).relu())
        logits: Tensor = self.classifier(features.mean(dim=(2, 3)))
        return logits


class Clock:
    """Shows the time that it was set to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class TimedImages(Dataset[tuple[Tensor, int]]):
    """The random images, each of which takes ``seconds`` of the clock to load."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self.clock, self.seconds = clock, seconds
        self.images, self.labels = random_images()

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.clock.now += self.seconds
        return self.images[index], int(self.labels[index])


class TimedSteps(Callback):
    """Each forward pass takes ``seconds`` of the clock, each validation a thousand."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self.clock, self.seconds = clock, seconds

    def on_before_backward(self, trainer: lightning.Trainer, pl_module: Any, loss: Tensor) -> None:
        self.clock.now += self.seconds

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.clock.now += 1000


class Recorder(Logger):
    """Keeps what is logged, by step."""

    name = "recorder"
    version = ""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, float]] = {}

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """None are kept."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.rows.setdefault(step, {}).update(metrics)

    def column(self, name: str) -> dict[int, float]:
        return {step: row[name] for step, row in self.rows.items() if name in row}


def random_images() -> tuple[Tensor, Tensor]:
    """Images [24, 1, 8, 8] and labels [24]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(IMAGES, 1, 8, 8, generator=generator), torch.arange(IMAGES) % 2


def tiny_module(learning_rate: float = 0.1) -> Classification:
    torch.manual_seed(0)
    return Classification(TinyNetwork(), OptimConfig(learning_rate=learning_rate, momentum=0.0), channels_last=False)


def train(
    module: Classification,
    folder: Path,
    callbacks: Sequence[Callback],
    *,
    loggers: Sequence[Logger] = (),
    images: Dataset[Any] | None = None,
    max_epochs: int = 2,
    **settings: Any,
) -> lightning.Trainer:
    """Six steps an epoch, in the order of the images, and a validation."""
    loader = DataLoader(images or TensorDataset(*random_images()), batch_size=BATCH)
    trainer = lightning.Trainer(
        max_epochs=max_epochs,
        **{"accelerator": "cpu", "devices": 1, **settings},
        callbacks=list(callbacks),
        logger=list(loggers) or False,
        enable_checkpointing=any(callback.__class__.__name__ == "BestAndLast" for callback in callbacks),
        enable_model_summary=False,
        enable_progress_bar=any(isinstance(callback, lightning.callbacks.ProgressBar) for callback in callbacks),
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    module.train()  # Lightning keeps the mode it finds
    trainer.fit(module, loader, DataLoader(TensorDataset(*random_images()), batch_size=BATCH))
    return trainer
