"""A search for hyper-parameters: claims trials of a shared study, runs them like any other run, and tells what they gave."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

from lowprec.config import INCIDENTAL_KEYS, ConfigError, RunConfig
from lowprec.run.command_line import FAILED, complain
from lowprec.run.compose import explain, sweep_config
from lowprec.run.directory import identity
from lowprec.run.sweep import sweep_records, trial_record
from lowprec.search.settings import SearchSettings

try:
    import optuna
except ImportError as error:
    raise ConfigError("a search needs Optuna: pip install 'lowprec[sweep]'") from error

from lowprec.search.space import Space
from lowprec.search.study import SharedStudy


class Search:
    """One worker of a search, checked as a whole before any trial is run.

    Args:
        composed: the command line's composed configuration, Hydra's included. arguments: its overrides.

    Raises:
        ConfigError: the settings or some values of the space are impossible, or the folder holds another search.
    """

    def __init__(
        self, composed: DictConfig, context: HydraContext, launcher: Launcher, arguments: Sequence[str]
    ) -> None:
        settings = OmegaConf.merge(OmegaConf.structured(SearchSettings), composed.hydra.sweeper)
        self.settings: SearchSettings = OmegaConf.to_object(settings)  # type: ignore[assignment]
        self.settings.validate()
        self.folder = Path(composed.hydra.sweep.dir)
        self._composed, self._context, self._launcher = composed, context, launcher
        self.space = Space.from_overrides(self._overrides(arguments))
        config = self._check()
        # Here, because it imports torch, for which a mistake above does not wait.
        from lowprec.training.processes import launch

        if launch().size > 1:
            raise ConfigError("a search is one process: give each of its trials several with trainer.devices=N")
        self.study = SharedStudy(self.folder, self.settings.sampler, self.settings.pruner)
        try:
            common = {**identity(config), **self.space.distributions}
            self.study.start({key: str(value) for key, value in common.items()}, fresh=config.fresh)
        except BaseException:
            self.study.release()
            raise

    def run(self) -> None:
        """Runs trials until there are ``n_trials`` of all workers together.

        Raises:
            SystemExit: with exit code 1, when no trial of the search came to its end.
        """
        try:
            while batch := self._claim():
                self._launch(batch)
        finally:
            self.study.release()
        if not any(record.status == "finished" for record in sweep_records(self.folder)):
            sys.exit(FAILED)

    def _claim(self) -> list[optuna.Trial]:
        trials: list[optuna.Trial] = []
        while (
            len(trials) < self.settings.batch_size and (trial := self.study.claim(self.settings.n_trials)) is not None
        ):
            trial.set_user_attr("run_id", self._run_id(trial))
            trials.append(trial)
        return trials

    def _launch(self, trials: Sequence[optuna.Trial]) -> None:
        jobs = [[*self.space.fixed, *self.space.suggest(trial), f"run_id={self._run_id(trial)}"] for trial in trials]
        try:
            self._launcher.launch(jobs, initial_job_idx=trials[0].number)
        except Exception as error:
            # Of the launcher, such as a cluster's job that was killed; errors of trials are in their records.
            complain(error)
        for trial in trials:
            record = trial_record(self.folder, self._run_id(trial))
            if record is None:
                self.study.finish(trial, "failed", None)
            else:
                self.study.finish(trial, record.status, record.validation)

    def _run_id(self, trial: optuna.Trial) -> str:
        return f"{self.folder.name}-{trial.number:03d}"

    def _overrides(self, arguments: Sequence[str]) -> list[Override]:
        lines = [*(f"{key}={values}" for key, values in self.settings.params.items()), *arguments]
        try:
            return OverridesParser.create(config_loader=self._context.config_loader).parse_overrides(lines)
        except HydraException as error:
            raise ConfigError(explain(error, lines)) from error

    def _check(self) -> RunConfig:
        """Composes every end and every choice of the space; returns the configuration without any of them."""
        config = self._compose(self.space.fixed)
        if config.task != "train":
            raise ConfigError(f"task={config.task}: a search is for task=train")
        for key in self.space.distributions:
            name = key.lstrip("+")
            if any(name == incidental or name.startswith(f"{incidental}.") for incidental in INCIDENTAL_KEYS):
                raise ConfigError(f"{key}: it changes no result, so there is nothing to search")
        for corner in self.space.corners():
            self._compose([*self.space.fixed, *corner])
        return config

    def _compose(self, overrides: Sequence[str]) -> RunConfig:
        return sweep_config(self._context.config_loader, self._composed, overrides)
