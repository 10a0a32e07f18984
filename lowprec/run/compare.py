"""Two runs side by side, from the files in their folders: what differs in their configurations, and what came of it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from lowprec.config import RunConfig
from lowprec.report.comparison import ComparedRun, figure_table, setting_differences, setting_table
from lowprec.report.html.compare_page import write_comparison
from lowprec.report.summary import Summary, build_summary
from lowprec.run.directory import RunDirectory, identity
from lowprec.training.loggers import read_metrics


def compare_runs(config: RunConfig, console: Console) -> Summary:
    """Prints two tables, of settings that differ and of results, and writes them and the curves as a page beside the runs.

    Raises:
        ConfigError: there is no such run. RunFileError: its config.yaml or run.json is damaged.
    """
    first, second = (compared_run(config, name) for name in config.run)
    if first.name == second.name:
        # Of other folders: their names are longer then.
        first, second = (replace(run, name=name) for run, name in zip((first, second), config.run, strict=True))
    if setting_differences(first, second):
        console.print(setting_table(first, second))
    else:
        console.print("the configurations do not differ in anything that results depend on")
    console.print(figure_table(first, second))
    path = Path(config.runs_dir) / "comparisons" / f"{_file_name(first)}_and_{_file_name(second)}.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_comparison(first, second, path)
    console.print(f"side by side, with curves: {path}")
    return {run.name: run.summary for run in (first, second)}


def compared_run(config: RunConfig, name: str) -> ComparedRun:
    """The run of this name in ``runs_dir``, or in this folder where the name has a folder's separator."""
    path = Path(name)
    runs_dir = str(path.parent) if path.name != name else config.runs_dir
    directory = RunDirectory(replace(config, runs_dir=runs_dir, run_id=path.name))
    stored = directory.config = replace(directory.stored_config(), runs_dir=runs_dir, run_id=path.name)
    directory.read_state()
    state = directory.state
    names = {"experiment": stored.experiment, "model": stored.model.name, "data": stored.data.name}
    summary = build_summary(
        {**names, "recipe": stored.recipe.name}, state["results"], state["seconds"], stored.trainer.max_epochs
    )
    metrics = read_metrics(directory.path / "metrics.csv")
    return ComparedRun(path.name, summary, identity(stored), metrics, directory.finished)


def _file_name(run: ComparedRun) -> str:
    return re.sub(r"[^\w.,+-]+", "_", run.name)
