"""The baseline is kept under a name that covers what its weights depend on, and nothing else."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import compose
from PIL import Image
from rich.console import Console

from lowprec.config import ConfigError
from lowprec.models import CheckpointError, save_checkpoint
from lowprec.run.current import Run
from lowprec.run.data import run_data
from lowprec.run.directory import RunDirectory
from lowprec.run.full_precision import baseline_file, build_model, full_precision_model
from lowprec.run.stages import check_same_data

SAME = ["quant=w2a8_n64", "trainer.max_epochs=9", "optim.learning_rate=0.5", "data.root=/data", "data.num_workers=3"]
SAME += ["logger=none", "run_id=mine", "calibration.images=9", "trainer.distillation.weight=0.5", "data.limit_test=9"]
OTHER = ["seed=1", "baseline.max_epochs=9", "baseline.optim.learning_rate=0.5", "baseline.label_smoothing=0.1"]
OTHER += ["model.arguments.width=32", "data.batch_size=64", "data.augment=false", "data.limit_train=100"]
OTHER += ["data.validation_share=0.5", "trainer.precision=bf16", "data.padding=2"]


@pytest.mark.parametrize("override", SAME)
def test_runs_share_a_baseline_whatever_follows_it(override: str) -> None:
    assert baseline_file(compose(override), None) == baseline_file(compose(), None)


@pytest.mark.parametrize("override", OTHER)
def test_other_settings_of_the_baseline_make_another_one(override: str) -> None:
    assert baseline_file(compose(override), None) != baseline_file(compose(), None)


def test_the_name_says_data_and_model() -> None:
    path = baseline_file(compose("runs_dir=somewhere"), None)
    assert path.parent.as_posix() == "somewhere/baselines"
    assert path.name.startswith("fashion_mnist-cifar_resnet8-")
    assert path.suffix == ".safetensors"


@pytest.mark.parametrize("name", ["fashion_mnist", "digits", "cifar10", "cifar100"])
def test_sets_that_are_always_the_same_are_known_by_name(name: str) -> None:
    assert run_data(compose("experiment=custom", f"data={name}", "model=cifar_resnet8")).fingerprint is None


def write_photographs(folder: Path, classes: tuple[str, ...]) -> Path:
    draw = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            for index in range(6):
                pixels = draw.integers(0, 255, (16, 16, 3), np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{index}.png")
    return folder


def test_each_folder_of_images_has_its_own_baseline(tmp_path: Path) -> None:
    def baseline_of(folder: Path) -> tuple[str, int]:
        """What was said of the baseline, and its classes."""
        says = io.StringIO()
        config = compose(
            *("experiment=custom", "data=image_folder", f"data.root={folder}", "data.image_size=16"),
            *("model=cifar_resnet8_tiny", "data.batch_size=4", "data.num_workers=0"),
            *("trainer.threads=1", "trainer.precision=32"),
            *("baseline.max_epochs=1", "baseline.optim.warmup_epochs=0", f"runs_dir={tmp_path / 'runs'}"),
        )
        model = full_precision_model(config, run_data(config), Console(file=says, width=500))
        return says.getvalue(), model(torch.zeros(1, 3, 16, 16)).shape[1]

    three = write_photographs(tmp_path / "three", ("cat", "dog", "wolf"))
    says, classes = baseline_of(three)
    assert ("none yet" in says, classes) == (True, 3)
    says, classes = baseline_of(write_photographs(tmp_path / "two", ("cat", "dog")))
    assert ("none yet" in says, classes) == (True, 2)
    says, classes = baseline_of(three.rename(tmp_path / "moved"))
    assert ("none yet" in says, classes) == (False, 3)


def test_a_run_goes_on_with_the_images_that_it_began_with_alone(tmp_path: Path) -> None:
    folder = write_photographs(tmp_path / "photographs", ("cat", "dog"))
    config = compose(
        *("experiment=custom", "data=image_folder", f"data.root={folder}", "data.image_size=16", "run_id=run"),
        *(f"runs_dir={tmp_path}", "model=cifar_resnet8_tiny"),
    )
    directory = RunDirectory(config)
    directory.open()
    console = Console(quiet=True)
    moved = folder.rename(tmp_path / "moved")
    config.data.root = str(moved)
    for _ in range(2):
        check_same_data(Run(config, directory, run_data(config), console, torch.device("cpu")))
    next(moved.glob("train/cat/*.png")).unlink()
    with pytest.raises(ConfigError, match="run_id=run: the run began with other images than those in"):
        check_same_data(Run(config, directory, run_data(config), console, torch.device("cpu")))
    directory.close()


def test_a_checkpoint_with_nan_is_refused_by_the_tensors_name(tmp_path: Path) -> None:
    config = compose(
        "experiment=digits_smoke", f"runs_dir={tmp_path}", f"model.checkpoint={tmp_path / 'nan.safetensors'}"
    )
    data = run_data(config)
    model = build_model(config, num_classes=data.num_classes)
    torch.nn.init.constant_(model.get_parameter("classifier.weight"), float("nan"))
    save_checkpoint(model, tmp_path / "nan.safetensors", {})
    with pytest.raises(CheckpointError, match=r"values of classifier.weight are infinite or NaN"):
        full_precision_model(config, data, Console(quiet=True))


def test_a_new_classifier_is_trained_in_full_precision_from_the_given_weights(tmp_path: Path) -> None:
    file = tmp_path / "five.safetensors"
    config = compose(
        *("experiment=digits_smoke", f"runs_dir={tmp_path}", f"model.checkpoint={file}", "model.head=new"),
        *("data.limit_train=64", "baseline.max_epochs=1", "baseline.optim.warmup_epochs=0"),
        *("baseline.optim.learning_rate=1e-6", "trainer.threads=1"),
    )
    given = build_model(config, num_classes=5)
    save_checkpoint(given, file, {})
    data = run_data(config)

    says = io.StringIO()
    model = full_precision_model(config, data, Console(file=says, width=500))
    assert f"training one from {file} with a new classifier (1 epochs)" in says.getvalue()
    weights = dict(model.named_parameters())
    assert weights["classifier.weight"].shape[0] == 10
    # At a rate of next to nothing the features are still the given ones.
    for name, parameter in given.named_parameters():
        if not name.startswith("classifier"):
            torch.testing.assert_close(weights[name], parameter, rtol=0, atol=1e-4)
    again = full_precision_model(config, data, Console(file=says, width=500))
    assert says.getvalue().count("training one") == 1
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))
    before = baseline_file(config, data.fingerprint)
    torch.nn.init.ones_(given.get_parameter("classifier.bias"))
    save_checkpoint(given, file, {})
    assert baseline_file(config, data.fingerprint) != before
