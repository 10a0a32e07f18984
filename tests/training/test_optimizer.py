"""Optimizers, schedules and losses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lowprec.config import OptimConfig
from lowprec.training.distillation import distillation_loss, training_loss
from lowprec.training.optimizer import create_optimizer, create_schedule


def small_model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3))


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_vectors_do_not_decay(name: str, kind: type[torch.optim.Optimizer]) -> None:
    optimizer = create_optimizer(small_model(), OptimConfig(name=name, weight_decay=0.1))
    assert isinstance(optimizer, kind)
    decayed, plain = optimizer.param_groups
    assert decayed["weight_decay"] == 0.1
    assert plain["weight_decay"] == 0.0
    assert all(parameter.ndim > 1 for parameter in decayed["params"])
    assert all(parameter.ndim == 1 for parameter in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == 6


def test_sgd_without_momentum_is_plain_sgd() -> None:
    optimizer = create_optimizer(small_model(), OptimConfig(momentum=0.0, nesterov=True))
    assert optimizer.param_groups[0]["nesterov"] is False


def test_frozen_parameters_are_left_out() -> None:
    model = small_model()
    model[0].requires_grad_(False)
    groups = create_optimizer(model, OptimConfig()).param_groups
    assert sum(len(group["params"]) for group in groups) == 4


def test_the_schedule_warms_up_and_ends_at_zero() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = create_schedule(optimizer, warmup_steps=4, total_steps=12)
    rates = []
    for _ in range(12):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:5] == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5])
    assert rates[8] == pytest.approx(0.5 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 0.03
    assert optimizer.param_groups[0]["lr"] == 0.0


def test_no_warm_up_starts_at_the_full_rate() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    create_schedule(optimizer, warmup_steps=0, total_steps=3)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_distillation_is_zero_for_equal_logits_and_positive_otherwise() -> None:
    logits = torch.randn(8, 10, generator=torch.Generator().manual_seed(0))
    assert distillation_loss(logits, logits, 4.0) == pytest.approx(0, abs=1e-6)
    assert distillation_loss(logits, logits.flip(1), 4.0) > 0.1


def test_distillation_is_the_stated_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(4, 5, generator=generator), torch.randn(4, 5, generator=generator)
    p, q = (teacher / 2).softmax(1), (student / 2).softmax(1)
    expected = 4 * (p * (p / q).log()).sum(1).mean()
    assert float(distillation_loss(student, teacher, 2.0)) == pytest.approx(float(expected), rel=1e-5)


def test_the_loss_mixes_labels_and_teacher() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(4, 5, generator=generator), torch.randn(4, 5, generator=generator)
    labels = torch.tensor([0, 1, 2, 3])
    cross_entropy = nn.functional.cross_entropy(student, labels, label_smoothing=0.1)
    mixed = training_loss(student, labels, label_smoothing=0.1, teacher_logits=teacher, weight=0.25, temperature=2.0)
    assert float(mixed) == pytest.approx(
        float(0.75 * cross_entropy + 0.25 * distillation_loss(student, teacher, 2.0)), rel=1e-6
    )
    assert float(training_loss(student, labels, label_smoothing=0.1, weight=0.25)) == pytest.approx(
        float(cross_entropy), rel=1e-6
    )
    alone = training_loss(student, labels, label_smoothing=0.1, teacher_logits=teacher, weight=1.0, temperature=2.0)
    assert float(alone) == pytest.approx(float(distillation_loss(student, teacher, 2.0)), rel=1e-6)


def test_losses_are_computed_in_float32() -> None:
    logits = torch.randn(4, 5, dtype=torch.bfloat16)
    loss = training_loss(
        logits, torch.zeros(4, dtype=torch.long), label_smoothing=0.0, teacher_logits=logits, weight=0.5
    )
    assert loss.dtype == torch.float32
