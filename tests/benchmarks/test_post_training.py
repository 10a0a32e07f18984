"""The benchmark of reconstruction, on digits."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest


def test_the_table_has_both_methods_for_each_recipe(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["data=digits", "model=cifar_resnet8_tiny", "baseline.max_epochs=2", "data.limit_test=64"]
    monkeypatch.setattr(sys, "argv", ["post_training.py", *small, "data.limit_train=200", "calibration.images=32"])
    runpy.run_path(str(Path(__file__).with_name("post_training.py")), run_name="__main__")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("w")]
    assert [line.split("  ")[0] for line in lines] == [
        name + rest for name in ("w2a8_n4", "w2a8_n64", "w4a8_n4") for rest in ("", ", 8-bit classifier")
    ]
    assert all(line.endswith(" s") for line in lines)
