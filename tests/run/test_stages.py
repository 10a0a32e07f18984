"""A whole run: its files, its figures, and that it goes on where it was cut off."""

from __future__ import annotations

import csv
import io
import json
import signal
import subprocess
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import FinishedRun, compose, start_train
from rich.console import Console
from wandb_files import wandb_artifacts, wandb_records

from lowprec.config import ConfigError
from lowprec.config.debug import OVERFIT_EPOCHS
from lowprec.data import DataError
from lowprec.models import create_model, save_checkpoint
from lowprec.run.command_line import run_to_exit_code
from lowprec.run.current import Run
from lowprec.run.data import run_data
from lowprec.run.directory import RunDirectory, RunInUseError
from lowprec.run.full_precision import build_model
from lowprec.run.stages import quantize, run
from lowprec.run.tasks import finished_run


def without_seconds(summary: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in summary.items() if key != "seconds"}


def first_process_that(says: str, *overrides: str, cwd: Path) -> subprocess.Popen[str]:
    """A started train.py that has just printed a line with these words."""
    process = start_train(*overrides, cwd=cwd)
    assert process.stdout is not None
    for line in process.stdout:
        if says in line:
            return process
    raise AssertionError(f"train.py never said {says!r}: {process.stderr and process.stderr.read()}")


def test_the_summary_holds_exactly_what_was_agreed(digits_run: FinishedRun) -> None:
    summary = digits_run.summary
    assert {key: list(value) if isinstance(value, dict) else value for key, value in summary.items()} == {
        "experiment": "digits_smoke",
        "model": "cifar_resnet8",
        "data": "digits",
        "recipe": "w2a8_n4",
        "full_precision": ["top1"],
        "post_training": ["top1"],
        "fine_tuned": ["top1", "epochs"],
        "integer": ["top1"],
        "onnx": ["top1"],
        "verify": ["images", "compared_codes", "mismatched_codes"],
        "cost": ["macs", "multiplications_replaced", "weight_bits", "fp32_bytes", "packed_bytes", "integer_mac_share"],
        "seconds": ["prepare", "calibrate", "fine_tune", "export"],
    }


def test_what_was_validated_is_what_is_shipped(digits_run: FinishedRun) -> None:
    summary = digits_run.summary
    assert summary["verify"]["mismatched_codes"] == 0
    assert summary["verify"]["images"] == 359
    assert summary["integer"]["top1"] == summary["onnx"]["top1"] == summary["fine_tuned"]["top1"]
    assert summary["full_precision"]["top1"] > 0.95
    assert summary["fine_tuned"]["top1"] > summary["full_precision"]["top1"] - 0.03
    packed = (digits_run.directory / "model.safetensors").stat().st_size
    assert packed == pytest.approx(summary["cost"]["packed_bytes"], rel=0.03)


def test_the_files_of_a_run(digits_run: FinishedRun) -> None:
    found = {path.name for path in digits_run.directory.iterdir() if not path.name.startswith(".")}
    assert found == {
        *("config.yaml", "run.json", "summary.json", "metrics.csv"),
        *("checkpoints", "model.safetensors", "model.onnx", "report.html", "wandb"),
    }
    checkpoints = {path.name for path in (digits_run.directory / "checkpoints").iterdir()}
    assert checkpoints == {"best.safetensors", "last.ckpt", "post_training.safetensors"}
    # Nothing of Hydra's, nothing half-written, and the baseline's own checkpoints are gone.
    assert {path.name for path in digits_run.runs_dir.iterdir()} == {"baselines", "digits_smoke"}
    baselines = digits_run.runs_dir / "baselines"
    assert sorted(path.suffix for path in baselines.iterdir()) == [".lock", ".safetensors"]


def test_calibration_says_how_many_images_there_were(tmp_path: Path) -> None:
    overrides = ("experiment=digits_smoke", "data.limit_train=30", "data.limit_test=5", "calibration.images=64")
    config, says = compose(*overrides, f"runs_dir={tmp_path}"), io.StringIO()
    directory = RunDirectory(config)
    directory.state = directory.open()
    current = Run(config, directory, run_data(config), Console(file=says, width=500), torch.device("cpu"))
    quantize(current, build_model(config, num_classes=10).eval())
    directory.close()
    assert "calibrate: exponents and weights on 30 images\n" in says.getvalue()


def test_the_config_and_the_commit_are_kept(digits_run: FinishedRun) -> None:
    config = yaml.safe_load((digits_run.directory / "config.yaml").read_text())
    assert config["experiment"] == "digits_smoke"
    assert config["quant"]["weights"]["cluster_size"] == 4
    state = json.loads((digits_run.directory / "run.json").read_text())
    commit = state["git"]["commit"]
    assert commit is None or len(commit) == 40


def test_the_output_is_a_story_and_one_table(digits_run: FinishedRun) -> None:
    lines = digits_run.output.splitlines()
    assert len([line for line in lines if line.startswith("full precision  epoch")]) == 12
    assert len([line for line in lines if line.startswith("fine-tuning  epoch")]) == 6
    for words in ("full precision", "post-training", "fine-tuned", "integer", "ONNX Runtime", "differing codes"):
        assert [cells[1].strip() for line in lines if len(cells := line.split("│")) > 3].count(words) == 1
    assert "\x1b" not in digits_run.output
    assert digits_run.errors == ""


def test_metrics_are_logged_by_group(digits_run: FinishedRun) -> None:
    header, *rows = (digits_run.directory / "metrics.csv").read_text().splitlines()
    columns = header.split(",")
    assert len([row for row in rows if row.split(",")[columns.index("val/top1")]]) == 6
    assert {"train/loss", "train/top1", "val/loss", "val/top1"} <= set(columns)
    layers = {column.removeprefix("sparsity/") for column in columns if column.startswith("sparsity/")}
    assert len(layers) == 10
    assert layers == {column.removeprefix("flips/") for column in columns if column.startswith("flips/")}


def test_wandb_is_offline_without_a_key_and_holds_the_summary(digits_run: FinishedRun) -> None:
    (folder,) = (digits_run.directory / "wandb").glob("offline-run-*-digits_smoke")
    assert json.loads((folder / "files" / "summary.json").read_text()) == digits_run.summary
    summary: dict[str, Any] = {}
    config: dict[str, Any] = {}
    for record in wandb_records(digits_run.directory):
        for update in record.summary.update:
            summary["/".join(update.nested_key) or update.key] = json.loads(update.value_json)
        for update in (*record.run.config.update, *record.config.update):
            config[update.key] = json.loads(update.value_json)
    assert summary["integer/top1"] == digits_run.summary["integer"]["top1"]
    assert summary["verify/mismatched_codes"] == 0
    assert config["quant"]["name"] == "w2a8_n4"
    assert "commit" in config["git"]


def test_wandb_holds_the_report_and_all_of_it_lies_in_the_runs_folder(digits_run: FinishedRun) -> None:
    (folder,) = (digits_run.directory / "wandb").glob("offline-run-*-digits_smoke")
    records = wandb_records(digits_run.directory)
    logged: dict[str, dict[str, Any]] = defaultdict(dict)
    for record in records:
        for item in record.history.item:
            key, _, field = "/".join(item.nested_key).rpartition("/")
            logged[key][field] = json.loads(item.value_json)
    layers = {"conv1", "classifier", *(f"stage{stage}.0.conv{conv}" for stage in (1, 2, 3) for conv in (1, 2))}
    layers |= {f"stage{stage}.0.shortcut.0" for stage in (2, 3)}
    assert {key.removeprefix("weights/") for key in logged if key.startswith("weights/")} == layers
    # The first convolution has 8-bit weights and no clusters.
    assert {key.removeprefix("scales/") for key in logged if key.startswith("scales/")} == layers - {"conv1"}
    assert sum(logged["weights/classifier"]["values"]) == 32 * 10
    assert sum(logged["scales/classifier"]["values"]) == 32 * 10 / 4
    tables = {key.removeprefix("report/") for key in logged if logged[key].get("_type") == "table-file"}
    assert {"layers", "activations", "confusions", "ladder_table", "depth_table", "confusion_table"} <= tables
    rows = {table: json.loads((folder / "files" / logged[f"report/{table}"]["path"]).read_text()) for table in tables}
    assert {row[0] for row in rows["layers"]["data"]} == layers
    summary = digits_run.summary
    assert [row[1] for row in rows["ladder_table"]["data"]] == [
        summary[stage]["top1"] for stage in ("full_precision", "post_training", "fine_tuned", "integer", "onnx")
    ]
    assert sum(row[2] for row in rows["confusion_table"]["data"]) == 359
    page = folder / "files" / logged["report/page"]["path"]
    assert page.read_bytes() == (digits_run.directory / "report.html").read_bytes()
    entries = [entry for artifact in wandb_artifacts(records) for entry in artifact.manifest.contents]
    files = [Path(entry.local_path) for entry in entries]
    assert len(files) > len(tables)
    for file in files:
        assert file.is_file()
        assert digits_run.directory.resolve() in file.resolve().parents


def test_the_same_seed_gives_the_same_summary(digits_run: FinishedRun, tmp_path: Path) -> None:
    again = run(compose("experiment=digits_smoke", f"runs_dir={tmp_path}", "logger=none", "trainer.progress=none"))
    assert without_seconds(again) == without_seconds(digits_run.summary)
    assert not (tmp_path / "digits_smoke" / "metrics.csv").exists()


def test_a_run_that_was_killed_and_stopped_ends_like_an_undisturbed_one(
    digits_run: FinishedRun, tmp_path: Path
) -> None:
    overrides = ("experiment=digits_smoke", f"runs_dir={tmp_path}")
    killed = first_process_that("full precision  epoch 4/12", *overrides, cwd=tmp_path)
    killed.kill()
    killed.communicate()
    stopped = first_process_that("fine-tuning  epoch 2/6", *overrides, cwd=tmp_path)
    stopped.send_signal(signal.SIGINT)
    _, errors = stopped.communicate(timeout=60)
    assert stopped.returncode == 130
    assert "Traceback" not in errors
    assert "the same command goes on with the run" in errors
    with pytest.raises(ConfigError, match="is not finished"):
        finished_run(compose(*overrides, "task=verify"))
    last = start_train(*overrides, cwd=tmp_path)
    output, errors = last.communicate(timeout=120)
    assert last.returncode == 0, errors
    # What was done was not done again.
    assert "full precision  epoch" not in output
    assert "fine-tuning  epoch 1/6" not in output
    assert "calibrate" not in output
    summary = json.loads((tmp_path / "digits_smoke" / "summary.json").read_text())
    assert without_seconds(summary) == without_seconds(digits_run.summary)
    with (tmp_path / "digits_smoke" / "metrics.csv").open(newline="") as file:
        assert len([row for row in csv.DictReader(file) if row["val/top1"]]) == 6


def test_a_finished_run_prints_its_table_and_how_to_start_afresh(
    digits_run: FinishedRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.stat().st_mtime_ns for path in digits_run.directory.rglob("*")}
    process = start_train("experiment=digits_smoke", f"runs_dir={digits_run.runs_dir}", cwd=digits_run.runs_dir)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "differing codes" in output
    assert "fresh=true starts it afresh, run_id=NAME makes another one" in output
    assert {path: path.stat().st_mtime_ns for path in digits_run.directory.rglob("*")} == before
    config = compose("experiment=digits_smoke", f"runs_dir={digits_run.runs_dir}")
    assert run(config) == digits_run.summary


def test_fresh_starts_afresh_with_the_baseline_kept(copied_digits_run: Callable[[], Path]) -> None:
    runs = copied_digits_run()
    (runs / "digits_smoke" / "mark").touch()
    config = compose("experiment=digits_smoke", f"runs_dir={runs}", "fresh=true", "logger=none")
    directory = RunDirectory(config)
    directory.open()
    assert not directory.finished
    assert directory.unique_name == "digits_smoke-2"
    assert sorted(path.name for path in directory.path.iterdir()) == [".lock", "checkpoints", "config.yaml", "run.json"]
    assert list((runs / "baselines").glob("*.safetensors"))
    directory.close()


def test_post_training_alone_leaves_null_for_what_was_not_done(copied_digits_run: Callable[[], Path]) -> None:
    runs = copied_digits_run()
    overrides = ("experiment=digits_smoke", "trainer.max_epochs=0", f"runs_dir={runs}", "logger=none")
    summary = run(compose(*overrides))
    assert summary["fine_tuned"] is None
    assert summary["integer"] == summary["onnx"] == summary["post_training"]
    assert summary["verify"]["mismatched_codes"] == 0
    assert (runs / "digits_smoke-trainer.max_epochs_0" / "summary.json").is_file()
    assert run(compose(*overrides, "task=verify"))["mismatched_codes"] == 0


def test_another_configuration_in_the_same_folder_is_refused(
    digits_run: FinishedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    config = compose(
        "experiment=digits_smoke", f"runs_dir={digits_run.runs_dir}", "run_id=digits_smoke", "optim.learning_rate=0.5"
    )
    assert run_to_exit_code(config) == 2
    message = capsys.readouterr().err
    assert "another configuration (optim.learning_rate: 0.03 there, 0.5 here)" in message
    assert "run_id=NAME" in message


def test_two_processes_cannot_work_on_one_run(copied_digits_run: Callable[[], Path]) -> None:
    config = compose("experiment=digits_smoke", f"runs_dir={copied_digits_run()}")
    first = RunDirectory(config)
    first.open()
    with pytest.raises(RunInUseError, match="another process"):
        RunDirectory(config).open()
    first.close()


@pytest.mark.parametrize("mode", ["one_batch", "overfit", "profile"])
def test_debug_modes_go_through_all_stages(
    mode: str, copied_digits_run: Callable[[], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    runs = copied_digits_run()
    overrides = [
        "experiment=digits_smoke",
        "trainer=debug",
        f"trainer.debug={mode}",
        f"runs_dir={runs}",
        "run_id=debug",
    ]
    overrides += [
        "trainer.threads=1",
        "trainer.max_epochs=8",
        "trainer.precision=32",
        "data.batch_size=32",
        "calibration.reconstruct=false",  # a start from which there is something to learn
    ]
    summary = run(compose(*overrides, "baseline.max_epochs=2"))
    assert (summary["verify"]["images"], summary["verify"]["mismatched_codes"]) == (32, 0)
    with (runs / "debug" / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert len(rows) == summary["fine_tuned"]["epochs"] == (OVERFIT_EPOCHS if mode == "overfit" else 1)
    if mode == "overfit":
        assert float(rows[-1]["train/loss"]) < 0.1 * float(rows[0]["train/loss"])
        assert float(rows[-1]["train/top1"]) == 1.0
    assert ((runs / "debug" / "profile.txt").is_file()) == (mode == "profile")
    # Baselines of a debug mode are kept apart.
    assert len(list((runs / "baselines").glob("*.safetensors"))) == 2


def test_differing_codes_fail_the_run_after_its_table_and_summary(
    copied_digits_run: Callable[[], Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowprec.run import stages

    def report_of(*arguments: Any, **keywords: Any) -> Any:
        report = honest(*arguments, **keywords)
        report.comparisons[0].mismatched = 7
        return report

    honest = stages.verify
    monkeypatch.setattr(stages, "verify", report_of)
    runs = copied_digits_run()
    overrides = ("experiment=digits_smoke", f"runs_dir={runs}", "logger=none", "trainer.max_epochs=0")
    assert run_to_exit_code(compose(*overrides)) == 1
    captured = capsys.readouterr()
    assert "differing codes" in captured.out
    assert "7 of" in captured.err
    summary = json.loads((runs / "digits_smoke-trainer.max_epochs_0" / "summary.json").read_text())
    assert summary["verify"]["mismatched_codes"] == 7
    # And a finished run that failed goes on failing.
    assert run_to_exit_code(compose(*overrides)) == 1


def test_a_checkpoint_of_ones_own_is_where_a_run_starts(tmp_path: Path) -> None:
    model = create_model("cifar_resnet8", in_channels=1, num_classes=10, width=8)
    save_checkpoint(model, tmp_path / "mine.safetensors", {})
    overrides = ("experiment=digits_smoke", f"runs_dir={tmp_path}", "logger=none", "trainer.max_epochs=0")
    summary = run(compose(*overrides, f"model.checkpoint={tmp_path}/mine.safetensors"))
    assert summary["full_precision"]["top1"] < 0.5
    assert not (tmp_path / "baselines").exists()
    config = compose(*overrides, "model.checkpoint=nowhere.pt")
    assert run_to_exit_code(config) == 1


@pytest.mark.parametrize(
    ("overrides", "code", "words"),
    [
        (["model.name=resnet_fifty"], 2, "unknown model"),
        (["+model.arguments.depth=9"], 2, "depth"),
        (["data.num_classes=7"], 2, "data.num_classes=7: the data set digits has 10"),
        (["data=imagenet", "data.root=/nowhere", "model=resnet50"], 1, "/nowhere"),
        (["quant.rules=[{pattern: 'layer9.*', bits: 4}]", "baseline.max_epochs=2"], 2, "layer9"),
    ],
)
def test_what_is_found_wrong_later_is_one_message_too(
    overrides: list[str], code: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = compose("experiment=digits_smoke", f"runs_dir={tmp_path}", *overrides)
    assert run_to_exit_code(config) == code
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert words in message
    assert "Traceback" not in message


def test_data_errors_are_not_hidden_from_those_who_call_run(tmp_path: Path) -> None:
    config = compose(f"runs_dir={tmp_path}", "data=image_folder", "data.root=/nowhere", "model=resnet18")
    with pytest.raises(DataError, match="/nowhere"):
        run(config)


@pytest.mark.parametrize(
    ("override", "code", "message"),
    [
        ('quant.rules=[{pattern: "nosuch*", bits: 8}]', 2, "matches none of the 10 layers"),
        ("model.name=timm:test_nfnet", 1, "conv2d() in stem.conv1"),
    ],
)
def test_what_cannot_be_quantized_is_refused_before_anything_is_trained(
    override: str, code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = ["model=resnet18", "model.pretrained=false"] if override.startswith("model") else []
    config = compose("experiment=digits_smoke", f"runs_dir={tmp_path}", override, *extra)
    assert run_to_exit_code(config) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "baselines").exists()
