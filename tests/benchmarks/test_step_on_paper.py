"""The estimate of a training step: bytes and operations counted by hand."""

from __future__ import annotations

import math

import pytest
import step_on_paper
import torch
from step_on_paper import KINDS, Device, Shapes, kept_bytes, step_seconds
from torch import nn

PLAIN, QUANTIZED, INTEGERS = KINDS
ONE_BYTE_A_SECOND = Device(bandwidth=1.0, bf16=math.inf, int8=math.inf)
# Elements for a batch of 10: 3 x 4 x 4 images, 8 x 4 x 4 outputs, depthwise the same again, 5 x 4 x 4 at the end.
IMAGES, WIDE, NARROW = 480, 1280, 800
WEIGHTS = 8 * 27, 8 * 9, 5 * 8


class Branches(nn.Module):
    """Dense, depthwise, and two pointwise convolutions that take one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.left, self.right = nn.Conv2d(8, 5, 1), nn.Conv2d(8, 5, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.depthwise(self.norm(self.stem(images)))
        result: torch.Tensor = self.left(features) + self.right(features)
        return result


@pytest.fixture
def shapes() -> Shapes:
    return Shapes.of(Branches(), 10, 4)


def test_bytes(shapes: Shapes) -> None:
    stem = 2 * IMAGES + 2 * WEIGHTS[0] + 2 * WIDE + 2 * WIDE + 2 * IMAGES + 4 * WEIGHTS[0]
    depthwise = 3 * (2 * WIDE + 2 * WIDE) + (2 + 2 + 4) * WEIGHTS[1]
    pointwise = 3 * (2 * WIDE + 2 * NARROW) + (2 + 2 + 4) * WEIGHTS[2]
    weights = WEIGHTS[0] + WEIGHTS[1] + 2 * WEIGHTS[2]
    plain = stem + depthwise + 2 * pointwise + (2 + 4 + 4 + 6) * WIDE + (4 + 2 + 20) * weights
    assert step_seconds(shapes, PLAIN, ONE_BYTE_A_SECOND) == plain
    quantized = plain + 3 * WIDE / 8 + 4 * weights
    assert step_seconds(shapes, QUANTIZED, ONE_BYTE_A_SECOND) == quantized
    # Read as bytes twice; weights written and read as bytes; the pointwise layers' one input written as bytes.
    dense = WEIGHTS[0] + 2 * WEIGHTS[2]
    saved = 2 * IMAGES + 2 * 2 * WIDE + 2 * dense + WIDE
    assert step_seconds(shapes, INTEGERS, ONE_BYTE_A_SECOND) == quantized - saved


def test_operations(shapes: Shapes) -> None:
    device = Device(bandwidth=math.inf, bf16=1.0, int8=2.0)
    stem, depthwise, pointwise = WIDE * 27, WIDE * 9, NARROW * 8
    plain = 2 * 2 * stem + 3 * 2 * depthwise + 2 * 3 * 2 * pointwise
    assert step_seconds(shapes, PLAIN, device) == plain
    assert step_seconds(shapes, INTEGERS, device) == plain - (stem + 2 * pointwise)


def test_kept_for_the_backward_pass(shapes: Shapes) -> None:
    plain = 2 * (IMAGES + 2 * WIDE) + 2 * WIDE
    assert kept_bytes(shapes, PLAIN) == plain
    assert kept_bytes(shapes, QUANTIZED) == plain + WIDE / 8
    assert kept_bytes(shapes, INTEGERS) == plain + WIDE / 8 - IMAGES - WIDE


def test_a_line_for_each_kind(capsys: pytest.CaptureFixture[str]) -> None:
    step_on_paper.main(["resnet10t", "--batch", "2", "--side", "32"])
    rows = [row for row in capsys.readouterr().out.splitlines() if row.startswith(("plain", "lowprec"))]
    assert [row[:26].strip() for row in rows] == [kind.name for kind in KINDS]
    assert rows[0].split()[2] == "1.00x"
