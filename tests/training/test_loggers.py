"""metrics.csv, and when W&B is offline."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import lightning.pytorch as lightning
import pytest
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from wandb_files import wandb_artifacts, wandb_records
from watched_training import Recorder, tiny_module, train

from lowprec.config import LoggerConfig
from lowprec.training.loggers import (
    MetricsFile,
    alert,
    close_loggers,
    create_loggers,
    flatten,
    has_wandb_key,
    log_artifacts,
    log_metrics,
    log_summary,
)


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
    expected = [("9", "0", "1.5"), ("19", "1", "0.9")]
    assert [(row["step"], row["epoch"], row["train/loss"]) for row in rows(path)] == expected


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


def test_rows_are_appended_and_half_a_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    logger = MetricsFile(path)
    for step in (9, 19, 29):
        logger.log_metrics({"epoch": 0, "train/loss": step / 10}, step=step)
        logger.save()
    before = path.stat().st_ino
    logger.log_metrics({"epoch": 0, "train/loss": 3.9}, step=39)
    logger.save()
    # The same file, one line longer: a long training does not write all its rows again and again.
    assert path.stat().st_ino == before
    assert [row["step"] for row in rows(path)] == ["9", "19", "29", "39"]
    with path.open("a") as file:
        file.write("49,0,4")  # what a killed process may leave of a line
    resumed = MetricsFile(path)
    resumed.log_metrics({"epoch": 0, "train/loss": 4.9}, step=49)
    resumed.finalize("success")
    assert [(row["step"], row["train/loss"]) for row in rows(path)][-2:] == [("39", "3.9"), ("49", "4.9")]


def test_a_row_that_gets_more_metrics_later_is_still_one_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    logger = MetricsFile(path)
    for metrics, step in (({"a": 1.0, "b": 1.0}, 9), ({"a": 2.0}, 19), ({"b": 2.0}, 19), ({"a": 3.0}, 29)):
        logger.log_metrics({"epoch": 0, **metrics}, step=step)
        logger.save()
    assert [(row["step"], row["a"], row["b"]) for row in rows(path)] == [
        ("9", "1.0", "1.0"),
        ("19", "2.0", "2.0"),
        ("29", "3.0", ""),
    ]


def test_an_offline_run_holds_alerts_and_the_model(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("model.safetensors", "model.onnx", "config.yaml")]
    for size, file in enumerate(files, start=5):
        file.write_bytes(b"x" * size)
    config = LoggerConfig(csv=True, wandb=True, mode="offline")
    loggers = create_loggers(config, tmp_path, "digits,seed=1", {})
    alert(loggers, "training diverged", "training diverged at step 3")
    log_artifacts(loggers, files, {"integer": {"top1": 0.5}, "onnx": {"top1": None}})
    close_loggers(loggers)
    records = wandb_records(tmp_path)
    alerts = [record.alert for record in records if record.HasField("alert")]
    assert [(found.title, found.text, found.level) for found in alerts] == [
        ("training diverged", "training diverged at step 3", "ERROR")
    ]
    (artifact,) = wandb_artifacts(records)
    assert (artifact.name, artifact.type) == ("digits_seed_1", "model")
    assert json.loads(artifact.metadata) == {"integer/top1": 0.5, "onnx/top1": None}
    found = {entry.path: (entry.size, entry.local_path) for entry in artifact.manifest.contents}
    assert found == {file.name: (size, str(file)) for size, file in enumerate(files, start=5)}


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    loggers = create_loggers(LoggerConfig(csv=False, wandb=True, mode="offline"), tmp_path, "run", {})
    with pytest.raises(FileNotFoundError, match=r"model\.onnx: no such file"):
        log_artifacts(loggers, [tmp_path / "model.onnx"], {})
    close_loggers(loggers)


def log_until_lost(loggers: list[Logger]) -> int:
    """Logs step after step, as what is sent first may still lie in a buffer; returns how many."""
    for step in range(500):
        for logger in loggers:
            logger.log_metrics({"train/loss": 1.0}, step=step)
        time.sleep(0.01)
        if loggers[-1].lost:
            break
    return step + 1


def test_a_training_outlives_the_service_of_wandb(tmp_path: Path) -> None:
    loggers = create_loggers(LoggerConfig(csv=True, wandb=True, mode="offline"), tmp_path, "run", {})
    children = subprocess.run(["pgrep", "-P", str(os.getpid()), "-f", "wandb-core"], capture_output=True, text=True)
    (service,) = map(int, children.stdout.split())
    os.kill(service, signal.SIGKILL)
    os.waitpid(service, 0)
    with pytest.warns(UserWarning, match="W&B's service process has ended .*the run itself goes on"):
        steps = log_until_lost(loggers)
    alert(loggers, "title", "text")
    loggers[0].save()
    log_summary(loggers, {"integer": {"top1": 0.5}}, tmp_path / "metrics.csv")
    close_loggers(loggers)
    assert len(rows(loggers[0].path)) == steps
    # The next run of a sweep has W&B again.
    close_loggers(create_loggers(LoggerConfig(csv=False, wandb=True, mode="offline"), tmp_path / "next", "next", {}))
    assert wandb_records(tmp_path / "next")


def test_metrics_of_callbacks_share_the_rows_of_lightning(tmp_path: Path) -> None:
    class Epochs(Callback):
        def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
            log_metrics(trainer, {"mine": 1.0})

    recorder = Recorder()
    train(tiny_module(), tmp_path, [Epochs()], loggers=[recorder], accumulate_grad_batches=4)
    assert set(recorder.column("mine")) == set(recorder.column("train/loss")) == {1, 3}
