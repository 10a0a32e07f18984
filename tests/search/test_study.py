"""Several workers, dead ones too, share one study: no trial is lost, none is done twice, none is one too many."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from lowprec.config import ConfigError
from lowprec.search.settings import PrunerSettings, SamplerSettings
from lowprec.search.study import SharedStudy, running_trial


def worker(folder: Path, *, fresh: bool = False, seed: int = 0, **settings: Any) -> SharedStudy:
    study = SharedStudy(folder, SamplerSettings(seed=seed, startup_trials=2), PrunerSettings(startup_trials=1))
    study.start({"seed": 0, **settings}, fresh=fresh)
    return study


def tried(trial: optuna.Trial) -> float:
    return trial.suggest_float("x", 0, 1)


def numbers(trials: list[optuna.Trial | None]) -> list[int | None]:
    return [None if trial is None else trial.number for trial in trials]


def die(study: SharedStudy) -> None:
    """What the system does when the worker's process ends: its lock is gone, and nothing else happens."""
    study._alive.release()


def test_the_trials_of_all_workers_count(tmp_path: Path) -> None:
    first, second = worker(tmp_path), worker(tmp_path)
    claimed = [first.claim(3), second.claim(3), first.claim(3), second.claim(3)]
    assert numbers(claimed) == [0, 1, 2, None]


def test_workers_with_one_seed_try_different_values(tmp_path: Path) -> None:
    first, second = worker(tmp_path), worker(tmp_path)
    values = [tried(trial) for study in (first, second, first, second) if (trial := study.claim(4))]
    assert len(set(values)) == 4


def test_a_search_that_was_cut_off_tries_what_an_undisturbed_one_does(tmp_path: Path) -> None:
    def values(folder: Path, restart: bool) -> list[float]:
        study, found = worker(folder), []
        while trial := study.claim(6):
            found.append(tried(trial))
            study.finish(trial, "finished", found[-1])
            if restart:
                study.release()
                study = worker(folder)
        return found

    assert values(tmp_path / "whole", False) == values(tmp_path / "cut", True)


def test_a_trial_is_given_back_and_goes_on_with_its_values(tmp_path: Path) -> None:
    first = worker(tmp_path)
    trial = first.claim(1)
    assert trial is not None
    value = tried(trial)
    first.release()
    again = worker(tmp_path).claim(1)
    assert again is not None
    assert (again.number, tried(again)) == (0, value)
    assert "deaths" not in again.user_attrs


def test_the_trial_of_a_dead_worker_goes_on_and_of_a_living_one_does_not(tmp_path: Path) -> None:
    dead, living = worker(tmp_path), worker(tmp_path)
    assert numbers([dead.claim(2), living.claim(2)]) == [0, 1]
    die(dead)
    third = worker(tmp_path)
    assert numbers([third.claim(2), third.claim(2)]) == [0, None]


def test_a_trial_that_three_workers_did_not_survive_has_failed(tmp_path: Path) -> None:
    for _ in range(3):
        study = worker(tmp_path)
        assert numbers([study.claim(1)]) == [0]
        die(study)
    last = worker(tmp_path)
    assert last.claim(1) is None
    assert [trial.state for trial in last.study.trials] == [TrialState.FAIL]


@pytest.mark.parametrize(
    ("status", "value", "state"),
    [
        ("finished", 0.5, TrialState.COMPLETE),
        ("pruned", 0.4, TrialState.PRUNED),
        ("failed", None, TrialState.FAIL),
        ("finished", None, TrialState.FAIL),
    ],
)
def test_the_study_is_told_how_a_trial_ended(
    status: str, value: float | None, state: TrialState, tmp_path: Path
) -> None:
    study = worker(tmp_path)
    trial = study.claim(1)
    assert trial is not None
    trial.report(0.4, 0)
    study.finish(trial, status, value)
    (told,) = study.study.trials
    assert (told.state, told.value) == (state, value)


def test_another_search_in_the_same_folder_is_refused_by_what_differs(tmp_path: Path) -> None:
    worker(tmp_path, epochs=3).release()
    with pytest.raises(ConfigError, match=r"another search \(epochs: 3 there, 4 here\): .*fresh=true"):
        worker(tmp_path, epochs=4)


def test_fresh_starts_afresh_but_not_under_the_feet_of_others(tmp_path: Path) -> None:
    first = worker(tmp_path)
    first.claim(5)
    with pytest.raises(ConfigError, match="another process works at"):
        worker(tmp_path, fresh=True, epochs=4)
    first.release()
    assert numbers([worker(tmp_path, fresh=True, epochs=4).claim(1)]) == [0]


def test_a_runs_trial_is_found_from_its_name_and_pruned_by_the_median(tmp_path: Path) -> None:
    study = worker(tmp_path)
    for name, values in (("good", [0.8, 0.9]), ("bad", [0.1, 0.1])):
        trial = study.claim(2)
        assert trial is not None
        trial.set_user_attr("run_id", name)
        found = running_trial(tmp_path, name, PrunerSettings(startup_trials=1, warmup_epochs=1))
        assert found is not None
        pruned = []
        for epoch, value in enumerate(values):
            pruned.append(found.should_prune())
            found.report(value, epoch)
        assert pruned == [False, False]
        assert found.should_prune() == (name == "bad")
        study.finish(trial, "finished", values[-1])
    assert running_trial(tmp_path, "good", PrunerSettings()) is None
    assert running_trial(tmp_path / "nowhere", "good", PrunerSettings()) is None
