"""task=list and --help: what there is to choose from is there, from the files themselves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lowprec.run.listing import GROUPS, description, listing

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "conf"
RECIPES = REPOSITORY / "lowprec" / "recipes"


def choices(group: str) -> list[str]:
    folder = RECIPES if group == "quant" else CONFIGS
    return sorted(file.stem for file in (folder / group).glob("*.yaml"))


def test_a_comment_is_read_without_hydras_own_line(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("# @package _global_\n# What it is,\n# on two lines.\nkey: 1  # not this\n# nor this\n")
    assert description(file) == "What it is, on two lines."


@pytest.mark.parametrize("group", GROUPS)
def test_every_choice_is_described(group: str) -> None:
    paragraph = next(part for part in listing(CONFIGS).split("\n\n") if part.startswith(GROUPS[group]))
    lines = [line for line in paragraph.splitlines()[1:] if not line.startswith("   ")]
    assert [line.split()[0] for line in lines] == choices(group)
    assert all(len(line.split()) > 3 for line in lines)


def test_each_experiment_has_its_expected_result() -> None:
    experiments = listing(CONFIGS).split("\n\n")[0]
    assert experiments.count("Expected: ") == len(choices("experiment"))
    assert "Expected: full precision 92.27 %" in experiments
    assert max(map(len, experiments.splitlines())) <= 130


def answer(*arguments: str) -> str:
    command = [sys.executable, str(REPOSITORY / "train.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def test_the_command_lists() -> None:
    assert answer("task=list") == listing(CONFIGS) + "\n"


def test_help_names_groups_choices_and_examples() -> None:
    text = answer("--help")
    for group in ("experiment", "quant", "model", "data"):
        line = next(line for line in text.splitlines() if line.startswith(f"{group}: "))
        assert line == f"{group}: {', '.join(choices(group))}"
    assert text.count("python train.py ") == 3
    assert "task=list" in text
