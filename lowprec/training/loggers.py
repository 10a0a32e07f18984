"""Where metrics, alerts and files go: ``metrics.csv`` in the run's folder, Weights & Biases, both or neither."""

from __future__ import annotations

import csv
import io
import netrc
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import lightning.pytorch as lightning
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lowprec.config import LoggerConfig
from lowprec.files import whole_file


class MetricsFile(Logger):
    """A CSV file with a row per logged step and a column per metric, which a resumed run goes on with.

    Lightning's own CSVLogger deletes the file that it finds. Rows from after the step that a run resumes at are
    dropped, as those steps are done again. New rows are appended; a new column, or a change to a row, rewrites the file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._rows: dict[int, dict[str, float]] = {}
        self._read = False
        self._changed: set[int] = set()
        self._columns: list[str] = []
        self._last_written = -1

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
        self._changed.add(step)

    @rank_zero_only
    def save(self) -> None:
        if not self._changed:
            return
        new = {name for step in self._changed for name in self._rows[step]} - {"epoch", *self._columns}
        if new or min(self._changed) <= self._last_written:
            self._rewrite()
        else:
            with self.path.open("a", newline="") as file:
                file.write(self._lines(sorted(self._changed)))
        self._last_written = max(self._rows)
        self._changed.clear()

    def _rewrite(self) -> None:
        self._columns = sorted({name for values in self._rows.values() for name in values} - {"epoch"})
        with whole_file(self.path) as temporary, temporary.open("w", newline="") as file:
            csv.writer(file).writerow(["step", "epoch", *self._columns])
            file.write(self._lines(sorted(self._rows)))

    def _lines(self, steps: list[int]) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, ["step", "epoch", *self._columns])
        writer.writerows({"step": step, **self._rows[step]} for step in steps)
        return text.getvalue()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()


def _read_rows(path: Path) -> dict[int, dict[str, float]]:
    if not path.is_file():
        return {}
    text = path.read_text()
    # A killed process may have left half a line at the end.
    whole = text[: text.rfind("\n") + 1]
    return {
        int(row.pop("step")): {
            name: int(float(value)) if name == "epoch" else float(value) for name, value in row.items() if value
        }
        for row in csv.DictReader(io.StringIO(whole))
    }


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.csv in the order of their steps, each with what was logged of it; none where there is no file."""
    return [{"step": step, **values} for step, values in sorted(_read_rows(path).items())]


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


class LastingWandbLogger(WandbLogger):
    """W&B's logger for a training that outlives W&B's service process (killed with a job's step, or out of memory).

    Once that is lost nothing more is sent; a warning says so, and a run that goes on later goes on with the same W&B run.
    """

    lost = False

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.attempt(lambda run: super(LastingWandbLogger, self).log_metrics(metrics, step))

    def attempt(self, action: Callable[[Any], Any]) -> None:
        """Does ``action`` on the W&B run, unless the connection to its service is lost, or is lost now."""
        if self.lost:
            return
        try:
            action(self.experiment)
        except ConnectionError as error:
            self.lost = True
            with suppress(ConnectionError):
                import wandb

                wandb.teardown()  # the next run of a sweep starts a service of its own
            warnings.warn(
                f"W&B's service process has ended ({error}): from here on nothing is logged to W&B, the run itself goes on",
                stacklevel=2,
            )


def _wandb_logger(config: LoggerConfig, folder: Path, run_name: str, content: dict[str, Any]) -> LastingWandbLogger:
    # Nothing on the terminal but errors: the run has its own words, and no prompt may stop it.
    os.environ.setdefault("WANDB_SILENT", "true")
    if not os.environ.get("WANDB_MODE"):
        os.environ.pop("WANDB_MODE", None)  # W&B stops at an empty one
    import wandb

    def started(offline: bool) -> Any:
        return wandb.init(
            name=run_name,
            # A run's name may have commas, which W&B refuses in ids.
            id=_plain_name(run_name),
            project=config.project,
            entity=config.entity,
            tags=config.tags,
            # Given, because W&B reads its variables once in a process.
            group=os.environ.get("WANDB_RUN_GROUP", ""),
            dir=folder,
            mode="offline" if offline else "online",
            resume="allow",
            config=content,
            settings=wandb.Settings(silent=True, console="off", init_timeout=_wandb_patience()),
        )

    try:
        run = started(config.mode == "offline" or (config.mode == "auto" and not has_wandb_key()))
    except wandb.errors.CommError as error:
        # A server that is away for an hour must not stop a training of a week.
        reason = str(error).strip().splitlines()[0]
        warnings.warn(
            f"W&B cannot be reached ({reason}): the run is logged offline; wandb sync {folder}/wandb/offline-run-* sends it",
            stacklevel=2,
        )
        wandb.teardown()  # else the id counts as in use
        run = started(True)
    # As Lightning does for runs that it starts itself: charts are over optimizer steps.
    run.define_metric("trainer/global_step")
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    return LastingWandbLogger(experiment=run)


def _wandb_patience() -> float:
    """Seconds to wait for W&B's server, from W&B's own variable."""
    return float(os.environ.get("WANDB_INIT_TIMEOUT", "60"))


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


def log_metrics(trainer: lightning.Trainer, metrics: dict[str, float]) -> None:
    """Logs ``metrics`` of the optimizer step just done; numbers on the host, which Lightning would copy to the device."""
    for logger in trainer.loggers:
        # The row of Lightning's own metrics, which counts steps from 0.
        logger.log_metrics({"epoch": trainer.current_epoch, **metrics}, step=max(0, trainer.global_step - 1))


@rank_zero_only
def alert(loggers: Sequence[Logger], title: str, text: str) -> None:
    """Has W&B tell the run's owner, by mail or chat as they set it up there; an offline run does so when it is synced."""
    for logger in loggers:
        if isinstance(logger, LastingWandbLogger):
            logger.attempt(lambda run: run.alert(title=title, text=text, level="ERROR"))


@rank_zero_only
def log_artifacts(loggers: Sequence[Logger], files: Sequence[Path], metadata: dict[str, Any]) -> None:
    """Sends ``files`` to W&B as one artifact of type ``model`` named after the run, with ``metadata``, flattened.

    Before :func:`close_loggers`. An offline run only refers to the files, which have to be there when it is synced.

    Raises:
        FileNotFoundError: one of the files is not there; it is named.
    """
    for logger in loggers:
        if isinstance(logger, LastingWandbLogger):
            import wandb

            artifact = wandb.Artifact(_plain_name(logger.experiment.name), type="model", metadata=flatten(metadata))
            for file in files:
                if not file.is_file():
                    raise FileNotFoundError(f"{file}: no such file to send to W&B")
                # "immutable": not copied into W&B's folder in the user's home, where the copies of all runs would add up.
                artifact.add_file(str(file), policy="immutable")
            logger.attempt(partial(_send, artifact))


def log_summary(loggers: list[Logger], summary: dict[str, Any], file: Path) -> None:
    """Sends a run's summary to W&B, as its summary values (``integer/top1``, …) and as the file itself."""
    for logger in loggers:
        if isinstance(logger, LastingWandbLogger):
            logger.attempt(lambda run: run.summary.update(flatten(summary)))
            # What lies in this folder at the end of a run goes with it.
            shutil.copy(file, logger.experiment.dir)


def log_media(loggers: Sequence[Logger], media: Callable[[], dict[str, Any]]) -> None:
    """Sends tables, plots and histograms to W&B, by key; ``media`` makes them, and is not called where W&B is not used."""
    for logger in loggers:
        if isinstance(logger, LastingWandbLogger):
            made = media()
            with _copies_in(Path(logger.experiment.dir).parent):
                logger.attempt(partial(_log, made))


@contextmanager
def _copies_in(folder: Path) -> Iterator[None]:
    """Within it, W&B copies what it is to send into ``folder``, not into the user's home: a run's folder is all of it."""
    if "WANDB_DATA_DIR" in os.environ:
        yield
        return
    os.environ["WANDB_DATA_DIR"] = str(folder)
    try:
        yield
    finally:
        del os.environ["WANDB_DATA_DIR"]


def _log(media: dict[str, Any], run: Any) -> None:
    run.log(media)


def _send(artifact: Any, run: Any) -> None:
    run.log_artifact(artifact)


def close_loggers(loggers: list[Logger]) -> None:
    """Writes what is left to write; a W&B run ends here, so that the next run of a sweep has one of its own."""
    for logger in loggers:
        logger.finalize("finished")
        if isinstance(logger, LastingWandbLogger):
            logger.attempt(lambda run: run.finish())


def _plain_name(name: str) -> str:
    """``name`` in the characters, and of the length, that W&B allows in ids and artifacts' names."""
    return re.sub(r"[^\w.-]", "_", name)[:128]


def flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with keys joined by ``/``."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}/"))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
