"""Training itself: it learns, it ends with the best weights, and one that was cut off ends like an undisturbed one."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from torch import Tensor, nn

from lowprec.calibrate import calibrate
from lowprec.config import DistillationConfig, OptimConfig, TrainerConfig
from lowprec.data import DataModule, create_data
from lowprec.layers.integer_product import use_integer_kernels
from lowprec.models import CheckpointError, checkpoint_metadata, create_model
from lowprec.prepare import prepare
from lowprec.recipe import Recipe
from lowprec.training.checkpoints import BEST, LAST, Interrupted, TrainingDiverged, written_at
from lowprec.training.evaluation import top1
from lowprec.training.fit import fit
from lowprec.training.module import Classification

EPOCHS = 3


@pytest.fixture(scope="module")
def data() -> DataModule:
    return create_data("digits", batch_size=64, limit_train=640)


def fake_quant_model(data: DataModule) -> nn.Module:
    torch.manual_seed(0)
    model = create_model("cifar_resnet8", in_channels=1, num_classes=10, width=8).eval()
    qmodel = prepare(model, Recipe.load("w2a8_n4"), torch.zeros(2, *data.input_size))
    calibrate(qmodel, data.calibration_batches(64))
    return qmodel


def train(
    model: nn.Module,
    data: DataModule,
    folder: Path,
    *,
    callbacks: Sequence[Callback] = (),
    console: Console | None = None,
    **settings: Any,
) -> int:
    module = Classification(
        model,
        OptimConfig(learning_rate=0.05, warmup_epochs=0.5),
        teacher=settings.pop("teacher", None),
        distillation=DistillationConfig(weight=0.5),
    )
    return fit(
        module,
        data,
        folder=folder,
        max_epochs=EPOCHS,
        settings=TrainerConfig(precision="32", accelerator="cpu", progress="none", **settings),
        title="fine-tuning",
        console=console or Console(quiet=True),
        callbacks=callbacks,
    )


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal_states(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


class EpochMetrics(Callback):
    """Training loss and top-1 of each epoch."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[float, float]] = {}

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        metrics = trainer.callback_metrics
        self.seen[trainer.current_epoch] = (float(metrics["train/loss"]), float(metrics["train/top1"]))


class Undisturbed(NamedTuple):
    """A training that nothing disturbed: its best weights, its last checkpoint, its metrics by epoch."""

    weights: dict[str, Tensor]
    last: dict[str, Any]
    metrics: dict[int, tuple[float, float]]


@pytest.fixture(scope="module")
def undisturbed(data: DataModule, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    model, metrics = fake_quant_model(data), EpochMetrics()
    train(model, data, folder, callbacks=[metrics])
    return Undisturbed(state(model), torch.load(folder / LAST, weights_only=True), metrics.seen)


class StopAt(Callback):
    """Presses Ctrl-C in a step: (epoch, batch)."""

    def __init__(self, epoch: int, batch: int) -> None:
        self.at = (epoch, batch)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if (trainer.current_epoch, batch_idx) == self.at:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("stop", "goes_on_at"),
    [
        (StopAt(0, 9), "epoch 2/3, step 11/30"),
        (StopAt(1, 4), "epoch 2/3, step 16/30"),
        (StopAt(0, 0), "epoch 1/3, step 2/30"),
    ],
    ids=["epoch_end", "mid_epoch", "first_step"],
)
def test_a_training_cut_off_by_ctrl_c_ends_like_an_undisturbed_one(
    stop: StopAt, goes_on_at: str, data: DataModule, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    before = signal.getsignal(signal.SIGINT)
    metrics, console = EpochMetrics(), Console(file=io.StringIO(), width=200)
    with pytest.raises(Interrupted):
        train(fake_quant_model(data), data, tmp_path, callbacks=[stop, metrics], console=console)
    assert signal.getsignal(signal.SIGINT) is before
    resumed = fake_quant_model(data)
    written = written_at(tmp_path / LAST)
    train(resumed, data, tmp_path, callbacks=[metrics], console=console)
    # Of the whole epoch, whichever process did which part of it.
    assert metrics.seen == undisturbed.metrics
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == (
        f"fine-tuning  going on at {goes_on_at}, from {tmp_path.name}/last.ckpt of {written}\n"
    )
    weights, last = undisturbed.weights, undisturbed.last
    assert_equal_states(state(resumed), weights)
    found = torch.load(tmp_path / LAST, weights_only=True)
    assert_equal_states(found["state_dict"], last["state_dict"])
    assert found["global_step"] == last["global_step"] == 10 * EPOCHS
    momenta = [content["optimizer_states"][0]["state"] for content in (found, last)]
    assert all(
        torch.equal(momenta[0][key]["momentum_buffer"], momenta[1][key]["momentum_buffer"]) for key in momenta[0]
    )


@pytest.mark.parametrize(("kept", "words"), [(None, "is missing"), (40, r"cannot be read \(.*\)")])
def test_best_weights_that_are_gone_are_noticed_at_once(
    kept: int | None, words: str, data: DataModule, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        train(fake_quant_model(data), data, tmp_path, callbacks=[StopAt(1, 4)])
    best = tmp_path / BEST
    content = best.read_bytes()
    best.unlink()
    if kept is not None:
        best.write_bytes(content[:kept])
    metrics = EpochMetrics()
    with pytest.raises(CheckpointError, match=rf"best\.safetensors {words}: .* Put the file back, or .*fresh=true"):
        train(fake_quant_model(data), data, tmp_path, callbacks=[metrics])
    assert metrics.seen == {}
    best.write_bytes(content)
    train(fake_quant_model(data), data, tmp_path, callbacks=[metrics])
    assert set(metrics.seen) == {1, 2}


def test_a_finished_training_is_not_done_again(data: DataModule, tmp_path: Path) -> None:
    first, again = fake_quant_model(data), fake_quant_model(data)
    best = train(first, data, tmp_path)
    written = (tmp_path / LAST).stat().st_mtime_ns
    assert train(again, data, tmp_path) == best
    assert (tmp_path / LAST).stat().st_mtime_ns == written
    assert_equal_states(state(first), state(again))


def test_the_model_ends_with_its_best_weights_by_validation(data: DataModule, tmp_path: Path) -> None:
    model = fake_quant_model(data)
    before = top1(model, data.val_dataloader())
    best = train(model, data, tmp_path)
    metadata = checkpoint_metadata(tmp_path / BEST)
    assert metadata["epoch"] == str(best)
    after = top1(model, data.val_dataloader())
    assert after == pytest.approx(float(metadata["validation_top1"]), abs=1e-6)
    assert after > before
    assert not list(tmp_path.glob(".*"))


def test_a_teacher_is_neither_trained_nor_kept(data: DataModule, tmp_path: Path) -> None:
    teacher = create_model("cifar_resnet8", in_channels=1, num_classes=10, width=8)
    before = state(teacher)
    train(fake_quant_model(data), data, tmp_path, teacher=teacher)
    assert_equal_states(state(teacher), before)
    assert not any("teacher" in key for key in torch.load(tmp_path / LAST, weights_only=True)["state_dict"])


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_codes_kept_and_integer_kernels_change_no_weight(
    precision: str, data: DataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for least in ("LEAST_OF_AN_ELEMENT", "LEAST_MULTIPLICATIONS"):
        monkeypatch.setattr(f"lowprec.layers.integer_product.{least}", 0)
    models = []
    for changed in (False, True):
        models.append(fake_quant_model(data))
        assert (use_integer_kernels(models[-1], changed) > 5) == changed
        module = Classification(models[-1], OptimConfig(learning_rate=0.05), keep_codes=changed)
        settings = TrainerConfig(precision=precision, accelerator="cpu", progress="none")
        folder = tmp_path / str(changed)
        fit(module, data, folder=folder, max_epochs=1, settings=settings, title="", console=Console(quiet=True))
    assert_equal_states(state(models[1]), state(models[0]))


def test_bf16_and_gradient_clipping_work_and_evaluation_stays_in_float32(data: DataModule, tmp_path: Path) -> None:
    model = fake_quant_model(data)
    module = Classification(model, OptimConfig(learning_rate=0.05), channels_last=False)
    fit(
        module,
        data,
        folder=tmp_path,
        max_epochs=1,
        settings=TrainerConfig(precision="bf16", accelerator="cpu", progress="none", gradient_clip=1.0),
        title="",
        console=Console(quiet=True),
    )
    metadata = checkpoint_metadata(tmp_path / BEST)
    assert top1(model, data.val_dataloader()) == pytest.approx(float(metadata["validation_top1"]), abs=1e-6)


def test_a_bar_on_a_terminal(data: DataModule, tmp_path: Path) -> None:
    module = Classification(fake_quant_model(data), OptimConfig(learning_rate=0.05))
    settings = TrainerConfig(precision="32", accelerator="cpu", progress="rich")
    console = Console(quiet=True)
    assert fit(module, data, folder=tmp_path, max_epochs=1, settings=settings, title="", console=console) == 1


def test_a_line_per_epoch_where_there_is_no_terminal(data: DataModule, tmp_path: Path) -> None:
    console = Console(record=True, width=120, quiet=False, file=(tmp_path / "out").open("w"))
    module = Classification(fake_quant_model(data), OptimConfig(learning_rate=0.05))
    settings = TrainerConfig(precision="32", accelerator="cpu", progress="plain")
    fit(module, data, folder=tmp_path, max_epochs=2, settings=settings, title="fine-tuning", console=console)
    lines = console.export_text().splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("fine-tuning  epoch 2/2  loss ")
    assert "validation top-1" in lines[1]


class Poison(Callback):
    """Makes the weights NaN in the second epoch, as too large a learning rate would."""

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.current_epoch == 1:
            for parameter in pl_module.parameters():
                torch.nn.init.constant_(parameter, float("nan"))


@pytest.mark.slow
def test_a_compiled_training_step_is_the_plain_one(data: DataModule) -> None:
    images = torch.randn(16, *data.input_size, generator=torch.Generator().manual_seed(0))
    outputs, gradients = [], []
    for compiled in (False, True):
        module = Classification(fake_quant_model(data), OptimConfig(), compiled=compiled).train()
        outputs.append(module(images))
        outputs[-1].square().sum().backward()
        gradients.append([parameter.grad for parameter in module.model.parameters()])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    for found, expected in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_a_diverged_training_stops_and_keeps_what_was_good(data: DataModule, tmp_path: Path) -> None:
    model = create_model("cifar_resnet8", in_channels=1, num_classes=10, width=8)
    with pytest.raises(TrainingDiverged, match=r"training diverged at step \d+ \(epoch 2\): the loss is nan"):
        train(model, data, tmp_path, callbacks=[Poison()])
    assert checkpoint_metadata(tmp_path / BEST)["epoch"] == "1"
    assert torch.load(tmp_path / LAST, weights_only=True)["epoch"] == 0
