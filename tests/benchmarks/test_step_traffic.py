"""The count of launches and bytes: against one made by hand, and a guard for the kernels of a GPU's training step."""

from __future__ import annotations

import pytest
import torch
from step_traffic import Counter, Memory, Traffic, counted_kernels, main, step_traffic, without_data
from torch import nn

import lowprec
from lowprec.layers.weights import WeightQuantizer
from lowprec.models import create_model
from lowprec.numerics.fixed_point import UNSIGNED_8_BIT
from lowprec.numerics.straight_through import StraightThroughActivation, straight_through_activation
from lowprec.recipe import WeightScheme

# Elements.
VALUES, WEIGHTS, OUTPUTS = 16 * 8 * 5 * 5, 4 * 8 * 9, 4


def test_operators_by_hand() -> None:
    """A launch reads its operands and writes its results; views launch nothing."""
    values = torch.zeros(16, 8, 5, 5, dtype=torch.bfloat16, device="meta")
    counted = Traffic()
    with Counter(counted):
        flat = values.flatten(1).T  # nothing
        sums = flat + flat  # two operands, a result
        sums.mul_(2.0)  # in place: read and written
        torch.empty_like(values).copy_(values)
        torch.neg(values, out=torch.empty_like(values))
    assert counted == Traffic(launches=4, bytes=2 * VALUES * (3 + 2 + 2 + 2))


@pytest.mark.parametrize("adds", [False, True])
def test_an_activation_by_hand(adds: bool) -> None:
    values = torch.zeros(16, 8, 5, 5, dtype=torch.bfloat16, device="meta", requires_grad=True)
    exponent = torch.zeros((), dtype=torch.int32, device="meta")
    counted = Traffic()
    with counted_kernels(counted), Counter(counted):
        addend = torch.empty_like(values) if adds else None
        result = straight_through_activation(values, exponent, UNSIGNED_8_BIT, "relu", addend=addend)
        assert counted == Traffic(launches=1, bytes=2 * VALUES * (3 if adds else 2) + VALUES // 8 + 4)
        StraightThroughActivation.backward(result.grad_fn, torch.empty_like(result))
    assert counted.launches == 2
    assert counted.bytes == 2 * VALUES * (5 if adds else 4) + 2 * (VALUES // 8) + 4


@pytest.mark.parametrize(("bits", "of_a_cluster"), [(2, 8), (4, 4)])
def test_a_weight_by_hand(bits: int, of_a_cluster: int) -> None:
    weight = torch.zeros(4, 8, 3, 3, device="meta")
    quantizer = WeightQuantizer((4, 8, 3, 3), WeightScheme(bits=bits, cluster_size=4)).to("meta")
    clusters = OUTPUTS * 2
    counted = Traffic()
    with counted_kernels(counted), Counter(counted):
        quantizer.descend(weight)
        # A scale is read and written, a threshold written.
        assert counted == Traffic(launches=1, bytes=4 * WEIGHTS + clusters * (of_a_cluster + 4))
        quantizer.with_exponents(weight)
    assert counted.launches == 2
    assert counted.bytes == 4 * WEIGHTS * 3 + clusters * (2 * of_a_cluster + 4) + 4 * OUTPUTS


def test_memory_by_hand() -> None:
    """What is held, once whatever the views of it, and the most of it."""
    values = torch.zeros(16, 8, 5, 5, dtype=torch.bfloat16, device="meta")
    memory = Memory([values, values.flatten()])
    with Counter(Traffic(), memory):
        first = values + values
        assert (memory.held, memory.peak) == (2 * VALUES * 2, 2 * VALUES * 2)
        second = first.float()
        del first
        third = second.view(-1)[:5]
        del second
        assert (memory.held, memory.peak) == (VALUES * (2 + 4), VALUES * (2 + 2 + 4))
        del third
    assert memory.held == 2 * VALUES


def test_the_peak_of_a_step_by_hand() -> None:
    """Before a convolution's backward pass there are weight, images, outputs, their gradients and what is taken of them."""
    model = nn.Sequential(nn.Conv2d(8, 4, 1, bias=False), nn.Flatten()).to("meta", torch.bfloat16)
    images = torch.zeros(16, 8, 5, 5, dtype=torch.bfloat16, device="meta")
    outputs, weights, scalars = 2 * 16 * 4 * 25, 2 * 4 * 8, 16
    _, peak = step_traffic(model, images, kernels=False)
    # The outputs, their logarithms, and the gradients of both, of which the first waits for the second.
    least = images.nbytes + weights + 4 * outputs
    assert least <= peak <= least + scalars


@pytest.mark.parametrize(
    ("name", "launches", "moved", "held"),
    [("resnet18", 1.45, 1.08, 0.9), ("mobilenetv2_100", 1.36, 0.9, 0.75), ("resnet50", 1.4, 1.09, 1.05)],
)
def test_kernels_move_and_hold_hardly_more_than_a_plain_step(
    name: str, launches: float, moved: float, held: float
) -> None:
    """Limits lie a few percent above what was counted."""
    batch = torch.zeros(64, 3, 224, 224, dtype=torch.bfloat16, device="meta")
    traffic: dict[str, Traffic] = {}
    peak: dict[str, int] = {}
    for kind in ("plain", "kernels"):
        model = create_model(name).eval()
        if kind == "kernels":
            model = lowprec.prepare(model, "w2a8_n4", torch.zeros(2, 3, 64, 64))
        traffic[kind], peak[kind] = step_traffic(without_data(model), batch, kernels=kind == "kernels")
    assert traffic["kernels"].launches / traffic["plain"].launches < launches
    assert traffic["kernels"].bytes / traffic["plain"].bytes < moved
    assert peak["kernels"] / peak["plain"] < held


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["resnet18", "--batch", "8", "--side", "64", "--recipe", "w4a8_n4"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "resnet18, 8 images of 64, bfloat16: launches, bytes moved and peak memory to plain"
    assert [line[:30].strip() for line in lines[1:5]] == [
        "plain",
        "lowprec w4a8_n4, operators",
        "lowprec w4a8_n4, kernels",
        "lowprec w4a8_n4, codes kept",
    ]
    moved, held = ([float(line[30:].split("x")[column].split()[-1]) for line in lines[1:5]] for column in (1, 2))
    assert moved[1] > 2 * moved[2] > 2 * moved[0] - 0.2
    assert moved[1] > 2 * moved[3] > 2 * moved[2]
    assert held[3] < held[2]
    assert held[0] == 1
