"""The profile of a few steps: a trace that can be opened, and a table of operators."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from watched_training import tiny_module, train

from lowprec.training.profile import PROFILED, TABLE, TRACE, StepProfile


def test_a_few_steps_are_profiled(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    train(tiny_module(), tmp_path, [StepProfile(folder)])
    assert {path.name for path in folder.iterdir()} == {TABLE, TRACE}
    with gzip.open(folder / TRACE, "rt") as file:
        events = json.load(file)["traceEvents"]
    steps = {event["name"] for event in events if str(event.get("name")).startswith("ProfilerStep#")}
    assert len(steps) == PROFILED
    table = (folder / TABLE).read_text()
    assert "aten::convolution" in table
    assert "Self CPU" in table


def test_too_short_a_training_says_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="nothing was profiled: the training was over before batch 7"):
        train(tiny_module(), tmp_path, [StepProfile(tmp_path)], max_epochs=1)
    assert not (tmp_path / TABLE).exists()
