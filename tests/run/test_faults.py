"""What goes wrong on a cluster: each fault ends in one clear error, or in a stated recovery, and nothing saved is lost."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import REPOSITORY, FinishedRun, compose, start_train
from filelock import FileLock
from PIL import Image

from lowprec.run.command_line import run_to_exit_code
from lowprec.run.compose import ConfigError

SMOKE = "experiment=digits_smoke"


@dataclass
class Scene:
    """A fresh folder with a copy of a finished run of digits_smoke in ``runs``."""

    tmp: Path
    runs: Path

    @property
    def run(self) -> Path:
        return self.runs / "digits_smoke"

    def unfinished(self) -> None:
        """The run as it was within its fine-tuning."""
        for name in ("summary.json", "model.safetensors", "model.onnx"):
            (self.run / name).unlink()
        state = json.loads((self.run / "run.json").read_text())
        state["results"] = {
            key: value for key, value in state["results"].items() if key in ("full_precision", "post_training", "cost")
        }
        (self.run / "run.json").write_text(json.dumps(state))

    def weights(self, change: Callable[[dict[str, torch.Tensor]], object]) -> str:
        """A full-precision checkpoint, changed; returns the override that names it."""
        (baseline,) = (self.runs / "baselines").glob("*.safetensors")
        tensors = safetensors.torch.load_file(baseline)
        change(tensors)
        safetensors.torch.save_file(tensors, self.tmp / "weights.safetensors")
        return f"model.checkpoint={self.tmp / 'weights.safetensors'}"

    def photographs(
        self, *, classes: tuple[str, ...] = ("cat", "dog"), splits: tuple[str, ...] = ("train", "val")
    ) -> Path:
        """A folder tree of tiny photographs."""
        draw = np.random.default_rng(0)
        for split in splits:
            for name in classes:
                folder = self.tmp / "photos" / split / name
                folder.mkdir(parents=True)
                for index in range(6):
                    Image.fromarray(draw.integers(0, 255, (16, 16, 3), np.uint8)).save(folder / f"{index}.jpg")
        return self.tmp / "photos"

    def on_photographs(self, folder: Path, *more: str) -> list[str]:
        return [
            *(
                "experiment=custom",
                "data=image_folder",
                f"data.root={folder}",
                "data.image_size=16",
                "data.batch_size=4",
            ),
            *(
                "model=cifar_resnet8_tiny",
                "data.num_workers=0",
                "baseline.max_epochs=1",
                "baseline.optim.warmup_epochs=0",
            ),
            *(
                "trainer.max_epochs=1",
                "trainer.threads=1",
                "trainer.precision=32",
                f"runs_dir={self.tmp / 'new'}",
                *more,
            ),
        ]


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def new_run(*overrides: str) -> Callable[[Scene], list[str]]:
    return lambda scene: [SMOKE, f"runs_dir={scene.runs}", "run_id=new", *overrides]


def with_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Scene], list[str]]:
    return lambda scene: [SMOKE, f"runs_dir={scene.runs}", "run_id=new", scene.weights(change)]


def damaged_weights(scene: Scene) -> list[str]:
    override = scene.weights(lambda tensors: None)
    truncate(scene.tmp / "weights.safetensors")
    return [SMOKE, f"runs_dir={scene.runs}", "run_id=new", override]


def poisoned(tensors: dict[str, torch.Tensor]) -> None:
    tensors["conv1.weight"][0, 0, 0, 0] = float("nan")


def more_classes(tensors: dict[str, torch.Tensor]) -> None:
    for key in [key for key in tensors if key.startswith("classifier")]:
        tensors[key] = torch.cat([tensors[key], tensors[key]])


def empty_folder(scene: Scene) -> list[str]:
    folder = scene.tmp / "photos"
    folder.mkdir()
    return scene.on_photographs(folder)


def missing_split(scene: Scene) -> list[str]:
    return scene.on_photographs(scene.photographs(splits=("train",)))


def differing_classes(scene: Scene) -> list[str]:
    folder = scene.photographs()
    (folder / "val" / "dog").rename(folder / "val" / "wolf")
    return scene.on_photographs(folder)


def class_count(scene: Scene) -> list[str]:
    return scene.on_photographs(scene.photographs(), "data.num_classes=3")


def damaged_images(split: str, *more: str) -> Callable[[Scene], list[str]]:
    def arrange(scene: Scene) -> list[str]:
        folder = scene.photographs()
        for file in (folder / split / "cat").iterdir():
            truncate(file)
        return scene.on_photographs(folder, *more)

    return arrange


def no_images_in_a_class(scene: Scene) -> list[str]:
    folder = scene.photographs()
    for file in (folder / "train" / "cat").iterdir():
        file.unlink()
    return scene.on_photographs(folder)


def resumed(change: Callable[[Scene], object]) -> Callable[[Scene], list[str]]:
    def arrange(scene: Scene) -> list[str]:
        scene.unfinished()
        change(scene)
        return [SMOKE, f"runs_dir={scene.runs}"]

    return arrange


def other_identity(key: str, value: object) -> Callable[[Scene], object]:
    def change(scene: Scene) -> None:
        file = scene.run / "checkpoints" / "last.ckpt"
        content = torch.load(file, weights_only=True)
        content["identity"][key] = value
        torch.save(content, file)

    return change


def finished(*overrides: str, change: Callable[[Scene], object] = lambda scene: None) -> Callable[[Scene], list[str]]:
    def arrange(scene: Scene) -> list[str]:
        change(scene)
        return [SMOKE, f"runs_dir={scene.runs}", *overrides]

    return arrange


# What is wrong; how the command comes about; its exit code; what it says.
FAULTS: dict[str, tuple[Callable[[Scene], list[str]], int, str]] = {
    "mistyped key": (
        new_run("trainer.max_epoch=1"),
        2,
        r"unknown key trainer\.max_epoch=1.*did you mean trainer\.max_epochs",
    ),
    "impossible value": (new_run("trainer.devices=0"), 2, r"trainer\.devices=0: expected at least 1"),
    "no GPU": (new_run("trainer.accelerator=gpu"), 2, r"trainer\.accelerator=gpu: torch finds no CUDA GPU"),
    "nobody started the other nodes": (new_run("trainer.nodes=2"), 2, r"trainer\.nodes=2: start it with srun"),
    "missing checkpoint": (new_run("model.checkpoint=/nowhere.pt"), 1, r"/nowhere\.pt"),
    "damaged checkpoint": (damaged_weights, 1, r"weights\.safetensors"),
    "checkpoint with NaN": (with_weights(poisoned), 1, r"values of .* are infinite or NaN"),
    "checkpoint of another model": (with_weights(lambda tensors: tensors.pop("conv1.weight")), 1, r"conv1\.weight"),
    "checkpoint with other classes": (with_weights(more_classes), 1, r"model\.head=new"),
    "missing data folder": (lambda scene: scene.on_photographs(scene.tmp / "nowhere"), 1, r"nowhere"),
    "empty data folder": (empty_folder, 1, r"photos.*\n.*train/CLASS"),
    "missing split": (missing_split, 1, r"val"),
    "class folders differ": (differing_classes, 1, r"1 missing \(dog\), 1 unknown \(wolf\)"),
    "class without images": (no_images_in_a_class, 1, r"cat"),
    "other number of classes": (class_count, 2, r"data\.num_classes=3"),
    "damaged test images": (damaged_images("val"), 1, r"cat/\d\.jpg"),
    "too many damaged training images": (damaged_images("train", "data.max_corrupted=2"), 1, r"data\.max_corrupted=2"),
    "folder that cannot be made": (lambda scene: [SMOKE, "runs_dir=/proc/runs"], 1, r"/proc/runs"),
    "damaged last.ckpt": (
        resumed(lambda scene: truncate(scene.run / "checkpoints/last.ckpt")),
        1,
        r"last\.ckpt cannot be read",
    ),
    "missing best.safetensors": (
        resumed(lambda scene: (scene.run / "checkpoints/best.safetensors").unlink()),
        1,
        r"best\.safetensors is missing: .*fresh=true",
    ),
    "last.ckpt of another recipe": (
        resumed(other_identity("recipe", "{}")),
        1,
        r"of another training \(quant\.activations\.bits: nothing there, 8 here; .*\): give",
    ),
    "last.ckpt of another model": (
        resumed(other_identity("model", "vgg")),
        1,
        r"model: vgg there, cifar_resnet8",
    ),
    "last.ckpt of more processes": (
        resumed(other_identity("processes", 4)),
        1,
        r"processes: 4 there, 1 here",
    ),
    "damaged post-training weights": (
        resumed(lambda scene: truncate(scene.run / "checkpoints/post_training.safetensors")),
        1,
        r"post_training\.safetensors",
    ),
    "damaged config.yaml": (
        resumed(lambda scene: (scene.run / "config.yaml").write_text("seed: [0\nmodel")),
        1,
        r"config\.yaml is damaged \(.*\), so .*fresh=true",
    ),
    "damaged run.json": (resumed(lambda scene: truncate(scene.run / "run.json")), 1, r"run\.json"),
    "another configuration in the folder": (
        finished("run_id=digits_smoke", "seed=3"),
        2,
        r"another configuration \(seed: 0 there, 3 here\): .*fresh=true",
    ),
    "task without a run": (finished("task=verify", "run_id=nothing"), 2, r"there is no run in"),
    "damaged packed model": (
        finished("task=verify", change=lambda scene: truncate(scene.run / "model.safetensors")),
        1,
        r"model\.safetensors",
    ),
    "diverging training": (new_run("optim.learning_rate=1e30", "optim.weight_decay=1"), 1, r"diverged"),
}


def contents(folder: Path) -> dict[str, str]:
    """A hash of each file below the folder."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.name.endswith(".lock")
    }


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_clear_error_and_nothing_saved_is_lost(
    name: str, copied_digits_run: Callable[[], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrange, code, message = FAULTS[name]
    scene = Scene(tmp_path, copied_digits_run())
    overrides = arrange(scene)
    before = contents(scene.runs)
    capsys.readouterr()
    try:
        found = run_to_exit_code(compose(*overrides)) if "trainer.nodes=2" not in overrides else launched(overrides)
        errors = capsys.readouterr().err
    except ConfigError as error:
        found, errors = 2, f"error: {error}"
    assert found == code, errors
    assert re.search(message, errors, re.DOTALL), errors
    assert errors.count("error: ") == 1
    assert "Traceback" not in errors
    after = contents(scene.runs)
    changed = [file for file, digest in before.items() if after.get(file) != digest and not file.endswith("run.json")]
    assert changed == []


def launched(overrides: list[str]) -> int:
    """As train.py itself, which would start other processes."""
    from lowprec.run.launcher import needs_launch

    needs_launch(compose(*overrides))
    raise AssertionError("should have been refused")


def test_a_run_in_use_is_left_alone(copied_digits_run: Callable[[], Path], capsys: pytest.CaptureFixture[str]) -> None:
    runs = copied_digits_run()
    (runs / "digits_smoke" / "summary.json").unlink()
    with FileLock(runs / "digits_smoke" / ".lock"):
        assert run_to_exit_code(compose(SMOKE, f"runs_dir={runs}")) == 1
    assert "another process is working on the run" in capsys.readouterr().err


def test_a_port_in_use_is_named(
    digits_run: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
        variables |= {"TORCHELASTIC_RUN_ID": "x", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for key, value in variables.items():
            monkeypatch.setenv(key, value)
        config = compose(SMOKE, "trainer.devices=2", "trainer.accelerator=cpu", f"runs_dir={tmp_path}")
        assert run_to_exit_code(config) == 1
    message = capsys.readouterr().err
    assert f"process 0 of 2 cannot join the others at 127.0.0.1:{port}" in message
    assert "MASTER_PORT" in message


def test_an_unreachable_wandb_is_logged_offline(
    copied_digits_run: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "a" * 40, "WANDB_INIT_TIMEOUT": "2"}
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    runs = copied_digits_run()
    overrides = [SMOKE, f"runs_dir={runs}", "run_id=away", "logger=wandb", "logger.mode=online", "trainer.max_epochs=0"]
    with pytest.warns(UserWarning, match=r"W&B cannot be reached .*: the run is logged offline; wandb sync"):
        assert run_to_exit_code(compose(*overrides)) == 0
    assert len(list((runs / "away" / "wandb").glob("offline-run-*-away/*.wandb"))) == 1


def test_as_many_processes_as_configured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    assert run_to_exit_code(compose(SMOKE, f"runs_dir={tmp_path}")) == 2
    assert "torchrun started 2 (2 on this node): give trainer.nodes=1 trainer.devices=2" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_full_disk_keeps_what_is_there(tmp_path: Path) -> None:
    """Files of more than 60 KiB cannot be written: the baseline's weights can, its last.ckpt cannot."""
    script = f"ulimit -f 60; exec {sys.executable} {REPOSITORY / 'train.py'} {SMOKE} runs_dir={tmp_path} baseline.max_epochs=1"
    script += " baseline.optim.warmup_epochs=0 trainer.max_epochs=1"
    refused = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert refused.returncode == 1, refused.stderr
    assert "Traceback" not in refused.stderr
    assert re.search(r"error: .*File too large", refused.stderr)
    assert not list(tmp_path.rglob("*.tmp"))
    with_room = subprocess.run(
        ["bash", "-c", script.replace("ulimit -f 60; ", "")], capture_output=True, text=True, cwd=tmp_path
    )
    assert with_room.returncode == 0, with_room.stderr


def test_one_process_that_is_killed_ends_the_others_and_the_same_command_goes_on(tmp_path: Path) -> None:
    overrides = [SMOKE, "trainer.devices=2", "trainer.accelerator=cpu", f"runs_dir={tmp_path}", "run_id=two"]
    overrides += ["trainer.checkpoint_minutes=0", "baseline.max_epochs=1", "baseline.optim.warmup_epochs=0"]
    overrides += ["trainer.max_epochs=20"]
    process = start_train(*overrides, cwd=tmp_path)
    last = tmp_path / "two" / "checkpoints" / "last.ckpt"
    end = time.monotonic() + 120
    while not last.is_file() and time.monotonic() < end and process.poll() is None:
        time.sleep(0.05)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert "Traceback" not in errors
    assert last.is_file()
    again = start_train(*overrides, cwd=tmp_path)
    output, errors = again.communicate(timeout=180)
    assert again.returncode == 0, errors
    summary: dict[str, Any] = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary["verify"]["mismatched_codes"] == 0
    assert "full-precision baseline: none yet" not in output
