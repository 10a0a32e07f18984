"""Fake-quant, integer executor and ONNX Runtime give the same codes: random networks, timm's, other CPUs' kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from networks import TinyTransformer, awkward, images, quantize, random_network, random_recipe
from torch import nn

import lowprec
from lowprec.integer.operators import OPERATORS, IntegerLayer, IntegerMovement
from lowprec.recipe import Recipe, WeightScheme
from lowprec.verify import FAKE_QUANT, FAST, ONNX, VerificationReport

RECIPES = ("w2a8_n4", "w2a8_n64", "w4a8_n4", "w8a8")


def verified(model: nn.Module, recipe: Recipe | str, shape: tuple[int, int, int], folder: Path) -> VerificationReport:
    """All three implementations on images that calibration has not seen."""
    qmodel, imodel = quantize(model, recipe, images(1, 8, shape))
    file = folder / "model.onnx"
    lowprec.export_onnx(imodel, file)
    batches = [images(2, 5, shape), (images(3, 3, shape), torch.zeros(3))]
    report = lowprec.verify(qmodel, imodel, batches, onnx=file)
    # Nothing was left out: every step, in both comparisons, with as many codes as its tensor has. Only of a movement that
    # takes several steps does the fake-quant model know the last alone.
    assert [(c.tensor, c.against) for c in report.comparisons] == [
        (step.name, against)
        for step in imodel.steps
        for against in (FAKE_QUANT, FAST, ONNX)
        if not (against == FAKE_QUANT and isinstance(step.operator, IntegerMovement) and step.name.endswith(".sliced"))
    ]
    tensors = imodel.codes(images(2, 8, shape))
    assert [c.compared for c in report.comparisons] == [tensors[c.tensor].numel() for c in report.comparisons]
    return report


@pytest.mark.parametrize("seed", range(24))
def test_random_networks_agree_in_every_code(seed: int, tmp_path: Path) -> None:
    report = verified(random_network(seed), random_recipe(seed), (3, 17, 14), tmp_path)
    assert report.mismatched_codes == 0, report


@pytest.mark.parametrize("recipe", RECIPES)
def test_random_networks_agree_with_every_shipped_recipe(recipe: str, tmp_path: Path) -> None:
    report = verified(random_network(101), recipe, (3, 17, 14), tmp_path)
    assert report.mismatched_codes == 0, report


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "recipe", "side"),
    [
        ("resnet18", "w2a8_n4", 48),
        ("resnet50d", "w2a8_n64", 32),
        ("efficientnet_lite0", "w4a8_n4", 48),
    ],
)
def test_timm_models_agree_in_every_code(name: str, recipe: str, side: int, tmp_path: Path) -> None:
    model = awkward(timm.create_model(name, num_classes=7), seed=4, dead_channels=name == "efficientnet_lite0")
    report = verified(model, recipe, (3, side, side), tmp_path)
    assert report.mismatched_codes == 0, report


class WideLayers(nn.Sequential):
    """Sums of the second convolution may leave float32's exact integers."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 128, 3), nn.ReLU(), nn.Conv2d(128, 4, 5), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 5)
        )


@pytest.mark.parametrize("bits", [4, 8])
def test_wide_layers_agree_in_float64(bits: int, tmp_path: Path) -> None:
    model = awkward(WideLayers(), seed=6, dead_channels=False)
    with torch.no_grad():
        model[2].weight.copy_(model[2].weight.sign() * 0.7)
    report = verified(model, Recipe(weights=WeightScheme(bits=bits)), (3, 14, 14), tmp_path)
    assert report.fake_quant_dtype == "float64"
    assert report.mismatched_codes == 0, report


def test_bounded_sums_are_compared_in_float32(tmp_path: Path) -> None:
    report = verified(random_network(0), "w2a8_n4", (3, 17, 14), tmp_path)
    assert report.fake_quant_dtype == "float32"


def test_the_networks_drawn_hold_every_operator() -> None:
    """Else the tests above would prove less than they say."""
    kinds, layers, sixes, shortcuts = set(), set(), 0, 0
    for seed in range(24):
        _, imodel = quantize(random_network(seed), random_recipe(seed), images(seed, 2))
        for step in imodel.steps:
            kinds.add(step.operator.KIND)
            sixes += getattr(step.operator, "six", None) is not None
            if isinstance(step.operator, IntegerLayer):
                shortcuts += step.operator.shortcut is not None
                layers.add((step.operator.bits, step.operator.layout.kind))
                assert step.operator.sum_bound < 1 << 31
    _, transformer = quantize(TinyTransformer().eval(), "w2a8_n4", images(0, 2, (3, 8, 8)))
    assert kinds | {step.operator.KIND for step in transformer.steps} == set(OPERATORS)
    assert sixes > 0
    assert shortcuts > 0
    assert {(2, "kernel"), (2, "element"), (4, "kernel"), (4, "element")} <= layers
    assert {bits for bits, _ in layers} == {2, 4, 8}


IN_ANOTHER_PROCESS = """
from networks import images, quantize, random_network, random_recipe
import lowprec, sys, torch
assert "AVX2" in torch.backends.cpu.get_cpu_capability(), torch.backends.cpu.get_cpu_capability()
compared = 0
for seed in range(200, 204):
    qmodel, imodel = quantize(random_network(seed), random_recipe(seed), images(seed))
    lowprec.export_onnx(imodel, sys.argv[1])
    report = lowprec.verify(qmodel, imodel, [images(seed + 1)], onnx=sys.argv[1])
    report.raise_if_different()
    compared += report.compared_codes
print(compared)
"""


@pytest.mark.slow
def test_random_networks_agree_with_avx2_kernels(tmp_path: Path) -> None:
    tests = str(Path(__file__).parents[1])
    environment = {
        **os.environ,
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "PYTHONPATH": os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS, str(tmp_path / "model.onnx")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10_000
