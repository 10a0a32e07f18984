"""An Optuna study in a folder, at which several processes work at a time and which outlives them all.

A worker claims a trial under the study's lock and holds a lock file of its own while it lives; the system gives that back
however the worker dies. So a trial whose worker is gone is found by the next one that claims, which goes on with it.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from filelock import FileLock, Timeout
from optuna.pruners import BasePruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from lowprec.config import ConfigError
from lowprec.search.settings import PrunerSettings, SamplerSettings
from lowprec.training.differences import differences

_FILE = "study.journal"
# A trial that its worker did not survive so often (memory ran out, say) would not let the next one live either.
_LIVES = 3

optuna.logging.set_verbosity(optuna.logging.WARNING)


class SharedStudy:
    """One worker's hold of the study in ``folder``. Close it, so that others take over what it has not finished."""

    def __init__(self, folder: Path, sampler: SamplerSettings, pruner: PrunerSettings) -> None:
        self.folder = folder
        self._sampler_settings = sampler
        self._lock = FileLock(folder / ".lock")
        self._worker = uuid.uuid4().hex
        (folder / "workers").mkdir(parents=True, exist_ok=True)
        self._alive = FileLock(self._lock_file(self._worker))
        with self._lock:  # else another worker may take it for a dead one's before it is held
            self._alive.acquire()
        self._pruner = pruner
        self._study: optuna.Study | None = None

    @property
    def study(self) -> optuna.Study:
        if self._study is None:
            self._study = _open(self.folder, _pruner(self._pruner))
        return self._study

    def start(self, settings: Mapping[str, Any], *, fresh: bool = False) -> None:
        """Makes the study, or joins it. ``settings``: what its trials have in common, by key; they are compared.

        Raises:
            ConfigError: the study was started with other settings, or is to be made afresh while others work at it.
        """
        with self._lock:
            if fresh:
                self._clear()
            stored = self.study.user_attrs.get("settings")
            wanted = json.loads(json.dumps(dict(settings)))
            if stored is None:
                self.study.set_user_attr("settings", wanted)
                return
            if different := differences(stored, wanted):
                raise ConfigError(
                    f"{self.folder} holds another search ({different}): throw the old one away with fresh=true, or keep "
                    "both with hydra.sweep.dir=FOLDER"
                )

    def claim(self, n_trials: int) -> optuna.Trial | None:
        """A trial for this worker: one that was cut off, else a new one; None when there are ``n_trials`` already."""
        with self._lock:
            trials = self.study.get_trials(deepcopy=False)
            number = next((trial.number for trial in trials if self._take_over(trial)), None)
            if number is None:
                if len(trials) >= n_trials:
                    return None
                self.study.sampler = self._sampler(len(trials))
                trial = self.study.ask()
            else:
                self.study.sampler = self._sampler(number)
                trial = optuna.Trial(self.study, trials[number]._trial_id)
            trial.set_user_attr("worker", self._worker)
            return trial

    def finish(self, trial: optuna.Trial, status: str, value: float | None) -> None:
        """Tells the study how a trial ended: ``finished`` with its validation top-1, ``pruned``, or anything else: failed."""
        if status == "finished" and value is not None:
            self.study.tell(trial, value)
        else:
            self.study.tell(trial, state=TrialState.PRUNED if status == "pruned" else TrialState.FAIL)

    def release(self) -> None:
        """Gives back the trials that this worker has not finished, which is no fault of theirs, and ends its work."""
        for trial in self._running():
            if trial.user_attrs.get("worker") == self._worker:
                optuna.Trial(self.study, trial._trial_id).set_user_attr("worker", "")
        self._alive.release()
        self._lock_file(self._worker).unlink(missing_ok=True)

    def _take_over(self, trial: FrozenTrial) -> bool:
        """Whether nobody works at the trial; one that its workers did not survive several times is failed instead."""
        if trial.state != TrialState.RUNNING or trial.user_attrs.get("worker") == self._worker:
            return False
        # No name at all: its worker died between asking for it and signing it.
        worker = trial.user_attrs.get("worker", "")
        if not worker:
            return True
        if self._is_alive(worker):
            return False
        deaths = trial.user_attrs.get("deaths", 0) + 1
        optuna.Trial(self.study, trial._trial_id).set_user_attr("deaths", deaths)
        if deaths >= _LIVES:
            self.study.tell(trial.number, state=TrialState.FAIL)
            return False
        return True

    def _is_alive(self, worker: str) -> bool:
        try:
            FileLock(self._lock_file(worker)).acquire(blocking=False).lock.release()
        except Timeout:
            return True
        self._lock_file(worker).unlink(missing_ok=True)
        return False

    def _running(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))

    def _clear(self) -> None:
        workers = [path.stem for path in (self.folder / "workers").glob("*.lock") if path.stem != self._worker]
        if any(self._is_alive(worker) for worker in workers):
            raise ConfigError(f"fresh=true: another process works at the search {self.folder}; stop it first")
        for path in (self.folder / _FILE, *(self.folder / "trials").glob("*.json")):
            path.unlink(missing_ok=True)

    def _sampler(self, number: int) -> BaseSampler:
        # Seeded by the trial: workers with one seed would all try the same, and so would a search that goes on.
        settings = self._sampler_settings
        seed = int(np.random.SeedSequence([settings.seed, number]).generate_state(1)[0])
        if settings.name == "random":
            return RandomSampler(seed=seed)
        return TPESampler(seed=seed, n_startup_trials=settings.startup_trials, constant_liar=True)

    def _lock_file(self, worker: str) -> Path:
        return self.folder / "workers" / f"{worker}.lock"


def running_trial(folder: Path, run_id: str, pruner: PrunerSettings) -> optuna.Trial | None:
    """The trial that this run belongs to, found in the study's file: the run may be in another process than its worker."""
    if not (folder / _FILE).is_file():
        return None
    study = _open(folder, _pruner(pruner))
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if trial.user_attrs.get("run_id") == run_id:
            return optuna.Trial(study, trial._trial_id)
    return None


def _open(folder: Path, pruner: BasePruner) -> optuna.Study:
    storage = JournalStorage(JournalFileBackend(str(folder / _FILE)))
    return optuna.create_study(
        study_name="search", storage=storage, direction="maximize", pruner=pruner, load_if_exists=True
    )


def _pruner(settings: PrunerSettings) -> BasePruner:
    if settings.name == "none":
        return NopPruner()
    return MedianPruner(n_startup_trials=settings.startup_trials, n_warmup_steps=settings.warmup_epochs)
