"""What is done with a finished run: evaluated, verified, exported; and a run that is not there."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from conftest import FinishedRun, compose

from lowprec.run.command_line import run_to_exit_code
from lowprec.run.stages import run


@pytest.mark.parametrize("name", [("experiment=digits_smoke",), ("run_id=digits_smoke",)])
def test_tasks_find_a_finished_run(
    name: tuple[str], copied_digits_run: Callable[[], Path], digits_run: FinishedRun
) -> None:
    runs = copied_digits_run()
    overrides = (*name, f"runs_dir={runs}")
    evaluated = run(compose(*overrides, "task=evaluate"))
    assert evaluated == {key: digits_run.summary[key] for key in ("integer", "onnx")}
    verified = run(compose(*overrides, "task=verify"))
    assert verified == digits_run.summary["verify"]
    exported = runs / "digits_smoke" / "model.onnx"
    content = exported.read_bytes()
    exported.unlink()
    run(compose(*overrides, "task=export"))
    assert exported.read_bytes() == content


@pytest.mark.parametrize("task", ["evaluate", "verify", "export"])
def test_a_task_without_a_run_is_one_clear_error(
    task: str, digits_run: FinishedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    config = compose(f"runs_dir={digits_run.runs_dir}", f"task={task}", "run_id=nothing")
    assert run_to_exit_code(config) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: there is no run in")
    assert "runs there: digits_smoke" in message
    assert not (digits_run.runs_dir / "nothing").exists()


def test_a_changed_file_does_not_pass_verification(
    copied_digits_run: Callable[[], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    runs = copied_digits_run()
    checkpoints = runs / "digits_smoke" / "checkpoints"
    shutil.copy(checkpoints / "post_training.safetensors", checkpoints / "best.safetensors")
    assert run_to_exit_code(compose("experiment=digits_smoke", f"runs_dir={runs}", "task=verify")) == 1
    captured = capsys.readouterr()
    assert "codes differ" in captured.err
    assert "Traceback" not in captured.err


def test_one_changed_number_in_model_onnx_fails_verification_and_is_named(
    copied_digits_run: Callable[[], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    runs = copied_digits_run()
    file, name = runs / "digits_smoke" / "model.onnx", "stage2.0.conv1"
    proto = onnx.load(file)
    bias = next(tensor for tensor in proto.graph.initializer if tensor.name == f"{name}.bias")
    array = onnx.numpy_helper.to_array(bias).copy()
    array[1] += 1 << 12
    bias.CopyFrom(onnx.numpy_helper.from_array(array, bias.name))
    onnx.save(proto, file)
    assert run_to_exit_code(compose("experiment=digits_smoke", f"runs_dir={runs}", "task=verify")) == 1
    captured = capsys.readouterr()
    assert f"codes differ; the first in {name} (ONNX Runtime against the integer executor: " in captured.err
    assert "by up to" in captured.err
    assert "Traceback" not in captured.err
    # The table says the same: this tensor and some behind it, in ONNX Runtime alone.
    rows = [line.split() for line in captured.out.splitlines() if "  ONNX Runtime " in line]
    assert next(row[0] for row in rows if row[-2] != "0") == name
    for other in ("fake-quant", "fast executor"):
        assert re.search(rf"^{other}: 16 tensors, .* codes, 0 differ$", captured.out, re.MULTILINE)


@pytest.mark.parametrize("count", [1, 50, 100_000])
def test_as_many_images_are_verified_as_were_asked_for(count: int, digits_run: FinishedRun) -> None:
    overrides = ("experiment=digits_smoke", f"runs_dir={digits_run.runs_dir}", "task=verify")
    verified = run(compose(*overrides, f"verify.images={count}"))
    whole = digits_run.summary["verify"]
    images = min(count, whole["images"])
    assert verified == {
        "images": images,
        "compared_codes": whole["compared_codes"] // whole["images"] * images,
        "mismatched_codes": 0,
    }


@pytest.mark.parametrize("task", ["verify", "evaluate"])
@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "export.runtime=openvino",
            r"export.runtime=openvino: .*model.onnx has onnxruntime; .*task=export writes it anew",
        ),
        ("export.batch_size=1", r"export.batch_size=1: .* has None"),
        ("export.opset=20", r"export.opset=20: .* has 18"),
        ("export.format=packed", r"there is no .*model.packed.onnx: the same command with task=export writes one"),
    ],
)
def test_a_file_that_is_not_what_the_command_says_is_not_taken_for_it(
    task: str, option: str, message: str, digits_run: FinishedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    config = compose("experiment=digits_smoke", f"runs_dir={digits_run.runs_dir}", f"task={task}", option)
    assert run_to_exit_code(config) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_missing_checkpoint_of_the_fine_tuning_is_named(
    copied_digits_run: Callable[[], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    runs = copied_digits_run()
    (runs / "digits_smoke" / "checkpoints" / "best.safetensors").unlink()
    assert run_to_exit_code(compose("experiment=digits_smoke", f"runs_dir={runs}", "task=verify")) == 1
    assert "best.safetensors" in capsys.readouterr().err


def test_a_finished_run_is_exported_for_openvino_and_verified_there(
    copied_digits_run: Callable[[], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ("experiment=digits_smoke", f"runs_dir={copied_digits_run()}", "verify.images=60")
    for export, says in ((["export.runtime=openvino"], "OpenVINO"), ([], "ONNX Runtime")):
        run(compose(*overrides, *export, "task=export"))
        capsys.readouterr()
        # The file says itself what it is for.
        assert run(compose(*overrides, "task=verify"))["mismatched_codes"] == 0
        output = capsys.readouterr().out
        assert f"{says}: 16 tensors, " in output
        assert ("OpenVINO" in output) == (says == "OpenVINO")
        assert run(compose(*overrides, "task=evaluate"))["onnx"]["top1"] > 0.9
