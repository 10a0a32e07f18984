"""task=compare: two runs' settings, results and curves, on the terminal and as a page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import FinishedRun, compose

from lowprec.config import ConfigError
from lowprec.report.comparison import ComparedRun, compared_figures, layer_figures, setting_differences
from lowprec.report.summary import build_summary
from lowprec.run.command_line import run_to_exit_code
from lowprec.run.stages import run

NAMES = {"experiment": "e", "model": "m", "data": "d", "recipe": "r"}


def compared(name: str, top1: float | None, settings: dict[str, object], **last: float) -> ComparedRun:
    results = {"integer": top1, "cost": {"macs": 100, "packed_bytes": 50}}
    metrics = [{"step": 1.0, "sparsity/a": 0.5}, {"step": 2.0, **{key.replace("_", "/"): last[key] for key in last}}]
    return ComparedRun(name, build_summary(NAMES, results, {"prepare": 1.0}, 0), settings, metrics, True)


def test_settings_that_differ_are_named_and_no_others() -> None:
    first = compared("a", 0.9, {"same": 1, "other": None, "only.first": True})
    second = compared("b", 0.8, {"same": 1, "other": [1], "only.second": 0.5})
    assert setting_differences(first, second) == [
        ("only.first", "true", "not there"),
        ("only.second", "not there", "0.5"),
        ("other", "null", "[1]"),
    ]


def test_figures_of_both_and_their_difference() -> None:
    figures = {figure.label: figure for figure in compared_figures(compared("a", 0.9, {}), compared("b", 0.95, {}))}
    assert figures["integer"].texts() == ("90.00%", "95.00%", "+5.00 points")
    assert figures["bytes, packed"].texts() == ("50", "50", "+0")
    assert figures["ONNX Runtime"].texts() == ("not measured", "not measured", "")
    assert figures["differing codes"].difference is None


def test_layers_have_what_was_logged_last_of_them() -> None:
    first, second = compared("a", 0.9, {}, sparsity_a=0.25, flips_a=0.1), compared("b", 0.9, {}, sparsity_b=0.75)
    found = {name: (sparsity.values, flips.values) for name, sparsity, flips in layer_figures(first, second)}
    assert found == {"a": ((0.25, 0.5), (0.1, None)), "b": ((None, 0.75), (None, None))}


def test_two_runs_by_name_and_by_folder(
    copied_digits_run: Callable[[], Path], digits_run: FinishedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = copied_digits_run()
    other = runs / "other"
    (runs / "digits_smoke").rename(other)
    config = other / "config.yaml"
    config.write_text(config.read_text().replace("cluster_size: 4", "cluster_size: 8"))
    (other / "summary.json").unlink()
    state = json.loads((other / "run.json").read_text())
    del state["results"]["onnx"]
    (other / "run.json").write_text(json.dumps(state))
    before = sorted(path.name for path in other.iterdir())
    run(compose("task=compare", f"run=[{digits_run.directory},other]", f"runs_dir={runs}"))
    output = capsys.readouterr().out
    assert output.index("quant.weights.cluster_size") < output.index("full precision")
    assert "optim.learning_rate" not in output
    page = (runs / "comparisons" / "digits_smoke_and_other.html").read_text()
    assert page.index('<section id="settings"') < page.index('<section id="results"')
    assert '<th scope="row">quant.weights.cluster_size</th><td>4</td><td>8</td>' in page
    assert "other is not finished" in page
    assert "digits_smoke is not finished" not in page
    assert sorted(path.name for path in other.iterdir()) == before


def test_runs_of_one_name_are_told_apart_by_their_folders(
    copied_digits_run: Callable[[], Path], digits_run: FinishedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = copied_digits_run()
    run(compose("task=compare", f"run=[{digits_run.directory},{runs}/digits_smoke]", f"runs_dir={runs}"))
    assert "the configurations do not differ" in capsys.readouterr().out
    (page,) = (runs / "comparisons").iterdir()
    assert f"{runs}/digits_smoke" in page.read_text()


@pytest.mark.parametrize("runs", ["[]", "[digits_smoke]", "[a,a]", "[a,b,c]"])
def test_other_than_two_runs_is_refused(runs: str) -> None:
    with pytest.raises(ConfigError, match=r"run=.*two different runs, run=\[a,b\]"):
        compose("task=compare", f"run={runs}")


def test_runs_are_for_comparing_alone() -> None:
    with pytest.raises(ConfigError, match=r"run=\['a', 'b'\]: expected none: it is for task=compare"):
        compose("run=[a,b]")


def test_a_run_that_is_not_there_is_named(digits_run: FinishedRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run_to_exit_code(compose("task=compare", "run=[digits_smoke,nothing]", f"runs_dir={digits_run.runs_dir}")) == 2
    )
    assert "there is no run in" in capsys.readouterr().err
