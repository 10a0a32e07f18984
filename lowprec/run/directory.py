"""The folder of a run: what lies where in it, what is done already, and whether it belongs to this configuration."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lowprec.config import INCIDENTAL_KEYS, ConfigError, RunConfig
from lowprec.files import whole_file
from lowprec.recipe import Recipe, RecipeError
from lowprec.training.differences import differences


class RunInUseError(RuntimeError):
    """Another process works on the run."""


class RunFileError(RuntimeError):
    """A file of the run is damaged."""


class RunDirectory:
    """Files of one run, all under ``runs_dir/run_id``. Every file is written under another name first, then renamed.

    ``run.json`` keeps what finished stages found out (accuracies, seconds) and the git commit, so that a run that was
    cut off goes on after its last finished stage; ``summary.json`` is written when all of them have, and marks the run as
    finished. Of several processes of a training only the main one writes; ``writes`` is false in the others, which keep what they
    record in memory.
    """

    def __init__(self, config: RunConfig) -> None:
        assert config.run_id is not None, "composition names every run"
        self.config = config
        self.path = Path(config.runs_dir) / config.run_id
        self.config_file = self.path / "config.yaml"
        self.state_file = self.path / "run.json"
        self.checkpoints = self.path / "checkpoints"
        self.post_training_file = self.checkpoints / "post_training.safetensors"
        self.model_file = self.path / "model.safetensors"
        self.onnx_file = self.path / "model.onnx"
        self.summary_file = self.path / "summary.json"
        self.recipe_file = self.path / "recipe.yaml"
        self.sensitivity_file = self.path / "sensitivity.json"
        self.report_file = self.path / "report.html"
        self.state: dict[str, Any] = {}
        self.writes = True
        self._held_lock: FileLock | None = None

    @property
    def finished(self) -> bool:
        return self.summary_file.is_file()

    @property
    def started(self) -> bool:
        return self.config_file.is_file()

    @property
    def recipe(self) -> Recipe:
        """The recipe of the run: the one that was assigned for its budget, if it has one, else the configured one.

        Raises:
            RunFileError: recipe.yaml is missing or damaged.
        """
        if not self.config.budget.given:
            return self.config.recipe
        try:
            return Recipe.load(self.recipe_file)
        except RecipeError as error:
            raise RunFileError(
                f"{self.recipe_file} is missing or damaged ({error}), and the checkpoints beside it belong to it: put the "
                "file back, or start the run anew with fresh=true"
            ) from error

    def open(self) -> dict[str, Any]:
        """Makes the folder for a new run, or reads how far the run in it has come; no other process may work on it
        then. Returns that state. A run that failed before anything was made is no run: another may take its place.

        Raises:
            ConfigError: the folder holds a run with another configuration; the differing keys are named.
            RunInUseError: another process works on this run. RunFileError: config.yaml or run.json is damaged.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock()
        attempt = 0
        if self.config.fresh and self.started:
            attempt = int(_read_json(self.state_file).get("attempt", 0)) + 1
            self._clear()
        elif self.started and not self._holds_anything():
            attempt = int(_read_json(self.state_file).get("attempt", 0))
            self.config_file.unlink()
            self.state_file.unlink(missing_ok=True)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        if self.started:
            self.check_configuration()
        else:
            write_text(self.config_file, to_yaml(self.config))
        self.read_state()
        self.state["attempt"] = max(attempt, self.state["attempt"])
        self._write_state()
        return self.state

    def _holds_anything(self) -> bool:
        """Whether there is a result, of a stage or an analysis, or a checkpoint of the run in the folder."""
        # Which images they are is known before anything is done with them.
        results = _read_json(self.state_file).get("results", {}).keys() - {"data"}
        files = self.sensitivity_file, self.recipe_file, self.summary_file
        return bool(results) or any(file.is_file() for file in files) or any(self.checkpoints.glob("*"))

    def read_state(self) -> None:
        """Reads what the run's finished stages recorded, without taking the run."""
        self.state = {"git": git_commit(), "attempt": 0, "results": {}, "seconds": {}}
        self.state.update(_read_json(self.state_file))

    def _lock(self) -> None:
        # The system gives the lock back when its process dies, however it dies.
        self._held_lock = FileLock(self.path / ".lock")
        try:
            self._held_lock.acquire(blocking=False)
        except Timeout as error:
            raise RunInUseError(f"another process is working on the run {self.path}: wait for it or stop it") from error

    def _clear(self) -> None:
        for entry in self.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != ".lock":
                entry.unlink()

    def close(self) -> None:
        """Lets other processes work on the run."""
        if self._held_lock is not None:
            self._held_lock.release()

    def stored_config(self) -> RunConfig:
        """The configuration that the run in the folder was started with.

        Raises:
            ConfigError: there is no run in the folder. RunFileError: its config.yaml is damaged.
        """
        if not self.started:
            raise ConfigError(
                f"there is no run in {self.path}{_runs_hint(self.path.parent)}; "
                "task=train makes one, run_id=NAME or the same experiment and overrides find it"
            )
        try:
            content = OmegaConf.load(self.config_file)
            if not isinstance(content, DictConfig) or not content:
                raise ValueError("it holds no keys")
            stored: RunConfig = OmegaConf.to_object(  # type: ignore[assignment]
                OmegaConf.merge(OmegaConf.structured(RunConfig), content)
            )
        # Text that is no UTF-8, or no YAML; keys and values that no run has.
        except (ValueError, YAMLError, OmegaConfBaseException) as error:
            reason = " ".join(str(error).split())
            raise RunFileError(
                f"{self.config_file} is damaged ({reason}), so it is unknown what the run beside it is: put the file back, give "
                "this run another run_id=NAME, or throw the old one away with fresh=true"
            ) from error
        return stored

    @property
    def unique_name(self) -> str:
        """The run's name, with a number when it was started afresh: W&B's id, which cannot be used twice."""
        attempt = self.state["attempt"]
        return f"{self.path.name}-{attempt + 1}" if attempt else self.path.name

    def summary(self) -> dict[str, Any]:
        """summary.json of a finished run."""
        return _read_json(self.summary_file)

    def result(self, name: str) -> Any:
        """What a finished stage recorded under this name, or None."""
        return self.state["results"].get(name)

    def record(self, name: str, value: Any) -> None:
        """Keeps a stage's result; it survives the process."""
        self.state["results"][name] = value
        self._write_state()

    def add_seconds(self, stage: str, seconds: float) -> None:
        """Adds to a stage's time, which may be spread over several processes."""
        self.state["seconds"][stage] = round(self.state["seconds"].get(stage, 0.0) + seconds, 2)
        self._write_state()

    def _write_state(self) -> None:
        if self.writes:
            write_text(self.state_file, json.dumps(self.state, indent=2) + "\n")

    def check_configuration(self) -> None:
        """Raises ConfigError when the run in the folder was started with another configuration; names what differs."""
        different = differences(identity(self.stored_config()), identity(self.config))
        if different:
            raise ConfigError(
                f"{self.path} holds a run with another configuration ({different}): give this one another run_id=NAME, or throw "
                "the old one away with fresh=true"
            )


def to_yaml(config: RunConfig) -> str:
    """The composed configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def write_text(path: Path, text: str) -> None:
    """Writes a whole file or nothing of it."""
    with whole_file(path) as temporary:
        temporary.write_text(text)


def git_commit() -> dict[str, Any]:
    """The commit of this source tree, and whether it has uncommitted changes; None where there is no git."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    changes = git("status", "--porcelain", "--untracked-files=no") if commit else None
    return {"commit": commit, "uncommitted_changes": None if changes is None else bool(changes)}


def identity(config: RunConfig) -> dict[str, Any]:
    """The flat keys and values that say what comes out of a run, without those that say where and how it works."""
    content = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(content, dict)
    weights = content["quant"].get("weights")
    # Left out where it says nothing, as in runs and searches that are older than planes.
    if isinstance(weights, dict) and weights.get("planes") == 1:
        del weights["planes"]
    flat = dict(_leaves(content))
    return {
        key: value
        for key, value in flat.items()
        if not any(key == name or key.startswith(f"{name}.") for name in INCIDENTAL_KEYS)
    }


def _leaves(node: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(node, dict) or not node:
        return [(prefix, node)]
    leaves = []
    for name, child in node.items():
        leaves += _leaves(child, f"{prefix}.{name}" if prefix else str(name))
    return leaves


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise RunFileError(
            f"{path} is damaged ({error}): delete it, and its results are measured again; checkpoints beside it stay"
        ) from error
    return content


def _runs_hint(runs: Path) -> str:
    names = sorted(path.parent.name for path in runs.glob("*/config.yaml")) if runs.is_dir() else []
    return f" (runs there: {', '.join(names)})" if names else ""
