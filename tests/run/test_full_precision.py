"""The baseline is kept under a name that covers what its weights depend on, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import compose
from rich.console import Console

from lowprec.models import CheckpointError, save_checkpoint
from lowprec.run.data import run_data
from lowprec.run.full_precision import baseline_file, build_model, full_precision_model

SAME = ["quant=w2a8_n64", "trainer.max_epochs=9", "optim.learning_rate=0.5", "data.root=/data", "data.num_workers=3"]
SAME += ["logger=none", "run_id=mine", "calibration.images=9", "trainer.distillation.weight=0.5", "data.limit_test=9"]
OTHER = ["seed=1", "baseline.max_epochs=9", "baseline.optim.learning_rate=0.5", "baseline.label_smoothing=0.1"]
OTHER += ["model.arguments.width=32", "data.batch_size=64", "data.augment=false", "data.limit_train=100"]
OTHER += ["data.validation_share=0.5", "trainer.precision=bf16", "data.padding=2"]


@pytest.mark.parametrize("override", SAME)
def test_runs_share_a_baseline_whatever_follows_it(override: str) -> None:
    assert baseline_file(compose(override)) == baseline_file(compose())


@pytest.mark.parametrize("override", OTHER)
def test_other_settings_of_the_baseline_make_another_one(override: str) -> None:
    assert baseline_file(compose(override)) != baseline_file(compose())


def test_the_name_says_data_and_model() -> None:
    path = baseline_file(compose("runs_dir=somewhere"))
    assert path.parent.as_posix() == "somewhere/baselines"
    assert path.name.startswith("fashion_mnist-cifar_resnet8-")
    assert path.suffix == ".safetensors"


def test_a_checkpoint_with_nan_is_refused_by_the_tensors_name(tmp_path: Path) -> None:
    config = compose(
        "experiment=digits_smoke", f"runs_dir={tmp_path}", f"model.checkpoint={tmp_path / 'nan.safetensors'}"
    )
    data = run_data(config)
    model = build_model(config, num_classes=data.num_classes)
    torch.nn.init.constant_(model.classifier.weight, float("nan"))  # type: ignore[union-attr]
    save_checkpoint(model, tmp_path / "nan.safetensors", {})
    with pytest.raises(CheckpointError, match=r"values of classifier.weight are infinite or NaN"):
        full_precision_model(config, data, Console(quiet=True))
