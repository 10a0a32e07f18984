"""A run's folder whose files are not what they were."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import compose

from lowprec.config import ConfigError
from lowprec.run.directory import RunDirectory, RunFileError


def opened(runs: Path, *overrides: str) -> RunDirectory:
    """A new run's folder, which no process holds."""
    directory = RunDirectory(compose("experiment=digits_smoke", f"runs_dir={runs}", "run_id=mine", *overrides))
    directory.open()
    directory.close()
    return directory


@pytest.mark.parametrize(
    "content",
    [b"seed: [0\nmodel", b"", b"just words", b"- a list", b"no_such_key: 1", b"seed: many", b"seed: \xff"],
    ids=["no_yaml", "empty", "text", "list", "key", "value", "bytes"],
)
def test_a_damaged_configuration_is_one_error_and_fresh_is_a_way_out(content: bytes, tmp_path: Path) -> None:
    directory = opened(tmp_path)
    directory.config_file.write_bytes(content)
    with pytest.raises(
        RunFileError, match=r"mine/config\.yaml is damaged \(.+\), so .*run_id=NAME.*fresh=true"
    ) as caught:
        directory.check_configuration()
    assert "\n" not in str(caught.value)
    opened(tmp_path, "fresh=true").check_configuration()


def test_a_run_from_before_there_were_planes_goes_on(tmp_path: Path) -> None:
    directory = opened(tmp_path)
    text = directory.config_file.read_text()
    assert text.count("    planes: 1\n") == 1
    directory.config_file.write_text(text.replace("    planes: 1\n", ""))
    directory.check_configuration()
    two = compose("experiment=digits_smoke", f"runs_dir={tmp_path}", "run_id=mine", "quant.weights.planes=2")
    with pytest.raises(ConfigError, match=r"quant\.weights\.planes: nothing there, 2 here"):
        RunDirectory(two).check_configuration()


def test_all_settings_of_another_configuration_are_named(tmp_path: Path) -> None:
    opened(tmp_path, "quant=w2a8_n4")
    other = compose("experiment=digits_smoke", f"runs_dir={tmp_path}", "run_id=mine", "quant=w4a8_n4", "seed=3")
    with pytest.raises(
        ConfigError, match=r"quant\.weights\.bits: 2 there, 4 here; .*seed: 0 there, 3 here\): "
    ) as caught:
        RunDirectory(other).check_configuration()
    assert "{" not in str(caught.value)


def test_a_run_that_failed_before_anything_was_made_leaves_its_name_free(tmp_path: Path) -> None:
    failed = opened(tmp_path, "seed=1")
    failed.record("data", "fingerprint")  # known before anything is done
    (failed.path / "notes.txt").write_text("mine")
    taken = opened(tmp_path, "seed=2")
    taken.check_configuration()
    assert taken.stored_config().seed == 2
    assert taken.result("data") is None
    assert (taken.path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("made", ["result", "checkpoint", "sensitivity.json", "recipe.yaml"])
def test_a_run_that_has_made_something_keeps_its_name(made: str, tmp_path: Path) -> None:
    run = opened(tmp_path, "seed=1")
    if made == "result":
        run.record("full_precision", 0.5)
    else:
        (run.checkpoints / "last.ckpt" if made == "checkpoint" else run.path / made).write_text("kept")
    with pytest.raises(ConfigError, match=r"seed: 1 there, 2 here"):
        opened(tmp_path, "seed=2")
    if made != "result":
        assert any(
            file.read_text() == "kept" for file in run.path.rglob("*") if file.is_file() and file.suffix != ".lock"
        )
