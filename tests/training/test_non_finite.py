"""The guard: which step it stops at, what it finds, and that no checkpoint of a bad state is written."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import TensorDataset
from wandb_files import wandb_records
from watched_training import BATCH, STEPS, Recorder, random_images, tiny_module, train

from lowprec.calibrate import calibrate
from lowprec.config import LoggerConfig
from lowprec.models import checkpoint_metadata
from lowprec.prepare import prepare
from lowprec.recipe import Recipe
from lowprec.training.checkpoints import BEST, LAST, BestAndLast, TrainingDiverged
from lowprec.training.loggers import close_loggers, create_loggers
from lowprec.training.module import Classification
from lowprec.training.non_finite import NonFiniteGuard

# A step in the second epoch, so that there is a checkpoint of the first.
BAD_STEP = STEPS + 3


class At(Callback):
    """Does something to the model just before the forward pass of a batch; batches are counted from 1, over all epochs."""

    def __init__(self, batch: int, action: Callable[[Classification], object]) -> None:
        self.batch, self.action = batch, action
        self.seen = 0

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen += 1
        if self.seen == self.batch:
            self.action(pl_module)


def poison(parameter: str, value: float) -> Callable[[Classification], object]:
    def action(module: Classification) -> None:
        with torch.no_grad():
            module.model.get_parameter(parameter).view(-1)[1] = value

    return action


def explode(module: Classification) -> None:
    """As a far too large learning rate does: weights that are finite, and outputs that are not."""
    with torch.no_grad():
        module.model.get_parameter("second.weight").mul_(3e38)
        module.model.get_parameter("classifier.weight").mul_(1e10)


def bad_gradient(name: str) -> Callable[[Classification], object]:
    def action(module: Classification) -> None:
        module.model.get_parameter(name).register_hook(lambda gradient: gradient * math.inf)

    return action


ADVICE = r"Lower optim\.learning_rate.*gradient_clip"
CASES = {
    "explosion": (
        explode,
        rf"the loss is (nan|-?inf); the first non-finite output is that of layer \w+ \(\w+\)\. {ADVICE}",
    ),
    "infinite_weight": (
        poison("second.weight", math.inf),
        rf"the loss is nan; 1 of 81 values of second\.weight are infinite or NaN\. {ADVICE}",
    ),
    "nan_in_the_last_layer": (
        poison("classifier.bias", math.nan),
        rf"the loss is nan; 1 of 2 values of classifier\.bias are infinite or NaN\. {ADVICE}",
    ),
    "gradient": (
        bad_gradient("first.weight"),
        rf"the gradient norm is (inf|nan); non-finite is the gradient of model\.first\.weight, though .* {ADVICE}",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_it_stops_at_the_step_and_says_where_it_began(name: str, tmp_path: Path) -> None:
    action, message = CASES[name]
    callbacks = [At(BAD_STEP, action), NonFiniteGuard(tmp_path / LAST, 50), BestAndLast(tmp_path)]
    with pytest.raises(TrainingDiverged, match=message) as raised:
        train(tiny_module(), tmp_path, callbacks)
    text = str(raised.value)
    assert text.startswith(f"training diverged at step {BAD_STEP} (epoch 2): ")
    assert text.endswith(f"The last good checkpoint is {tmp_path / LAST}")
    assert torch.load(tmp_path / LAST, weights_only=True)["epoch"] == 0
    assert checkpoint_metadata(tmp_path / BEST)["epoch"] == "1"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_batch_is_told_from_a_bad_model(value: float, tmp_path: Path) -> None:
    images, labels = random_images()
    images[2 * BATCH + 1, 0, 3, 3] = value
    message = (
        r"step 3 \(epoch 1\): the loss is nan; the batch itself is not finite: 1 of its 4 images .*number 1 is the first.*"
        r"learning rate is not to blame.*No checkpoint was written yet"
    )
    with pytest.raises(TrainingDiverged, match=message):
        train(tiny_module(), tmp_path, [NonFiniteGuard(tmp_path / LAST, 50)], images=TensorDataset(images, labels))


def test_too_large_a_learning_rate_is_found_before_validation(tmp_path: Path) -> None:
    validated: list[int] = []

    class Validations(Callback):
        def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
            validated.append(trainer.global_step)

    callbacks = [NonFiniteGuard(tmp_path / LAST, 50), Validations(), BestAndLast(tmp_path)]
    with pytest.raises(TrainingDiverged, match=r"step [2-6] \(epoch 1\).*Lower optim.learning_rate.*No checkpoint"):
        train(tiny_module(learning_rate=1e30), tmp_path, callbacks)
    assert validated == []
    assert list(tmp_path.iterdir()) == []


def test_a_finite_gradient_that_makes_weights_infinite_reaches_no_checkpoint(tmp_path: Path) -> None:
    # The last step of the first epoch: no later loss shows it before the checkpoint of the epoch's end.
    class Overflow(Callback):
        def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *arguments: Any) -> None:
            if trainer.global_step == STEPS:
                poison("first.bias", -math.inf)(pl_module)

    callbacks = [Overflow(), NonFiniteGuard(tmp_path / LAST, 50), BestAndLast(tmp_path)]
    with pytest.raises(
        TrainingDiverged, match=rf"step {STEPS} \(epoch 1\): values of model.first.bias are infinite or NaN"
    ):
        train(tiny_module(), tmp_path, callbacks)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_within_an_epoch_is_refused_as_well(tmp_path: Path) -> None:
    class Save(Callback):
        def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *arguments: Any) -> None:
            poison("second.weight", math.nan)(pl_module)
            trainer.save_checkpoint(tmp_path / LAST)

    with pytest.raises(TrainingDiverged, match=r"step 1 \(epoch 1\): values of model.second.weight"):
        train(tiny_module(), tmp_path, [NonFiniteGuard(tmp_path / LAST, 50), Save()])
    assert list(tmp_path.iterdir()) == []


def test_steps_are_those_of_the_optimizer_when_gradients_add_up(tmp_path: Path) -> None:
    images, labels = random_images()
    images[2 * BATCH] = math.nan  # the third batch, the first of the second step's two
    with pytest.raises(TrainingDiverged, match=r"step 2 \(epoch 1\).*batch itself is not finite: 1 of its 4 images"):
        train(
            tiny_module(),
            tmp_path,
            [NonFiniteGuard(tmp_path / LAST, 1)],
            images=TensorDataset(images, labels),
            accumulate_grad_batches=2,
        )


def test_a_fake_quant_layer_is_named_by_its_weight(tmp_path: Path) -> None:
    module = tiny_module()
    qmodel = prepare(module.model.eval(), Recipe.load("w2a8_n4"), torch.zeros(2, 1, 8, 8))
    calibrate(qmodel, [random_images()[0]])
    quantized = Classification(qmodel, module.optim, channels_last=False)
    callbacks = [At(2, poison("second.weight", math.inf)), NonFiniteGuard(tmp_path / LAST, 50)]
    with pytest.raises(TrainingDiverged, match=r"step 2 .*1 of 81 values of second\.weight are infinite or NaN"):
        train(quantized, tmp_path, callbacks)


def test_what_it_reads_is_logged(tmp_path: Path) -> None:
    """Against norms and losses taken in the training itself."""
    norms: list[float] = []
    losses: list[float] = []
    rates: list[float] = []

    class Truth(Callback):
        def on_before_backward(self, trainer: lightning.Trainer, pl_module: Any, loss: Tensor) -> None:
            losses.append(2 * loss.item())

        def on_before_optimizer_step(self, trainer: lightning.Trainer, pl_module: Any, optimizer: Any) -> None:
            norms.append(torch.cat([value.grad.flatten() for value in pl_module.parameters()]).norm().item())
            rates.append(optimizer.param_groups[0]["lr"])

    recorder = Recorder()
    guard = NonFiniteGuard(tmp_path / LAST, 2)
    train(
        tiny_module(),
        tmp_path,
        [Truth(), guard],
        loggers=[recorder],
        accumulate_grad_batches=2,
        gradient_clip_val=1e-3,
    )
    assert len(norms) == 6
    assert recorder.column("optim/gradient_norm") == pytest.approx({1: norms[1], 3: norms[3], 5: norms[5]}, rel=1e-5)
    assert recorder.column("optim/learning_rate") == {1: rates[1], 3: rates[3], 5: rates[5]}
    means = {step: sum(losses[2 * step - 2 : 2 * step + 2]) / 4 for step in (1, 3, 5)}
    assert recorder.column("train/step_loss") == pytest.approx(means)
    assert guard.steps == 6


def test_training_is_the_same_with_the_guard(tmp_path: Path) -> None:
    guarded, alone = tiny_module(), tiny_module()
    train(guarded, tmp_path, [NonFiniteGuard(tmp_path / LAST, 1)])
    train(alone, tmp_path, [])
    assert all(torch.equal(a, b) for a, b in zip(guarded.parameters(), alone.parameters(), strict=True))


def test_a_divergence_is_an_alert(tmp_path: Path) -> None:
    loggers = create_loggers(LoggerConfig(csv=False, wandb=True, mode="offline"), tmp_path, "run", {})
    with pytest.raises(TrainingDiverged) as raised:
        train(tiny_module(), tmp_path, [At(1, explode), NonFiniteGuard(tmp_path / LAST, 50)], loggers=loggers)
    close_loggers(loggers)
    alerts = [record.alert for record in wandb_records(tmp_path) if record.HasField("alert")]
    assert [(found.title, found.text) for found in alerts] == [("training diverged", str(raised.value))]


def test_integer_parameters_are_passed_over(tmp_path: Path) -> None:
    """Others' quantizers, NNCF's for one, have them: a number of bits, for instance."""
    module = tiny_module()
    module.model.register_parameter("bits", torch.nn.Parameter(torch.tensor([8]), requires_grad=False))
    train(module, tmp_path, [NonFiniteGuard(tmp_path / LAST, 50)])
    assert module.model.get_parameter("bits").tolist() == [8]
