"""task=sensitivity, and runs with a budget: their files, their resumption, and what is refused before any work."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import FinishedRun, compose

from lowprec.candidates import CANDIDATES
from lowprec.config import ConfigError
from lowprec.integer.packed import load
from lowprec.recipe import Recipe
from lowprec.run.command_line import run_to_exit_code
from lowprec.run.stages import run

FEW = ("sensitivity.images=32",)
BUDGET = (*FEW, "budget.weight_bits=3.2", "trainer.max_epochs=0", "logger=none")


def test_each_layer_of_a_finished_run(
    copied_digits_run: Callable[[], Path], digits_run: FinishedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = copied_digits_run()
    files = {path: path.read_bytes() for path in (runs / "digits_smoke").iterdir() if path.name == "config.yaml"}
    # fresh=true is for the run, which the analysis leaves alone.
    options = ("sensitivity.labelled_images=40", "fresh=true")
    found = run(compose("experiment=digits_smoke", f"runs_dir={runs}", "task=sensitivity", *options))
    output = capsys.readouterr().out
    folder = runs / "digits_smoke"
    assert found == json.loads((folder / "sensitivity.json").read_text())
    rows = list(csv.DictReader((folder / "sensitivity.csv").open(newline="")))
    assert len(rows) == len(found["rows"]) == len(CANDIDATES) * 10
    assert (found["images"], found["labelled_images"], found["fixed"]) == (128, 40, ["conv1"])
    assert "full-precision baseline: " in output
    assert "none yet" not in output
    for name in {row["layer"] for row in rows}:
        assert f"\n{name} " in output
    assert all(path.read_bytes() == content for path, content in files.items())
    assert json.loads((folder / "summary.json").read_text()) == digits_run.summary


def test_a_budget_becomes_a_recipe_and_a_run_of_it(
    copied_digits_run: Callable[[], Path], digits_run: FinishedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = copied_digits_run()
    overrides = ("experiment=digits_smoke", f"runs_dir={runs}", *BUDGET)
    summary = run(compose(*overrides))
    output = capsys.readouterr().out
    folder = next(path for path in runs.iterdir() if "budget" in path.name)
    recipe = Recipe.load(folder / "recipe.yaml")
    assert summary["cost"]["weight_bits"] <= 3.2
    assert summary["recipe"] == recipe.name == "w2a8_n4_weight_bits_3.2"
    assert list(summary) == list(digits_run.summary)
    assert summary["seconds"].keys() == digits_run.summary["seconds"].keys()
    assert summary["verify"]["mismatched_codes"] == 0
    for rule in recipe.rules:
        changes = ", ".join(f"{key}={value}" for key, value in rule.given().items())
        assert f"  {rule.pattern}: {changes}" in output
    assert load(folder / "model.safetensors") is not None
    # Other tasks know the recipe too.
    assert run(compose(*overrides, "task=verify", "verify.images=20"))["mismatched_codes"] == 0

    # Cut off before calibration, it goes on with the assignment that is there, whatever that is.
    other = Recipe.load(folder / "recipe.yaml")
    other.rules = []
    (folder / "recipe.yaml").write_text(other.to_yaml())
    (folder / "sensitivity.json").unlink()
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints")
    state = json.loads((folder / "run.json").read_text())
    state["results"] = {key: state["results"][key] for key in ("data", "full_precision")}
    (folder / "run.json").write_text(json.dumps(state))
    again = run(compose(*overrides))
    assert not (folder / "sensitivity.json").exists()
    assert again["cost"] == digits_run.summary["cost"]

    # And the recipe is one like any other.
    config = compose("experiment=digits_smoke", f"recipe_file={folder}/recipe.yaml")
    assert config.recipe == other
    assert config.recipe_file is None


def test_a_damaged_assignment_is_named(
    copied_digits_run: Callable[[], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    runs = copied_digits_run()
    overrides = ("experiment=digits_smoke", f"runs_dir={runs}", "run_id=mixed", *BUDGET)
    (runs / "mixed").mkdir()
    (runs / "mixed" / "recipe.yaml").write_text("weights: {bits: 3}\n")
    assert run_to_exit_code(compose(*overrides)) == 1
    message = capsys.readouterr().err
    assert "mixed/recipe.yaml is missing or damaged" in message
    assert "fresh=true" in message


@pytest.mark.parametrize("task", ["train", "sensitivity"])
@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("budget.weight_bits=1.5", "budget.weight_bits=1.5: no assignment meets it; "),
        ("budget.multiplications_replaced=0.999", "budget.multiplications_replaced=0.999: no assignment meets it; "),
    ],
)
def test_a_budget_out_of_reach_is_refused_before_anything_is_trained(
    budget: str, message: str, task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = compose("experiment=digits_smoke", f"runs_dir={tmp_path}", budget, f"task={task}")
    assert run_to_exit_code(config) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "baselines").exists()


def test_a_baseline_of_several_processes_is_not_trained_in_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = compose("experiment=digits_smoke", f"runs_dir={tmp_path}", "task=sensitivity", "trainer.devices=2")
    assert run_to_exit_code(config) == 2
    assert "task=train trains it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["budget.weight_bits=0"], "budget.weight_bits=0.0: give bits"),
        (["budget.weight_bits=many"], "budget.weight_bits=many: "),
        (["budget.multiplications_replaced=1"], "budget.multiplications_replaced=1.0: give a share"),
        (["budget.weight_bits=3", "budget.multiplications_replaced=0.5"], "give one of the two"),
        (["budget.bits=3"], "unknown key budget.bits=3"),
        (["budget.weight_bits=3", "task=cost"], "task=cost reads no data"),
        (["sensitivity.images=0"], "sensitivity.images=0: expected at least 1"),
        (["sensitivity.labelled_images=-1"], "sensitivity.labelled_images=-1: expected 0 or more"),
        (["recipe_file=none.yaml"], "recipe_file=none.yaml: there is no such file"),
        (
            ["recipe_file=none.yaml", "quant.weights.bits=4"],
            "quant.weights.bits=4: recipe_file=none.yaml takes the place",
        ),
    ],
)
def test_wrong_values_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose("experiment=digits_smoke", *overrides)
    assert message in str(caught.value)


def test_labelled_images_do_not_make_another_run() -> None:
    options = ("experiment=digits_smoke", "task=sensitivity", "sensitivity.labelled_images=9")
    assert compose(*options).run_id == "digits_smoke"
