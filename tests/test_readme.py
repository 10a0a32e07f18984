"""Every command and the API example of the README run as they stand; the two set-up commands are .ci/run's and CI's."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lowprec.models import create_model, save_checkpoint

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
SET_UP = {
    "apt-get update && apt-get install -y dataset-fashion-mnist && pip install -e . && python train.py",
    'pip install -e ".[dev]" && pytest',
}
# What makes long commands short; nothing that they prove depends on it.
SHORTER = {
    "coverage.py": ["resnet18", "vit_tiny_patch16_224", "--images", "1", "--calibration", "2"],
    "image_folder": [
        "data.image_size=64",
        "data.batch_size=4",
        "calibration.images=8",
        "calibration.reconstruct=false",
        "trainer.max_epochs=1",
    ],
    "hparams_search=digits": ["hydra.sweeper.n_trials=2"],
    "hparams_search=w2a8_n64": [
        *("hydra.sweeper.n_trials=1", "data.limit_train=600", "data.limit_test=200"),
        *("baseline.max_epochs=2", "trainer.max_epochs=1"),
    ],
    "hparams_search=mission_study": [
        *("quant.weights.cluster_size=4", "quant.weights.layout=kernel", "quant.weights.solver=exact"),
        *("data.limit_train=600", "data.limit_test=200", "calibration.images=16"),
        *("baseline.max_epochs=2", "trainer.max_epochs=1"),
    ],
    "seed=0,1": ["baseline.max_epochs=2", "trainer.max_epochs=1"],
    "fashion_mnist": ["data.limit_train=600", "data.limit_test=200", "baseline.max_epochs=2", "trainer.max_epochs=1"],
}


def commands() -> list[str]:
    """The lines of the README's shell blocks, in order."""
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the README's commands name: train.py, conf, photographs and a checkpoint."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("train.py", "conf", "tests"):
        (folder / name).symlink_to(REPOSITORY / name)
    (folder / "README.md").write_text(README)
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            (folder / "photos" / split / label).mkdir(parents=True)
            for index in range(8):
                pixels = torch.randint(0, 256, (80, 96, 3), dtype=torch.uint8, generator=generator)
                Image.fromarray(pixels.numpy()).save(folder / "photos" / split / label / f"{index}.jpg")
    model = create_model("timm:resnet18", num_classes=2)
    save_checkpoint(model, folder / "my_weights.safetensors", {})
    return folder


def test_set_up_commands_come_first() -> None:
    assert set(commands()[:2]) == SET_UP
    assert "command=$(sed -n" in (REPOSITORY / ".ci" / "run").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("command", commands()[2:])
def test_command_runs(command: str, workplace: Path) -> None:
    arguments = shlex.split(command, comments=True)
    assert arguments[0] == "python", f"the README's commands call python: {command}"
    extra = next((options for key, options in SHORTER.items() if key in command and "task=cost" not in command), [])
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "WANDB_MODE": "offline"}
    done = subprocess.run(
        [sys.executable, *arguments[1:], *extra],
        cwd=workplace,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert done.stdout.strip(), f"{command} printed nothing"


@pytest.mark.slow
def test_the_exported_file_classifies_photographs_as_the_run_did(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the tests of the commands that train and export runs/photos."""
    (example,) = [block for block in PYTHON if "custom_metadata_map" in block]
    monkeypatch.chdir(workplace)
    names: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), names)
    right = sum(file.parent.name == label for file, label in zip(names["files"], names["found"], strict=True))
    summary = json.loads((workplace / "runs" / "photos" / "summary.json").read_text())
    assert len(names["files"]) == 16
    assert right / 16 == summary["integer"]["top1"]


def test_api_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = [block for block in PYTHON if "lowprec.export_onnx(" in block]
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(example, "README.md", "exec"), {})
    assert (tmp_path / "model.onnx").stat().st_size > 0
    assert (tmp_path / "model.safetensors").stat().st_size > 0
