"""Where metrics go: ``metrics.csv`` in the run's folder, Weights & Biases, both or neither."""

from __future__ import annotations

import csv
import netrc
import os
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lowprec.config import LoggerConfig


class MetricsFile(Logger):
    """A CSV file with a row per step and a column per metric, which a resumed run goes on with.

    Lightning's own CSVLogger deletes the file that it finds. Rows from after the step that a run resumes at are
    dropped, as those steps are done again.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._rows: dict[int, dict[str, float]] = {}
        self._read = False

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The composed config lies beside the file already."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        step = step or 0
        if not self._read:
            self._rows = {row: values for row, values in _read_rows(self.path).items() if row < step}
            self._read = True
        self._rows.setdefault(step, {}).update(metrics)

    @rank_zero_only
    def save(self) -> None:
        if not self._rows:
            return
        columns = sorted({name for values in self._rows.values() for name in values} - {"epoch"})
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["step", "epoch", *columns])
            writer.writeheader()
            writer.writerows({"step": step, **values} for step, values in sorted(self._rows.items()))
        os.replace(temporary, self.path)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()


def _read_rows(path: Path) -> dict[int, dict[str, float]]:
    if not path.is_file():
        return {}
    with path.open(newline="") as file:
        return {
            int(row.pop("step")): {name: float(value) for name, value in row.items() if value}
            for row in csv.DictReader(file)
        }


def create_loggers(config: LoggerConfig, folder: Path, run_name: str, content: dict[str, Any]) -> list[Logger]:
    """The loggers of a run.

    Args:
        config: which ones. folder: the run's. run_name: also W&B's id, so that a resumed run goes on in the same W&B
        run.
        content: what goes with a W&B run as its config: the composed config and the git commit.
    """
    loggers: list[Logger] = []
    if config.csv:
        loggers.append(MetricsFile(folder / "metrics.csv"))
    if config.wandb:
        loggers.append(_wandb_logger(config, folder, run_name, content))
    return loggers


def _wandb_logger(config: LoggerConfig, folder: Path, run_name: str, content: dict[str, Any]) -> WandbLogger:
    # Nothing on the terminal but errors: the run has its own words, and no prompt may stop it.
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    offline = config.mode == "offline" or (config.mode == "auto" and not has_wandb_key())
    run = wandb.init(
        name=run_name,
        id=run_name,
        project=config.project,
        entity=config.entity,
        tags=config.tags,
        dir=folder,
        mode="offline" if offline else "online",
        resume="allow",
        config=content,
        settings=wandb.Settings(silent=True, console="off"),
    )
    return WandbLogger(experiment=run)


def has_wandb_key() -> bool:
    """Whether W&B can log in without asking: WANDB_API_KEY, or the entry of ``wandb login`` in ~/.netrc."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return False
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def log_summary(loggers: list[Logger], summary: dict[str, Any], file: Path) -> None:
    """Sends a run's summary to W&B, as its summary values (``integer/top1``, …) and as the file itself."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.summary.update(flatten(summary))
            # What lies in this folder at the end of a run goes with it.
            shutil.copy(file, logger.experiment.dir)


def close_loggers(loggers: list[Logger]) -> None:
    """Writes what is left to write; a W&B run ends here, so that the next run of a sweep has one of its own."""
    for logger in loggers:
        logger.finalize("finished")
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()


def flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with keys joined by ``/``."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}/"))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
