"""The typed settings of sweeps, ``hydra.sweeper``. Imports neither torch nor Optuna."""

from __future__ import annotations

from dataclasses import dataclass, field

from hydra._internal.core_plugins.basic_sweeper import BasicSweeperConf
from hydra.core.config_store import ConfigStore

from lowprec.config import ConfigError

SAMPLERS = ("tpe", "random")
PRUNERS = ("median", "none")


@dataclass
class GridSettings(BasicSweeperConf):
    """All combinations of the values on the command line: Hydra's own sweeper, with a table at the end.

    ``grids``: several grids in one sweep, each a mapping from override keys to values, ``{quant.weights.bits: "2,4"}``. All
    share ``params`` and the command line, which have the last word; a combination that comes twice is one trial.
    """

    _target_: str = "hydra_plugins.lowprec_search.GridSweeper"
    grids: list[dict[str, str]] = field(default_factory=list)


@dataclass
class SamplerSettings:
    """How the next trial is chosen; the first ``startup_trials`` of tpe are random. Trial i draws from (``seed``, i)."""

    name: str = "tpe"
    seed: int = 0
    startup_trials: int = 10


@dataclass
class PrunerSettings:
    """Which trials are stopped early: median stops what is worse, at an epoch's end, than half of the trials before it.

    Nothing is stopped before ``startup_trials`` are finished, nor within a trial's first ``warmup_epochs``.
    """

    name: str = "median"
    startup_trials: int = 5
    warmup_epochs: int = 1


@dataclass
class SearchSettings:
    """A search for the highest validation top-1.

    ``params`` is the space, by override key, in Hydra's grammar: ``interval(0.5, 8)``, ``tag(log, interval(1e-3, 0.1))``,
    ``int(interval(1, 8))``, ``range(0, 1, 0.1)``, ``choice(sgd, adamw)``. ``n_trials`` counts those of all workers.
    ``batch_size`` trials at a time are given to the launcher.
    """

    _target_: str = "hydra_plugins.lowprec_search.SearchSweeper"
    params: dict[str, str] = field(default_factory=dict)
    n_trials: int = 20
    batch_size: int = 1
    sampler: SamplerSettings = field(default_factory=SamplerSettings)
    pruner: PrunerSettings = field(default_factory=PrunerSettings)

    def validate(self) -> None:
        """Raises ConfigError for the first setting that no search can have."""
        for key, value, least in (
            ("n_trials", self.n_trials, 1),
            ("batch_size", self.batch_size, 1),
            ("sampler.seed", self.sampler.seed, 0),
            ("sampler.startup_trials", self.sampler.startup_trials, 0),
            ("pruner.startup_trials", self.pruner.startup_trials, 0),
            ("pruner.warmup_epochs", self.pruner.warmup_epochs, 0),
        ):
            if value < least:
                raise ConfigError(f"hydra.sweeper.{key}={value}: expected at least {least}")
        for key, name, choices in (("sampler", self.sampler.name, SAMPLERS), ("pruner", self.pruner.name, PRUNERS)):
            if name not in choices:
                raise ConfigError(f"hydra.sweeper.{key}.name={name}: choose one of {', '.join(choices)}")


def register() -> None:
    """Makes ``hydra/sweeper=grid`` and ``hydra/sweeper=search`` known to Hydra."""
    store = ConfigStore.instance()
    for name, settings in (("grid", GridSettings), ("search", SearchSettings)):
        store.store(group="hydra/sweeper", name=name, node=settings, provider="lowprec")
