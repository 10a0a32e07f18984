"""The LightningModule of both trainings: of the full-precision baseline and of the fake-quant model."""

from __future__ import annotations

import random
from typing import Any

import lightning.pytorch as lightning
import numpy as np
import torch
from torch import Tensor, nn

from lowprec.config import DistillationConfig, OptimConfig
from lowprec.training.distillation import training_loss
from lowprec.training.optimizer import create_optimizer, create_schedule
from lowprec.training.precision import float32_evaluation

Batch = tuple[Tensor, Tensor]


class Classification(lightning.LightningModule):
    """Trains ``model`` on labelled images, optionally also on the logits of a ``teacher``.

    Validation runs in float32 and in eval mode, in which a fake-quant model computes with its folded, rounded
    weights: the validation accuracy is the one that is shipped. Scales and codes follow the weights inside the
    model's own forward.
    """

    def __init__(
        self,
        model: nn.Module,
        optim: OptimConfig,
        *,
        label_smoothing: float = 0.0,
        teacher: nn.Module | None = None,
        distillation: DistillationConfig | None = None,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.model = model.to(memory_format=self.memory_format)
        self.optim = optim
        self.label_smoothing = label_smoothing
        self.distillation = distillation or DistillationConfig()
        self._random_state: dict[str, Any] = {}
        # In a tuple, so that it is no submodule: the teacher is neither trained nor saved in checkpoints.
        self._teacher = (teacher,) if teacher is not None and self.distillation.weight > 0 else ()

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of float images [B, C, H, W]."""
        logits: Tensor = self.model(images.contiguous(memory_format=self.memory_format))
        return logits

    def on_fit_start(self) -> None:
        if self._random_state:
            torch.set_rng_state(self._random_state["torch"])
            random.setstate(_as_tuples(self._random_state["python"]))
            np.random.set_state(("MT19937", *self._random_state["numpy"]))  # noqa: NPY002
        for teacher in self._teacher:
            teacher.to(self.device, memory_format=self.memory_format)  # type: ignore[call-overload]
            teacher.eval().requires_grad_(False)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        images, labels = batch
        logits = self(images)
        teacher_logits = None
        if self._teacher:
            with torch.no_grad():
                teacher_logits = self._teacher[0](images.contiguous(memory_format=self.memory_format))
        loss = training_loss(
            logits,
            labels,
            label_smoothing=self.label_smoothing,
            teacher_logits=teacher_logits,
            weight=self.distillation.weight,
            temperature=self.distillation.temperature,
        )
        top1 = (logits.detach().argmax(dim=1) == labels).float().mean()
        self.log("train/loss", loss.detach(), on_step=False, on_epoch=True, batch_size=len(labels))
        self.log("train/top1", top1, on_step=False, on_epoch=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        images, labels = batch
        with float32_evaluation(self.device):
            logits = self(images)
            loss = nn.functional.cross_entropy(logits, labels)
        top1 = (logits.argmax(dim=1) == labels).float().mean()
        self.log("val/loss", loss, batch_size=len(labels), sync_dist=True)
        self.log("val/top1", top1, batch_size=len(labels), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = create_optimizer(self.model, self.optim)
        total_steps = int(self.trainer.estimated_stepping_batches)
        steps_per_epoch = total_steps / max(1, self.trainer.max_epochs or 1)
        warmup_steps = round(self.optim.warmup_epochs * steps_per_epoch)
        schedule = create_schedule(optimizer, warmup_steps=warmup_steps, total_steps=total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Dropout and random transforms draw from these: a resumed run goes on with the same numbers.
        _, keys, *position = np.random.get_state(legacy=True)  # noqa: NPY002 - transforms use the global state
        checkpoint["random_state"] = {
            "torch": torch.get_rng_state(),
            "python": random.getstate(),
            "numpy": (keys.tolist(), *position),  # type: ignore[union-attr]
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._random_state = checkpoint.get("random_state", {})


def _as_tuples(state: Any) -> Any:
    # random.setstate takes tuples alone, and a checkpoint may hold them as lists.
    return tuple(_as_tuples(item) for item in state) if isinstance(state, (list, tuple)) else state
