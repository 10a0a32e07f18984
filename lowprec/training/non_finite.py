"""The guard of a training: it stops at the step whose loss or gradient is infinite or NaN, and says where that began."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lowprec.training import processes
from lowprec.training.checkpoints import TrainingDiverged
from lowprec.training.loggers import alert, log_metrics

LOWER_THE_RATE = (
    "Lower optim.learning_rate (baseline.optim.learning_rate for the full-precision model), "
    "or set trainer.gradient_clip"
)
LOOK_AT_THE_DATA = (
    "The learning rate is not to blame: look at the images, and at what decodes, augments and normalizes them"
)


class Reading:
    """Numbers on their way from the device to the host: asking for them waits for them alone, not for what came later."""

    def __init__(self, values: Tensor) -> None:
        # Pinned memory where the values come from a GPU; elsewhere a copy, as the original may be changed in place.
        self._host = values.detach().to("cpu", non_blocking=True, copy=True)
        self._event: torch.cuda.Event | None = None
        if values.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def values(self) -> list[float]:
        if self._event is not None:
            self._event.synchronize()
        return self._host.double().flatten().tolist()


class Gradients(NamedTuple):
    """The norms of a step's gradients: of which step and epoch (from 1), by parameter, in the order of the model."""

    step: int
    epoch: int
    names: list[str]
    norms: Reading


class Finding(NamedTuple):
    """What is non-finite; ``place`` orders findings by when a forward pass comes to them, -1 is the batch."""

    place: int
    text: str
    advice: str


class NonFiniteGuard(Callback):
    """Raises TrainingDiverged at the optimizer step whose loss or gradient norm is infinite or NaN, in all processes.

    The message names step, epoch, the first layer whose output is not finite (from a second forward pass over the batch), or
    the parameter whose gradient is not, and the last good checkpoint: none is written of a state that is not finite.

    The device is never waited for: a step's loss is read when its backward pass has been launched, before its weights
    change. Gradient norms are read then on a CPU, and a step later on a GPU.

    What is read anyway is logged every N optimizer steps: ``optim/gradient_norm`` (before clipping), ``optim/learning_rate``
    and ``train/step_loss``, the mean loss of these steps over all processes.

    Args:
        checkpoint: the file that is named as the last good one, if it is there.
    """

    def __init__(self, checkpoint: Path, log_every_steps: int) -> None:
        self.checkpoint = checkpoint
        self.log_every_steps = log_every_steps
        self.loss_total = 0.0  # of all steps of this training so far, ``steps`` in number
        self.steps = 0
        self.learning_rate = 0.0
        self.gradient_norm = 0.0  # of the last step that was read
        self._batch: Any = None
        self._suspect: Any = None
        self._loss: Reading | None = None
        self._losses: list[float] = []
        self._unread: Gradients | None = None
        self._logged = (0.0, 0)
        self._logged_step = -1

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._logged_step = trainer.global_step

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch = batch

    def on_before_backward(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, loss: Tensor
    ) -> None:
        self._loss = Reading(loss)

    def on_after_backward(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert self._loss is not None
        # Lightning has divided the loss by the batches whose gradients add up to one step.
        loss = self._loss.values()[0] * trainer.accumulate_grad_batches
        self._losses.append(loss)
        if self._suspect is None and not math.isfinite(loss):
            self._suspect = self._batch

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        # First, as the loss of a step is not finite either where the gradients before it were not.
        self._check_gradients(trainer)
        mean = sum(self._losses) / len(self._losses)
        self._losses = []
        # The sum is finite where the loss is in all processes, so all of them decide the same.
        (total,) = processes.total(mean)
        loss = total / processes.size()
        if not math.isfinite(loss):
            batch = self._batch if self._suspect is None else self._suspect
            found = min(processes.gathered(find_non_finite(trainer, pl_module, batch[0])))
            raise self._diverged(trainer, trainer.global_step + 1, f"the loss is {loss}", found.text, found.advice)
        self.loss_total += loss
        self.steps += 1
        self.learning_rate = optimizer.param_groups[0]["lr"]
        self._unread = _gradients(trainer, pl_module)
        if pl_module.device.type != "cuda":
            self._check_gradients(trainer)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batch = None
        if trainer.is_last_batch:
            self._check_state(trainer, pl_module)
        if trainer.global_step == self._logged_step or trainer.global_step % self.log_every_steps:
            return
        self._logged_step = trainer.global_step
        self._check_gradients(trainer)
        losses, steps = self._logged
        self._logged = (self.loss_total, self.steps)
        log_metrics(
            trainer,
            {
                "optim/gradient_norm": self.gradient_norm,
                "optim/learning_rate": self.learning_rate,
                "train/step_loss": (self.loss_total - losses) / (self.steps - steps),
            },
        )

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._check_state(trainer, pl_module)

    def _check_gradients(self, trainer: lightning.Trainer) -> None:
        """Reads the norms that were not read yet; the same in all processes."""
        if self._unread is None:
            return
        gradients, self._unread = self._unread, None
        norms = gradients.norms.values()
        self.gradient_norm = math.hypot(*norms)
        bad = [name for name, norm in zip(gradients.names, norms, strict=True) if not math.isfinite(norm)]
        if bad:
            others = f", and {len(bad) - 1} more" if len(bad) > 1 else ""
            # Gradients flow from the last layer to the first.
            where = f"non-finite is the gradient of {bad[-1]}{others}, though outputs and loss are finite"
            what = f"the gradient norm is {self.gradient_norm}"
            raise self._diverged(trainer, gradients.step, what, where, LOWER_THE_RATE, gradients.epoch)

    def _check_state(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """A finite gradient, too, can make weights infinite. Waits for the device; for before validation and checkpoints."""
        self._check_gradients(trainer)
        # Others' quantizers keep integers among their parameters, which have no norm and are always finite.
        named = [(name, value) for name, value in pl_module.named_parameters() if value.is_floating_point()]
        largest = torch._foreach_norm([parameter.detach() for _, parameter in named], math.inf)
        values = Reading(torch.stack([value.float() for value in largest])).values()
        bad = [name for (name, _), value in zip(named, values, strict=True) if not math.isfinite(value)]
        if bad:
            others = f" and of {len(bad) - 1} more parameters" if len(bad) > 1 else ""
            what = f"values of {bad[0]}{others} are infinite or NaN"
            raise self._diverged(trainer, trainer.global_step, what, "", LOWER_THE_RATE)

    def _diverged(
        self, trainer: lightning.Trainer, step: int, what: str, where: str, advice: str, epoch: int | None = None
    ) -> TrainingDiverged:
        kept = (
            f"The last good checkpoint is {self.checkpoint}"
            if self.checkpoint.is_file()
            else "No checkpoint was written yet"
        )
        text = f"training diverged at step {step} (epoch {epoch or trainer.current_epoch + 1}): {what}"
        text = f"{text}{f'; {where}' if where else ''}. {advice}. {kept}"
        alert(trainer.loggers, "training diverged", text)
        return TrainingDiverged(text)


@torch.no_grad()
def find_non_finite(trainer: lightning.Trainer, pl_module: lightning.LightningModule, images: Tensor) -> Finding:
    """Where a forward pass over ``images`` [B, C, H, W] first becomes infinite or NaN.

    All processes have to call it, as batch norm may reach over them. The model's statistics change, as in any training pass.
    """
    model: nn.Module = pl_module.model  # type: ignore[assignment]
    findings: list[Finding] = []
    calls = 0

    def look_at_parameters(name: str, module: nn.Module) -> None:
        nonlocal calls
        calls += 1
        for part, parameter in module.named_parameters(recurse=False):
            bad = 0 if findings else _count_non_finite(parameter)
            if bad:
                text = f"{bad} of {parameter.numel()} values of {name}.{part} are infinite or NaN"
                findings.append(Finding(calls, text, LOWER_THE_RATE))

    def look_at_output(name: str, module: nn.Module, output: Any) -> None:
        if not findings and isinstance(output, Tensor) and _count_non_finite(output):
            text = f"the first non-finite output is that of layer {name} ({type(module).__name__})"
            findings.append(Finding(calls, text, LOWER_THE_RATE))

    handles = []
    for name, module in model.named_modules():
        if name:
            handles.append(
                module.register_forward_pre_hook(lambda module, _, name=name: look_at_parameters(name, module))
            )
            handles.append(
                module.register_forward_hook(lambda module, _, out, name=name: look_at_output(name, module, out))
            )
    try:
        with trainer.precision_plugin.forward_context():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    bad_images = (~torch.isfinite(images)).flatten(1).any(dim=1).nonzero().flatten().tolist()
    if bad_images:
        which = f"number {bad_images[0]} is the first, counted from 0"
        text = f"the batch itself is not finite: {len(bad_images)} of its {len(images)} images hold infinities or NaN ({which})"
        return Finding(-1, text, LOOK_AT_THE_DATA)
    nowhere = Finding(
        calls + 1, "all layers' outputs are finite, so it is the loss: look at labels and teacher", LOWER_THE_RATE
    )
    return findings[0] if findings else nowhere


def _gradients(trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> Gradients:
    named = [(name, value.grad) for name, value in pl_module.named_parameters() if value.grad is not None]
    norms = torch._foreach_norm([gradient for _, gradient in named])
    reading = Reading(torch.stack([norm.float() for norm in norms]))
    return Gradients(trainer.global_step + 1, trainer.current_epoch + 1, [name for name, _ in named], reading)


def _count_non_finite(values: Tensor) -> int:
    return int((~torch.isfinite(values)).sum())
