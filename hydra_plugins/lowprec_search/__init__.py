"""Hydra's plugins of lowprec: the sweepers ``grid`` (the default) and ``search``.

Hydra takes sweepers from this namespace alone and imports it at every start, so nothing heavy is imported here before a
sweep begins.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class GridSweeper(BasicSweeper):
    """Runs all combinations, of one grid or of several, and ends with their table, also when it is stopped."""

    def __init__(
        self,
        max_batch_size: int | None,
        params: dict[str, str] | None = None,
        grids: Sequence[Mapping[str, str]] = (),
    ) -> None:
        super().__init__(max_batch_size, params)
        self.grids = grids

    def sweep(self, arguments: list[str]) -> Any:
        assert self.config is not None
        with _reported(Path(self.config.hydra.sweep.dir)):
            batches = super().sweep(arguments)
        code = max((job.return_value for batch in batches for job in batch), default=0)
        if code:
            sys.exit(code)
        return batches

    def split_arguments(  # type: ignore[override]  # Hydra's is static, and knows one grid
        self, overrides: list[Override], max_batch_size: int | None
    ) -> list[list[list[str]]]:
        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        # In the order of their precedence: the last word on a key is the command line's.
        grids = [parser.parse_overrides([f"{key}={values}" for key, values in grid.items()]) for grid in self.grids]
        trials = [
            trial for grid in grids or [[]] for trial in BasicSweeper.split_arguments([*grid, *overrides], None)[0]
        ]
        distinct = [list(trial) for trial in dict.fromkeys(map(tuple, trials))]
        return list(self.split_overrides_to_chunks(distinct, max_batch_size))

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Leaves with exit code 2 and one message when a trial describes no run, before any of the batch is run."""
        from lowprec.config import ConfigError
        from lowprec.run.command_line import WRONG_CONFIGURATION, complain
        from lowprec.run.compose import sweep_config

        assert self.config is not None
        assert self.hydra_context is not None
        try:
            for overrides in batch:
                sweep_config(self.hydra_context.config_loader, self.config, overrides)
        except ConfigError as error:
            complain(error)
            sys.exit(WRONG_CONFIGURATION)


class SearchSweeper(Sweeper):
    """Searches with Optuna for the highest validation top-1; any number of these may work at one search."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context = hydra_context
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        from lowprec.config import ConfigError
        from lowprec.run.command_line import WRONG_CONFIGURATION, complain

        assert self.config is not None
        assert self.hydra_context is not None
        assert self.launcher is not None
        try:
            from lowprec.run.search import Search

            search = Search(self.config, self.hydra_context, self.launcher, arguments)
        except ConfigError as error:
            complain(error)
            sys.exit(WRONG_CONFIGURATION)
        with _reported(search.folder):
            search.run()


@contextmanager
def _reported(folder: Path) -> Iterator[None]:
    """Prints and writes the table of a sweep when it ends, however it does."""
    from lowprec.run.command_line import INTERRUPTED
    from lowprec.run.sweep import report_sweep

    try:
        yield
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    finally:
        report_sweep(folder)
