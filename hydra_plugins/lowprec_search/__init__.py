"""Hydra's plugins of lowprec: the sweepers ``grid`` (the default) and ``search``.

Hydra takes sweepers from this namespace alone and imports it at every start, so nothing heavy is imported here before a
sweep begins.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class GridSweeper(BasicSweeper):
    """Runs all combinations, and ends with their table, also when it is stopped."""

    def sweep(self, arguments: list[str]) -> Any:
        assert self.config is not None
        with _reported(Path(self.config.hydra.sweep.dir)):
            batches = super().sweep(arguments)
        code = max((job.return_value for batch in batches for job in batch), default=0)
        if code:
            sys.exit(code)
        return batches


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
