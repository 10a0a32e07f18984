"""What several test files share: one whole run of digits_smoke per session, as a user would start it."""

from __future__ import annotations

import json
import os

# Before torch is imported: two workers with two threads each on two cores wait for each other, ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from lowprec.config import RunConfig
from lowprec.run.compose import compose_run

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG_FOLDER = REPOSITORY / "conf"
# PyTorch for CPUs alone, and for some systems, comes without Triton.
collect_ignore_glob = [] if find_spec("triton") else ["*/test_triton_*.py", "*/test_step_traffic.py"]


def compose(*overrides: str) -> RunConfig:
    """The configuration that ``python train.py OVERRIDES`` runs."""
    return compose_run(overrides, CONFIG_FOLDER)


def environment_without_wandb_key(home: Path) -> dict[str, str]:
    """This process's environment, in which W&B finds no key."""
    hidden = ("WANDB_API_KEY", "WANDB_MODE")
    return {**{name: value for name, value in os.environ.items() if name not in hidden}, "NETRC": str(home / "netrc")}


def start_train(*overrides: str, cwd: Path) -> subprocess.Popen[str]:
    """``python train.py OVERRIDES``, running; its output is a pipe, so it sees no terminal."""
    return subprocess.Popen(
        [sys.executable, "-u", str(REPOSITORY / "train.py"), *overrides],
        cwd=cwd,
        env=environment_without_wandb_key(cwd),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@dataclass(frozen=True)
class FinishedRun:
    """A run of digits_smoke: its folder, what it printed, and its summary."""

    directory: Path
    output: str
    errors: str

    @property
    def runs_dir(self) -> Path:
        return self.directory.parent

    @property
    def summary(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.directory / "summary.json").read_text())
        return content


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """``python train.py experiment=digits_smoke logger=csv_wandb``, run once. Tests must leave its folder as it is."""
    runs = tmp_path_factory.mktemp("digits")
    process = start_train("experiment=digits_smoke", "logger=csv_wandb", f"runs_dir={runs}", cwd=runs)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, f"{output}\n{errors}"
    return FinishedRun(runs / "digits_smoke", output, errors)


@pytest.fixture
def copied_digits_run(digits_run: FinishedRun, tmp_path: Path) -> Callable[[], Path]:
    """Makes a copy of the finished run, baseline included, that a test may change; returns its runs_dir."""
    import shutil

    def copy() -> Path:
        runs = tmp_path / "runs"
        shutil.copytree(digits_run.runs_dir, runs, symlinks=True)
        return runs

    return copy
