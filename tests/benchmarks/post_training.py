r"""What reconstruction is worth without any training: top-1 of weights as solved, and of weights fitted to outputs.

    python tests/benchmarks/post_training.py [OVERRIDE …]

The overrides are train.py's, for the model, its baseline (trained first where it is not there yet, kept in runs/baselines)
and the data; the default is the ResNet-8 of the default run. Each recipe once as it is and once with an 8-bit classifier.
Prints points of test top-1 lost against full precision, and seconds. Calibration takes calibration.images.

    python tests/benchmarks/post_training.py model=cifar_resnet20 model.arguments.stem_stride=2 baseline.max_epochs=45
    python tests/benchmarks/post_training.py 'model.arguments={width: 8, stem_stride: 2}' baseline.max_epochs=16
    python tests/benchmarks/post_training.py model=cifar_mobilenetv2
    python tests/benchmarks/post_training.py model=vit_small_images baseline.max_epochs=6 baseline.optim.name=adamw \
        baseline.optim.learning_rate=1e-3
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

import lowprec
from lowprec.recipe import Recipe, Rule
from lowprec.run.compose import compose_run
from lowprec.run.data import run_data
from lowprec.run.full_precision import full_precision_model
from lowprec.training.evaluation import top1

CONFIGS = Path(__file__).parents[2] / "conf"
RECIPES = ("w2a8_n4", "w2a8_n64", "w4a8_n4")
METHODS = {"as solved": lowprec.calibrate, "reconstructed": lowprec.reconstruct}


def recipes() -> list[tuple[str, Recipe]]:
    """Each recipe as it is, and with an 8-bit classifier."""
    found = []
    for name in RECIPES:
        found.append((name, Recipe.load(name)))
        eight = Recipe.load(name)
        eight.rules.append(Rule("@classifier", bits=8))
        found.append((f"{name}, 8-bit classifier", eight))
    return found


def measured(
    model: nn.Module, recipe: Recipe, method: str, images: list[Tensor], test: list[tuple[Tensor, Tensor]]
) -> tuple[float, float]:
    """Test top-1 of the quantized model, and the seconds of the method."""
    qmodel = lowprec.prepare(model, recipe, torch.zeros(2, *images[0].shape[1:]))
    started = time.monotonic()
    METHODS[method](qmodel, images)
    seconds = time.monotonic() - started
    return top1(qmodel, test), seconds


def main(overrides: list[str]) -> None:
    config = compose_run(["experiment=custom", "data=fashion_mnist", "model=cifar_resnet8", *overrides], CONFIGS)
    if config.trainer.threads is not None:
        torch.set_num_threads(config.trainer.threads)
    data = run_data(config)
    model = full_precision_model(config, data, Console())
    images, test = data.calibration_batches(config.calibration.images), list(data.test_dataloader())
    reference = top1(model, test)
    print(f"{config.model.name} {config.model.arguments}, {config.data.name}: full precision {reference:.2%}")
    print(f"{'points lost':30}" + "".join(f"{method:>24}" for method in METHODS), flush=True)
    for name, recipe in recipes():
        cells = []
        for method in METHODS:
            accuracy, seconds = measured(model, recipe, method, images, test)
            cells.append(f"{100 * (reference - accuracy):>16.2f} {seconds:5.1f} s")
        print(f"{name:30}" + "".join(cells), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
