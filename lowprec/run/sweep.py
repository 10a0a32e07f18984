"""A run as one trial of a sweep, and what a sweep leaves: a file per trial, a table and a figure of them all.

A sweep's folder is ``runs_dir/sweeps/NAME``; its trials are runs like any other, in ``runs_dir``. An error ends its trial
alone. Imports neither torch nor Optuna before a trial is run.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from hydra.conf import HydraConf
from omegaconf import DictConfig, OmegaConf

from lowprec.config import ConfigError, RunConfig
from lowprec.report.html.sweep_page import write_sweep_report
from lowprec.report.sweep import TrialRecord, read_record, sorted_records, trials_table, write_record, write_trials
from lowprec.report.terminal import create_console
from lowprec.run.command_line import (
    FAILED,
    INTERRUPTED,
    TEMPORARY_FAILURE,
    WRONG_CONFIGURATION,
    complain,
    execute,
    run_to_exit_code,
)
from lowprec.run.compose import run_config, run_name
from lowprec.run.directory import RunDirectory
from lowprec.run.launcher import launch_processes, needs_launch
from lowprec.search.settings import PrunerSettings, SearchSettings

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback


# W&B's own variable.
WANDB_GROUP = "WANDB_RUN_GROUP"


def run_trial(composed: DictConfig, settings: HydraConf) -> int:
    """Runs one trial of a sweep; returns its exit code. What came of it, an error included, is kept in the sweep's folder.

    Raises:
        SystemExit, KeyboardInterrupt: it was stopped from outside, and the whole sweep with it.
    """
    choices, overrides = settings.runtime.choices, list(settings.overrides.task)
    if composed.task != "train":
        return execute(composed, choices, overrides)
    tried = dict(override.split("=", 1) for override in overrides if "=" in override)
    name = composed.run_id or run_name(str(choices.get("experiment") or "custom"), overrides)
    record = TrialRecord(settings.job.num, str(Path(composed.runs_dir) / name), tried, "running")
    path = _trials_folder(settings.sweep.dir) / f"{name}.json"
    with _recorded(record, path), wandb_group(Path(settings.sweep.dir).name):
        try:
            return _run(run_config(composed, choices, overrides), record, settings)
        except ConfigError as error:
            complain(error)
            record.status, record.error = "failed", str(error)
            return WRONG_CONFIGURATION
        except Exception as error:
            # Not expected, but no reason to throw away the other trials.
            traceback.print_exc()
            record.status, record.error = "failed", f"{type(error).__name__}: {error}"
            return FAILED


def report_sweep(folder: Path) -> None:
    """Writes trials.csv and report.html, draws trials.png and .svg, prints the table of all trials so far, other workers' too."""
    records = sweep_records(folder)
    if not records or not _is_main():
        return
    write_trials(records, folder / "trials.csv")
    console = create_console()
    console.print(trials_table(records, f"{folder.name}: {len(records)} trials, the best in validation first"))
    for record in records:
        if record.error:
            console.print(f"{record.number} {record.status}: {record.error}", markup=False)
    if records[0].status == "finished":
        console.print(f"the best is {records[0].run}")
    console.print(f"the table is {folder / 'trials.csv'}")
    try:
        write_sweep_report(records, folder.name, folder / "report.html")
        console.print(f"the report is {folder / 'report.html'}")
    except Exception as error:
        # The table is written, and the runs are theirs.
        console.print(f"warning: there is no report.html ({type(error).__name__}: {error})", markup=False)
    if records[0].status == "finished":
        console.print(_draw(records, folder), markup=False)


def sweep_records(folder: Path) -> list[TrialRecord]:
    """The trials of a sweep, the best first; one whose process ended without a word has failed."""
    records = [read_record(path) for path in _trials_folder(folder).glob("*.json")]
    for record in records:
        if record.status == "running" and not _is_locked(Path(record.run)):
            record.status, record.error = "failed", "its process ended without a word (killed, or out of memory?)"
    return sorted_records(records)


def trial_record(folder: Path, run_id: str) -> TrialRecord | None:
    """What came of one trial, or None when it never started."""
    path = _trials_folder(folder) / f"{run_id}.json"
    return read_record(path) if path.is_file() else None


def _run(config: RunConfig, record: TrialRecord, settings: HydraConf) -> int:
    errors: list[Exception] = []

    def note(error: Exception) -> None:
        complain(error)
        errors.append(error)

    # Here, because it imports torch.
    from lowprec.search.pruning import TrialPruned

    try:
        if needs_launch(config):
            # The processes start with the trial's own command line, which is no sweep; a search does not prune these.
            code = launch_processes(config, [*settings.overrides.task, "hydra.mode=RUN"])
            if code in (INTERRUPTED, TEMPORARY_FAILURE):
                sys.exit(code)
        else:
            code = run_to_exit_code(config, _pruning(config, settings), note)
    except TrialPruned as pruned:
        print(f"pruned: {pruned}")
        record.status, record.error = "pruned", str(pruned)
        return 0
    finally:
        _measure(record, config)
    record.status = "failed" if code else "finished"
    if code:
        record.error = str(errors[0]) if errors else f"exit code {code}; the output says why"
    return code


def _pruning(config: RunConfig, settings: HydraConf) -> list[Callback]:
    if settings.sweeper.get("_target_") != SearchSettings._target_:
        return []
    # Here, because Optuna may not be installed where nothing is searched.
    from lowprec.search.pruning import PruneHopeless
    from lowprec.search.study import running_trial

    trial = running_trial(Path(settings.sweep.dir), str(config.run_id), PrunerSettings(**settings.sweeper.pruner))
    return [] if trial is None else [PruneHopeless(trial)]


def _measure(record: TrialRecord, config: RunConfig) -> None:
    """Copies what the run has measured so far into its record."""
    from lowprec.models import checkpoint_metadata
    from lowprec.training.checkpoints import BEST

    directory = RunDirectory(config)
    if not directory.state_file.is_file():
        return
    state = json.loads(directory.state_file.read_text())
    results, cost = state["results"], state["results"].get("cost") or {}
    for name in ("full_precision", "post_training", "validation", "fine_tuned", "integer"):
        setattr(record, name, results.get(name))
    best = directory.checkpoints / BEST
    if record.validation is None and best.is_file():
        # The fine-tuning did not come to its end.
        record.validation = float(checkpoint_metadata(best)["validation_top1"])
    record.bytes, record.multiplications_replaced = cost.get("packed_bytes"), cost.get("multiplications_replaced")
    record.seconds = round(sum(state["seconds"].values()), 2)


@contextmanager
def _recorded(record: TrialRecord, path: Path) -> Iterator[None]:
    """Keeps the record's file up to date: that the trial is running, and what it was in the end."""
    if _is_main():
        write_record(record, path)
    try:
        yield
    except (SystemExit, KeyboardInterrupt):
        record.status = "interrupted"
        raise
    finally:
        if _is_main():
            write_record(record, path)


@contextmanager
def wandb_group(name: str) -> Iterator[None]:
    """Within it, W&B puts runs, those of processes that are started too, into one group, unless the user has named another."""
    if WANDB_GROUP in os.environ:
        yield
        return
    os.environ[WANDB_GROUP] = name[:128]  # no longer in W&B
    try:
        yield
    finally:
        del os.environ[WANDB_GROUP]


def _draw(records: Sequence[TrialRecord], folder: Path) -> str:
    try:
        # Here, because matplotlib takes a second to import and may not be installed.
        from lowprec.report.figure import write_figure
    except ModuleNotFoundError:
        return "the figure needs matplotlib: pip install 'lowprec[sweep]', then the same command draws it"
    path = folder / "trials.png"
    drawn = write_figure(records, folder.name, path)
    return (
        f"the figure is {path}, and .svg beside it" if drawn else "no finished trial has a cost, so there is no figure"
    )


def _trials_folder(folder: str | Path) -> Path:
    return Path(folder) / "trials"


def _is_locked(run: Path) -> bool:
    """Whether a process works on the run."""
    if not run.is_dir():
        return False
    try:
        with FileLock(run / ".lock").acquire(blocking=False):
            return False
    except Timeout:
        return True


def _is_main() -> bool:
    # Here, because it imports torch.
    from lowprec.training.processes import launch

    return launch().rank == 0


def _sweep_folder(runs_dir: str, choices: Mapping[str, Any], overrides: Iterable[str]) -> str:
    return str(Path(runs_dir) / "sweeps" / run_name(str(choices.get("experiment") or "custom"), overrides))


# What a sweep's folder is called follows from its command line. Each trial has a command line of its own, and takes the
# sweep's folder from the cache, which Hydra copies to it.
OmegaConf.register_new_resolver("sweep_folder", _sweep_folder, use_cache=True, replace=True)
