"""metrics.csv, and when W&B is offline."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from lowprec.config import LoggerConfig
from lowprec.training.loggers import MetricsFile, create_loggers, flatten, has_wandb_key


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_metrics_of_a_step_share_a_row_and_new_columns_may_come_later(tmp_path: Path) -> None:
    logger = MetricsFile(tmp_path / "metrics.csv")
    logger.log_metrics({"epoch": 0, "train/loss": 1.5}, step=9)
    logger.log_metrics({"epoch": 0, "val/top1": 0.5}, step=9)
    logger.save()
    logger.log_metrics({"epoch": 1, "train/loss": 1.0, "flips/conv1": 0.1}, step=19)
    logger.finalize("success")
    first, second = rows(tmp_path / "metrics.csv")
    assert (first["step"], second["step"]) == ("9", "19")
    assert first["val/top1"] == "0.5"
    assert first["flips/conv1"] == ""
    assert second["flips/conv1"] == "0.1"


def test_a_resumed_run_goes_on_with_the_file_and_redoes_what_came_after(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    first = MetricsFile(path)
    for step, loss in ((9, 1.5), (19, 1.0), (29, 0.7)):
        first.log_metrics({"epoch": step // 10, "train/loss": loss}, step=step)
    first.finalize("failed")
    resumed = MetricsFile(path)
    resumed.log_metrics({"epoch": 1, "train/loss": 0.9}, step=19)
    resumed.finalize("success")
    assert [(row["step"], row["train/loss"]) for row in rows(path)] == [("9", "1.5"), ("19", "0.9")]


def test_a_file_that_nothing_was_logged_to_stays(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,epoch,train/loss\n9,0,1.5\n")
    MetricsFile(path).finalize("success")
    assert path.read_text() == "step,epoch,train/loss\n9,0,1.5\n"


def test_no_logger_is_needed(tmp_path: Path) -> None:
    assert create_loggers(LoggerConfig(csv=False), tmp_path, "run", {}) == []


def test_a_key_is_found_in_the_environment_and_in_netrc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(netrc))
    assert not has_wandb_key()
    netrc.write_text("machine api.wandb.ai login user password none\n")
    netrc.chmod(0o600)
    assert has_wandb_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not has_wandb_key()
    monkeypatch.setenv("WANDB_API_KEY", "none")
    assert has_wandb_key()
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert not has_wandb_key()


def test_summaries_are_flattened() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": None}}, "e": 2}) == {"a/b": 1, "a/c/d": None, "e": 2}
