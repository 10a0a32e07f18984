"""Sweeps and searches as a user starts them: no trial takes the others with it, and a table is left in any case."""

from __future__ import annotations

import csv
import itertools
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import CONFIG_FOLDER, REPOSITORY, compose, start_train
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import HydraContext
from hydra.utils import instantiate
from optuna.trial import TrialState, create_trial
from wandb_files import wandb_records

from lowprec.config import LoggerConfig
from lowprec.recipe import LAYOUTS, SOLVERS
from lowprec.report.sweep import TrialRecord, write_record
from lowprec.run.command_line import FAILED
from lowprec.run.sweep import report_sweep, sweep_records, wandb_group
from lowprec.search.settings import PrunerSettings, SamplerSettings
from lowprec.search.space import FloatDistribution
from lowprec.search.study import SharedStudy
from lowprec.training.loggers import close_loggers, create_loggers

SMALL = ("data.limit_train=200", "data.limit_test=32", "calibration.images=16", "logger=none")
LINES = "trainer.progress=plain"

# The shortest fine-tuning on digits that is one; the baseline is that of the fixture below.
SEARCH = """# @package _global_
defaults:
  - override /hydra/sweeper: search
  - override /experiment: digits_smoke
  - override /logger: none
data: {{limit_train: 200, limit_test: 32}}
calibration: {{images: 16}}
baseline: {{max_epochs: 2}}
trainer: {{max_epochs: {epochs}, progress: plain}}
hydra:
  mode: MULTIRUN
  sweeper:
    n_trials: {n_trials}
    params: {{{params}}}
    pruner: {{startup_trials: 1, warmup_epochs: 0}}
"""
LEARNING_RATE = "optim.learning_rate: 'tag(log, interval(1e-3, 0.1))'"


class Workplace:
    """A folder in which ``train.py`` is started: here, where torch is imported already, or in a process of its own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.monkeypatch = monkeypatch
        self.capfd = capfd
        monkeypatch.chdir(folder)

    def train(self, *overrides: str, code: int = 0) -> tuple[str, str]:
        """Runs ``python train.py OVERRIDES`` in this process; returns what it printed."""
        self.monkeypatch.setattr(sys, "argv", ["train.py", *overrides])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(REPOSITORY / "train.py"), run_name="__main__")
        output, errors = self.capfd.readouterr()
        assert ended.value.code == code, f"{output}\n{errors}"
        return output, errors

    def start(self, *overrides: str) -> subprocess.Popen[str]:
        return start_train(*overrides, cwd=self.folder)

    def search(self, params: str = LEARNING_RATE, n_trials: int = 3, epochs: int = 1) -> tuple[str, str]:
        """Writes a search of one's own; returns the overrides that start it."""
        folder = self.folder / "conf" / "hparams_search"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tiny.yaml").write_text(SEARCH.format(params=params, n_trials=n_trials, epochs=epochs))
        return "hparams_search=tiny", f"hydra.searchpath=[file://{self.folder / 'conf'},pkg://lowprec.recipes]"

    def sweep_folder(self) -> Path:
        (folder,) = (self.folder / "runs" / "sweeps").iterdir()
        return folder


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Workplace:
    return Workplace(tmp_path, monkeypatch, capfd)


def finish(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == code, f"{output}\n{errors}"
    return output, errors


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_failed_trial_is_recorded_and_the_sweep_goes_on(workplace: Workplace) -> None:
    overrides = ("experiment=digits_smoke", *SMALL, "baseline.max_epochs=2", "trainer.max_epochs=1")
    # The loss of the second one is infinite.
    output, errors = workplace.train("-m", *overrides, "optim.learning_rate=0.01,1e30", code=FAILED)
    rows = table(workplace.sweep_folder())
    assert (rows[0]["optim.learning_rate"], rows[0]["status"]) == ("0.01", "finished")
    failed = {float(row["optim.learning_rate"]): row["error"] for row in rows[1:] if row["status"] == "failed"}
    assert set(failed) == {1e30}
    assert "training diverged" in failed[1e30]
    assert f"error: {failed[1e30]}" in errors
    best = rows[0]
    run = workplace.folder / best["run"]
    assert (run / "summary.json").is_file()
    assert best["fine_tuned"] == best["integer"]
    assert 0 < float(best["validation"]) <= 1
    assert int(best["bytes"]) == 10_402
    assert "1e+30" in output
    assert f"the best is {best['run']}" in output
    figure = workplace.sweep_folder() / "trials.png"
    assert figure.is_file()
    assert figure.with_suffix(".svg").is_file()
    assert f"the figure is {figure.relative_to(workplace.folder)}, and .svg beside it" in output
    report = workplace.sweep_folder() / "report.html"
    assert f"the report is {report.relative_to(workplace.folder)}\n" in output
    assert "training diverged" in report.read_text()


def test_a_report_that_fails_leaves_a_sweep_its_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError("the disk is [full]")

    monkeypatch.setattr("lowprec.run.sweep.write_sweep_report", fail)
    write_record(TrialRecord(0, "runs/0", {}, "failed", error="no"), tmp_path / "trials" / "0.json")
    report_sweep(tmp_path)
    assert "warning: there is no report.html (OSError: the disk is [full])\n" in capsys.readouterr().out
    assert (tmp_path / "trials.csv").is_file()


def test_without_matplotlib_a_sweep_says_how_to_get_the_figure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "lowprec.report.figure", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_record(TrialRecord(0, "runs/0", {}, "finished", multiplications_replaced=0.9), tmp_path / "trials" / "0.json")
    report_sweep(tmp_path)
    assert capsys.readouterr().out.endswith(
        "the figure needs matplotlib: pip install 'lowprec[sweep]', then the same command draws it\n"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "trials", "trials.csv"]


def trials_of(search: str, *overrides: str) -> list[dict[str, str]]:
    """What the trials of a grid try, of a file in conf/hparams_search and what the command line adds."""
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3", job_name="train"):
        settings = hydra_compose("train", [f"hparams_search={search}"], return_hydra_config=True).hydra.sweeper
        loader = GlobalHydra.instance().config_loader()
        sweeper = instantiate(settings)
        sweeper.hydra_context = HydraContext(loader, Callbacks())
        lines = [*(f"{key}={values}" for key, values in settings.params.items()), *overrides]
        (batch,) = sweeper.split_arguments(OverridesParser.create(loader).parse_overrides(lines), None)
    return [dict(override.split("=", 1) for override in trial) for trial in batch]


def test_the_mission_s_study_tries_what_the_mission_asks_for() -> None:
    trials = [{key.rpartition(".")[2]: value for key, value in trial.items()} for trial in trials_of("mission_study")]
    keys = ("bits", "cluster_size", "layout", "solver", "reconstruct")
    tried = [tuple(trial[key] for key in keys) for trial in trials]
    points = list(itertools.product(("1", "2", "4", "8", "16", "32", "64"), LAYOUTS))
    fitted = {(bits, *point, "exact", "True") for bits in ("2", "4") for point in points}
    solvers = {("2", *point, solver, "False") for solver in SOLVERS for point in points}
    assert set(tried) == fitted | solvers
    assert len(tried) == len(set(tried)) == 84


def test_the_command_line_has_the_last_word_on_all_grids_and_equal_trials_are_one() -> None:
    part = ("quant.weights.cluster_size=4", "quant.weights.layout=kernel", "quant.weights.solver=twn", "seed=0,1")
    trials = trials_of("mission_study", *part)
    assert [(trial["quant.weights.bits"], trial["calibration.reconstruct"], trial["seed"]) for trial in trials] == [
        *(("2", "True", "0"), ("2", "True", "1"), ("4", "True", "0"), ("4", "True", "1")),
        *(("2", "False", "0"), ("2", "False", "1")),
    ]
    same = trials_of("mission_study", *part, "quant.weights.bits=2", "calibration.reconstruct=false")
    assert [trial["seed"] for trial in same] == ["0", "1"]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("quant.weights.bitts: '2,4'", "quant.weights.bitts"),
        ("quant.weights.bits: '2,3'", "quant.weights.bits=3"),
        ("quant.weights.cluster_size: '4,0'", "quant.weights.cluster_size=0"),
    ],
)
def test_a_mistake_in_a_grid_is_named_before_anything_runs(grid: str, message: str, workplace: Workplace) -> None:
    search = workplace.search()
    path = workplace.folder / "conf" / "hparams_search" / "tiny.yaml"
    defaults = "defaults: [override /hydra/sweeper: grid, override /experiment: digits_smoke]"
    sweeper = f"hydra: {{mode: MULTIRUN, sweeper: {{grids: [{{{grid}}}]}}}}"
    path.write_text(f"# @package _global_\n{defaults}\n{sweeper}\n")
    output, errors = workplace.train(*search, code=2)
    assert errors.startswith("error: ")
    assert message in errors
    assert errors.count("\n") == 1
    assert output == ""
    assert not (workplace.sweep_folder() / "trials").exists()


def test_an_unexpected_error_in_a_trial_is_a_failed_trial(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from hydra.conf import HydraConf
    from omegaconf import OmegaConf

    from lowprec.run import sweep

    def broken(*arguments: Any) -> int:
        raise IndexError("out of range")

    monkeypatch.setattr(sweep, "run_to_exit_code", broken)
    config = compose("experiment=digits_smoke", f"runs_dir={tmp_path}", "seed=7", *SMALL)
    settings = OmegaConf.structured(HydraConf)
    settings.sweep.dir, settings.job.num, settings.sweeper = str(tmp_path / "sweep"), 4, {"_target_": "grid"}
    settings.runtime.choices, settings.overrides.task = {"experiment": "digits_smoke"}, ["seed=7"]
    composed = OmegaConf.structured(config)
    assert sweep.run_trial(composed, settings) == 1
    (record,) = sweep_records(tmp_path / "sweep")
    assert (record.number, record.status, record.error) == (4, "failed", "IndexError: out of range")
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_ends_a_sweep_and_leaves_the_table(workplace: Workplace) -> None:
    overrides = ("experiment=digits_smoke", *SMALL, "baseline.max_epochs=2", "trainer.max_epochs=500", LINES)
    process = workplace.start("-m", *overrides, "seed=0,1")
    stop_at(process, "fine-tuning  epoch 1/500")
    output, _ = finish(process, code=130)
    (row,) = table(workplace.sweep_folder())
    assert (row["seed"], row["status"]) == ("0", "interrupted")
    assert float(row["post_training"]) > 0
    assert "interrupted" in output


def stop_at(process: subprocess.Popen[str], words: str) -> None:
    """Sends Ctrl-C when a line of the output has these words."""
    assert process.stdout is not None
    assert any(words in line for line in process.stdout), "it ended before that"
    process.send_signal(signal.SIGINT)


@pytest.mark.slow
def test_a_search_is_stopped_and_goes_on_where_it_was(workplace: Workplace) -> None:
    search = workplace.search(epochs=3)
    first = workplace.start(*search)
    stop_at(first, "digits_smoke-hparams_search_tiny-001")
    _, errors = finish(first, code=130)
    assert "Traceback" not in errors
    folder = workplace.sweep_folder()
    before = {row["number"]: row for row in table(folder)}
    assert before["0"]["status"] == "finished"
    output, _ = workplace.train(*search)
    rows = table(folder)
    assert sorted(row["number"] for row in rows) == ["0", "1", "2"]
    assert {row["status"] for row in rows} <= {"finished", "pruned"}
    # What was done is not done again, and what was begun keeps its values.
    assert "hparams_search_tiny-000" not in output.split("┏")[0]
    after = {row["number"]: row for row in rows}
    assert after["0"] == before["0"]
    assert before["1"]["status"] == "interrupted"
    assert after["1"]["optim.learning_rate"] == before["1"]["optim.learning_rate"]
    validations = [float(row["validation"]) for row in rows if row["status"] == "finished"]
    assert validations == sorted(validations, reverse=True)


@pytest.mark.slow
def test_two_workers_share_one_search(workplace: Workplace) -> None:
    search = workplace.search(n_trials=6)
    other = workplace.start(*search)
    assert other.stdout is not None
    assert any(line.startswith("run ") for line in other.stdout)  # it works at its first trial, and this one joins it
    outputs = [workplace.train(*search)[0], f"run x-000\n{finish(other)[0]}"]
    folder = workplace.sweep_folder()
    rows = {row["number"]: row for row in table(folder)}
    assert len({row["optim.learning_rate"] for row in rows.values()}) == len(rows)
    done = [re.findall(r"^run \S+-(\d{3})$", output, re.MULTILINE) for output in outputs]
    assert sorted(done[0] + done[1]) == [f"{number:03d}" for number in range(6)]
    assert done[0]
    assert [record.status for record in sweep_records(folder)].count("failed") == 0


def test_a_hopeless_trial_is_pruned(workplace: Workplace) -> None:
    # The study remembers a trial that was right in all images from the first epoch on.
    folder = workplace.folder / "runs" / "sweeps" / "digits_smoke-hparams_search_tiny"
    study = SharedStudy(folder, SamplerSettings(), PrunerSettings())
    study.study.add_trial(
        create_trial(
            state=TrialState.COMPLETE,
            value=1.0,
            params={"optim.learning_rate": 0.05},
            distributions={"optim.learning_rate": FloatDistribution(1e-3, 0.1, log=True)},
            intermediate_values=dict.fromkeys(range(3), 1.0),
        )
    )
    study.release()
    # None of its own is finished.
    output, errors = workplace.train(*workplace.search(n_trials=2, epochs=3), code=1)
    (row,) = table(folder)
    assert (row["number"], row["status"]) == ("1", "pruned")
    assert row["error"] == "worse than half of the trials before it after 1 epoch"
    assert 0 < float(row["validation"]) < 1
    assert row["fine_tuned"] == ""
    assert "Traceback" not in errors
    assert "fine-tuning  epoch 1/3" in output
    assert "fine-tuning  epoch 2/3" not in output
    assert [trial.state for trial in study.study.trials] == [TrialState.COMPLETE, TrialState.PRUNED]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            "optim.learning_rat: 'interval(0.1, 1)'",
            "unknown key optim.learning_rat=0.1: .*did you mean optim.learning_rate?",
        ),
        ("optim.learning_rate: 'interval(-1, 1)'", "optim.learning_rate=-1.0: expected above 0"),
        ("optim: 'choice(sgd, adamm)'", "optim=adamm: choose one of .*did you mean adamw?"),
        ("optim.learning_rate: 'intervall(0, 1)'", "optim.learning_rate=intervall.*: write KEY=VALUE"),
        ("logger.project: 'choice(a, b)'", "logger.project: it changes no result"),
    ],
)
def test_a_mistake_in_the_space_is_named_before_anything_runs(params: str, message: str, workplace: Workplace) -> None:
    output, errors = workplace.train(*workplace.search(params), code=2)
    assert re.fullmatch(rf"error: {message.replace('?', '[?]')}.*\n", errors), errors
    assert output == ""
    assert not (workplace.folder / "runs").exists()


@pytest.mark.parametrize("file", sorted((CONFIG_FOLDER / "hparams_search").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_search_composes(file: Path) -> None:
    config = compose(f"hparams_search={file.stem}")
    assert config.experiment in ("fashion_mnist_w2a8_n64", "digits_smoke", "fashion_mnist_w2a8_n4")


@pytest.mark.slow
def test_wandb_groups_the_trials_of_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def group_of(name: str) -> str:
        close_loggers(create_loggers(LoggerConfig(csv=False, wandb=True, mode="offline"), tmp_path / name, name, {}))
        (started,) = [record.run for record in wandb_records(tmp_path / name) if record.HasField("run")]
        return str(started.run_group)

    monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
    with wandb_group("digits_smoke-seed_0,1"):
        assert group_of("trial") == "digits_smoke-seed_0,1"
    assert group_of("alone") == ""
    monkeypatch.setenv("WANDB_RUN_GROUP", "the user's")
    with wandb_group("digits_smoke-seed_0,1"):
        assert group_of("theirs") == "the user's"


def test_trials_in_other_processes_are_in_the_table_too(workplace: Workplace) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    overrides = ("experiment=digits_smoke", *SMALL, "baseline.max_epochs=2", "trainer.max_epochs=1")
    launcher = ("hydra/launcher=submitit_local", "hydra.launcher.cpus_per_task=1", "hydra.launcher.timeout_min=5")
    workplace.train("-m", *overrides, *launcher, "optim.learning_rate=0.01,1e30", code=FAILED)
    rows = table(workplace.sweep_folder())
    assert [row["status"] for row in rows] == ["finished", "failed"]
    assert "training diverged" in rows[1]["error"]


def test_an_impossible_value_is_refused_before_any_trial(workplace: Workplace) -> None:
    output, errors = workplace.train("-m", "experiment=digits_smoke", "optim.learning_rate=0.01,0", code=2)
    assert errors == "error: optim.learning_rate=0.0: expected above 0\n"
    assert output == ""
    assert not (workplace.folder / "runs").exists()
