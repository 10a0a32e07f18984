"""W&B's agent gets a command line that describes a run, for every end of every parameter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import CONFIG_FOLDER, REPOSITORY, compose
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from lowprec.config import RunConfig, schema_keys

FILES = sorted((CONFIG_FOLDER / "hparams_search" / "wandb").glob("*.yaml"))


def composed(sweep: dict[str, Any], values: dict[str, Any]) -> RunConfig:
    """The run that the agent starts with these values."""
    arguments = create_sweep_command_args({"args": {key: {"value": value} for key, value in values.items()}})
    *start, last = sweep["command"]
    assert start[:3] == ["${env}", "${interpreter}", "${program}"]
    return compose(*start[3:], *arguments[last.removeprefix("${").removesuffix("}")])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_end_of_every_parameter_composes(file: Path) -> None:
    sweep = yaml.safe_load(file.read_text())
    assert (REPOSITORY / sweep["program"]).is_file()
    assert set(sweep["parameters"]) <= set(schema_keys())
    for end in ("min", "max"):
        values = {key: parameter[end] for key, parameter in sweep["parameters"].items()}
        # YAML reads 1e-6, without a point, as text, and W&B would refuse it.
        assert all(isinstance(value, float) for value in values.values())
        config = composed(sweep, values)
        assert config.logger.wandb
        assert config.optim.learning_rate == values["optim.learning_rate"]
        assert config.trainer.distillation.weight == values["trainer.distillation.weight"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_metric_is_one_of_validation_that_is_logged(file: Path) -> None:
    sweep = yaml.safe_load(file.read_text())
    assert sweep["metric"] == {"name": "val/top1", "goal": "maximize"}


def test_there_is_a_file() -> None:
    assert [file.stem for file in FILES] == ["w2a8_n64"]
