"""The loss of fine-tuning: cross-entropy with labels, and the teacher's logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)), a mean over the batch (Hinton et al., arXiv 1503.02531).

    Args:
        student_logits, teacher_logits: [B, classes]; computed in float32 whatever their type.
        temperature: T above 0. The factor T² keeps the size of the gradient independent of it.
    """
    student = functional.log_softmax(student_logits.float() / temperature, dim=1)
    teacher = functional.log_softmax(teacher_logits.float() / temperature, dim=1)
    return temperature**2 * functional.kl_div(student, teacher, log_target=True, reduction="batchmean")


def training_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float,
    teacher_logits: Tensor | None = None,
    weight: float = 0.0,
    temperature: float = 1.0,
) -> Tensor:
    """(1 - weight) · cross-entropy + weight · distillation; without a teacher, cross-entropy alone.

    Args:
        logits: [B, classes]. labels: int64 [B]. label_smoothing: share in [0, 1) of the cross-entropy's target.
        teacher_logits: [B, classes] or None. weight: share in [0, 1] of the distillation.
    """
    loss: Tensor = torch.zeros((), device=logits.device)
    if teacher_logits is None:
        weight = 0.0
    if weight < 1.0:
        cross_entropy = functional.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)
        loss = loss + (1.0 - weight) * cross_entropy
    if teacher_logits is not None and weight > 0.0:
        loss = loss + weight * distillation_loss(logits, teacher_logits, temperature)
    return loss
