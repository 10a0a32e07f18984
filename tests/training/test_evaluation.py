"""Top-1 counts images, not batches."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowprec.training.evaluation import top1


def test_top1_is_the_share_of_images() -> None:
    logits = torch.eye(4)[:, :, None, None]
    batches = [(logits[:3], torch.tensor([0, 1, 0])), (logits[3:], torch.tensor([3]))]
    assert top1(lambda images: images.flatten(1), batches) == 0.75


def test_modules_are_evaluated_in_eval_mode_and_float32() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.999), nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        model[2].weight.copy_(torch.eye(4))
    batches = [(torch.eye(4)[:, :, None, None] + 1e-4, torch.arange(4))]
    with torch.autocast("cpu", torch.bfloat16):
        assert top1(model, batches) == 1.0
    assert not model.training


def test_no_images_have_no_accuracy() -> None:
    with pytest.raises(ValueError, match="no images"):
        top1(nn.Flatten(), [])
