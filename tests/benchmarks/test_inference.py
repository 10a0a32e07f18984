"""The inference benchmark on a tiny network: all of ours are timed and equal; what is not installed says so."""

from __future__ import annotations

import sys

import inference
import pytest

SETTING = ["cifar_resnet8", "--side", "32", "--batch", "3", "--seconds", "0.01", "--rounds", "1", "--threads", "1"]


def test_ours_are_timed_and_equal(capsys: pytest.CaptureFixture[str]) -> None:
    inference.main([*SETTING, "--only", "lowprec*", "ONNX Runtime FP32", "--reference"])
    table = capsys.readouterr().out.splitlines()
    for residual in ("requantized", "accumulator"):
        for runtime in ("PyTorch", "ONNX Runtime", "OpenVINO"):
            (line,) = [line for line in table if line.startswith(f"lowprec, {runtime}, {residual}")]
            assert line.endswith("yes")
    assert any(line.startswith("ONNX Runtime FP32") and "x " in line for line in table)
    assert any(line.startswith("lowprec, integer executor") for line in table)
    assert not any("failed" in line for line in table)


def test_a_quantizer_that_is_missing_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    inference.main([*SETTING, "--only", "*NNCF*"])
    assert 'OpenVINO int8 (NNCF) failed: pip install "lowprec[peers]"' in capsys.readouterr().out


def test_codes_that_differ_are_told() -> None:
    candidate = inference.Candidate(lambda: None, 1, codes_equal=False)  # type: ignore[arg-type,return-value]
    speeds = {inference.REFERENCE: [1.0], "ours": [2.0]}
    full = inference.Candidate(lambda: None, 1)  # type: ignore[arg-type,return-value]
    text = inference.table({inference.REFERENCE: full, "ours": candidate}, {}, speeds)
    assert text.endswith("NO")
    assert "2.00x" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds 0: give at least 1"),
        (["--side", "0"], "--side 0: give at least 1"),
        (["--only", "lowprec*", "tensorrt*"], "--only tensorrt*: no such candidate; there are PyTorch FP32"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        inference.main([*SETTING, *arguments])
    assert message in capsys.readouterr().err
