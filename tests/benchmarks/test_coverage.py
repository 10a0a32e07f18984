"""The coverage benchmark: it refuses at once what it cannot measure, and changes only the lines that it has measured."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

# By its path: a package of the same name measures tests.
_SPEC = importlib.util.spec_from_file_location("coverage_benchmark", Path(__file__).with_name("coverage.py"))
assert _SPEC is not None
assert _SPEC.loader is not None
coverage = sys.modules[_SPEC.name] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(coverage)

OLD = f"""Before.

{coverage.MARKERS[0]}
{coverage.HEAD}
| resnet18 | 1 |
| resnet50 | 2 |
{coverage.MARKERS[1]}

After.
"""


def test_only_the_families_measured_get_new_lines() -> None:
    text = coverage.with_lines(OLD, {"resnet50": "| resnet50 | 3 |", "dla34": "| dla34 | 4 |"})
    assert text == OLD.replace("| resnet50 | 2 |", "| resnet50 | 3 |\n| dla34 | 4 |")
    assert coverage.with_lines(text, {}) == text


def test_a_table_is_written_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "README.md"
    file.write_text(OLD)
    short = ["resnet18", "--images", "1", "--calibration", "2", "--side", "32", "--runtimes", "onnxruntime"]
    coverage.main([*short, "--write", str(file)])
    printed = capsys.readouterr()
    line = printed.out.splitlines()[-1]
    assert line.startswith("| resnet18 | 33 | 100.0% |")
    assert file.read_text() == OLD.replace("| resnet18 | 1 |", line)
    assert "resnet18: 1 of 1" in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet1x8"], "unknown families: resnet1x8; known are resnet18"),
        (["--side", "0"], "--side 0: give at least 1"),
        (["--images", "0"], "--images 0: give at least 1"),
        (["--runtimes", "tensorrt"], "--runtimes tensorrt: choose from onnxruntime,openvino"),
        (["--photographs", "{folder}/missing"], "missing: no folder with .jpg"),
        (["--photographs", "{folder}"], "no folder with .jpg"),
        (["--write", "{folder}/missing.md"], "missing.md: no file with the lines"),
        (["--write", "{folder}/plain.md"], "plain.md: no file with the lines"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plain.md").write_text("no table\n")
    with pytest.raises(SystemExit):
        coverage.main([argument.replace("{folder}", str(tmp_path)) for argument in arguments])
    assert message in capsys.readouterr().err
