"""The estimate for many GPUs: inputs are measured, and the formula is what it says."""

from __future__ import annotations

import argparse

import pytest
import scaling
import timm


def test_the_formula() -> None:
    measured = scaling.Measured(100_000_000, 200_000_000, 0.5, 10.0, 0.001, 400.0)
    options = argparse.Namespace(
        gpus=4, gpus_per_node=2, batch=100, images_per_second=1000.0, gigabits=8.0, checkpoint_minutes=10.0
    )
    text = "\n".join(scaling.estimate(measured, options))
    # 2 · 3/4 · 100 MB at 1 GB/s are 150 ms, of which two thirds of 100 ms are hidden: 100 + 83.3 + 1.
    assert "100.0 ms of computing, 150.0 ms of network behind it, 1.00 ms to agree: 184.3 ms, 2,170 images/s" in text
    assert "4,000 images/s in all, 5 cores on each node" in text
    assert "0.08% of the time" in text
    assert "5.2 minutes of work and start" in text


@pytest.mark.slow
def test_inputs_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    scaling.main(["resnet10t", "--side", "32", "--images", "40"])
    output = capsys.readouterr().out
    gradients = sum(parameter.numel() * 4 for parameter in timm.create_model("resnet10t").parameters()) / 1e6
    assert f"measured: gradients {gradients:.1f} MB, checkpoint" in output
    assert "of 64 GPUs" in output
