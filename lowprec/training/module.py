"""The LightningModule of both trainings: of the full-precision baseline and of the fake-quant model."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import lightning.pytorch as lightning
import numpy as np
import torch
from torch import Tensor, nn

from lowprec.config import DistillationConfig, OptimConfig
from lowprec.layers.linear import folded_once
from lowprec.layers.saved_codes import saved_as_codes
from lowprec.training import processes
from lowprec.training.distillation import training_loss
from lowprec.training.optimizer import create_optimizer, create_schedule
from lowprec.training.precision import float32_evaluation
from lowprec.training.resume import IDENTITY

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
        compiled: bool = False,
        keep_codes: bool = False,
        identity: dict[str, Any] | None = None,
    ) -> None:
        """identity: what this training is, kept in its checkpoints. compiled: training goes through torch.compile;
        validation does not, so that it computes exactly what is shipped. keep_codes: see :func:`saved_as_codes`.
        """
        super().__init__()
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.model = model.to(memory_format=self.memory_format)
        self.optim = optim
        self.label_smoothing = label_smoothing
        self.distillation = distillation or DistillationConfig()
        self.identity = identity or {}
        self.keep_codes = keep_codes
        self._own_state: dict[str, Any] = {}
        # Loss, correct ones and images of an epoch: sums of this process's share.
        self._training = torch.zeros(3, dtype=torch.float64)
        self._validation = torch.zeros(3, dtype=torch.float64)
        self._folded = contextlib.ExitStack()
        # In a tuple for the same reason as the teacher below.
        self._compiled = (torch.compile(self.model),) if compiled else ()
        # In a tuple, so that it is no submodule: the teacher is neither trained nor saved in checkpoints.
        self._teacher = (teacher,) if teacher is not None and self.distillation.weight > 0 else ()

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of float images [B, C, H, W]."""
        model = self._compiled[0] if self._compiled and self.training else self.model
        with saved_as_codes(self.model, self.keep_codes and self.training):
            logits: Tensor = model(images.contiguous(memory_format=self.memory_format))
        return logits

    def on_fit_start(self) -> None:
        if self._own_state:
            self._restore_random(self._own_state)
        for teacher in self._teacher:
            teacher.to(self.device, memory_format=self.memory_format)  # type: ignore[call-overload]
            teacher.eval().requires_grad_(False)

    def on_train_start(self) -> None:
        # Here, because DDP hands the main process's buffers to all before.
        buffers = dict(self.model.named_buffers())
        for name, statistic in self._own_state.get("statistics", {}).items():
            buffers[name].copy_(statistic)
        # Lightning starts no epoch where a run goes on in the middle of one.
        sums = self._own_state.get("training", [0.0, 0.0, 0.0])
        self._training = torch.tensor(sums, dtype=torch.float64, device=self.device)

    def on_train_epoch_start(self) -> None:
        self._training = torch.zeros(3, dtype=torch.float64, device=self.device)

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
        self._training += _sums(loss.detach() * len(labels), logits, labels)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_index: int) -> None:
        # Not at the epoch's end, where callbacks that show these come first.
        if self.trainer.is_last_batch:
            self._log_means("train", self._training, on_step=False, on_epoch=True, batch_size=1)

    def on_validation_epoch_start(self) -> None:
        self._validation = torch.zeros(3, dtype=torch.float64, device=self.device)
        self._folded.enter_context(folded_once(self.model))

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        images, labels = batch
        with float32_evaluation(self.device):
            logits = self(images)
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        self._validation += _sums(loss, logits, labels)

    def on_validation_epoch_end(self) -> None:
        self._folded.close()
        self._log_means("val", self._validation)

    def _log_means(self, split: str, sums: Tensor, **settings: Any) -> None:
        # Sums over all processes, not means of means: their shares of the images need not be equal.
        loss, correct, images = processes.total(*sums.tolist())
        self.log(f"{split}/loss", loss / max(1, images), **settings)
        self.log(f"{split}/top1", correct / max(1, images), **settings)

    def configure_optimizers(self) -> Any:
        optimizer = create_optimizer(self.model, self.optim)
        total_steps = int(self.trainer.estimated_stepping_batches)
        steps_per_epoch = total_steps / max(1, self.trainer.max_epochs or 1)
        warmup_steps = round(self.optim.warmup_epochs * steps_per_epoch)
        schedule = create_schedule(optimizer, warmup_steps=warmup_steps, total_steps=total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[IDENTITY] = self.identity
        # Called in all processes: each has random numbers and, within an epoch, sums and batch statistics of its own.
        checkpoint["own_states"] = processes.gathered(self._state())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._own_state = checkpoint["own_states"][processes.rank()]

    def _state(self) -> dict[str, Any]:
        # Dropout and random transforms draw from these: a resumed run goes on with the same numbers.
        _, keys, *position = np.random.get_state(legacy=True)  # noqa: NPY002 - transforms use the global state
        state = {
            "torch": torch.get_rng_state(),
            "python": random.getstate(),
            "numpy": (keys.tolist(), *position),  # type: ignore[union-attr]
            "training": self._training.tolist(),
        }
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        if processes.size() > 1:
            state["statistics"] = {
                name: buffer.cpu() for name, buffer in self.model.named_buffers() if _is_statistic(name)
            }
        return state

    def _restore_random(self, state: dict[str, Any]) -> None:
        torch.set_rng_state(state["torch"])
        random.setstate(_as_tuples(state["python"]))
        np.random.set_state(("MT19937", *state["numpy"]))  # noqa: NPY002
        if "cuda" in state and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self.device)


def _sums(loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Loss, correct ones and images of a batch, [3]; loss: summed over it. Does not wait for the device."""
    correct = (logits.detach().argmax(dim=1) == labels).sum()
    return torch.stack([loss, correct, torch.full_like(loss, len(labels))])


def _is_statistic(name: str) -> bool:
    return name.endswith(("running_mean", "running_var"))


def _as_tuples(state: Any) -> Any:
    # random.setstate takes tuples alone, and a checkpoint may hold them as lists.
    return tuple(_as_tuples(item) for item in state) if isinstance(state, (list, tuple)) else state
